"""Each remedy against its formula written out, and against the plain quantizer where it has nothing to do."""
import copy
import json
import math
from functools import partial

import pytest
import torch

from minq.model import FAMILIES
from minq.quant import ActivationQuantizer, affine_parameters, calibrating
from minq.remedies import REMEDIES, Groups, OutlierColumns, PerToken, Rotated, SinkInFloat, hadamard, smooth
from running import SMALL, run


def activation(seed=0, outlier=50.0):
    """(3, 7, 12) of standard normal values with one outlier in each sample, in dimension 5 of token 2."""
    x = torch.randn(3, 7, 12, generator=torch.Generator().manual_seed(seed))
    x[:, 2, 5] = outlier
    return x


def calibrated(make, *batches, n_bits=8):
    quantizer = make(n_bits, "running")
    quantizer.estimating = True
    for x in batches:
        quantizer(x)
    quantizer.estimating = False
    return quantizer


def torch_quantized(x, low, high, n_bits=8):
    """PyTorch's own kernel on the grid from low to high."""
    scale, zero_point = affine_parameters(low, high, n_bits)
    return torch.fake_quantize_per_tensor_affine(x, scale.item(), int(zero_point), 0, 2 ** n_bits - 1)


BATCHES = [activation(seed) for seed in range(3)]
X = activation(9)
PLAIN = calibrated(ActivationQuantizer, *BATCHES)(X)


def test_per_token_is_a_loop_over_tokens():
    found = calibrated(PerToken, *BATCHES)(X)
    for sample, quantized in zip(X, found):
        for token, row in zip(sample, quantized):
            assert torch.equal(row, torch_quantized(token, token.min(), token.max()))
    error = lambda q: (q - X)[:, [0, 1, 3, 4, 5, 6]].square().mean().sqrt()
    assert error(found) < error(PLAIN) / 5  # the outlier spoils its own token only


def test_outlier_columns_stay_as_they_are_and_leave_the_range():
    quantizer = calibrated(OutlierColumns, *BATCHES)
    assert quantizer.columns.nonzero().flatten().tolist() == [5]
    found, rest = quantizer(X), [i for i in range(12) if i != 5]
    assert torch.equal(found[..., 5], X[..., 5])
    low, high = torch.tensor(0.0), torch.tensor(0.0)
    for i, x in enumerate(BATCHES):
        new = torch.aminmax(x[..., rest])
        low, high = new if i == 0 else (0.9 * low + 0.1 * new.min, 0.9 * high + 0.1 * new.max)
    torch.testing.assert_close(found[..., rest], torch_quantized(X[..., rest], low, high), atol=1e-6, rtol=0)


def test_no_outlier_column_is_plain():
    batches = [activation(seed, outlier=2.0).clamp(-5, 5) for seed in range(3)]
    assert torch.equal(calibrated(OutlierColumns, *batches)(batches[0]), calibrated(ActivationQuantizer, *batches)(batches[0]))


@pytest.mark.parametrize("permute", [False, True])
def test_one_group_is_per_tensor_and_as_many_as_dimensions_per_channel(permute):
    torch.testing.assert_close(calibrated(partial(Groups, K=1, permute=permute), *BATCHES)(X), PLAIN, atol=1e-6, rtol=0)
    found = calibrated(partial(Groups, K=12, permute=permute), BATCHES[0])(X)
    scale, zero_point = affine_parameters(BATCHES[0].amin((0, 1)), BATCHES[0].amax((0, 1)), 8)
    assert torch.equal(found, torch.fake_quantize_per_channel_affine(X, scale, zero_point.int(), 2, 0, 255))


def test_groups_by_range_keep_wide_dimensions_together():
    x = activation(outlier=0.0) * torch.tensor([1.0, 100.0] * 6)  # every other dimension is wide
    quantizer = calibrated(partial(Groups, K=2, permute=True), x)
    assert {int(i) % 2 for i in quantizer.groups[0]} == {0} and {int(i) % 2 for i in quantizer.groups[1]} == {1}
    narrow = lambda q: (q(x) - x)[..., ::2].square().mean().sqrt()
    assert narrow(quantizer) < narrow(calibrated(partial(Groups, K=2), x)) / 20


@pytest.mark.parametrize("d", [1, 2, 7, 12, 64, 96, 384])
def test_the_rotation_is_orthogonal_and_flat(d):
    H = hadamard(d)
    torch.testing.assert_close(H @ H.T, torch.eye(d), atol=1e-5, rtol=0)
    assert H.abs().max() <= math.sqrt(2 / d) + 1e-6  # one value of M becomes values of M sqrt(2 / d) at most
    if d & (d - 1) == 0:
        torch.testing.assert_close(H.abs(), torch.full((d, d), d ** -0.5))


def test_rotation_is_its_formula_and_by_the_identity_plain(monkeypatch):
    found, H = calibrated(Rotated, BATCHES[0])(X), hadamard(12)
    turned = BATCHES[0] @ H
    torch.testing.assert_close(found, torch_quantized(X @ H, turned.min(), turned.max()) @ H.T, atol=1e-5, rtol=0)
    monkeypatch.setattr(Rotated, "matrix", staticmethod(torch.eye))
    assert torch.equal(calibrated(Rotated, *BATCHES)(X), PLAIN)


def test_the_start_token_skips_the_quantizer_and_its_range():
    batches = [x.roll(-2, dims=1) for x in BATCHES]  # the outlier is at position 0
    x = X.roll(-2, dims=1)
    found = calibrated(SinkInFloat, batches[0])(x)
    assert torch.equal(found[:, 0], x[:, 0])
    assert torch.equal(found[:, 1:], torch_quantized(x[:, 1:], batches[0][:, 1:].min(), batches[0][:, 1:].max()))
    queries = torch.randn(2, 4, 7, 3)  # (B, H, T, d_head): tokens are the last dimension but one
    assert torch.equal(calibrated(SinkInFloat, queries)(queries)[:, :, 0], queries[:, :, 0])


@pytest.mark.parametrize("kind", [PerToken, OutlierColumns, Groups, Rotated, SinkInFloat])
def test_a_vector_a_sample_is_quantized(kind):
    """A ViT's final norm sees [CLS] alone: (B, d)."""
    x = torch.randn(5, 12)
    found = calibrated(kind, x)(x)
    assert 0 < (found - x).abs().max() < 0.05


# ---- SmoothQuant ----

def small(family, **settings):
    torch.manual_seed(0)
    build = FAMILIES[family]
    model = build(build.config_class(layers=2, width=32, heads=4, **settings)).eval()
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)  # norms away from their first values
    inputs = (torch.rand(3, 3, 32, 32),) if family == "vit" else (torch.randint(256, (3, 12)),)
    return model, inputs


@pytest.mark.parametrize("family", ["opt", "vit"])
@pytest.mark.parametrize("settings", [{}, {"attention": "gated"}, {"attention": "gated", "gate": "mlp"}, {"attention": "gated", "gate": "all-heads"}])
@torch.no_grad()
def test_smoothing_leaves_the_floating_point_output(family, settings):
    model, inputs = small(family, **settings)
    before, weight = model(*inputs), model.layers[0].ffn_up.weight.clone()
    torch.testing.assert_close(smooth(model, [inputs])(*inputs), before, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(model.layers[0].ffn_up.weight, weight)


@torch.no_grad()
def test_smoothing_is_its_formula():
    model, inputs = small("opt")
    block, seen = model.layers[1], []
    handle = block.norm2.register_forward_hook(lambda m, a, x: seen.append(x))
    model(*inputs)
    handle.remove()
    W, gamma, beta = block.ffn_up.weight.clone(), block.norm2.weight.clone(), block.norm2.bias.clone()
    s = torch.tensor([(seen[0][..., j].abs().max() ** 0.25 / W[:, j].abs().max() ** 0.75).item() for j in range(32)])
    smooth(model, [inputs], alpha=0.25)
    torch.testing.assert_close(block.norm2.weight, gamma / s)
    torch.testing.assert_close(block.norm2.bias, beta / s)
    torch.testing.assert_close(block.ffn_up.weight, W * s)


def test_a_post_ln_model_cannot_be_smoothed():
    model, inputs = small("bert")
    assert smooth(model, [inputs]) is None


# ---- by name ----

@pytest.mark.parametrize("name", REMEDIES)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_every_remedy_is_near_floating_point_at_sixteen_bits(name, family):
    model, inputs = small(family)
    remedied = REMEDIES[name](copy.deepcopy(model), 16, 16, [inputs])
    if remedied is None:
        return
    with calibrating(remedied):
        remedied(*inputs)
    torch.testing.assert_close(remedied(*inputs), model(*inputs), rtol=0.05, atol=0.05)


@pytest.mark.slow
def test_the_table(corpus, tmp_path):
    run("train_opt.py", *SMALL, "--data", corpus, "--out", tmp_path / "opt")
    out, _ = run("quantize.py", tmp_path / "opt", "--seeds", 2, "--batches", 1, "--remedies", "--bits", 8, 4, "--json", tmp_path / "table.json")
    (row,) = json.loads((tmp_path / "table.json").read_text())
    assert [remedy["remedy"] for remedy in row["remedies"]] == list(REMEDIES)
    for remedy in row["remedies"]:
        assert list(remedy["quantized"]) == ["8x8", "4x4"] and f"| {remedy['remedy']} |" in out
        assert {"mean", "std", "all", "sqnr"} <= remedy["quantized"]["8x8"].keys()
    assert row["remedies"][0]["quantized"]["8x8"]["all"] == row["quantized"]["8x8"]["all"]
    assert "1 token" in out and "of" in row["remedies"][4]["floats"]
