"""The cures since the paper: each against its formula in Python loops, an identity, and its limits.

That each trains and quantizes is in test_training.py."""
import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn as nn
from torch.testing import assert_close

from lab.cures import (ATTENTIONS, ExtraKey, LearnedSink, ReLUAttention, SigmoidAttention, Softmax1,
                       Softpick)
from lab.survey import survey
from minq.attention import SelfAttention
from minq.fake_quant import DynamicQuantizer, fake_quantize_training
from minq.model import BertConfig
from minq.quant import calibrating, quantize_model
from small import inputs, small

H, D, T = 4, 8, 10  # heads, d_head, tokens
EXTRA_PARAMETERS = {
    "softmax1": 0, "learned-sink": H, "sigmoid": 0, "relu": 0, "softpick": 0,
    "headwise-gate": H * D * H, "elementwise-gate": (H * D) ** 2, "value-gate": H * D * H,
    "k-bias": H * D, "kv-bias": 2 * H * D, "qk-norm": 2 * D, "row-clipped": 0}
ALWAYS = [name for name in EXTRA_PARAMETERS if name != "row-clipped"]  # it needs a causal model
X = torch.randn(2, T, H * D, generator=torch.Generator().manual_seed(0))
ALPHA, ZETA = 1.5, 1.02


def attention(name, causal=False):
    torch.manual_seed(1)
    layer = SelfAttention(BertConfig(width=H * D, heads=H, seq_len=T, causal=causal, alpha=ALPHA,
                                     zeta=ZETA, attention=name, norm_eps=1e-5))
    for p in layer.parameters():
        nn.init.normal_(p, std=0.3)  # what starts at 0 or 1 matters, too
    return layer


# ---- against the formulas, a query and a head at a time ----

def softmax(s, one=0.0):
    """exp(s_j) / (one + sum_k exp(s_k))"""
    return [math.exp(x) / (one + sum(map(math.exp, s))) for x in s]


def with_key(s, layer, h, q):
    return softmax(s, math.exp(q @ layer.prepare.k_bias[h, 0] / math.sqrt(D)))


def row_clipped(s, *_):
    gamma = -ALPHA / len(s)
    return [min(max((ZETA - gamma) * p + gamma, 0), 1) for p in softmax(s)]


PROBABILITIES = {  # of scores s in a row of head h, whose query is q
    "softmax1": lambda s, *_: softmax(s, 1),
    "learned-sink": lambda s, layer, h, q: softmax(s, math.exp(layer.softmax.sink[h])),
    "sigmoid": lambda s, *_: [1 / (1 + math.exp(-(x - math.log(T)))) for x in s],
    "relu": lambda s, *_: [max(x, 0) / len(s) for x in s],
    "softpick": lambda s, *_: [max(math.exp(x) - 1, 0) / sum(abs(math.exp(y) - 1) for y in s)
                               for x in s],
    "row-clipped": row_clipped, "k-bias": with_key, "kv-bias": with_key}
PI_HAT = {  # of head h, from a token's input x (width) and the values v (H, D) of all heads
    "headwise-gate": lambda weight, h, x, v: weight[h] @ x,
    "elementwise-gate": lambda weight, h, x, v: weight[h * D:h * D + D] @ x,
    "value-gate": lambda weight, h, x, v: weight[h] @ v.flatten()}


def by_loops(layer, name, x, causal):
    """The attention of one sequence x (T, width)."""
    q, k, v = layer.qkv(x).view(T, 3, H, D).unbind(1)
    if name == "qk-norm":
        q, k = (y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt() * gain
                for y, gain in zip((q, k), layer.prepare.parameters()))
    out = torch.zeros(T, H, D)
    for t, h in itertools.product(range(T), range(H)):
        s = [(q[t, h] @ key).item() / math.sqrt(D) for key in k[:t + 1 if causal else T, h]]
        p = PROBABILITIES[name](s, layer, h, q[t, h]) if name in PROBABILITIES else softmax(s)
        out[t, h] = sum(share * value for share, value in zip(p, v[:, h]))
        if name == "kv-bias":
            out[t, h] += (1 - sum(p)) * layer.prepare.v_bias[h, 0]
        if name in PI_HAT:
            out[t, h] *= PI_HAT[name](layer.gate.weight, h, x[t], v[t]).sigmoid()
    return layer.proj(out.flatten(1))


@pytest.mark.parametrize("name, causal", [
    *((name, causal) for name in ALWAYS for causal in (False, True)), ("row-clipped", True)])
@torch.no_grad()
def test_the_formula_in_loops(name, causal):
    layer = attention(name, causal)
    assert_close(layer(X)[0], by_loops(layer, name, X[0], causal), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ATTENTIONS)
def test_no_attention_looks_ahead_however_short_the_sequence_and_all_parameters_learn(name):
    layer, changed = attention(name, causal=True), torch.cat((X[:, :6], X[:, 6:] + 1), dim=1)
    assert_close(layer(X)[:, :6], layer(changed)[:, :6])
    assert_close(layer(X)[:, :6], layer(X[:, :6]))
    layer(X).square().sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in layer.parameters())
    extra = EXTRA_PARAMETERS | {"vanilla": 0, "clipped": 0, "gated": H * (D + 1)}
    counts = [sum(p.numel() for p in attention(x, True).parameters()) for x in ("vanilla", name)]
    assert counts[1] - counts[0] == extra[name]


# ---- identities ----

SCORES = 4 * torch.randn(2, H, T, T, generator=torch.Generator().manual_seed(2))


def test_limits_are_the_plain_softmax_or_nothing():
    sink = LearnedSink(H)
    assert_close(sink(SCORES), Softmax1()(SCORES))
    nn.init.constant_(sink.sink, -torch.inf)
    assert torch.equal(sink(SCORES), SCORES.softmax(-1))
    s = torch.tensor([[-90, -95], [0, 1], [80, 85], [300, 299]], dtype=torch.float64)
    expected = s.exp() / (1 + s.exp().sum(-1, keepdim=True))
    assert_close(Softmax1()(s.float()).double(), expected, rtol=1e-5, atol=1e-45)
    assert_close(Softpick()(SCORES + 100), SCORES.softmax(-1))
    assert (Softpick()(-SCORES.abs() - 0.1) == 0).all()
    rows = SigmoidAttention(1000)(torch.zeros(1, 1, 1, 1000)).sum(-1)  # what log T is for
    assert rows.item() == pytest.approx(1, abs=2e-3)


@pytest.mark.parametrize("causal", [False, True])
def test_an_extra_key_and_value_equal_pytorchs_own(causal):
    """nn.MultiheadAttention's add_bias_kv is this cure."""
    layer = attention("kv-bias", causal)
    theirs = nn.MultiheadAttention(H * D, H, add_bias_kv=True, batch_first=True)
    for parameter, ours in zip(theirs.parameters(), layer.parameters()):
        parameter.data = ours.data.view_as(parameter)
    future = torch.ones(T, T, dtype=torch.bool).triu(1) if causal else None
    assert_close(layer(X), theirs(X, X, X, attn_mask=future, need_weights=False)[0])


ROWS = torch.tensor([[0.0, 0.0, torch.nan], [200.0, 90.0, 1.0], [-200.0, -90.0, -300.0],
                     [5.0, torch.nan, torch.nan], [-1e-9, 1e-9, 0.0]]).view(1, 1, 5, 3)


@pytest.mark.parametrize("softmax", [Softmax1(), LearnedSink(1), SigmoidAttention(3),
                                     ReLUAttention(), Softpick()], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masked_and_extreme_rows_give_finite_probabilities_and_gradients(softmax, dtype):
    masked = ROWS.isnan()
    scores = ROWS.nan_to_num(nan=torch.finfo(dtype).min).to(dtype).requires_grad_()
    p = softmax(scores)
    (p * torch.tensor([1.0, -2.0, 3.0])).sum().backward()
    for x in (p, scores.grad, *(parameter.grad for parameter in softmax.parameters())):
        assert x.isfinite().all()
    assert (p >= 0).all() and (p[masked] == 0).all() and (scores.grad[masked] == 0).all()


def test_rmsnorm_has_no_gain_and_an_extra_key_starts_as_its_authors_do():
    model, x = small("opt", norm="rmsnorm"), torch.randn(2, 3, 32)
    assert not any("norm" in name for name, _ in model.named_parameters())
    assert_close(model.final_norm(x), x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt())
    assert ExtraKey(256 * 64, 256, True).k_bias.std().item() == pytest.approx(0.02, rel=0.05)


# ---- quantized and fake-quantized ----

@pytest.mark.parametrize("name", EXTRA_PARAMETERS)
def test_every_tap_is_quantized_and_gates_and_sinks_are_not(name):
    model = small("opt", attention=name, init_std=0.2, alpha=ALPHA)
    if name == "kv-bias":  # the extra key shares the grid of the others
        nn.init.constant_(model.layers[0].attention.prepare.k_bias, 50.0)
    with calibrating(quantized := quantize_model(model)):
        quantized(inputs())
    inner = quantized.layers[0].attention
    taps = [m for path, m in inner.named_children() if path.endswith("_tap")]
    assert len(taps) == 7 and all(tap.scale.isfinite() for tap in taps)
    assert (inner.keys_tap.range.high == 50) == (name == "kv-bias")
    touched = {path for path, m in inner.named_modules() if hasattr(m, "weight_grid")}
    gains = {"prepare.queries_norm", "prepare.keys_norm"} if name == "qk-norm" else set()
    assert touched == {"qkv", "proj"} | gains  # a norm's gain is a weight

    exact = model(inputs())
    assert_close(fake_quantize_training(model, 16, 16)(inputs()), exact, rtol=0.02, atol=0.02)
    assert isinstance(model.layers[0].attention.keys_tap, DynamicQuantizer)


# ---- looked at ----

@torch.no_grad()
def surveyed(model, family="opt"):
    x = inputs(family)
    return survey(model.eval(), [((x,), x)], torch.device("cpu"), "layer_output",
                  None if family == "vit" else 260)


@pytest.mark.parametrize("family", ["opt", "vit"])
@pytest.mark.parametrize("name", ALWAYS)
def test_heads_and_gates_are_measured(name, family):
    model, pi = small(family, attention=name, init_std=0.2), []
    if gated := name.endswith("-gate"):
        model.layers[0].attention.gate.register_forward_hook(lambda m, args, out: pi.append(out))
    heads = surveyed(model, family)["heads"]
    assert all(((0 <= heads[key]) & (heads[key] <= 1.001)).all() for key in ("zeros", "ones"))
    assert all(x.shape == (2, 4) and np.isfinite(x).all() for x in heads.values())
    assert ("pi" in heads) == gated
    if gated:  # a mean over samples, tokens and, of an elementwise gate, dimensions
        assert_close(torch.tensor(heads["pi"][0]), pi[0].transpose(0, 1).flatten(1).mean(1))


def test_a_key_that_is_no_token_is_not_measured():
    """Neither as a sink nor as a value, whatever the size of its learned value."""
    model, found = small("opt", attention="kv-bias", init_std=0.2), []
    for size in (0.0, 1000.0):
        for layer in (layer.attention for layer in model.layers):
            layer.qkv.weight.data[:32], layer.qkv.bias.data[:32] = 0.0, 1.0  # all queries are 1
            layer.prepare.k_bias.data[:], layer.prepare.v_bias.data[:] = -20.0, size  # not seen
        found.append({key: torch.tensor(x) for key, x in surveyed(model)["heads"].items()})
    assert_close(*found)
