"""Muon for the matrices, AdamW for the rest, beside PyTorch's own."""
import pytest
import torch
import torch.nn as nn

from lab.muon import MuonAndAdamW
from minq.training import parameter_groups, set_lr
from small import small


def model():
    return small(width=16, ffn=24, init_std=0.2, attention="gated", gate="all-heads")


def make(bert):
    return MuonAndAdamW(bert, parameter_groups(bert, 0.1), lr=0.01, betas=(0.9, 0.95))


def give_gradients(bert, seed=0):
    torch.manual_seed(seed)
    for p in bert.parameters():
        p.grad = torch.randn_like(p)


def test_it_moves_the_linears_of_the_blocks_as_pytorchs_muon_and_all_else_as_its_adamw():
    """Bit by bit; W_q, W_k and W_v, which are stacked, as three matrices."""
    ours, theirs = model(), model()
    parts = {f"layers.{i}.{name}.weight": n for i in (0, 1) for name, n in (
        ("attention.qkv", 3), ("attention.proj", 1), ("ffn_up", 1), ("ffn_down", 1))}
    whole = {name: theirs.get_parameter(name) for name in parts}
    alone = {name: list(map(nn.Parameter, p.detach().chunk(parts[name])))  # in the same memory
             for name, p in whole.items()}
    optimizers = [
        make(ours), torch.optim.AdamW(parameter_groups(theirs, 0.1), betas=(0.9, 0.95), fused=True),
        torch.optim.Muon(sum(alone.values(), []), weight_decay=0.1, adjust_lr_fn="match_rms_adamw")]
    for step in range(3):
        give_gradients(ours, step)
        give_gradients(theirs, step)
        for name, p in whole.items():
            for part, gradient in zip(alone[name], p.grad.chunk(parts[name])):
                part.grad = gradient
            p.grad = None  # AdamW leaves it alone
        for optimizer in optimizers:
            set_lr(optimizer, 0.01 / (step + 1))
            optimizer.step()
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters()):
        assert torch.equal(p, q) and p.grad is not None, name


@pytest.mark.parametrize("name", ["layers.1.ffn_up.weight", "token_embedding.weight"])
def test_a_scaler_unscales_all_gradients_and_skips_a_step_that_overflowed(name):
    bert = model()
    optimizer, scaler = make(bert), torch.amp.GradScaler("cpu", init_scale=8.0)
    before = [p.detach().clone() for p in bert.parameters()]
    scaler.scale(torch.zeros(()))  # makes its scale
    for overflow, unscaled in ((True, True), (True, False), (False, True), (False, False)):
        give_gradients(bert)
        expected = [p.grad / scaler.get_scale() for p in bert.parameters()]
        if overflow:
            bert.get_parameter(name).grad[0, 0] = torch.inf
        if unscaled:  # as the scripts do, to clip; without, `step` does it
            scaler.unscale_(optimizer)
            assert overflow or all(map(torch.equal, (p.grad for p in bert.parameters()), expected))
        scaler.step(optimizer)
        scaler.update()
        assert all(torch.equal(p, q) for p, q in zip(bert.parameters(), before)) == overflow
