"""Training in few bits: straight-through gradients, per-token ranges, what is quantized and what is not."""
import json

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from minq.attention import QKV
from minq.fake_quant import (DynamicQuantizer, DynamicWeightQuantizer, FakeQuantLinear, fake_quantization_off,
                             fake_quantize_training)
from minq.model import Bert, BertConfig, Opt, OptConfig, ViT, ViTConfig
from running import SMALL, SMALL_VIT, assert_same_weights, logged, run, saved, stopped_at, torchrun, train

SMALL_MODEL = dict(layers=2, width=32, heads=4, ffn=64)
FAMILIES = {
    "bert": lambda **c: (Bert(BertConfig(**SMALL_MODEL, seq_len=16, **c)), torch.randint(256, (2, 16))),
    "opt": lambda **c: (Opt(OptConfig(**SMALL_MODEL, seq_len=16, **c)), torch.randint(256, (2, 16))),
    "vit": lambda **c: (ViT(ViTConfig(**SMALL_MODEL, patch_size=8, **c)), torch.rand(2, 3, 32, 32)),
}


# ---- PyTorch's own fake quantization, token by token ----

def reference_activation(x, n_bits=8):
    """(..., d): each row with torch.fake_quantize_per_tensor_affine and eq. 1's parameters."""
    rows = []
    for row in x.reshape(-1, x.shape[-1]):
        low, high = min(row.min().item(), 0.0), max(row.max().item(), 0.0)
        scale = torch.tensor(high - low) / (2 ** n_bits - 1)
        zero_point = int((-torch.tensor(low) / scale).round())
        rows.append(torch.fake_quantize_per_tensor_affine(row, scale.item(), zero_point, 0, 2 ** n_bits - 1))
    return torch.stack(rows).view_as(x)


def reference_weight(w, n_bits=8):
    q_max = 2 ** (n_bits - 1) - 1
    return torch.fake_quantize_per_tensor_affine(w, (w.abs().max() / q_max).item(), 0, -q_max - 1, q_max)


@pytest.mark.parametrize("n_bits", [8, 4])
def test_dynamic_ranges_equal_a_loop_over_tokens(n_bits):
    x = torch.randn(3, 2, 5, 16) * torch.logspace(-3, 3, 5)[:, None] + torch.randn(5, 1)
    torch.testing.assert_close(DynamicQuantizer(n_bits)(x), reference_activation(x, n_bits), rtol=1e-6, atol=0)


def test_per_tensor_has_one_scale():
    x = torch.randn(4, 6, 16)
    expected = reference_activation(x.reshape(1, -1)).view_as(x)
    torch.testing.assert_close(DynamicQuantizer(8, "tensor")(x), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("w_bits, a_bits", [(8, 8), (4, 6)])
def test_the_gradient_is_the_float_one_at_the_quantized_operands(w_bits, a_bits):
    linear = nn.Linear(16, 24)
    x = torch.randn(2, 5, 16, requires_grad=True)
    upstream = torch.randn(2, 5, 24)
    FakeQuantLinear(linear, w_bits, a_bits)(x).backward(upstream)

    quantized_x = reference_activation(x.detach(), a_bits).requires_grad_()
    quantized_w = reference_weight(linear.weight.detach(), w_bits).requires_grad_()
    bias = linear.bias.detach().clone().requires_grad_()
    F.linear(quantized_x, quantized_w, bias).backward(upstream)
    torch.testing.assert_close(x.grad, quantized_x.grad)
    torch.testing.assert_close(linear.weight.grad, quantized_w.grad)
    torch.testing.assert_close(linear.bias.grad, bias.grad)


def test_query_key_and_value_weights_have_a_scale_each():
    weight = torch.cat((torch.randn(8, 8), 100 * torch.randn(8, 8), 1e-3 * torch.randn(8, 8)))
    expected = torch.cat([reference_weight(part) for part in weight.chunk(3)])
    torch.testing.assert_close(DynamicWeightQuantizer(8, parts=3)(weight), expected, rtol=1e-6, atol=0)
    assert FakeQuantLinear(QKV(8, 24)).weight_quantizer.parts == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("granularity", ["token", "tensor"])
def test_degenerate_tokens_stay_finite(dtype, granularity):
    x = torch.randn(6, 16)
    x[0], x[1], x[2], x[3] = 0.0, 0.25, -3.0, 1e-8
    x[4, 3] = 6e4
    x = x.to(dtype).requires_grad_()
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        y = FakeQuantLinear(nn.Linear(16, 8), 8, 8, granularity)(x)
    y.sum().backward()
    assert y.isfinite().all() and x.grad.isfinite().all()
    quantized = DynamicQuantizer(8, granularity)(x)
    assert quantized.dtype == dtype and quantized.isfinite().all() and (quantized[0] == 0).all()
    if granularity == "token":
        torch.testing.assert_close(quantized[:4], x[:4], rtol=1e-2, atol=0)  # zeros and constants are exact on their own grid


def test_nothing_but_the_quantized_operands_is_kept_for_backward():
    kept = []
    layer, x = FakeQuantLinear(nn.Linear(16, 24)), torch.randn(10, 16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        layer(x * 1)
    assert sorted(map(tuple, kept)) == [(10, 16), (16, 24)]  # x and W^T


# ---- the walk ----

@pytest.mark.parametrize("family", FAMILIES)
def test_all_linears_but_the_last_are_swapped_and_parameters_stay_the_same(family):
    model, _ = FAMILIES[family](attention="gated")
    names, parameters = list(model.state_dict()), dict(model.named_parameters())
    fake_quantize_training(model)
    assert list(model.state_dict()) == names
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    assert linears == [model.final_linear]


@pytest.mark.parametrize("family", FAMILIES)
def test_products_read_eight_levels_a_token_at_three_bits_and_nothing_else_does(family):
    model, inputs = FAMILIES[family](attention="gated")
    fake_quantize_training(model, 3, 3)
    levels = lambda x: max(len(row.unique()) for row in x.reshape(-1, x.shape[-1]))
    operands, others = [], []
    for name, module in model.named_modules():
        if isinstance(module, DynamicQuantizer):
            module.register_forward_hook(lambda module, args, x: operands.append(levels(x)))
        if name.endswith(("norm1_tap", "norm2_tap", "attention.gate", "residual1_tap")):
            module.register_forward_pre_hook(lambda module, args: others.append(levels(args[0])))
    model(inputs)
    expected = 2 * (4 + 4) + {"bert": 1, "opt": 0, "vit": 1}[family]  # per layer 4 Linears and 4 taps
    assert len(operands) == expected and max(operands) <= 8 and min(others) > 8


@pytest.mark.parametrize("family", FAMILIES)
def test_switched_off_it_is_the_float_model(family):
    torch.manual_seed(0)
    model, inputs = FAMILIES[family](attention="clipped", gamma=-0.01)
    with torch.no_grad():
        expected = model(inputs)
        fake_quantize_training(model, 4, 4)
        assert not torch.allclose(model(inputs), expected, rtol=1e-3)
        with fake_quantization_off(model):
            assert torch.equal(model(inputs), expected)
        assert not torch.allclose(model(inputs), expected, rtol=1e-3)


# ---- the scripts ----

def last_line(folder):
    return logged(folder)[-1]


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_trains_is_measured_and_quantizes(family, corpus, tmp_path):
    small = SMALL_VIT if family == "vit" else [*SMALL, "--data", corpus]
    out, _ = run(f"train_{family}.py", *small, "--fake-quant", "--w-bits", 3, "--a-bits", 3, "--fake-quant-granularity",
                 "tensor", "--out", tmp_path / "run")
    assert family == "vit" or "fake quantization off" in out  # an accuracy of six steps may be the same
    last = last_line(tmp_path / "run")
    assert len(last["layer_input"]["inf_norm"]) == 2
    assert last["layer_input"]["inf_norm"][1] == last["layer_output"]["inf_norm"][0]
    metric = "accuracy" if family == "vit" else "perplexity"
    out, _ = run("quantize.py", tmp_path / "run", "--batches", 1, "--seeds", 1, "--json", tmp_path / "table.json")
    (row,) = json.loads((tmp_path / "table.json").read_text())
    assert row["fp"] == pytest.approx(last["float_" + metric]) and row["settings"]["fake_quant"] is True


@pytest.mark.slow
@pytest.mark.parametrize("options", [["--precision", "bf16"], ["--precision", "fp16"],
                                     ["--precision", "fp32", "--compile", "--layers", "1"]])
def test_mixed_precision_and_compile(corpus, tmp_path, options):
    train(corpus, tmp_path / "run", "--fake-quant", *options)
    assert 4 < last_line(tmp_path / "run")["loss"] < 6


def test_interrupted_and_resumed_equals_uninterrupted(corpus, tmp_path, monkeypatch):
    train(corpus, tmp_path / "whole", "--fake-quant")
    with stopped_at(3, monkeypatch):
        train(corpus, tmp_path / "stopped", "--fake-quant", "--save-every", "3")
    checkpoint = saved(tmp_path / "stopped")
    assert checkpoint["step"] == 3 and checkpoint["args"]["a_bits"] == 8
    run("train_bert.py", "--resume", "--out", tmp_path / "stopped")
    assert_same_weights(tmp_path / "stopped", tmp_path / "whole")


@pytest.mark.slow
def test_two_processes_equal_one(corpus, tmp_path):
    train(corpus, tmp_path / "one", "--fake-quant", "--dropout", "0")
    torchrun("train_bert.py", *SMALL, "--data", corpus, "--dropout", "0", "--fake-quant", "--out", tmp_path / "two")
    assert last_line(tmp_path / "two")["loss"] == pytest.approx(last_line(tmp_path / "one")["loss"], rel=1e-3)


def test_a_loss_that_stays_nan_stops_the_run_and_keeps_the_last_good_checkpoint(corpus, tmp_path, monkeypatch):
    import train_bert
    honest = F.cross_entropy
    calls = []
    def breaks_after_ten(*args, **kwargs):
        calls.append(1)
        return honest(*args, **kwargs) * (torch.nan if len(calls) > 10 else 1.0)
    monkeypatch.setattr(train_bert.F, "cross_entropy", breaks_after_ten)
    _, err = train(corpus, tmp_path / "run", "--fake-quant", "--steps", "1000", "--save-every", "4", "--eval-every", "1000", code=2)
    line = err.splitlines()[-1]
    assert "stopped at step 40, the loss of the last 30 steps is not finite" in line and "--lr" in line
    checkpoint = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert checkpoint["step"] == 8 and all(value.isfinite().all() for value in checkpoint["model"].values())


@pytest.mark.slow
def test_the_scaler_recovers_from_an_overflow(corpus, tmp_path, monkeypatch):
    scales = []
    class Scaler(torch.amp.GradScaler):
        def __init__(self, device, enabled):
            super().__init__(device, init_scale=2.0 ** 40, enabled=enabled)
        def update(self):
            super().update()
            scales.append(self.get_scale())
    monkeypatch.setattr(torch.amp, "GradScaler", Scaler)
    train(corpus, tmp_path / "run", "--fake-quant", "--precision", "fp16", "--steps", "40")
    assert scales[0] < 2.0 ** 40 and scales[-1] == scales[-5]  # halved until the gradients fit
    assert last_line(tmp_path / "run")["loss"] < 5.5
