"""Uniform affine quantization (paper, eq. 1), simulated in float32, and the walk that applies it.

    quantized = quantize_model(copy.deepcopy(model), w_bits=8, a_bits=8)
    with calibrating(quantized):
        for inputs, _ in training_batches:      # 16 of them set the activation ranges
            quantized(*inputs)

`quantize_model` puts a WeightQuantizer on every weight and swaps every Tap for an
ActivationQuantizer. The model's forward pass stays as it is.

    fake_quantize_training(model, w_bits=8, a_bits=8)     # and train it: every product sees 8 bits
    with fake_quantization_off(model): ...                # the same weights in floating point
"""
from contextlib import contextmanager

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils import parametrize

from minq.attention import SelfAttention, Tap


# ---- eq. 1 ----

def grid(n_bits, symmetric):
    """(lowest, highest) integer: 0 .. 2^b - 1, or -2^(b-1) .. 2^(b-1) - 1 if symmetric."""
    return (-2 ** (n_bits - 1), 2 ** (n_bits - 1) - 1) if symmetric else (0, 2 ** n_bits - 1)


def affine_parameters(low, high, n_bits, symmetric=False):
    """Scale s and zero point z of the grid that spans [low, high], stretched to contain 0.

    low, high: float tensors of any one shape. Symmetric: z = 0 and s = max(|low|, |high|) / (2^(b-1) - 1).
    """
    low, high = low.clamp(max=0.0), high.clamp(min=0.0)
    q_min, q_max = grid(n_bits, symmetric)
    span = torch.maximum(-low, high) / q_max if symmetric else (high - low) / q_max
    scale = span.clamp(min=torch.finfo(torch.float32).tiny)  # an all-zero tensor has no span
    zero_point = torch.zeros_like(scale) if symmetric else (-low / scale).round().clamp(q_min, q_max)
    return scale, zero_point


def quantize(x, scale, zero_point, n_bits, symmetric=False):
    """x -> integers on the grid (held in float32): clip(round(x / s) + z; 0, 2^b - 1), inside eq. 1.

    Rounds halves to even and multiplies by 1 / s, as PyTorch's own kernels do.
    """
    integers = (x.float() * (1.0 / scale)).round_()
    return (integers if symmetric else integers.add_(zero_point)).clamp_(*grid(n_bits, symmetric))


def fake_quantize(x, scale, zero_point, n_bits, symmetric=False):
    """x rounded to the grid and mapped back: s * (quantize(x) - z) (eq. 1). Keeps the dtype of x."""
    integers = quantize(x, scale, zero_point, n_bits, symmetric)
    return (integers if symmetric else integers.sub_(zero_point)).mul_(scale).to(x.dtype)


# ---- ranges ----

def value_range(x, percentile=100.0):
    """(low, high) of one batch: min and max, or the (100-p)-th and the p-th percentile of all values."""
    if percentile == 100.0:
        return torch.aminmax(x.float())
    return percentile_of(x, 100.0 - percentile), percentile_of(x, percentile)


def percentile_of(x, percentile):
    """The p-th percentile of all values of x, interpolated between the two nearest ranks (as numpy's).

    Only the tail beyond it is sorted: torch.quantile refuses more than 2^24 values.
    """
    x = x.float().flatten()
    rank = (x.numel() - 1) * percentile / 100.0
    below = int(rank)
    upper_tail = percentile >= 50.0
    tail = x.topk(x.numel() - below if upper_tail else below + 2, largest=upper_tail).values
    a, b = (tail[-1], tail[max(len(tail) - 2, 0)]) if upper_tail else (tail[-2], tail[-1])
    return a + (b - a) * (rank - below)


def token_range(x):
    """(low, high) of each token, that is of each row of the last dimension: (..., d) -> (..., 1)."""
    x = x.float()
    return x.amin(dim=-1, keepdim=True), x.amax(dim=-1, keepdim=True)  # on CPUs faster than torch.aminmax


class RunningRange:
    """The range of an activation, batch after batch (sec. C.4).

    The first batch sets it; then low = 0.9 * low + 0.1 * new, and the same for high. With
    `momentum` None it is the lowest and the highest value ever seen.
    """

    def __init__(self, percentile=100.0, momentum=0.9):
        self.percentile, self.momentum = percentile, momentum
        self.low = self.high = None

    def update(self, x):
        low, high = value_range(x, self.percentile)
        if self.low is None:
            self.low, self.high = low, high
        elif self.momentum is None:
            self.low, self.high = torch.minimum(self.low, low), torch.maximum(self.high, high)
        else:
            self.low = self.momentum * self.low + (1 - self.momentum) * low
            self.high = self.momentum * self.high + (1 - self.momentum) * high


A_ESTIMATORS = {
    "minmax": lambda: RunningRange(momentum=None),
    "running": lambda: RunningRange(),
    "p99.99": lambda: RunningRange(percentile=99.99),
    "p99.999": lambda: RunningRange(percentile=99.999),
}


def minmax_threshold(groups, n_bits):
    """max |w| of each row: (G, n) -> (G, 1)"""
    return groups.abs().amax(dim=1, keepdim=True)


def mse_threshold(groups, n_bits):
    """Of the 100 thresholds k/100 * max |w|, the one whose grid has the least squared error (sec. C.4, OPT)."""
    largest = minmax_threshold(groups, n_bits)
    best, least_error = largest, torch.full_like(largest, torch.inf)
    for k in range(1, 101):
        threshold = largest * (k / 100)
        scale, zero_point = affine_parameters(-threshold, threshold, n_bits, symmetric=True)
        error = (fake_quantize(groups, scale, zero_point, n_bits, True) - groups).square().sum(dim=1, keepdim=True)
        best = torch.where(error < least_error, threshold, best)
        least_error = torch.minimum(error, least_error)
    return best


W_ESTIMATORS = {"minmax": minmax_threshold, "mse": mse_threshold}


# ---- quantizers ----

class WeightQuantizer(nn.Module):
    """Symmetric fake quantization of one weight, a parametrization of it: weight -> weight on the grid.

    Per tensor each of `parts` equal stacks of rows (W_q, W_k, W_v) has a scale, per channel each row.
    """

    def __init__(self, weight, n_bits=8, estimator="minmax", granularity="tensor", parts=1):
        super().__init__()
        self.n_bits = n_bits
        self.n_scales = weight.shape[0] if granularity == "channel" and weight.dim() > 1 else parts
        groups = weight.detach().reshape(self.n_scales, -1)
        threshold = W_ESTIMATORS[estimator](groups, n_bits)
        scale, zero_point = affine_parameters(-threshold, threshold, n_bits, symmetric=True)
        self.register_buffer("scale", scale)  # (n_scales, 1)
        self.register_buffer("zero_point", zero_point)

    def forward(self, weight):
        groups = weight.reshape(self.n_scales, -1)
        return fake_quantize(groups, self.scale, self.zero_point, self.n_bits, symmetric=True).view_as(weight)


class ActivationQuantizer(nn.Module):
    """Asymmetric per-tensor fake quantization of an activation, with a static range.

    While `estimating` it updates the range with what arrives and already quantizes with it, so
    that the layers behind it are calibrated on what they will really get.
    """

    def __init__(self, n_bits=8, estimator="running"):
        super().__init__()
        self.n_bits, self.range, self.estimating = n_bits, A_ESTIMATORS[estimator](), False
        self.register_buffer("scale", torch.tensor(torch.nan))  # NaN until calibrated
        self.register_buffer("zero_point", torch.tensor(torch.nan))

    def forward(self, x):
        if self.estimating:
            self.range.update(x)
            self.scale, self.zero_point = affine_parameters(self.range.low, self.range.high, self.n_bits)
        return fake_quantize(x, self.scale, self.zero_point, self.n_bits)


# ---- the walk ----

def quantize_model(model, w_bits=8, a_bits=8, w_estimator="minmax", a_estimator="running", w_granularity="tensor"):
    """Quantize all weights and taps of `model` in place and return it, ready for `calibrating`.

    Stays in floating point: what the model lists in `float_modules` (the final layer of BERT and
    OPT, sec. 5), gates, and biases. A tied output layer keeps the float table.
    """
    gates = [f"{name}.gate" for name, module in model.named_modules() if isinstance(module, SelfAttention)]
    stays_float = tuple(f"{name}." for name in (*model.float_modules, *gates))
    for name, module in list(model.named_modules()):
        if f"{name}.".startswith(stays_float):
            continue
        if isinstance(module, Tap):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, ActivationQuantizer(a_bits, a_estimator))
        if isinstance(module, (nn.Linear, nn.Embedding, nn.LayerNorm)):
            quantizer = WeightQuantizer(module.weight, w_bits, w_estimator, w_granularity, getattr(module, "parts", 1))
            parametrize.register_parametrization(module, "weight", quantizer)
    return model.to(next(model.parameters()).device).eval()


@contextmanager
def calibrating(model):
    """While active, the batches that run through a quantized `model` set its activation ranges."""
    quantizers = [module for module in model.modules() if isinstance(module, ActivationQuantizer)]
    for quantizer in quantizers:
        quantizer.estimating = True
    try:
        with torch.no_grad(), parametrize.cached():
            yield
    finally:
        for quantizer in quantizers:
            quantizer.estimating = False


# ---- fake quantization from the first training step (the blog) ----
#
# It sits at the operands of each matrix product, with ranges that follow what arrives: inputs and weights
# of each Linear, queries and keys, probabilities and values. What a norm hands to the residual stream,
# what a gate sees and the gate itself stay in floating point, and so does the final linear layer.

class StraightThrough(torch.autograd.Function):
    """Fake quantization whose gradient is the identity. It keeps nothing for the backward pass."""

    @staticmethod
    def forward(ctx, x, low, high, n_bits, symmetric):
        return fake_quantize(x, *affine_parameters(low, high, n_bits, symmetric), n_bits, symmetric)

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None, None, None, None


GRANULARITIES = {"token": token_range, "tensor": value_range}


class DynamicQuantizer(nn.Module):
    """Asymmetric fake quantization of an activation by its own range: of each token, or of the tensor.

    A token is a row of the last dimension. Per token, the scales of the values V lie along the dimension that
    probs @ V sums over: an integer kernel could not take them out of the sum. This simulates; it cannot be run.
    """
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


def fake_quantize_training(model, w_bits=8, a_bits=8, granularity="token"):
    """Quantize the operands of all matrix products of `model` in place, ready to be trained, and return it.

    Parameters stay the same objects under the same names: its state_dict fits the float model.
    """
    for name, module in list(model.named_modules()):
        parent, _, child = name.rpartition(".")
        if isinstance(module, nn.Linear) and name != model.final_linear:
            setattr(model.get_submodule(parent), child, FakeQuantLinear(module, w_bits, a_bits, granularity))
        if isinstance(module, SelfAttention):
            for tap in ("queries_tap", "keys_tap", "values_tap", "probs_tap"):
                setattr(module, tap, DynamicQuantizer(a_bits, granularity))
    return model


@contextmanager
def fake_quantization_off(model):
    """While active, a `fake_quantize_training` model computes in floating point."""
    quantizers = [module for module in model.modules() if isinstance(module, (DynamicQuantizer, DynamicWeightQuantizer))]
    for quantizer in quantizers:
        quantizer.active = False
    try:
        yield
    finally:
        for quantizer in quantizers:
            quantizer.active = True
