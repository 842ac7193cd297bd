"""Training in eight bits from the first step (the blog).

    fake_quantize_training(model, w_bits=8, a_bits=8)     # and train it: products see 8 bits
    with fake_quantization_off(model): ...                # the same weights in floating point

A transformer's forward pass multiplies matrices in six places of a layer, and each product has
two operands. Both are rounded to a grid (eq. 1) just before they meet:

    product                     left operand            right operand
    x W_q, x W_k, x W_v         what the layer gets     three weights
    queries keys^T              queries                 keys
    probs values                probs, before dropout   values
    context W_o                 what all heads hand on  a weight
    x W_up                      what the FFN gets       a weight
    hidden W_down               the FFN's hidden units  a weight

Activations have a scale and a zero point of their own for every token, taken from the token as it
arrives: dynamic, nothing to calibrate. Weights are symmetric, with a scale per tensor. Nothing
else is rounded: the residual stream, LayerNorms, the softmax, gates, biases and the final linear
layer stay in floating point. (After training, quant.py rounds every named tensor instead, with
fixed ranges.)

Rounding is a staircase: its gradient is 0 almost everywhere, and nothing would learn. So the
backward pass takes it for the identity (`StraightThrough`): the gradient of the rounded operand is
handed to the original as it is. Weights are kept and updated in floating point; the grid sees them
anew each step.

Could integers compute this? In a sum over k of x[t, k] w[k, n] a scale per token t or per tensor
can be taken out in front; what is left to add up are integers. So the Linears could run, and so
could queries keys^T, whose scales belong to tokens on either side. But probs values sums over the
tokens that the values belong to: each term has another scale, and none can be taken out. Per
token, that product is a simulation which no integer kernel can follow; with
`--fake-quant-granularity tensor` it could.
"""
from contextlib import contextmanager

import torch
import torch.nn as nn
import torch.nn.functional as F

from minq.attention import SelfAttention
from minq.flags import UserError
from minq.quant import affine_parameters, fake_quantize, minmax_threshold, value_range


class StraightThrough(torch.autograd.Function):
    """Fake quantization whose gradient is the identity. It keeps nothing for the backward pass."""

    @staticmethod
    def forward(ctx, x, low, high, n_bits, symmetric):
        return fake_quantize(x, *affine_parameters(low, high, n_bits, symmetric), n_bits, symmetric)

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None, None, None, None


def token_range(x):
    """(low, high) of each token, each row of the last dimension: (..., d) -> (..., 1)."""
    x = x.float()
    return x.amin(dim=-1, keepdim=True), x.amax(dim=-1, keepdim=True)  # faster than torch.aminmax


GRANULARITIES = {"token": token_range, "tensor": value_range}


class DynamicQuantizer(nn.Module):
    """Asymmetric fake quantization of an activation by its own range: per token, or per tensor."""

    def __init__(self, n_bits=8, granularity="token"):
        super().__init__()
        self.n_bits, self.granularity, self.active = n_bits, granularity, True

    def forward(self, x):
        if not self.active:
            return x
        low, high = GRANULARITIES[self.granularity](x.detach())
        return StraightThrough.apply(x, low, high, self.n_bits, False)


class FakeQuantLinear(nn.Module):
    """A Linear, whose weight and bias it shares, with both operands of its product quantized: the
    input by a DynamicQuantizer; the weight symmetrically, each of its `parts` with a scale."""

    def __init__(self, linear, w_bits=8, a_bits=8, granularity="token"):
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.w_bits, self.parts = w_bits, getattr(linear, "parts", 1)
        self.input_quantizer = DynamicQuantizer(a_bits, granularity)

    def forward(self, x):
        weight = self.weight.reshape(self.parts, -1)
        if self.input_quantizer.active:
            largest = minmax_threshold(weight.detach(), self.w_bits)
            weight = StraightThrough.apply(weight, -largest, largest, self.w_bits, True)
        return F.linear(self.input_quantizer(x), weight.view_as(self.weight), self.bias)


def fake_quantize_training(model, w_bits=8, a_bits=8, granularity="token"):
    """Quantize the operands of all matrix products of `model` in place, ready to be trained.

    Parameters stay the same objects under the same names: its state_dict fits the float model.
    Returns `model`.
    """
    if model.config.fused:
        raise UserError("--fused has no operands to quantize; leave it out with --fake-quant")
    for name, module in list(model.named_modules()):
        parent, _, child = name.rpartition(".")
        if isinstance(module, nn.Linear) and name != model.final_linear:
            quantized = FakeQuantLinear(module, w_bits, a_bits, granularity)
            setattr(model.get_submodule(parent), child, quantized)
        if isinstance(module, SelfAttention):
            for tap in ("queries_tap", "keys_tap", "values_tap", "probs_tap"):
                setattr(module, tap, DynamicQuantizer(a_bits, granularity))
    return model


@contextmanager
def fake_quantization_off(model):
    """While active, a `fake_quantize_training` model computes in floating point."""
    before = {module: module.active for module in model.modules() if hasattr(module, "active")}
    for quantizer in before:
        quantizer.active = False
    try:
        yield
    finally:
        for quantizer, active in before.items():
            quantizer.active = active
