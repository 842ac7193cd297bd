"""The quantizer against PyTorch's own kernels and the paper's definitions."""
import copy
import functools
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from minq.attention import Tap
from minq.flags import UserError
from minq.model import FAMILIES
from minq.quant import (A_ESTIMATORS, W_ESTIMATORS, ActivationQuantizer, affine_parameters,
                        calibrating, fake_quantize, grid, mse_threshold, quantize,
                        quantize_model, quantize_weight)
from running import same
from small import inputs, small


# ---- eq. 1 ----

def test_per_tensor_equals_pytorch_bit_for_bit():
    """Multiplying by 1 / s, as PyTorch does, matters: dividing by s would differ."""
    differences = 0
    for seed in range(50):
        torch.manual_seed(seed)
        x = torch.randn(4000) * 10 ** torch.empty(1).uniform_(-3, 3)
        scale, zero = affine_parameters(x.min(), x.max(), 8)
        x = torch.cat((x, (torch.arange(-300, 300) + 0.5) * scale))  # exact half-steps
        expected = torch.fake_quantize_per_tensor_affine(x, scale, zero.int(), 0, 255)
        assert torch.equal(fake_quantize(x, scale, zero, 8), expected)
        divided = ((x / scale).round() + zero).clamp(0, 255)
        differences += (divided != quantize(x, scale, zero, 8)).sum()
    assert differences > 0


@pytest.mark.parametrize("n_bits", [2, 4, 8, 16])
def test_per_channel_equals_pytorch_bit_for_bit(n_bits):
    torch.manual_seed(n_bits)
    weight = torch.randn(30, 400) * torch.logspace(-3, 3, 30)[:, None]
    top = weight.abs().amax(1)
    scale, zero = affine_parameters(-top, top, n_bits, symmetric=True)
    weight = torch.cat((weight, (torch.arange(-200, 200) + 0.5) * scale[:, None]), dim=1)
    ends = grid(n_bits, symmetric=True)
    expected = torch.fake_quantize_per_channel_affine(weight, scale, zero.int(), 0, *ends)
    assert torch.equal(fake_quantize(weight, scale[:, None], zero[:, None], n_bits, True), expected)


@pytest.mark.parametrize("low, high, n_bits, symmetric, scale, zero_point", [
    (-1.0, 3.0, 8, False, 4 / 255, 64), (2.0, 4.0, 4, False, 4 / 15, 0),  # stretched to contain 0
    (-4.0, -2.0, 4, False, 4 / 15, 15), (-1.0, 0.5, 8, True, 1 / 127, 0)])
def test_affine_parameters_are_equation_1s(low, high, n_bits, symmetric, scale, zero_point):
    found = affine_parameters(torch.tensor(low), torch.tensor(high), n_bits, symmetric)
    assert [x.item() for x in found] == [pytest.approx(scale), zero_point]


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("x", [(0.0, 1.7, 2.9, 3.3, 5.0), (0.0, 0.0), (3.0, 3.0), (0.0, 1e-30),
                               (0.0, -1e30)])
def test_zero_is_exact_and_quantizing_twice_changes_nothing(x, symmetric):
    x = torch.tensor(x)
    found = *affine_parameters(x.min(), x.max(), 4, symmetric), 4, symmetric
    once = fake_quantize(x, *found)
    assert once[x == 0].eq(0).all() and torch.equal(fake_quantize(once, *found), once)
    assert (once - x).abs().max() <= found[0] * 0.5001


def test_arithmetic_is_float32_under_autocast():
    """bfloat16 has 8 significant bits: it cannot even hold the integers 0..511."""
    x = torch.linspace(-1, 1, 5000)
    on_grid = lambda y: fake_quantize(y, *affine_parameters(x.min(), x.max(), 12), 12)
    with torch.autocast("cpu", torch.bfloat16):
        inside = on_grid(x), on_grid(x.bfloat16())
    assert torch.equal(inside[0], on_grid(x)) and inside[1].dtype == torch.bfloat16
    assert torch.equal(inside[1], on_grid(x.bfloat16().float()).bfloat16())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("ends", [(0.0, 0.0), (-6e4, 6e4), (0.0, 1e-7), (-1.0, 3.0)])
def test_grids_of_half_precision_are_float32s(dtype, ends):
    low, high = torch.tensor(ends, dtype=dtype)
    found = affine_parameters(low, high, 8)
    assert found == affine_parameters(low.float(), high.float(), 8) and found[0].isfinite()
    weight = torch.tensor(ends, dtype=dtype).repeat(3, 5) * torch.tensor([1, 0, 0.5])[:, None]
    weight = weight.to(dtype)  # a row of it is pruned
    for estimator in W_ESTIMATORS:
        found, (scale, *_) = quantize_weight(weight, 8, estimator, "channel")
        expected, _ = quantize_weight(weight.float(), 8, estimator, "channel")
        assert scale.dtype == torch.float32 and found.dtype == dtype
        assert torch.equal(found, expected.to(dtype)) and found.isfinite().all()


# ---- ranges and thresholds ----

@pytest.mark.parametrize("name, percentile", [
    ("running", 100), ("minmax", 100), ("p99.99", 99.99), ("p99.999", 99.999)])
def test_ranges_over_batches(name, percentile):
    running, ends = A_ESTIMATORS[name](), []
    for i in range(16):
        x = torch.randn(20_000) * (1 + i % 5) + 1
        running.update(x)
        ends.append(np.percentile(x.double().numpy(), [100 - percentile, percentile]))
    expected = np.array([np.min(ends, axis=0)[0], np.max(ends, axis=0)[1]])
    if name != "minmax":
        expected = functools.reduce(lambda old, new: 0.9 * old + 0.1 * new, ends)
    assert [running.low.item(), running.high.item()] == pytest.approx(list(expected), rel=1e-3)


@pytest.mark.parametrize("n_bits", [3, 8])
def test_mse_threshold_is_the_best_of_the_hundred(n_bits):
    torch.manual_seed(0)
    groups, (q_min, q_max) = torch.randn(2, 500), grid(n_bits, symmetric=True)
    groups[0, 0] = 12.0  # an outlier that is better clipped
    for row, threshold in zip(groups, mse_threshold(groups, n_bits)):
        on_grid = lambda t: (row * q_max / t).round().clamp(q_min, q_max) * t / q_max
        error = lambda t: (on_grid(t) - row).square().sum()
        best = min(row.abs().max() * torch.arange(1, 101) / 100, key=error)
        assert threshold.item() == pytest.approx(best.item(), rel=1e-5)
        assert row[0] < 12 or n_bits == 8 or threshold < 12


def test_per_channel_weights_have_a_scale_per_row():
    weight = torch.randn(6, 10) * torch.logspace(-2, 2, 6)[:, None]
    on_grid, (scale, *_) = quantize_weight(weight, granularity="channel")
    assert_close(scale[:, 0], weight.abs().amax(1) / 127)
    assert ((on_grid - weight).abs().amax(1) <= 0.501 * scale[:, 0]).all()
    assert quantize_weight(weight[0], granularity="channel")[1][0].shape == (1, 1)  # a gain


@pytest.mark.parametrize("estimator", ["minmax", "mse"])
@pytest.mark.parametrize("n_bits", [4, 8])
def test_a_weight_without_a_negative_value_has_the_unsigned_grid(n_bits, estimator):
    """The authors' rule: 0 .. 2^b - 1, twice as fine as the symmetric grid."""
    gamma, q_max = 1 + 0.3 * torch.rand(300), 2 ** n_bits - 1
    found, (scale, *_) = quantize_weight(gamma, n_bits, estimator)
    expected = torch.fake_quantize_per_tensor_affine(gamma, scale.item(), 0, 0, q_max)
    assert torch.equal(found, expected)
    assert estimator == "mse" or scale.item() == pytest.approx(gamma.max().item() / q_max)
    signed = torch.cat((gamma, torch.tensor([-1e-3])))
    assert quantize_weight(signed, n_bits, estimator)[1][0] > 1.8 * scale


# ---- the walk ----

def calibrated(model, family="bert", **settings):
    quantized = quantize_model(model, **settings)
    with calibrating(quantized):
        for seed in (1, 2, 3):
            quantized(inputs(family, seed))
    return quantized


OUTSIDE = {
    "bert": "token_embedding position_embedding embedding_norm",
    "opt": "token_embedding position_embedding final_norm",
    "vit": "patch_embedding patch_norm cls_embedding position_embedding final_norm head"}
IN_BLOCKS = ["attention.qkv", "attention.proj", "norm1", "ffn_up", "ffn_down", "norm2"]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_weight_and_tap_is_on_its_grid_except_what_stays_float(family):
    """The output layer of BERT and OPT stays float, though it is tied to the token table; gates
    do, too. W_q, W_k and W_v have a scale each."""
    model, seen = small(family, attention="gated"), {}
    for layer in model.layers:
        layer.attention.qkv.weight.data[:32] *= 100
    quantized = calibrated(model, family, w_bits=4, a_bits=4)
    on_grid = {name for name, module in quantized.named_modules() if hasattr(module, "weight_grid")}
    in_blocks = {f"layers.{i}.{part}" for i in (0, 1) for part in IN_BLOCKS}
    assert on_grid == in_blocks | set(OUTSIDE[family].split())
    for name, p in model.named_parameters(remove_duplicate=False):
        parent, _, last = name.rpartition(".")
        q, n = quantized.get_parameter(name), 3 if parent.endswith("qkv") else 1
        if last != "weight" or parent not in on_grid:
            assert torch.equal(q, p), name
            continue
        for part, found in zip(p.chunk(n), q.chunk(n)):
            scale = part.abs().max() / (7 if (part < 0).any() else 15)
            assert_close(found / scale, (found / scale).round(), atol=1e-3, rtol=0)
            assert_close(found / scale, part / scale, atol=0.501, rtol=0)

    taps = [name for name, module in model.named_modules() if isinstance(module, Tap)]
    for name in taps:
        quantized.get_submodule(name).register_forward_hook(
            lambda module, args, out, name=name: seen.update({name: len(out.unique())}))
    quantized(inputs(family))
    assert sorted(seen) == sorted(taps) and max(seen.values()) <= 16


@pytest.mark.parametrize("only, count", [
    ("*", 43), ("*_tap", 28), ("*.weight", 15), ("*ffn_output_tap", 2), ("layers.0.norm1_tap", 1)])
def test_a_pattern_chooses_what_is_quantized(only, count):
    kind = type("Own", (ActivationQuantizer,), {})
    modules = [*quantize_model(small(), only=only, quantizer=kind).named_modules()]
    changed = [name for name, module in modules if type(module) is kind]
    changed += [f"{name}.weight" for name, module in modules if hasattr(module, "weight_grid")]
    assert len(changed) == count and all(only.strip("*") in name for name in changed)


def test_a_quantized_model_is_a_copy_however_often():
    model, x = small(), inputs(seed=1)
    before, expected = copy.deepcopy(model.state_dict()), model(x)
    outputs = [calibrated(model, w_bits=bits, a_bits=bits, a_estimator="minmax")(x)
               for bits in (16, 8, 4, 8)]
    errors = [(output - expected).norm() / expected.norm() for output in outputs]
    assert errors[0] < errors[1] < errors[2] and torch.equal(outputs[1], outputs[3])
    assert errors[0] < 1e-3 and same(model.state_dict(), before)  # many bits change little
    assert torch.equal(model(x), expected) and model.training


def test_calibration_sees_what_is_quantized_upstream_and_then_rests():
    """Ranges are estimated while everything before them is quantized already."""
    model, arrived = small(), []
    quantized = quantize_model(model, w_bits=16, a_bits=2)
    tap = quantized.layers[0].residual1_tap
    for each in (tap, model.layers[0].residual1_tap):
        each.register_forward_pre_hook(lambda module, args: arrived.append(args[0].max()))
    with calibrating(quantized):
        quantized(inputs())
    model(inputs())
    assert tap.range.high == arrived[0] and (arrived[1] / arrived[0] - 1).abs() > 1e-3
    before = copy.deepcopy(quantized.state_dict())
    quantized(inputs(seed=9))
    assert same(quantized.state_dict(), before)


def test_calibrations_nest():
    tap = (quantized := quantize_model(small())).layers[0].ffn_output_tap
    with calibrating(quantized):
        quantized(inputs())
        with calibrating(quantized.layers[0]):
            before = tap.scale
        quantized(inputs(seed=1))
    assert tap.scale != before and not tap.estimating


class Masked(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.idle_tap = torch.nn.Linear(3, 3), None
        self.last_tap, self.masked_tap = Tap(), Tap()  # in this order the cause comes second

    def forward(self, x):
        return self.last_tap(self.masked_tap(self.linear(x).masked_fill(x > 0, -torch.inf)))


@pytest.mark.parametrize("x, expected", [
    ([1.0, -1.0, 0.5], pytest.raises(UserError, match="^masked_tap: .*range from -inf to")),
    (None, pytest.raises(UserError, match="_tap: nothing passed it")),
    ([-1.0, -1.0, -1.0], nullcontext())])
def test_a_tap_whose_range_is_not_finite_is_named(x, expected):
    model = quantize_model(Masked())
    with expected, calibrating(model):
        if x:
            model(torch.tensor([x]))
