"""Muon for the matrices, AdamW for the rest, behind one interface."""
import copy
import math

import pytest
import torch
import torch.nn as nn

from minq.attention import QKV
from minq.model import Bert, BertConfig
from minq.optimizers import OPTIMIZERS, Muon, MuonAndAdamW
from minq.training import parameter_groups, set_lr
from running import SMALL, assert_same_weights, logged, run, saved, stopped_at, torchrun


def model(**settings):
    torch.manual_seed(0)
    return Bert(BertConfig(layers=2, width=16, heads=4, ffn=24, seq_len=12, init_std=0.2, **settings))


def make(bert, lr=0.01):
    return MuonAndAdamW(bert, parameter_groups(bert, 0.1), lr=lr, betas=(0.9, 0.95))


def give_gradients(bert, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for p in bert.parameters():
        p.grad = torch.randn(p.shape, generator=generator)


def test_muon_has_the_linears_of_the_blocks_and_adamw_all_else_once():
    bert = model(attention="gated", gate="all-heads")
    names = {id(p): name for name, p in bert.named_parameters()}
    muon, adamw = ({names[id(p)] for group in each.param_groups for p in group["params"]} for each in make(bert).both)
    assert muon == {f"layers.{i}.{name}.weight" for i in (0, 1) for name in ("attention.qkv", "attention.proj", "ffn_up", "ffn_down")}
    assert adamw == set(names.values()) - muon and "token_embedding.weight" in adamw and "layers.0.attention.gate.weight" in adamw
    assert sum(len(group["params"]) for group in make(bert).param_groups) == len(names)


def orthogonal(x):
    """What Newton-Schulz aims at, by a singular value decomposition."""
    u, _, v = torch.linalg.svd(x, full_matrices=False)
    return u @ v


@pytest.mark.parametrize("stacked", [False, True])
def test_a_step_of_muon_is_nearly_orthogonal_times_the_learning_rate(stacked):
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(48, 16))
    spread = lambda rows: orthogonal(torch.randn(rows, 16)) * torch.linspace(0.5, 2, 16) @ orthogonal(torch.randn(16, 16))
    before, p.grad = p.detach().clone(), torch.cat([spread(16) for _ in range(3)]) if stacked else spread(48)
    Muon([{"params": [p], "parts": 3 if stacked else 1, "weight_decay": 0.1}], lr=0.02, adjust_lr_fn="match_rms_adamw").step()
    step = (before * (1 - 0.02 * 0.1) - p.detach()) / 0.02
    size = 16 if stacked else 48
    for part, gradient in zip(step.chunk(3) if stacked else [step], p.grad.chunk(3) if stacked else [p.grad]):
        part = part / (0.2 * math.sqrt(size))
        singular = torch.linalg.svdvals(part)
        assert (0.5 < singular).all() and (singular < 1.4).all()  # five steps do not converge, on purpose
        assert (part * orthogonal(gradient)).sum() / (part.norm() * orthogonal(gradient).norm()) > 0.95


def test_stacked_matrices_move_as_three_would_alone():
    torch.manual_seed(0)
    bert = model()
    optimizer = make(bert)
    weight = bert.layers[0].attention.qkv.weight
    alone = [nn.Parameter(part.clone()) for part in weight.detach().chunk(QKV.parts)]
    theirs = torch.optim.Muon(alone, lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for seed in range(3):
        give_gradients(bert, seed)
        for p, gradient in zip(alone, weight.grad.chunk(3)):
            p.grad = gradient.clone()
        optimizer.step()
        theirs.step()
    torch.testing.assert_close(weight.detach(), torch.cat([p.detach() for p in alone]))


def test_the_others_move_as_adamw_moves_them():
    ours, theirs = model(), model()
    optimizer, reference = make(ours), torch.optim.AdamW(parameter_groups(theirs, 0.1), lr=0.01, betas=(0.9, 0.95))
    for seed in range(3):
        give_gradients(ours, seed)
        give_gradients(theirs, seed)
        optimizer.step()
        reference.step()
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters()):
        in_a_block = name.startswith("layers.") and p.dim() == 2
        assert torch.allclose(p, q, atol=1e-6) != in_a_block, name


def test_its_state_is_kept_and_its_rate_set():
    bert, again = model(), model()
    optimizer, other = make(bert), make(again)
    give_gradients(bert)
    optimizer.step()
    again.load_state_dict(bert.state_dict())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for each, parameters in ((optimizer, bert), (other, again)):
        set_lr(each, 0.003)
        give_gradients(parameters, 1)
        each.step()
    assert all(torch.equal(p, q) for p, q in zip(bert.parameters(), again.parameters()))
    assert {group["lr"] for group in optimizer.param_groups} == {0.003}
    optimizer.zero_grad()
    assert all(p.grad is None for p in bert.parameters())


def test_a_scaler_unscales_all_gradients_and_skips_a_step_that_overflowed():
    bert = model()
    optimizer, scaler = make(bert), torch.amp.GradScaler("cpu", init_scale=8.0)
    before = [p.detach().clone() for p in bert.parameters()]
    scaler.scale(torch.zeros(()))  # makes its scale
    for overflow in (True, False):
        give_gradients(bert)
        expected = [p.grad / scaler.get_scale() for p in bert.parameters()]
        if overflow:
            bert.layers[1].ffn_up.weight.grad[0, 0] = torch.inf
        scaler.unscale_(optimizer)
        assert overflow or all(torch.equal(p.grad, g) for p, g in zip(bert.parameters(), expected))
        scaler.step(optimizer)
        scaler.update()
        assert all(torch.equal(p, q) for p, q in zip(bert.parameters(), before)) == overflow


# ---- through the scripts ----

def train(corpus, out, *more, code=0):
    return run("train_bert.py", *SMALL, "--data", corpus, "--optimizer", "muon", "--out", out, *more, code=code)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_killed_and_resumed_equals_uninterrupted(precision, corpus, tmp_path, monkeypatch):
    options = ["--save-every", "3", "--precision", precision, "--attention", "gated"]
    train(corpus, tmp_path / "whole", *options)
    with stopped_at(3, monkeypatch):
        train(corpus, tmp_path / "killed", *options)
    assert saved(tmp_path / "killed")["step"] == 3
    _, err = run("train_bert.py", "--resume", "--optimizer", "adamw", "--out", tmp_path / "killed", code=2)
    assert "--optimizer adamw differs from the run's muon" in err
    run("train_bert.py", "--resume", "--optimizer", "muon", "--out", tmp_path / "killed")
    assert_same_weights(tmp_path / "killed", tmp_path / "whole")
    assert logged(tmp_path / "killed") == logged(tmp_path / "whole")


def test_a_script_with_another_optimizer_is_refused(corpus, tmp_path, monkeypatch):
    with stopped_at(3, monkeypatch):
        train(corpus, tmp_path / "run", "--save-every", "3")
    monkeypatch.setitem(OPTIMIZERS, "muon", OPTIMIZERS["adamw"])
    _, err = run("train_bert.py", "--resume", "--out", tmp_path / "run", code=2)
    assert "the script's AdamW is not the run's optimizer; they differ in" in err and err.count("\n") == 1


@pytest.mark.slow
def test_two_processes_equal_one(corpus, tmp_path):
    train(corpus, tmp_path / "one", "--layers", 1)
    torchrun("train_bert.py", *SMALL, "--data", corpus, "--layers", "1", "--optimizer", "muon", "--out", tmp_path / "two")
    one = saved(tmp_path / "one")["model"]
    for name, value in saved(tmp_path / "two")["model"].items():  # Newton-Schulz rounds to bf16
        torch.testing.assert_close(value, one[name], rtol=1e-2, atol=2e-3)
