"""Clipped softmax and gates against the paper's equations and Table 3."""
import math

import pytest
import torch
import torch.nn.functional as F

from minq.attention import GATES, ClippedSoftmax, RowClippedSoftmax, SelfAttention, Tap, clipped_softmax
from minq.dropout import Dropout
from minq.model import BertConfig

torch.manual_seed(0)
X = torch.randn(2, 3, 5, 7) * 3


def test_vanilla_is_clipped_softmax_without_stretch():
    assert torch.equal(clipped_softmax(X, 0.0, 1.0), X.softmax(-1))


def test_clipped_softmax_is_equation_4():
    p = clipped_softmax(X, gamma=-0.03, zeta=1.03)
    expected = torch.clip((1.03 + 0.03) * F.softmax(X, dim=-1) - 0.03, 0, 1)
    torch.testing.assert_close(p, expected)


def test_values_beyond_the_thresholds_become_exact_zeros_and_ones():
    gamma, zeta = -0.1, 1.2
    soft, p = X.softmax(-1), clipped_softmax(X, gamma, zeta)
    low, high = -gamma / (zeta - gamma), (1 - gamma) / (zeta - gamma)  # sec. 4.1
    margin = 1e-6
    assert (p[soft < low - margin] == 0).all() and (p[soft > low + margin] > 0).all()
    assert (p[soft > high + margin] == 1).all() and (p[soft < high - margin] < 1).all()
    assert (p == 0).any() and (p == 1).any()


def test_gamma_per_row_equals_a_loop_over_causal_rows():
    scores = (3 * torch.randn(2, 6, 6)).masked_fill(torch.ones(6, 6).triu(1).bool(), -torch.inf)
    p = RowClippedSoftmax(alpha=1.5, zeta=1.02)(scores)
    for t in range(6):
        row = clipped_softmax(scores[:, t, :t + 1], gamma=-1.5 / (t + 1), zeta=1.02)
        torch.testing.assert_close(p[:, t, :t + 1], row)
        assert (p[:, t, t + 1:] == 0).all()


def test_clipped_values_give_no_gradient():
    """Footnote 5: a plain softmax always passes a gradient on; a clipped value never does."""
    x = torch.tensor([[4.0, 0.0, -1.0]], requires_grad=True)
    clipped_softmax(x, gamma=-0.1)[0, 2].backward()
    assert (x.grad == 0).all()
    x.grad = None
    clipped_softmax(x)[0, 2].backward()
    assert (x.grad != 0).all()


@pytest.mark.parametrize("gate, count", [
    ("linear", lambda H, d, n: H * (d + 1)),
    ("mlp", lambda H, d, n: H * (n * (d + 2) + 1)),
    ("all-heads", lambda H, d, n: H * (H * d + 1))])
def test_gates_have_the_parameters_of_table_3(gate, count):
    config = BertConfig(width=48, heads=6, gate=gate, gate_hidden=5)
    assert sum(p.numel() for p in GATES[gate](config).parameters()) == count(6, 8, 5)


@pytest.mark.parametrize("gate", GATES)
def test_gates_equal_a_loop_over_heads(gate):
    """Equations 6 and 7 with one small network per head."""
    config = BertConfig(width=12, heads=3, gate=gate, gate_hidden=5, gate_init=0.3)
    module, x = GATES[gate](config), torch.randn(2, 4, 12)
    for head in range(3):
        own = x[..., 4 * head:4 * head + 4]
        if gate == "linear":
            pi_hat = own @ module.weight[head] + module.bias[head]
        elif gate == "mlp":
            hidden = F.relu(own @ module.weight1[head] + module.bias1[head])
            pi_hat = hidden @ module.weight2[head] + module.bias2[head]
        else:
            pi_hat = x @ module.weight[head] + module.bias[head]
        torch.testing.assert_close(module(x)[:, head], torch.sigmoid(pi_hat))


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("gate_init", [0.1, 0.5, 0.9])
def test_gate_init_is_the_opening_at_zero_input(gate, gate_init):
    module = GATES[gate](BertConfig(gate=gate, gate_init=gate_init))
    if gate == "mlp":
        torch.nn.init.zeros_(module.bias1)
    torch.testing.assert_close(module(torch.zeros(1, 3, 128)), torch.full((1, 4, 3), gate_init))


def test_gate_weights_start_as_nn_linear_does():
    weight = GATES["linear"](BertConfig(width=4096, heads=4)).weight
    bound = 1 / math.sqrt(1024)
    assert weight.abs().max() <= bound and weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)


def attention(causal=False, **settings):
    torch.manual_seed(1)
    return SelfAttention(BertConfig(width=32, heads=4, seq_len=10, causal=causal, **settings))


@pytest.mark.parametrize("causal", [False, True])
def test_fused_and_explicit_attention_agree(causal):
    layer, x = attention(causal), torch.randn(2, 10, 32)
    assert layer.can_fuse(x)
    fused = layer(x)
    handle = layer.probs_tap.register_forward_hook(lambda *_: None)
    assert not layer.can_fuse(x)
    torch.testing.assert_close(layer(x), fused)
    handle.remove()
    assert layer.can_fuse(x)


@pytest.mark.parametrize("tap, fuses", [("scores_tap", False), ("probs_tap", False), ("my_tap", False), ("values_tap", True),
                                        ("attention_output_tap", True)])
def test_the_fused_kernel_gives_way_to_any_tap_that_it_would_skip(tap, fuses):
    layer, x = attention(), torch.randn(2, 10, 32)
    layer.my_tap = Tap()  # a student's own
    assert layer.can_fuse(x)
    getattr(layer, tap).register_forward_hook(lambda *_: None)
    assert layer.can_fuse(x) == fuses


class Tempered(torch.nn.Softmax):
    """A student's own, written as a kind of nn.Softmax."""

    def forward(self, scores):
        return super().forward(scores / 30)


@pytest.mark.parametrize("softmax", [Tempered(dim=-1), torch.nn.Softmax(dim=-2)])
def test_the_fused_kernel_serves_the_plain_softmax_only(softmax):
    layer, x = attention(), torch.randn(2, 10, 32)
    plain = layer(x)
    layer.softmax = softmax
    assert not layer.can_fuse(x) and not torch.allclose(layer(x), plain)


def test_attention_is_equation_5_written_out():
    layer, x = attention(attention="gated", gate="linear"), torch.randn(2, 10, 32)
    q, k, v = layer.qkv(x).chunk(3, dim=-1)
    heads = []
    for h in range(4):
        part = slice(8 * h, 8 * h + 8)
        probs = torch.softmax(q[..., part] @ k[..., part].mT / math.sqrt(8), dim=-1)
        heads.append(layer.gate(x)[:, h, :, None] * (probs @ v[..., part]))
    torch.testing.assert_close(layer(x), layer.proj(torch.cat(heads, dim=-1)))


def test_a_closed_gate_and_a_clipped_row_are_no_ops():
    """What both methods are for: an update of exactly (or nearly) nothing."""
    x = torch.randn(1, 10, 32)
    clipped = attention(attention="clipped", gamma=-0.5)  # nearly uniform rows: every probability is clipped
    assert (clipped(x) == clipped.proj.bias).all()
    gated = attention(attention="gated", gate="linear")
    torch.nn.init.constant_(gated.gate.bias, -100.0)
    assert (gated(x) == gated.proj.bias).all()


def test_causal_attention_never_looks_ahead():
    for settings in ({}, {"attention": "clipped", "gamma": -0.01}):
        layer, x = attention(causal=True, **settings), torch.randn(1, 10, 32)
        changed = x.clone()
        changed[:, 6:] += 1
        torch.testing.assert_close(layer(x)[:, :6], layer(changed)[:, :6])


def test_dropout_acts_on_the_probabilities_after_their_tap():
    layer, seen = attention(dropout=0.5).train(), []
    layer.probs_tap.register_forward_hook(lambda module, args, out: seen.append(out))
    x = torch.randn(1, 10, 32)
    first, second = layer(x), layer(x)
    torch.testing.assert_close(seen[0], seen[1])
    torch.testing.assert_close(seen[0].sum(-1), torch.ones(1, 4, 10))
    assert not torch.equal(first, second)


def test_the_softmax_is_a_module_that_shows_its_settings():
    assert "gamma=-0.03, zeta=1" in repr(ClippedSoftmax(-0.03))


# ---- dropout ----

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout_zeroes_a_share_of_p_and_scales_the_rest(p, dtype):
    torch.manual_seed(0)
    x = torch.ones(401, 1001, dtype=dtype, requires_grad=True)
    y = Dropout(p)(x)
    y.sum().backward()
    kept = round(2 ** 16 * (1 - p)) / 2 ** 16
    assert (y != 0).float().mean() == pytest.approx(kept, abs=4 * (p * (1 - p) / x.numel()) ** 0.5)  # four deviations
    assert set(y.unique().tolist()) == {0.0, torch.tensor(1 / kept, dtype=dtype).item()}
    assert torch.equal(x.grad, y.detach())


def test_dropouts_elements_are_independent():
    """Also the four that come from one draw, and rows."""
    torch.manual_seed(0)
    y = (Dropout(0.3)(torch.ones(1000, 1000)) != 0).float() - 0.7
    for shift in (1, 2, 3, 4, 1000):
        flat = y.flatten()
        assert abs((flat[shift:] * flat[:-shift]).mean() / 0.21) < 0.004  # four deviations


def test_dropout_follows_the_seed_and_rests_in_evaluation():
    x = torch.randn(7, 9)
    torch.manual_seed(3)
    first = Dropout(0.4)(x)
    torch.manual_seed(3)
    assert torch.equal(Dropout(0.4)(x), first)
    assert Dropout(0.4).eval()(x) is x and Dropout(0.0)(x) is x and Dropout(0.4)(x[:0]).shape == (0, 9)
    assert Dropout(1 - 1e-9)(x).count_nonzero() <= 1  # finite, hardly anything kept
