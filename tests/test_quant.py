"""The quantizer against PyTorch's own kernels and the paper's definitions."""
import copy

import numpy as np
import pytest
import torch
from torch.nn.utils import parametrize

from minq.attention import Tap
from minq.errors import UserError
from minq.fake_quant import token_range
from minq.model import Bert, BertConfig, Opt, OptConfig, ViT, ViTConfig
from minq.quant import (A_ESTIMATORS, ActivationQuantizer, RunningRange, WeightQuantizer, affine_parameters, calibrating,
                        fake_quantize, grid, mse_threshold, percentile_of, quantize, quantize_model)


def wide_sample(seed):
    """Values of many sizes, and a grid whose exact half-steps are among them."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4000, generator=generator) * 10 ** torch.empty(1).uniform_(-3, 3, generator=generator)
    scale, zero_point = affine_parameters(x.min(), x.max(), 8)
    half_steps = (torch.arange(-300, 300) + 0.5) * scale
    return torch.cat((x, half_steps)), scale, zero_point


@pytest.mark.parametrize("seed", range(50))
def test_per_tensor_equals_pytorch_bit_for_bit(seed):
    x, scale, zero_point = wide_sample(seed)
    expected = torch.fake_quantize_per_tensor_affine(x, scale, zero_point.int(), 0, 255)
    assert torch.equal(fake_quantize(x, scale, zero_point, 8), expected)


def test_dividing_by_the_scale_would_differ_from_pytorch():
    """Why quantize() multiplies by 1 / s."""
    differences = 0
    for seed in range(50):
        x, scale, zero_point = wide_sample(seed)
        divided = ((x / scale).round() + zero_point).clamp(0, 255)
        differences += (divided != quantize(x, scale, zero_point, 8)).sum().item()
    assert differences > 0


@pytest.mark.parametrize("n_bits", [2, 4, 8, 16])
def test_per_channel_equals_pytorch_bit_for_bit(n_bits):
    torch.manual_seed(n_bits)
    weight = torch.randn(30, 400) * torch.logspace(-3, 3, 30)[:, None]
    threshold = weight.abs().amax(1)
    scale, zero_point = affine_parameters(-threshold, threshold, n_bits, symmetric=True)
    weight = torch.cat((weight, (torch.arange(-200, 200) + 0.5) * scale[:, None]), dim=1)
    q_min, q_max = grid(n_bits, symmetric=True)
    expected = torch.fake_quantize_per_channel_affine(weight, scale, zero_point.int(), 0, q_min, q_max)
    assert torch.equal(fake_quantize(weight, scale[:, None], zero_point[:, None], n_bits, True), expected)


def test_affine_parameters_are_equation_1s():
    scale, zero_point = affine_parameters(torch.tensor(-1.0), torch.tensor(3.0), 8)
    assert scale.item() == pytest.approx(4 / 255) and zero_point.item() == 64
    scale, zero_point = affine_parameters(torch.tensor(2.0), torch.tensor(4.0), 4)  # stretched to contain 0
    assert scale.item() == pytest.approx(4 / 15) and zero_point.item() == 0
    scale, zero_point = affine_parameters(torch.tensor(-4.0), torch.tensor(-2.0), 4)
    assert scale.item() == pytest.approx(4 / 15) and zero_point.item() == 15
    scale, zero_point = affine_parameters(torch.tensor(-1.0), torch.tensor(0.5), 8, symmetric=True)
    assert scale.item() == pytest.approx(1 / 127) and zero_point.item() == 0


@pytest.mark.parametrize("symmetric", [False, True])
def test_zero_is_exact_and_quantizing_twice_changes_nothing(symmetric):
    x = torch.tensor([0.0, 1.7, 2.9, 3.3, 5.0])
    scale, zero_point = affine_parameters(x.min(), x.max(), 4, symmetric)
    once = fake_quantize(x, scale, zero_point, 4, symmetric)
    assert once[0] == 0 and torch.equal(fake_quantize(once, scale, zero_point, 4, symmetric), once)
    assert (once - x).abs().max() <= scale / 2 + 1e-6


@pytest.mark.parametrize("x", [torch.zeros(5), torch.full((5,), 3.0), torch.tensor([0.0, 1e-30]), torch.tensor([0.0, 1e30])])
def test_degenerate_tensors_stay_finite(x):
    quantized = fake_quantize(x, *affine_parameters(x.min(), x.max(), 8), 8)
    torch.testing.assert_close(quantized, x, rtol=1e-6, atol=0)


def test_one_scale_per_token_equals_a_loop_over_tokens():
    x = torch.randn(2, 5, 16) * torch.logspace(-2, 2, 5)[:, None]
    low, high = token_range(x)
    quantized = fake_quantize(x, *affine_parameters(low, high, 8), 8)
    for b in range(2):
        for t in range(5):
            row = x[b, t]
            alone = fake_quantize(row, *affine_parameters(row.min(), row.max(), 8), 8)
            assert torch.equal(quantized[b, t], alone)


def test_arithmetic_is_float32_under_autocast():
    """bfloat16 has 8 significant bits: it cannot even hold the integers 0..511."""
    x = torch.linspace(-1, 1, 5000)
    scale, zero_point = affine_parameters(x.min(), x.max(), 12)
    expected = fake_quantize(x, scale, zero_point, 12)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fake_quantize(x, scale, zero_point, 12), expected)
    half = fake_quantize(x.bfloat16(), scale, zero_point, 12)
    assert half.dtype == torch.bfloat16
    assert torch.equal(half, fake_quantize(x.bfloat16().float(), scale, zero_point, 12).bfloat16())


# ---- ranges ----

def test_running_range_is_an_exponential_moving_average():
    batches, running = [torch.randn(100) * (i + 1) for i in range(16)], RunningRange()
    low, high = batches[0].min(), batches[0].max()
    for batch in batches:
        running.update(batch)
    for batch in batches[1:]:
        low, high = 0.9 * low + 0.1 * batch.min(), 0.9 * high + 0.1 * batch.max()
    torch.testing.assert_close(torch.stack((running.low, running.high)), torch.stack((low, high)))


def test_minmax_range_keeps_the_extremes():
    extremes = A_ESTIMATORS["minmax"]()
    for batch in (torch.tensor([-1.0, 5.0]), torch.tensor([-3.0, 2.0]), torch.tensor([0.0, 1.0])):
        extremes.update(batch)
    assert (extremes.low.item(), extremes.high.item()) == (-3.0, 5.0)


@pytest.mark.parametrize("percentile", [0.001, 0.01, 5.0, 95.0, 99.99, 99.999])
@pytest.mark.parametrize("n", [3, 1000, 54321])
def test_percentiles_equal_numpy(percentile, n):
    x = torch.randn(n)
    assert percentile_of(x, percentile).item() == pytest.approx(np.percentile(x.double().numpy(), percentile), rel=1e-4)


def test_percentiles_of_more_values_than_torch_quantile_takes():
    x = torch.arange(2 ** 24 + 10, dtype=torch.float32)
    assert percentile_of(x, 99.99).item() == pytest.approx(0.9999 * (2 ** 24 + 9), rel=1e-6)


def test_a_percentile_pair_is_low_then_high():
    running = A_ESTIMATORS["p99.99"]()
    running.update(torch.linspace(-7, 9, 100_001))
    assert running.low.item() == pytest.approx(-7 + 16e-4, abs=1e-4) and running.high.item() == pytest.approx(9 - 16e-4, abs=1e-4)


@pytest.mark.parametrize("n_bits", [3, 8])
def test_mse_threshold_is_the_best_of_the_hundred(n_bits):
    torch.manual_seed(0)
    groups = torch.randn(2, 500)
    groups[0, 0] = 12.0  # an outlier that is better clipped
    found = mse_threshold(groups, n_bits)
    for row, threshold in zip(groups, found):
        def error(t):
            scale = t / (2 ** (n_bits - 1) - 1)
            q_min, q_max = grid(n_bits, symmetric=True)
            return ((row * (1 / scale)).round().clamp(q_min, q_max) * scale - row).square().sum()
        candidates = row.abs().max() * torch.arange(1, 101) / 100
        assert threshold.item() == pytest.approx(min(candidates, key=error).item(), rel=1e-5)
    assert n_bits == 8 or found[0] < 12.0


# ---- the walk ----

def small(**settings):
    torch.manual_seed(0)
    return Bert(BertConfig(layers=2, width=32, heads=4, ffn=64, seq_len=12, **settings)).eval()


def calibrated(model, **settings):
    quantized = quantize_model(copy.deepcopy(model), **settings)
    with calibrating(quantized):
        for seed in range(3):
            quantized(torch.randint(256, (4, 12), generator=torch.Generator().manual_seed(seed)))
    return quantized


def n_levels(x):
    return len(x.detach().unique())


def test_every_weight_and_tap_is_on_its_grid_except_what_stays_float():
    model = small(attention="gated", gate="mlp")
    quantized, seen = calibrated(model, w_bits=4, a_bits=4), {}
    for name, module in quantized.named_modules():
        assert not isinstance(module, Tap)
        if name.endswith("_tap"):
            module.register_forward_hook(lambda m, a, out, name=name: seen.update({name: out}))
    quantized(torch.randint(256, (4, 12)))
    assert set(seen) == {name for name, module in model.named_modules() if isinstance(module, Tap)} and len(seen) >= 2 + 2 * 13
    assert all(n_levels(x) <= 16 for x in seen.values())

    on_grid = {name for name, module in quantized.named_modules() if parametrize.is_parametrized(module)}
    block = ["attention.qkv", "attention.proj", "norm1", "ffn_up", "ffn_down", "norm2"]
    assert on_grid == {"token_embedding", "position_embedding", "embedding_norm",
                       *(f"layers.{i}.{part}" for i in range(2) for part in block)}
    for name in on_grid:
        weight = quantized.get_submodule(name).weight
        scales = 3 if name.endswith("qkv") else 1
        assert all(n_levels(part) <= 16 for part in weight.chunk(scales))
    untouched = {"head.transform.weight", "head.norm.weight", "head.decoder.weight",
                 *(f"layers.{i}.attention.gate.{p}" for i in range(2) for p in ("weight1", "weight2"))}
    for name in untouched:
        assert torch.equal(quantized.get_parameter(name), model.get_parameter(name))


SMALL = dict(layers=2, width=32, heads=4, ffn=64)


@pytest.mark.parametrize("model, inputs, outside_layers, in_float", [
    (lambda: Opt(OptConfig(**SMALL, seq_len=12)), lambda: torch.randint(256, (4, 12)),
     {"token_embedding", "position_embedding", "final_norm"}, {"decoder"}),
    (lambda: ViT(ViTConfig(**SMALL, image_size=12, patch_layernorm=True)), lambda: torch.rand(4, 3, 12, 12),
     {"patch_embedding", "patch_norm", "cls_embedding", "position_embedding", "final_norm", "head"}, set())])
def test_opt_keeps_its_output_layer_and_vit_quantizes_all(model, inputs, outside_layers, in_float):
    quantized = quantize_model(model(), w_bits=4, a_bits=4)
    with calibrating(quantized):
        quantized(inputs())
    assert torch.isfinite(quantized(inputs())).all()
    assert not any(isinstance(module, Tap) for module in quantized.modules())
    on_grid = {name for name, module in quantized.named_modules() if parametrize.is_parametrized(module)}
    assert {name for name in on_grid if not name.startswith("layers")} == outside_layers
    assert len(on_grid) == len(outside_layers) + 2 * 6 and not on_grid & in_float


def test_the_tied_decoder_stays_float_while_the_embedding_is_quantized():
    model = small()
    quantized = calibrated(model, w_bits=4)
    assert torch.equal(quantized.head.decoder.weight, model.token_embedding.weight)
    assert n_levels(quantized.token_embedding.weight) <= 16 < n_levels(quantized.head.decoder.weight)


def test_query_key_and_value_weights_have_a_scale_each():
    model = small()
    qkv = model.layers[0].attention.qkv
    with torch.no_grad():
        qkv.weight[:32] *= 100
    quantized = calibrated(model).layers[0].attention.qkv
    assert quantized.parametrizations.weight[0].scale.shape == (3, 1)
    for part, scale in zip(qkv.weight.chunk(3), quantized.parametrizations.weight[0].scale):
        assert scale.item() == pytest.approx(part.abs().max().item() / 127)


def test_per_channel_weights_have_a_scale_a_row():
    weight = torch.randn(6, 10) * torch.logspace(-2, 2, 6)[:, None]
    quantizer = WeightQuantizer(weight, n_bits=8, granularity="channel")
    torch.testing.assert_close(quantizer.scale[:, 0], weight.abs().amax(1) / 127)
    assert WeightQuantizer(weight[0], granularity="channel").scale.shape == (1, 1)  # LayerNorm's gamma


def test_calibration_sees_what_is_quantized_upstream():
    """Ranges are estimated while everything before them is quantized already."""
    model, tokens = small(), torch.randint(256, (4, 12))
    quantized = quantize_model(copy.deepcopy(model), w_bits=2, a_bits=2)
    arrived = []
    quantized.layers[0].residual1_tap.register_forward_pre_hook(lambda m, args: arrived.append(args[0]))
    with calibrating(quantized):
        quantized(tokens)
    tap = quantized.layers[0].residual1_tap
    assert torch.equal(tap.range.high, arrived[0].max())
    model.layers[0].residual1_tap.register_forward_hook(lambda m, a, x: arrived.append(x))
    model(tokens)
    assert not torch.allclose(arrived[1].max(), arrived[0].max(), rtol=1e-3)


def test_ranges_stand_still_after_calibration():
    quantized = calibrated(small())
    before = [m.scale.clone() for m in quantized.modules() if isinstance(m, ActivationQuantizer)]
    with torch.no_grad():
        quantized(torch.randint(256, (4, 12)))
    after = [m.scale for m in quantized.modules() if isinstance(m, ActivationQuantizer)]
    assert all(torch.equal(a, b) for a, b in zip(before, after))


def test_many_bits_change_little_and_few_bits_much():
    model, tokens = small(), torch.randint(256, (4, 12))
    with torch.no_grad():
        error = {bits: (calibrated(model, w_bits=bits, a_bits=bits)(tokens) - model(tokens)).norm().item() for bits in (16, 8, 4)}
    assert error[16] < error[8] < error[4] and error[16] < 1e-3 * model(tokens).norm()


def test_an_outlier_ruins_a_tensors_grid():
    """The paper's premise: one large value takes the grid away from all the others."""
    x = torch.randn(10_000)
    error = lambda x: (fake_quantize(x, *affine_parameters(x.min(), x.max(), 8), 8) - x)[:-1].square().mean().item()
    assert error(torch.cat((x, torch.tensor([700.0])))) > 1000 * error(torch.cat((x, torch.tensor([0.0]))))


@pytest.mark.parametrize("estimator", ["minmax", "mse"])
@pytest.mark.parametrize("n_bits", [4, 8])
def test_a_weight_without_a_negative_value_has_the_unsigned_grid(n_bits, estimator):
    """The authors' rule: 0 .. 2^b - 1 with max w / (2^b - 1), twice as fine as the symmetric grid."""
    torch.manual_seed(0)
    gamma = 1 + 0.3 * torch.rand(300)
    quantizer = WeightQuantizer(gamma, n_bits, estimator)
    expected = torch.fake_quantize_per_tensor_affine(gamma, quantizer.scale.item(), 0, 0, 2 ** n_bits - 1)
    assert torch.equal(quantizer(gamma), expected)
    if estimator == "minmax":
        assert quantizer.scale.item() == pytest.approx(gamma.max().item() / (2 ** n_bits - 1))
    signed = WeightQuantizer(torch.cat((gamma, torch.tensor([-1e-3]))), n_bits, estimator)
    assert signed.symmetric and signed.scale > 1.8 * quantizer.scale


def test_a_tap_whose_range_is_not_finite_is_named():
    class Masked(torch.nn.Module):
        float_modules = ()

        def __init__(self):
            super().__init__()
            self.linear, self.idle_tap = torch.nn.Linear(3, 3), None
            self.last_tap, self.first_tap, self.masked_tap = Tap(), Tap(), Tap()

        def forward(self, x):  # what the infinity spoils stands before its cause in the model's list
            return self.last_tap(self.masked_tap(self.first_tap(self.linear(x)).masked_fill(x > 0, -torch.inf)))

    model = quantize_model(Masked())
    with pytest.raises(UserError, match="masked_tap: its calibrated scale is inf; the values range from -inf to"):
        with calibrating(model):
            model(torch.tensor([[1.0, -1.0, 0.5]]))
    model = quantize_model(Masked())
    with calibrating(model):  # a finite range is fine
        model(-torch.ones(1, 3))
    model = quantize_model(Masked())
    with pytest.raises(UserError, match="_tap: nothing passed it"):
        with calibrating(model):
            pass
