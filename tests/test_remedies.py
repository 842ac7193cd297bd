"""Each remedy is its formula written out, and the plain quantizer where it has nothing to do."""
import json
import math
from functools import partial

import pytest
import torch

from lab import remedies
from lab.remedies import REMEDIES, Groups, OutlierColumns, PerToken, Rotated, SinkInFloat, smooth
from minq.attention import ATTENTIONS
from minq.model import FAMILIES
from minq.quant import ActivationQuantizer, affine_parameters, calibrating, quantize_model
from running import SMALL, run
from small import inputs
from small import small as tiny


def activation(seed=0, outlier=50.0):
    """(3, 7, 12) standard normal values, and one outlier per sample: dimension 5 of token 2."""
    x = torch.randn(3, 7, 12, generator=torch.Generator().manual_seed(seed))
    x[:, 2, 5] = outlier
    return x


def calibrated(make, *batches):
    quantizer = make(8, "running")
    with calibrating(quantizer):
        for x in batches:
            quantizer(x)
    return quantizer


def by_torch(x, low, high):
    """PyTorch's own kernel on the grid from low to high."""
    scale, zero_point = affine_parameters(low, high, 8)
    return torch.fake_quantize_per_tensor_affine(x, scale.item(), int(zero_point), 0, 255)


BATCHES, X = [activation(seed) for seed in range(3)], activation(9)
PLAIN = calibrated(ActivationQuantizer, *BATCHES)(X)
close = partial(torch.testing.assert_close, rtol=0)


def test_per_token_is_a_loop_over_tokens():
    found = calibrated(PerToken, *BATCHES)(X)
    for token, row in zip(X.flatten(0, 1), found.flatten(0, 1)):
        assert torch.equal(row, by_torch(token, token.min(), token.max()))


def test_outlier_columns_stay_as_they_are_and_leave_the_range():
    quantizer = calibrated(OutlierColumns, *BATCHES)
    assert quantizer.columns.nonzero().flatten().tolist() == [5]
    found, rest = quantizer(X), [i for i in range(12) if i != 5]
    assert torch.equal(found[..., 5], X[..., 5])
    low, high = torch.aminmax(BATCHES[0][..., rest])
    for x in BATCHES[1:]:
        new = torch.aminmax(x[..., rest])
        low, high = 0.9 * low + 0.1 * new.min, 0.9 * high + 0.1 * new.max
    close(found[..., rest], by_torch(X[..., rest], low, high), atol=1e-6)
    calm = activation(outlier=2.0)
    assert calibrated(OutlierColumns, X, calm).columns.sum() == 1  # it stays one
    plain, found = (calibrated(kind, calm)(X) for kind in (ActivationQuantizer, OutlierColumns))
    assert torch.equal(found, plain)
    assert torch.equal(calibrated(OutlierColumns, X + 60)(X), X)  # all are: nothing is left


@pytest.mark.parametrize("permute", [False, True])
def test_one_group_is_per_tensor_and_as_many_as_dimensions_per_channel(permute):
    close(calibrated(partial(Groups, K=1, permute=permute), *BATCHES)(X), PLAIN, atol=1e-6)
    for K in (12, 13):  # more groups than dimensions are as many
        found = calibrated(partial(Groups, K=K, permute=permute), BATCHES[0])(X)
        for column, expected in enumerate(X.unbind(-1)):
            span = torch.aminmax(BATCHES[0][..., column])
            assert torch.equal(found[..., column], by_torch(expected, *span))


def test_groups_by_range_keep_wide_dimensions_together():
    x = activation(outlier=0.0) * torch.tensor([1.0, 100.0] * 6)  # every other dimension is wide
    quantizer, plain = (calibrated(partial(Groups, K=2, permute=p), x) for p in (True, False))
    assert [{int(i) % 2 for i in group} for group in quantizer.groups] == [{0}, {1}]
    error, worse = ((q(x) - x)[..., ::2].square().mean() for q in (quantizer, plain))
    assert error < worse / 400


@pytest.mark.parametrize("d, flat", [
    *((d, True) for d in (1, 2, 4, 12, 20, 64, 96, 192, 384, 768, 1536)),
    *((d, False) for d in (3, 6, 7, 18, 36))])
def test_the_rotation_is_orthogonal_and_flat(d, flat):
    H = remedies.hadamard(d)
    close(H @ H.T, torch.eye(d), atol=2e-5)
    assert H.abs().max() <= math.sqrt(2 / d) + 1e-6  # of M there is that share left
    if flat:
        close(H.abs(), torch.full((d, d), 1 / math.sqrt(d)), atol=1e-6)


def test_rotation_is_its_formula_and_by_the_identity_plain(monkeypatch):
    found, H = calibrated(Rotated, BATCHES[0])(X), remedies.hadamard(12)
    low, high = torch.aminmax(BATCHES[0] @ H)
    close(found, by_torch(X @ H, low, high) @ H.T, atol=1e-5)
    monkeypatch.setattr(remedies, "hadamard", torch.eye)
    assert torch.equal(calibrated(Rotated, *BATCHES)(X), PLAIN)


def test_the_start_token_skips_the_quantizer_and_its_range():
    first, x = BATCHES[0].roll(-2, dims=1), X.roll(-2, dims=1)  # the outlier is at position 0
    found = calibrated(SinkInFloat, first)(x)
    assert torch.equal(found[:, 0], x[:, 0])
    assert torch.equal(found[:, 1:], by_torch(x[:, 1:], *torch.aminmax(first[:, 1:])))
    queries = torch.randn(2, 4, 7, 3)  # (B, H, T, d_head): tokens are the last dimension but one
    moved = (calibrated(SinkInFloat, queries)(queries) != queries).any(dim=-1)
    assert not moved[:, :, 0].any() and moved[:, :, 1:].all()


@pytest.mark.parametrize("kind", [PerToken, OutlierColumns, Groups, Rotated, SinkInFloat])
def test_a_vector_per_sample_is_quantized(kind):
    """A ViT's final norm sees [CLS] alone: (B, d)."""
    x = torch.randn(5, 12)
    assert 0 < (calibrated(kind, x)(x) - x).abs().max() < 0.05


# ---- SmoothQuant ----

def small(family, **settings):
    model = tiny(family, ffn=128, **settings).eval()
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)  # norms away from their first values
    return model, (inputs(family, n=3),)


KINDS = [{"attention": name, "alpha": 1.0} for name in ATTENTIONS] + [
    {"attention": "gated", "gate": gate} for gate in ("mlp", "all-heads")]


@pytest.mark.parametrize("settings", KINDS, ids=str)
@torch.no_grad()
def test_smoothing_leaves_the_floating_point_output(settings):
    model, inputs = small("opt", **settings)
    smoothed = smooth(model, [inputs])
    torch.testing.assert_close(smoothed(*inputs), model(*inputs), rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_smoothing_is_its_formula():
    model, inputs = small("vit")
    block, seen = model.layers[1], []
    block.norm2.register_forward_hook(lambda m, args, x: seen.append(x))
    smoothed = smooth(model, [inputs, (-inputs[0],)], alpha=0.25).layers[1]
    W, largest = block.ffn_up.weight, torch.cat(seen).abs().amax(dim=(0, 1))
    s = torch.stack([largest[j] ** 0.25 / W[:, j].abs().max() ** 0.75 for j in range(32)])
    torch.testing.assert_close(smoothed.norm2.weight, block.norm2.weight / s)
    torch.testing.assert_close(smoothed.norm2.bias, block.norm2.bias / s)
    torch.testing.assert_close(smoothed.ffn_up.weight, W * s)


@torch.no_grad()
def test_a_clamp_ends_the_range_of_its_quantizer():
    model, inputs = small("opt")
    known = remedies.limits(model, [inputs], "ffn_output", 1.0)
    quantized = quantize_model(remedies.clamped(model, [inputs], sigma=1.0))
    with calibrating(quantized):
        quantized(*inputs)
    low, high, _ = known[1]  # layer 1, whose input is not clamped
    seen = quantized.layers[0].ffn_output_tap.after_tap.range
    assert seen.low == low and seen.high == high


# ---- by name ----

@pytest.mark.parametrize("name", REMEDIES)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_every_remedy_is_near_floating_point_at_sixteen_bits(name, family):
    model, inputs = small(family)
    remedied = REMEDIES[name](model, 16, [inputs])
    if name == "SmoothQuant" and family == "bert":  # nor is there a gain in RMSNorm
        assert remedied is None and smooth(small("opt", norm="rmsnorm")[0], [inputs]) is None
        return
    with calibrating(remedied):
        remedied(*inputs)
    torch.testing.assert_close(remedied(*inputs), model(*inputs), rtol=0.05, atol=0.05)


@pytest.mark.slow
def test_the_table(corpus, tmp_path):
    run("train_bert.py", *SMALL, "--data", corpus, "--out", tmp_path / "run")
    command = ["--seeds", 2, "--batches", 1, "--bits", 8, 4, "--json", tmp_path / "x.json"]
    out, _ = run("lab.remedies", tmp_path / "run", *command)
    (row,) = json.loads((tmp_path / "x.json").read_text())
    assert [remedy["remedy"] for remedy in row["remedies"]] == list(REMEDIES)
    for remedy in row["remedies"]:
        found = remedy["quantized"]
        assert list(found) == ["8x8", "4x4"] * (remedy["remedy"] != "SmoothQuant")
        assert all(len(x["all"]) == len(x["sqnr"]["all"]) == 2 for x in found.values())
        assert f"| {remedy['remedy']} | {'' if found else '–'}" in out
    assert out.count("1 token") == 1 and " of " in row["remedies"][6]["floats"]
    run("quantize.py", tmp_path / "run", *command)
    (plain,) = json.loads((tmp_path / "x.json").read_text())
    assert row["remedies"][0]["quantized"]["8x8"]["all"] == plain["quantized"]["8x8"]["all"]
