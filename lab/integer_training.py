"""Training in eight bits on real integers: the blog's forward pass with its Linears run in int8.

    python train_bert.py --fake-quant --fake-quant-linear integer

minq/fake_quant.py rounds both operands of a product and multiplies them in floating point. Here
they stay integers. With a scale s_x and a zero point z for each token t, a scale s_w for the
weights:

    y[t, n] = s_x[t] s_w (sum_k q_x[t, k] q_w[n, k] - z[t] sum_k q_w[n, k]) + b[n]

Only the first sum is work, int8 times int8 into int32 (integer.int_mm). The second is one number
per output, taken anew in each step, since weights move. The losses are the simulation's up to
rounding.

Queries keys^T and probs values stay simulated. The second has no choice: values have a scale for
each token, which is what that product sums over (fake_quant.py). The first would save little: its
inner dimension is a head's, and two scales per token are as much work as the product.

The backward pass is fake_quant.py's: gradients are multiplied in floating point (bf16 or fp32) with
the operands as they were on their grids, straight through the rounding. They are kept as integers
until then, in a quarter of fp32's memory, half of bf16's.
"""
import torch
import torch.nn.functional as F

from lab.integer import SHIFT, int_mm
from minq.fake_quant import GRANULARITIES, LINEARS, FakeQuantLinear
from minq.flags import UserError
from minq.quant import affine_parameters, minmax_threshold, quantize


class IntegerProduct(torch.autograd.Function):
    """x (..., K), W (N, K), b (N,) -> (..., N), in `dtype`. Each of `parts` stacks of W's rows has
    a scale."""

    @staticmethod
    def forward(ctx, x, weight, bias, bits, parts, ranges, dtype):
        w_bits, a_bits = bits
        s_x, z = affine_parameters(*ranges(x), a_bits)  # (..., 1), or () per tensor
        q_x = (quantize(x, s_x, z, a_bits) - SHIFT).to(torch.int8)
        z = z - SHIFT

        groups = weight.reshape(parts, -1)
        threshold = minmax_threshold(groups, w_bits)
        s_w, zero = affine_parameters(-threshold, threshold, w_bits, symmetric=True)  # (parts, 1)
        q_w = quantize(groups, s_w, zero, w_bits, symmetric=True).to(torch.int8).view_as(weight)
        s_w = s_w.repeat_interleave(len(weight) // parts)  # (N,)

        sums = int_mm(q_x.flatten(0, -2), q_w.t()).view(*x.shape[:-1], -1)
        sums -= z.int() * q_w.sum(dim=1, dtype=torch.int32)
        y = sums.float().mul_(s_x).mul_(s_w)
        ctx.save_for_backward(q_x, s_x, z, q_w, s_w)
        ctx.has_bias, ctx.dtype = bias is not None, dtype
        return (y if bias is None else y.add_(bias)).to(dtype)

    @staticmethod
    def backward(ctx, gradient):
        q_x, s_x, z, q_w, s_w = ctx.saved_tensors
        x = q_x.float().sub_(z).mul_(s_x).to(ctx.dtype).flatten(0, -2)  # (M, K)
        weight = q_w.float().mul_(s_w[:, None]).to(ctx.dtype)  # (N, K)
        flat = gradient.flatten(0, -2)  # (M, N)
        of_bias = flat.sum(dim=0, dtype=torch.float32) if ctx.has_bias else None
        return (gradient @ weight).float(), (flat.mT @ x).float(), of_bias, None, None, None, None


class IntegerTrainingLinear(FakeQuantLinear):
    """A FakeQuantLinear that multiplies integers."""

    def __init__(self, linear, w_bits, a_bits, granularity):
        super().__init__(linear, w_bits, a_bits, granularity)
        if max(w_bits, a_bits) > 8:
            raise UserError(f"--fake-quant-linear integer: int8 holds at most 8 bits, not --w-bits "
                            f"{w_bits} --a-bits {a_bits}")

    def forward(self, x):
        if not self.input_quantizer.active:
            return F.linear(x, self.weight, self.bias)
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        bits = self.w_bits, self.input_quantizer.n_bits
        ranges = GRANULARITIES[self.input_quantizer.granularity]
        return IntegerProduct.apply(x, self.weight, self.bias, bits, self.parts, ranges, dtype)


LINEARS["integer"] = IntegerTrainingLinear
