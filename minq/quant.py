"""Uniform affine quantization (paper, eq. 1), simulated in float32, and the walk that applies it.

    quantized = quantize_model(copy.deepcopy(model), w_bits=8, a_bits=8)
    with calibrating(quantized):
        for inputs, _ in training_batches:      # 16 of them set the activation ranges
            quantized(*inputs)

`quantize_model` puts a WeightQuantizer on every weight and swaps every Tap for an
ActivationQuantizer. The model's forward pass stays as it is. (Training in eight bits: fake_quant.py.)
"""
import math
from contextlib import contextmanager

import torch
import torch.nn as nn
from torch.nn.utils import parametrize

from minq.attention import SelfAttention, Tap
from minq.errors import UserError


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

    torch.quantile refuses more than 2^24 values.
    """
    x = x.float().flatten()
    rank = (x.numel() - 1) * percentile / 100.0
    a, b = (x.kthvalue(k + 1).values for k in (math.floor(rank), math.ceil(rank)))
    return a + (b - a) * (rank % 1)


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


def minmax_threshold(groups, n_bits, symmetric=True):
    """max |w| of each row: (G, n) -> (G, 1)"""
    return groups.abs().amax(dim=1, keepdim=True)


def mse_threshold(groups, n_bits, symmetric=True):
    """Of the 100 thresholds k/100 * max |w|, the one whose grid has the least squared error (sec. C.4, OPT)."""
    largest = minmax_threshold(groups, n_bits)
    best, least_error = largest, torch.full_like(largest, torch.inf)
    for k in range(1, 101):
        threshold = largest * (k / 100)
        grid_of = affine_parameters(-threshold * symmetric, threshold, n_bits, symmetric)
        on_grid = fake_quantize(groups, *grid_of, n_bits, symmetric)
        error = (on_grid - groups).square().sum(dim=1, keepdim=True)
        best = torch.where(error < least_error, threshold, best)
        least_error = torch.minimum(error, least_error)
    return best


W_ESTIMATORS = {"minmax": minmax_threshold, "mse": mse_threshold}


# ---- quantizers ----

class WeightQuantizer(nn.Module):
    """Fake quantization of one weight, a parametrization of it: weight -> weight on the grid.

    Symmetric, unless no weight is negative (LayerNorm's gamma, mostly): then on the unsigned grid
    0 .. 2^b - 1, twice as fine, as the authors do. Per tensor each of `parts` equal stacks of rows
    (W_q, W_k, W_v) has a scale, per channel each row.
    """

    active = True

    def __init__(self, weight, n_bits=8, estimator="minmax", granularity="tensor", parts=1):
        super().__init__()
        self.n_bits, self.symmetric = n_bits, bool((weight < 0).any())
        self.n_scales = weight.shape[0] if granularity == "channel" and weight.dim() > 1 else parts
        groups = weight.detach().reshape(self.n_scales, -1)
        threshold = W_ESTIMATORS[estimator](groups, n_bits, self.symmetric)
        low = -threshold * self.symmetric  # an asymmetric grid from 0 on has the zero point 0
        scale, zero_point = affine_parameters(low, threshold, n_bits, self.symmetric)
        self.register_buffer("scale", scale)  # (n_scales, 1)
        self.register_buffer("zero_point", zero_point)

    def forward(self, weight):
        if not self.active:
            return weight
        groups = weight.reshape(self.n_scales, -1)
        on_grid = fake_quantize(groups, self.scale, self.zero_point, self.n_bits, self.symmetric)
        return on_grid.view_as(weight)


class ActivationQuantizer(nn.Module):
    """Asymmetric per-tensor fake quantization of an activation, with a static range.

    While `estimating` it updates the range with what arrives and already quantizes with it, so
    that the layers behind it are calibrated on what they will really get.
    """
    estimating, active = False, True

    def __init__(self, n_bits=8, estimator="running"):
        super().__init__()
        self.n_bits, self.range = n_bits, A_ESTIMATORS[estimator]()
        self.register_buffer("scale", torch.tensor(torch.nan))  # NaN until calibrated
        self.register_buffer("zero_point", torch.tensor(torch.nan))

    def forward(self, x):
        if self.estimating:
            self.observe(x)
        return self.on_grid(x) if self.active else x

    def observe(self, x):
        self.range.update(x)
        self.scale, self.zero_point = affine_parameters(self.range.low, self.range.high, self.n_bits)

    def on_grid(self, x):
        return fake_quantize(x, self.scale, self.zero_point, self.n_bits)


# ---- the walk ----

def quantize_model(model, w_bits=8, a_bits=8, w_estimator="minmax", a_estimator="running",
                   w_granularity="tensor", a_quantizer=ActivationQuantizer):
    """Quantize all weights and taps of `model` in place and return it, ready for `calibrating`.

    Stays in floating point: what the model lists in `float_modules` (the final layer of BERT and
    OPT, sec. 5), gates, and biases. A tied output layer keeps the float table.
    """
    modules = list(model.named_modules())
    gates = [f"{name}.gate" for name, module in modules if isinstance(module, SelfAttention)]
    stays_float = tuple(f"{name}." for name in (*model.float_modules, *gates))
    for name, module in modules:
        if f"{name}.".startswith(stays_float):
            continue
        if isinstance(module, Tap):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, a_quantizer(a_bits, a_estimator))
        if isinstance(getattr(module, "weight", None), nn.Parameter):
            parts = getattr(module, "parts", 1)
            quantizer = WeightQuantizer(module.weight, w_bits, w_estimator, w_granularity, parts)
            parametrize.register_parametrization(module, "weight", quantizer)
    return model.to(next(model.parameters()).device).eval()


@contextmanager
def switched(modules, **attributes):
    """While active, all `modules` have these attributes instead of their class's."""
    for module in modules:
        vars(module).update(attributes)
    try:
        yield
    finally:
        for module in modules:
            for name in attributes:
                del vars(module)[name]


@contextmanager
def calibrating(model):
    """While active, the batches that run through a quantized `model` set its activation ranges.

    Raises UserError at the end, naming the tap, where a range has not come out finite.
    """
    taps = {name: m for name, m in model.named_modules() if isinstance(m, ActivationQuantizer)}
    with switched(taps.values(), estimating=True), torch.no_grad(), parametrize.cached():
        yield
    # what is infinite spoils what comes after it: name the cause, not a NaN behind it
    for name, quantizer in sorted(taps.items(), key=lambda tap: bool(tap[1].scale.isnan().any())):
        if quantizer.range.low is None:
            raise UserError(f"{name}: nothing passed it; a tap that is never called must be None")
        scale, low, high = quantizer.scale.max().item(), quantizer.range.low.item(), quantizer.range.high.item()
        if not math.isfinite(scale):
            raise UserError(f"{name}: its calibrated scale is {scale}; the values range from {low} to {high}")
