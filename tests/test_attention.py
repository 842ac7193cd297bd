"""Clipped softmax, gates, attention and dropout against the paper's equations and Table 3."""
import math

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from minq.attention import GATES, Dropout, SelfAttention, clipped_softmax, mask_future
from minq.model import BertConfig

SCORES = 3 * torch.randn(2, 3, 5, 7, generator=torch.Generator().manual_seed(0))
X = torch.randn(2, 10, 32, generator=torch.Generator().manual_seed(0))


# ---- clipped softmax ----

def test_clipped_softmax_is_equation_4():
    assert torch.equal(clipped_softmax(SCORES, 0.0, 1.0), SCORES.softmax(-1))
    gamma, zeta, margin = -0.1, 1.2, 1e-6
    soft, p = SCORES.softmax(-1), clipped_softmax(SCORES, gamma, zeta)
    assert_close(p, torch.clip((zeta - gamma) * soft + gamma, 0, 1))
    low, high = -gamma / (zeta - gamma), (1 - gamma) / (zeta - gamma)  # sec. 4.1
    assert (p[soft < low - margin] == 0).all() and (p[soft > low + margin] > 0).all()
    assert (p[soft > high + margin] == 1).all() and (p[soft < high - margin] < 1).all()
    assert (p == 0).any() and (p == 1).any()
    for gamma in (0.0, -0.1):  # footnote 5: what is clipped gives no gradient, a plain softmax does
        x = torch.tensor([[4.0, 0.0, -1.0]], requires_grad=True)
        clipped_softmax(x, gamma)[0, 2].backward()
        assert ((x.grad == 0) == (gamma != 0)).all()


# ---- gates ----

TABLE_3 = {  # name -> parameters of H heads with d_head d and n hidden units; pi_hat of head h
    "linear": (lambda H, d, n: H * (d + 1), lambda g, x, own, h: own @ g.weight[h] + g.bias[h]),
    "mlp": (lambda H, d, n: H * (n * (d + 2) + 1), lambda g, x, own, h:
            F.relu(own @ g.weight1[h] + g.bias1[h]) @ g.weight2[h] + g.bias2[h]),
    "all-heads": (lambda H, d, n: H * (H * d + 1),
                  lambda g, x, own, h: x @ g.weight[h] + g.bias[h])}


@pytest.mark.parametrize("gate_init", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("name", GATES)
def test_gates_are_the_networks_of_table_3(name, gate_init):
    """Equations 6 and 7 with one small network per head. Weights start as nn.Linear's do; at zero
    input gate_init is the opening."""
    config = BertConfig(width=480, heads=6, gate=name, gate_hidden=70, gate_init=gate_init)
    gate, x, (count, pi_hat) = GATES[name](config), torch.randn(2, 4, 480), TABLE_3[name]
    assert sum(p.numel() for p in gate.parameters()) == count(6, 80, 70)
    for h in range(6):
        expected = pi_hat(gate, x, x[..., 80 * h:80 * h + 80], h).sigmoid()
        assert_close(gate(x, None)[:, h], expected)
    for weight in (p for key, p in gate.named_parameters() if "weight" in key):
        deviation = weight.shape[1] ** -0.5 / math.sqrt(3)  # uniform up to 1 / sqrt(fan-in)
        assert weight.abs().max() <= weight.shape[1] ** -0.5
        assert weight.std().item() == pytest.approx(deviation, rel=0.1)
    if name == "mlp":
        torch.nn.init.zeros_(gate.bias1)
    assert_close(gate(torch.zeros(1, 3, 480), None), torch.full((1, 6, 3), gate_init))


# ---- attention ----

def layer_with(**settings):
    torch.manual_seed(1)
    return SelfAttention(BertConfig(width=32, heads=4, seq_len=10, **settings))


@pytest.mark.parametrize("gate", GATES)
def test_attention_is_equation_5_written_out(gate):
    layer, heads = layer_with(attention="gated", gate=gate), []
    q, k, v = layer.qkv(X).chunk(3, dim=-1)
    for h in range(4):
        part = slice(8 * h, 8 * h + 8)
        probs = torch.softmax(q[..., part] @ k[..., part].mT / math.sqrt(8), dim=-1)
        heads.append(layer.gate(X, None)[:, h, :, None] * (probs @ v[..., part]))
    assert_close(layer(X), layer.proj(torch.cat(heads, dim=-1)))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", ["vanilla", "gated"])
def test_fused_training_equals_explicit_training_and_evaluation_is_explicit(name, causal):
    results, seen = [], []
    for fused in (False, True):
        layer, x = layer_with(attention=name, causal=causal, fused=fused), X.clone()
        layer.probs_tap.register_forward_hook(lambda *_: seen.append((fused, layer.training)))
        out = layer(x.requires_grad_())
        out.square().sum().backward()
        results.append((out, x.grad, layer.qkv.weight.grad))
    assert_close(*results, rtol=0, atol=1e-5)
    assert_close(layer.eval()(X), results[0][0])
    assert seen == [(False, True), (True, False)]


def test_a_closed_gate_and_a_clipped_row_are_no_ops():
    """What both methods are for: an update of exactly (or nearly) nothing."""
    clipped, gated = layer_with(attention="clipped", gamma=-0.5), layer_with(attention="gated")
    assert (clipped(0.1 * X) == clipped.proj.bias).all()  # rows are nearly even: all are clipped
    torch.nn.init.constant_(gated.gate.bias, -100.0)
    assert (gated(X) == gated.proj.bias).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_future_is_masked_with_finite_numbers(dtype):
    """A student's temperature, by which masked scores are multiplied, has a finite gradient."""
    masked = mask_future(torch.randn(2, 1, 3, 4).to(dtype))
    assert masked.isfinite().all() and masked.dtype == dtype
    visible = torch.tensor([[1, 0, 0, 1], [1, 1, 0, 1], [1, 1, 1, 1]])  # the last key is no token
    assert torch.equal(masked.softmax(-1) > 0, visible.bool().expand(2, 1, 3, 4))
    temperature = torch.tensor(2.0, dtype=dtype, requires_grad=True)
    (temperature * masked).softmax(-1).square().sum().backward()
    assert temperature.grad.isfinite() and temperature.grad != 0


@pytest.mark.parametrize("fused", [False, True])
def test_dropout_acts_on_the_probabilities_after_their_tap(fused):
    layer, seen = layer_with(dropout=0.5, fused=fused), []
    layer.probs_tap.register_forward_hook(lambda module, args, out: seen.append(out))
    assert not torch.equal(layer(X), layer(X))
    assert torch.equal(layer.eval()(X), layer(X))
    assert all(torch.equal(p, seen[0]) for p in seen) and len(seen) == (2 if fused else 4)
    assert_close(seen[0].sum(-1), torch.ones(2, 4, 10))


# ---- dropout ----

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout_zeroes_a_share_of_p_and_scales_the_rest(p, dtype):
    torch.manual_seed(0)
    x = torch.ones(401, 1001, dtype=dtype, requires_grad=True)
    y = Dropout(p)(x)
    y.sum().backward()
    kept, variance = round(2 ** 16 * (1 - p)) / 2 ** 16, p * (1 - p)
    assert abs((y != 0).float().mean() - kept) < 4 * (variance / x.numel()) ** 0.5
    assert set(y.unique().tolist()) == {0.0, torch.tensor(1 / kept, dtype=dtype).item()}
    assert torch.equal(x.grad, y.detach())
    y = (y != 0).float().flatten() - kept
    for shift in (1, 2, 3, 4, 1001):  # independent, also the four that come from one draw
        assert abs((y[shift:] * y[:-shift]).mean() / variance) < 0.0064  # four deviations


def test_dropout_follows_the_seed_and_rests_in_evaluation():
    draws = [torch.manual_seed(seed) and Dropout(0.4)(torch.ones(7, 9)) for seed in (3, 3, 4)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    assert Dropout(0.4).eval()(X) is X and Dropout(0.0)(X) is X
    assert Dropout(0.4)(X[:0]).shape == (0, 10, 32)
    assert Dropout(1 - 1e-9)(X).count_nonzero() <= 1  # finite, hardly anything kept
