"""Training in few bits: straight-through gradients, ranges of tokens, what is quantized and what
is not."""
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.testing import assert_close

from minq.attention import QKV
from minq.fake_quant import (DynamicQuantizer, FakeQuantLinear, fake_quantization_off,
                             fake_quantize_training)
from minq.flags import UserError
from minq.model import FAMILIES
from small import inputs, small


# ---- PyTorch's own fake quantization, token by token ----

def reference_activation(x, n_bits=8):
    """(..., d): each row with torch.fake_quantize_per_tensor_affine and eq. 1's parameters."""
    rows, top = [], 2 ** n_bits - 1
    for row in x.reshape(-1, x.shape[-1]):
        low, high = row.min().clamp(max=0), row.max().clamp(min=0)
        scale = (high - low) / top
        zero_point = int((-low / scale).round())
        rows.append(torch.fake_quantize_per_tensor_affine(row, scale.item(), zero_point, 0, top))
    return torch.stack(rows).view_as(x)


def reference_weight(w, n_bits=8):
    top = 2 ** (n_bits - 1) - 1
    scale = (w.abs().max() / top).item()
    return torch.fake_quantize_per_tensor_affine(w, scale, 0, -top - 1, top)


@pytest.mark.parametrize("n_bits", [8, 4])
def test_dynamic_ranges_equal_a_loop_over_tokens(n_bits):
    x = torch.randn(3, 2, 5, 16) * torch.logspace(-3, 3, 5)[:, None] + torch.randn(5, 1)
    for granularity, rows in (("token", x), ("tensor", x.view(1, -1))):
        expected = reference_activation(rows, n_bits).view_as(x)
        assert_close(DynamicQuantizer(n_bits, granularity)(x), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("w_bits, a_bits", [(8, 8), (4, 6)])
def test_the_gradient_is_the_float_one_at_the_quantized_operands(w_bits, a_bits):
    """W_q, W_k and W_v have a scale each."""
    linear, upstream, kept = QKV(16, 24), torch.randn(2, 5, 24), []
    linear.weight.data *= torch.tensor([1, 100, 1e-3]).repeat_interleave(8)[:, None]
    x = torch.randn(2, 5, 16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out = FakeQuantLinear(linear, w_bits, a_bits)(x)
    out.backward(upstream)
    assert sorted(t.numel() for t in kept) == [x.numel(), linear.weight.numel()]  # and no more

    weight = torch.cat([reference_weight(part, w_bits) for part in linear.weight.data.chunk(3)])
    operands = [reference_activation(x.detach(), a_bits), weight, linear.bias.detach().clone()]
    expected = F.linear(*(operand.requires_grad_() for operand in operands))
    expected.backward(upstream)
    assert_close(out, expected)
    for found, operand in zip((x, linear.weight, linear.bias), operands):
        assert_close(found.grad, operand.grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("granularity", ["token", "tensor"])
def test_degenerate_tokens_stay_finite(dtype, granularity):
    x = torch.randn(6, 16)
    x[:4], x[4, 3] = torch.tensor([0.0, 0.25, -3.0, 1e-8])[:, None], 6e4
    x = x.to(dtype).requires_grad_()
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        y = FakeQuantLinear(nn.Linear(16, 8), 8, 8, granularity)(x)
    y.sum().backward()
    assert y.isfinite().all() and x.grad.isfinite().all()
    quantized = DynamicQuantizer(8, granularity)(x)
    assert quantized.dtype == dtype and quantized.isfinite().all() and (quantized[0] == 0).all()
    if granularity == "token":  # zeros and constants are exact on their own grid
        assert_close(quantized[:4], x[:4], rtol=1e-2, atol=0)


# ---- the walk ----

@pytest.mark.parametrize("family", FAMILIES)
def test_products_read_eight_levels_per_token_at_three_bits_and_nothing_else_does(family):
    model, operands, others = small(family, attention="gated"), [], []
    names, parameters = list(model.state_dict()), dict(model.named_parameters())
    fake_quantize_training(model, 3, 3)
    assert list(model.state_dict()) == names
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    assert linears == [model.final_linear]

    levels = lambda x: max(len(row.unique()) for row in x.reshape(-1, x.shape[-1]))
    for name, module in model.named_modules():
        if isinstance(module, DynamicQuantizer):
            module.register_forward_hook(lambda m, args, x: operands.append(levels(x)))
        if name.endswith(("norm1_tap", "norm2_tap", "attention.gate", "residual1_tap")):
            module.register_forward_pre_hook(lambda m, args: others.append(levels(args[0])))
    model(inputs(family))
    expected = 2 * (4 + 4) + (family != "opt")  # 4 Linears and 4 taps per layer, a head, patches
    assert len(operands) == expected and max(operands) <= 8 and min(others) > 8


@pytest.mark.parametrize("family", FAMILIES)
def test_switched_off_it_is_the_float_model_however_deeply(family):
    model, x = small(family, attention="clipped", gamma=-0.01), inputs(family)
    expected = model(x)
    on = fake_quantize_training(model, 4, 4)(x)
    assert not torch.allclose(on, expected, rtol=1e-3)
    with fake_quantization_off(model):
        with fake_quantization_off(model.layers[0]):
            assert torch.equal(model(x), expected)
        assert torch.equal(model(x), expected)
    assert torch.equal(model(x), on)


def test_a_fused_kernel_has_no_operands_to_quantize():
    with pytest.raises(UserError, match="--fused has no operands to quantize"):
        fake_quantize_training(small(fused=True))


@pytest.mark.slow
def test_compiled_in_one_graph_it_is_the_same():
    model = fake_quantize_training(small(attention="gated"))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(inputs()), model(inputs()))
