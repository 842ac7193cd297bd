"""Uniform affine quantization (paper, eq. 1), simulated in float32, and the walk that applies it.

    quantized = quantize_model(model, w_bits=8, a_bits=8)   # a copy
    with calibrating(quantized):
        for inputs, _ in training_batches:      # 16 of them set the activation ranges
            quantized(*inputs)

`quantize_model` puts every weight on its grid and swaps every Tap for an ActivationQuantizer. The
model's forward pass stays as it is. (Training in eight bits: fake_quant.py.)
"""
import copy
from contextlib import contextmanager
from fnmatch import fnmatch

import numpy as np
import torch
import torch.nn as nn

from minq.attention import Tap
from minq.flags import UserError


# ---- eq. 1 ----

def grid(n_bits, symmetric):
    """(lowest, highest) integer: 0 .. 2^b - 1, or -2^(b-1) .. 2^(b-1) - 1 if symmetric."""
    return (-2 ** (n_bits - 1), 2 ** (n_bits - 1) - 1) if symmetric else (0, 2 ** n_bits - 1)


def affine_parameters(low, high, n_bits, symmetric=False):
    """Scale s and zero point z, float32, of the grid that spans [low, high] and contains 0.

    low, high: float tensors of any one shape. Symmetric: z = 0, and s spans max(|low|, |high|).
    """
    low, high = low.float().clamp(max=0.0), high.float().clamp(min=0.0)
    q_min, q_max = grid(n_bits, symmetric)
    span = torch.maximum(-low, high) if symmetric else high - low
    scale = (span / q_max).clamp(min=torch.finfo(torch.float32).tiny)  # all zeros have no span
    zero_point = (-low / scale).round().clamp(q_min, q_max)
    return scale, torch.zeros_like(scale) if symmetric else zero_point


def quantize(x, scale, zero_point, n_bits, symmetric=False):
    """x -> integers on the grid, in float32: clip(round(x / s) + z; 0, 2^b - 1), inside eq. 1.

    Rounds halves to even and multiplies by 1 / s, as PyTorch's own kernels do.
    """
    integers = (x.float() * (1.0 / scale)).round_().add_(zero_point)  # in place: twice as fast
    return integers.clamp_(*grid(n_bits, symmetric))


def fake_quantize(x, scale, zero_point, n_bits, symmetric=False):
    """x rounded to the grid and mapped back: s * (quantize(x) - z) (eq. 1), in the dtype of x."""
    integers = quantize(x, scale, zero_point, n_bits, symmetric)
    return integers.sub_(zero_point).mul_(scale).to(x.dtype)


# ---- ranges of activations ----

def value_range(x, percentile=100.0):
    """(low, high) of one batch: min and max, or the (100-p)-th and the p-th percentile of all."""
    if percentile == 100.0:
        return torch.aminmax(x.float())
    found = np.percentile(x.float().cpu(), (100.0 - percentile, percentile))
    return torch.tensor(found, dtype=torch.float32, device=x.device).unbind()


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


# ---- thresholds of weights: groups (G, n) -> (G, 1) ----

def minmax_threshold(groups, n_bits, symmetric=True):
    """max |w| of each row."""
    return groups.abs().amax(dim=1, keepdim=True)


def mse_threshold(groups, n_bits, symmetric=True):
    """Of 100 thresholds k/100 * max |w| the one with the least squared error (sec. C.4, OPT)."""
    largest = minmax_threshold(groups, n_bits)
    best, least_error = largest, torch.full_like(largest, torch.inf)
    for k in range(1, 101):
        threshold = largest * (k / 100)
        on_grid = fake_quantize(groups, *weight_grid(threshold, n_bits, symmetric))
        error = (on_grid - groups).square().sum(dim=1, keepdim=True)
        best = torch.where(error < least_error, threshold, best)
        least_error = torch.minimum(error, least_error)
    return best


W_ESTIMATORS = {"minmax": minmax_threshold, "mse": mse_threshold}


# ---- quantizers ----

def weight_grid(threshold, n_bits, symmetric):
    """(scale, zero point, bits, symmetric) of weights up to +-threshold. Where none is negative
    (LayerNorm's gamma, mostly) the grid is unsigned, and twice as fine, as the authors do."""
    low = -threshold if symmetric else torch.zeros_like(threshold)
    return *affine_parameters(low, threshold, n_bits, symmetric), n_bits, symmetric


def quantize_weight(weight, n_bits=8, estimator="minmax", granularity="tensor", parts=1):
    """weight -> (weight on its grid, that grid). Per tensor each of `parts` equal stacks of rows
    (W_q, W_k, W_v) has a scale, per channel each row: (G, 1) scales."""
    n_scales = len(weight) if granularity == "channel" and weight.dim() > 1 else parts
    groups, symmetric = weight.detach().float().reshape(n_scales, -1), bool((weight < 0).any())
    threshold = W_ESTIMATORS[estimator](groups, n_bits, symmetric)
    found = weight_grid(threshold, n_bits, symmetric)
    return fake_quantize(groups, *found).view_as(weight).to(weight.dtype), found


class ActivationQuantizer(nn.Module):
    """Asymmetric per-tensor fake quantization of an activation, with a static range.

    While `estimating` it updates the range with what arrives and already quantizes with it, so
    that the layers behind it are calibrated on what they will really get.
    """

    def __init__(self, n_bits=8, estimator="running"):
        super().__init__()
        self.n_bits, self.range, self.estimating = n_bits, A_ESTIMATORS[estimator](), 0
        self.register_buffer("scale", torch.tensor(torch.nan))  # NaN until calibrated
        self.register_buffer("zero_point", torch.tensor(torch.nan))

    def forward(self, x):
        if self.estimating:
            self.observe(x)
        return self.on_grid(x)

    def observe(self, x):
        self.range.update(x)
        low, high = self.range.low, self.range.high
        self.scale, self.zero_point = affine_parameters(low, high, self.n_bits)

    def on_grid(self, x):
        return fake_quantize(x, self.scale, self.zero_point, self.n_bits)


# ---- the walk ----

def quantize_model(model, w_bits=8, a_bits=8, w_estimator="minmax", a_estimator="running",
                   w_granularity="tensor", only="*", quantizer=ActivationQuantizer):
    """A quantized copy of `model`, ready for `calibrating`. Every module's `weight` and every Tap
    is quantized whose name fits the pattern `only`: "*_tap" is all activations, "*.weight" all
    weights, "*ffn_output_tap" one kind of tensor, "layers.0.ffn_output_tap" one tensor.

    Stays in floating point: what a module lists in `float_modules` (the final layer of BERT and
    OPT, sec. 5; gates), and biases. A tied output layer keeps the float table.
    """
    model = copy.deepcopy(model)
    stays_float = []
    for name, module in list(model.named_modules()):
        children = getattr(module, "float_modules", ())
        stays_float += [f"{name}.{child}.".lstrip(".") for child in children]
        if f"{name}.".startswith(tuple(stays_float)):
            continue
        if isinstance(module, Tap) and fnmatch(name, only):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, quantizer(a_bits, a_estimator))
        weight = getattr(module, "weight", None)
        if isinstance(weight, nn.Parameter) and fnmatch(f"{name}.weight", only):
            settings = w_bits, w_estimator, w_granularity, getattr(module, "parts", 1)
            on_grid, module.weight_grid = quantize_weight(weight, *settings)
            module.weight = nn.Parameter(on_grid)
    return model.to(next(model.parameters()).device).eval()


@contextmanager
def calibrating(model):
    """While active, the batches that run through a quantized `model` set its activation ranges.

    Raises UserError at the end, naming the tap, where a range has not come out finite.
    """
    taps = {name: m for name, m in model.named_modules() if isinstance(m, ActivationQuantizer)}
    for tap in taps.values():
        tap.estimating += 1  # a calibration may stand in another
    try:
        with torch.no_grad():
            yield
    finally:
        for tap in taps.values():
            tap.estimating -= 1
    # what is infinite spoils what comes after it: name the cause, not a NaN behind it
    for name, tap in sorted(taps.items(), key=lambda tap: bool(tap[1].scale.isnan().any())):
        if tap.range.low is None:
            raise UserError(f"{name}: nothing passed it; a tap that is never called must be None")
        if not tap.scale.isfinite().all():
            raise UserError(f"{name}: its values range from {tap.range.low.item()} to "
                            f"{tap.range.high.item()}; expected finite ones")
