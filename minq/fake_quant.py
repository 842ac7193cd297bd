"""Training in eight bits from the first step (the blog).

    fake_quantize_training(model, w_bits=8, a_bits=8)     # and train it: every product sees 8 bits
    with fake_quantization_off(model): ...                # the same weights in floating point

A transformer's forward pass multiplies matrices in six places of a layer, and each product has two
operands. Both are rounded to a grid (eq. 1) just before they meet:

    product                     left operand            right operand
    x W_q, x W_k, x W_v         what the layer gets     three weights
    queries keys^T              queries                 keys
    probs values                probs, before dropout   values
    context W_o                 what all heads hand on  a weight
    x W_up                      what the FFN gets       a weight
    hidden W_down               the FFN's hidden units  a weight

Activations have a scale and a zero point of their own for every token, taken from the token as it
arrives: dynamic, nothing to calibrate. Weights are symmetric, with a scale per tensor. Nothing else is
rounded: the residual stream, LayerNorms, the softmax, gates, biases and the final linear layer stay
in floating point. (After training, quant.py rounds every named tensor instead, with fixed ranges.)

Rounding is a staircase: its gradient is 0 almost everywhere, and nothing would learn. So the backward
pass takes it for the identity (`StraightThrough`): the gradient of the rounded operand is handed to
the original as it is. Weights are kept and updated in floating point; the grid sees them anew each step.

Could integers compute this? In a sum over k of x[t, k] w[k, n] a scale per token t or per tensor can be
taken out in front; what is left to add up are integers. So the Linears could run, and so could
queries keys^T, whose scales belong to tokens on either side. But probs values sums over the tokens that
the values belong to: each term has another scale, and none can be taken out. Per token, that product is
a simulation which no integer kernel can follow; with `--fake-quant-granularity tensor` it could.
`--integer` (integer_training.py) runs the Linears so.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F

from minq.attention import SelfAttention
from minq.quant import affine_parameters, fake_quantize, minmax_threshold, switched, value_range


class StraightThrough(torch.autograd.Function):
    """Fake quantization whose gradient is the identity. It keeps nothing for the backward pass."""

    @staticmethod
    def forward(ctx, x, low, high, n_bits, symmetric):
        return fake_quantize(x, *affine_parameters(low, high, n_bits, symmetric), n_bits, symmetric)

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None, None, None, None


def token_range(x):
    """(low, high) of each token, that is of each row of the last dimension: (..., d) -> (..., 1)."""
    x = x.float()
    return x.amin(dim=-1, keepdim=True), x.amax(dim=-1, keepdim=True)  # on CPUs faster than torch.aminmax


GRANULARITIES = {"token": token_range, "tensor": value_range}


class DynamicQuantizer(nn.Module):
    """Asymmetric fake quantization of an activation by its own range: of each token, or of the tensor."""
    active = True

    def __init__(self, n_bits=8, granularity="token"):
        super().__init__()
        self.n_bits, self.granularity = n_bits, granularity

    def forward(self, x):
        if not self.active:
            return x
        low, high = GRANULARITIES[self.granularity](x.detach())
        return StraightThrough.apply(x, low, high, self.n_bits, False)


class DynamicWeightQuantizer(nn.Module):
    """Symmetric per-tensor fake quantization of a weight, a scale for each of its `parts` (W_q, W_k, W_v)."""
    active = True

    def __init__(self, n_bits=8, parts=1):
        super().__init__()
        self.n_bits, self.parts = n_bits, parts

    def forward(self, weight):
        if not self.active:
            return weight
        groups = weight.reshape(self.parts, -1)
        threshold = minmax_threshold(groups.detach(), self.n_bits)
        return StraightThrough.apply(groups, -threshold, threshold, self.n_bits, True).view_as(weight)


class FakeQuantLinear(nn.Module):
    """A Linear, whose weight and bias it shares, with both operands of its product quantized."""

    def __init__(self, linear, w_bits=8, a_bits=8, granularity="token"):
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.input_quantizer = DynamicQuantizer(a_bits, granularity)
        self.weight_quantizer = DynamicWeightQuantizer(w_bits, getattr(linear, "parts", 1))

    def forward(self, x):
        return F.linear(self.input_quantizer(x), self.weight_quantizer(self.weight), self.bias)


def fake_quantize_training(model, w_bits=8, a_bits=8, granularity="token", linear=FakeQuantLinear):
    """Quantize the operands of all matrix products of `model` in place, ready to be trained, and return it.

    linear: what stands in for an nn.Linear; integer_training.py has another.

    Parameters stay the same objects under the same names: its state_dict fits the float model.
    """
    for name, module in list(model.named_modules()):
        parent, _, child = name.rpartition(".")
        if isinstance(module, nn.Linear) and name != model.final_linear:
            setattr(model.get_submodule(parent), child, linear(module, w_bits, a_bits, granularity))
        if isinstance(module, SelfAttention):
            for tap in ("queries_tap", "keys_tap", "values_tap", "probs_tap"):
                setattr(module, tap, DynamicQuantizer(a_bits, granularity))
    return model


def fake_quantization_off(model):
    """A context in which a `fake_quantize_training` model computes in floating point."""
    kinds = (DynamicQuantizer, DynamicWeightQuantizer)
    return switched([module for module in model.modules() if isinstance(module, kinds)], active=False)
