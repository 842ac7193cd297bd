"""The calibrated model on real integers: int8 times int8 into int32 (paper, eq. 1; arXiv 1712.05877, sec. 2).

    model = quantize_model(model)
    with calibrating(model): ...
    to_integer(model)              # the same model, the same forward pass, now on int8

quant.py rounds numbers to a grid and multiplies them in floating point. On the blackboard, one output of a
Linear whose input and weights lie on grids, x = s_x (q_x - z) and w = s_w q_w:

    y = sum_k s_x (q_x - z) s_w q_w + b
      = s_x s_w  sum_k q_x q_w  +  (b - s_x s_w z sum_k q_w)
                 ------------       -----------------------
                 int8 into int32    one number an output, known beforehand

The scales leave the sum because they are the same for each k: that is what "per tensor" buys (a scale for each
row of W may leave it, too). The zero point costs nothing: its sum over the weights goes into the bias. So only
the first sum is work, and it is exact: 3072 products of two int8 stay far below 2^31. Two activations, as in
queries keys^T and probs values, have a zero point each, and four sums:

    sum (q_a - z_a) (q_b - z_b) = sum q_a q_b - z_b sum q_a - z_a sum q_b + K z_a z_b

How integers get from a tap to a Linear: a tap hands on `OnGrid`, a tensor of int8 that knows its scale and
zero point, and so do weights. Moving values about keeps it what it is. A product of two of them runs on
integers. Whatever else is done to it (a sum, LayerNorm, a softmax, somebody's new module) sees the floats on
the grid, as in the simulation: nothing has to know which tap feeds which Linear. What a product gives is
float32, until the next tap puts it on a grid again.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from minq.errors import UserError
from minq.quant import ActivationQuantizer, WeightQuantizer, quantize

SHIFT = 128  # the grid 0 .. 255 as int8: integers and zero point both move by it, and q - z stays


# ---- the kernel ----

def int_mm(a, b):
    """Integer product, exact: int8 (M, K), int8 (K, N) -> int32 (M, N)."""
    (M, K), N = a.shape, b.shape[1]
    if a.is_cuda or K == 1 or N == 1:
        # a GPU wants more than 16 rows and multiples of 8 (not tried: none was at hand); on a CPU, PyTorch 2.13
        # leaves the result unwritten where K is 1
        rows, multiple = (17, 8) if a.is_cuda else (1, 2)
        a = F.pad(a, (0, -K % multiple, 0, max(0, rows - M)))
        b = F.pad(b, (0, -N % multiple, 0, -K % multiple))
        return exact_int_mm(a, b)[:M, :N]
    return exact_int_mm(a, b)


def exact_int_mm(a, b):
    if SATURATES and not a.is_cuda:  # b = 2 (b >> 1) + (b & 1): seven bits, and one
        return torch._int_mm(a, b >> 1).mul_(2).add_(torch._int_mm(a, b & 1))
    return torch._int_mm(a, b)


def saturates():
    """Does this CPU add two products in 16 bits, as those without VNNI do? Then sums stop at 32767."""
    a = torch.full((16, 64), 127, dtype=torch.int8)
    return bool((torch._int_mm(a, a.mT) != 64 * 127 ** 2).any())


SATURATES = saturates()


def exact_floats(a, b):
    """int8 (..., M, K), (..., K, N) -> the same integers as floats whose product a @ b is exact.

    PyTorch has no batched kernel for int8, so floating point multiplies the integers. That is the same: sums of
    up to 1024 products of two int8 stay below 2^24, where float32 holds every integer; float64 up to 2^53.
    """
    exact = torch.float32 if a.shape[-1] <= 1024 else torch.float64
    return a.to(exact), b.to(exact)


# ---- a tensor of integers ----

class OnGrid(Tensor):
    """Integers that stand for scale * (integers - zero_point). To all but the RULES it is those floats.

    scale, zero_point: tensors without dimensions; a weight's scale may be one for each row, (N, 1).
    What lies in the tensor itself is of the right shape and type, and in eager mode nobody reads it.
    """

    integers: Tensor
    scale: Tensor
    zero_point: Tensor
    row_sum: Tensor  # of a weight only, (N,)

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if function in METADATA:
                return function(*args, **kwargs)
            if function in IN_PLACE:
                raise TypeError(f"{function.__name__}: a tap's integers cannot be changed in place")
            rule = RULES.get(function)
            if rule is not None:
                result = rule(function, *args, **kwargs)
                if result is not NotImplemented:
                    return result
            return function(*floats(args), **{key: floats(value) for key, value in kwargs.items()})

    def unflatten(self, *args):  # torch.compile cannot see through Tensor's own
        return torch.unflatten(self, *args)


def on_grid(integers, scale, zero_point):
    if torch.compiler.is_compiling():  # it overlooks an OnGrid within a list: then these are read, else never computed
        inside = (integers.float() - zero_point) * scale
    else:
        inside = scale.flatten()[0].expand(integers.shape)
    x = inside.as_subclass(OnGrid)
    x.integers, x.scale, x.zero_point = integers, scale, zero_point
    return x


def floats(x):
    """The floats that an OnGrid stands for, also inside lists and tuples; everything else as it is."""
    if isinstance(x, OnGrid):
        return x.integers.float().sub_(x.zero_point).mul_(x.scale)
    return type(x)(map(floats, x)) if type(x) in (list, tuple) else x


# ---- what OnGrid does as integers: function -> rule; NotImplemented: not with these arguments ----

def moved(function, x, *args, **kwargs):
    """Values in another order, or some of them."""
    if not isinstance(x, OnGrid) or x.scale.dim() > 0:
        return NotImplemented
    return on_grid(function(x.integers, *args, **kwargs), x.scale, x.zero_point)


def scaled(function, x, number):
    """Times a number, as queries are: into the scale."""
    if not isinstance(x, OnGrid) or not isinstance(number, (int, float)):
        return NotImplemented
    return on_grid(x.integers, x.scale * number, x.zero_point)


def embedded(function, tokens, table, *args, **kwargs):
    """Rows of a table: gathered as integers, to be scaled afterwards."""
    if not isinstance(table, OnGrid):
        return NotImplemented
    scale = F.embedding(tokens, table.scale) if table.scale.dim() > 0 else table.scale  # (B, T, 1), or ()
    return on_grid(function(tokens, table.integers, *args, **kwargs), scale, table.zero_point)


def linear(function, x, weight, bias=None):
    """x (..., K), W (N, K), b (N,) -> s_x s_w (q_x W^T) + (b - s_x s_w z sum_k q_w), float32 (..., N)"""
    if not (isinstance(x, OnGrid) and isinstance(weight, OnGrid)) or x.scale.dim() > 0:
        return NotImplemented
    scale = x.scale * weight.scale.flatten()  # (1,) or (N,)
    offset = scale * x.zero_point * weight.row_sum  # (N,)
    y = times_weight(x.integers.flatten(0, -2), weight.integers).float()
    y = y.mul_(scale).add_(-offset if bias is None else bias - offset)
    return y.view(*x.shape[:-1], -1)


def times_weight(x, weight):
    """sum_k q_x q_w: (M, K), (N, K) -> int32 (M, N)"""
    if weight.dtype == torch.int8:
        return int_mm(x, weight.t())
    signed = (weight ^ SHIFT).view(torch.int8)  # no weight is negative, 0 .. 255: q_w = (q_w - 128) + 128
    return int_mm(x, signed.t()) + SHIFT * x.sum(dim=1, keepdim=True, dtype=torch.int32)


def product(function, a, b):
    """a (..., M, K), b (..., K, N), both activations -> float32 (..., M, N)"""
    if not (isinstance(a, OnGrid) and isinstance(b, OnGrid)) or a.shape[:-2] != b.shape[:-2]:
        return NotImplemented
    q_a, q_b = exact_floats(a.integers, b.integers)
    K = q_a.shape[-1]
    rows = b.zero_point * q_a.sum(dim=-1, keepdim=True)
    columns = a.zero_point * (q_b.sum(dim=-2, keepdim=True) - K * b.zero_point)
    return (q_a @ q_b).sub_(rows).sub_(columns).float().mul_(a.scale * b.scale)


def getter(name):
    """The function behind a property of tensors."""
    return getattr(Tensor, name).__get__


MOVES = (Tensor.view, Tensor.reshape, Tensor.flatten, torch.unflatten, Tensor.squeeze, Tensor.unsqueeze, Tensor.transpose,
         Tensor.permute, getter("mT"), Tensor.__getitem__, Tensor.contiguous, Tensor.detach, F.dropout)
RULES: dict = {F.linear: linear, F.embedding: embedded, Tensor.matmul: product, torch.matmul: product,
         Tensor.mul: scaled, **dict.fromkeys(MOVES, moved)}
METADATA = {getter("shape"), getter("dtype"), getter("device"), Tensor.size, Tensor.dim, Tensor.__len__}
IN_PLACE = {getattr(Tensor, name) for name in dir(Tensor) if name.endswith("_") and not name.endswith("__")} | {Tensor.__setitem__}


# ---- the walk ----

class IntegerWeight(nn.Module):
    """In a WeightQuantizer's place: the parametrization of a weight that is held as int8, or uint8."""

    def __init__(self, quantizer, integers):
        super().__init__()
        n, scale = quantizer.n_scales, quantizer.scale  # (n, 1)
        self.register_buffer("scale", scale.repeat_interleave(len(integers) // n, dim=0) if n > 1 else scale.squeeze())
        self.register_buffer("zero_point", torch.zeros_like(scale[0, 0]), persistent=False)
        self.register_buffer("row_sum", integers.flatten(1).sum(dim=1).float() if integers.dim() > 1 else None)

    def forward(self, integers):
        weight = on_grid(integers, self.scale, self.zero_point)
        weight.row_sum = self.row_sum
        return weight


class IntegerTap(nn.Module):
    """In an ActivationQuantizer's place: float -> OnGrid."""
    scale: Tensor
    zero_point: Tensor

    def __init__(self, quantizer):
        super().__init__()
        self.n_bits = quantizer.n_bits
        self.register_buffer("scale", quantizer.scale)
        self.register_buffer("zero_point", quantizer.zero_point)

    def forward(self, x):
        integers = quantize(x, self.scale, self.zero_point, self.n_bits).sub_(SHIFT)
        return on_grid(integers.to(torch.int8), self.scale, self.zero_point - SHIFT)


def to_integer(model):
    """Swap the quantizers of a calibrated model for integers, in place, and return it: it can only be evaluated.

    What has no quantizer, or one of another kind (remedies.py), computes as before. Raises UserError above
    8 bits, and where a range is not calibrated.
    """
    for name, module in list(model.named_modules()):
        place, _, child = name.rpartition(".")
        if type(module) is ActivationQuantizer:
            setattr(model.get_submodule(place), child, IntegerTap(checked(module, name)))
        if isinstance(module, WeightQuantizer):
            hold_integers(model.get_submodule(place), checked(module, name))
    return model.requires_grad_(False).eval()


def checked(quantizer, name):
    if quantizer.n_bits > 8:
        raise UserError(f"{name}: {quantizer.n_bits} bits; int8 holds at most 8")
    if not quantizer.scale.isfinite().all():
        raise UserError(f"{name}: not calibrated, its scale is {quantizer.scale.max().item()}")
    return quantizer


def hold_integers(parametrizations, quantizer):
    """Of a weight with all that is done to it: float `original` and quantizer -> int8 `original`."""
    weight = parametrizations.original.detach()
    groups = weight.reshape(quantizer.n_scales, -1)
    integers = quantize(groups, quantizer.scale, quantizer.zero_point, quantizer.n_bits, quantizer.symmetric)
    integers = integers.to(torch.int8 if quantizer.symmetric else torch.uint8).view_as(weight)
    del parametrizations.original  # a tied output layer keeps it
    parametrizations.register_buffer("original", integers)
    parametrizations[0] = IntegerWeight(quantizer, integers)
