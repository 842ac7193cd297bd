"""The calibrated model on real integers: int8 times int8 into int32 (eq. 1; arXiv 1712.05877).

    python -m lab.integer runs/bert-vanilla-s0      the metric on integers, and the size

    model = to_integer(quantized)                   # a copy, whose Linears multiply int8

quant.py rounds numbers to a grid and multiplies them in floating point. On the blackboard, one
output of a Linear whose input and weights lie on grids, x = s_x (q_x - z) and w = s_w q_w:

    y = sum_k s_x (q_x - z) s_w q_w + b
      = s_x s_w (sum_k q_x q_w  -  z sum_k q_w)  +  b
                 -------------     -----------
                 int8 into int32   one integer per output, known beforehand

The scales leave the sum because they are the same for each k: that is what "per tensor" buys (a
scale for each row of W may leave it, too). The zero point costs next to nothing. So only the first
sum is work. Both are exact, and they are subtracted as integers, since float32 holds integers up to
2^24 only: 3072 products stay far below 2^31.

A block has four such Linears, and each has its tap, whose grid its input lies on (`pairs`). Where
a tap goes straight into its Linear, the Linear does the tap's rounding, too. Inside the FFN only
integers travel: ffn_up knows the grid that comes next, and puts GELU's output on it. What else is
quantized (embeddings, LayerNorm, attention's two products) computes with floats on the grid.

The metric is the simulation's to three or four digits: float32 rounds its sums, integers need not,
so that a value halfway between two points of the next grid may fall to the other side.
"""
import copy

import torch
import torch.nn as nn

from lab.damage import last_states, scores
from lab.opened import open_runs
from lab.tables import markdown, write_json
from minq import flags
from minq.attention import Tap
from minq.flags import UserError
from minq.quant import ActivationQuantizer, quantize, quantize_model

SHIFT = 128  # the grid 0 .. 255 as int8: integers and zero point both move by it, and q - z stays


# ---- the kernels ----

def int_mm(a, b):
    """Integer product, exact: int8 (M, K), int8 (N, K) -> int32 (M, N), the sums over K.

    float64 holds integers up to 2^53. PyTorch's own product of int8 is many times as fast, where it
    is known to be exact: on this CPU, with no dimension of size 1 (whose stride misleads it).
    """
    if SATURATES or not a.is_cpu or min(*a.shape, len(b)) < 2:
        return (a.double() @ b.double().t()).to(torch.int32)
    return torch._int_mm(a, b.t())


# Does this CPU add two products in 16 bits, as those without VNNI do? Sums stop at 32767: inside,
# 127 becomes 127 + 128, and 2 * 255 * 127 is more.
PROBE = torch.full((16, 64), 127, dtype=torch.int8)
SATURATES = bool((torch._int_mm(PROBE, PROBE.mT) != 64 * 127 ** 2).any())
# A kernel of oneDNN does at once what IntegerLinear does around int_mm. It cannot be compiled; in a
# compiled model int_mm is as fast, since what surrounds it is compiled, too. (Tried on x86 only.)
ONEDNN = not SATURATES and torch.backends.cpu.get_cpu_capability().startswith("AVX")


# ---- a Linear on integers ----

class IntegerLinear(nn.Module):
    """A Linear whose weight is int8, and whose input is put on the grid of its tap, unless it comes
    as integers on it. It gives y in float32; or, if it knows the `next` tap, activation(y) as
    integers, uint8, on that one's grid. (`post_op` is oneDNN's name of the activation.)"""

    def __init__(self, linear, tap):
        super().__init__()
        scale, _, n_bits, _ = linear.weight_grid
        rows = len(linear.weight) // len(scale)
        row_scale = scale.repeat_interleave(rows, dim=0)  # (N, 1)
        integers = (linear.weight / row_scale).round()
        self.grid, self.activation, self.next, self.post_op = tap, nn.Identity(), None, "none"
        self.register_buffer("integers", integers.to(torch.int8))  # (N, K)
        self.register_buffer("scale", tap.scale * row_scale[:, 0])  # s_x s_w, (N,)
        shift = (tap.zero_point.int() - SHIFT) * self.integers.sum(dim=1, dtype=torch.int32)
        self.register_buffer("shift", shift)  # (z - SHIFT) sum_k q_w, (N,)
        self.register_buffer("bias", shift * 0.0 if linear.bias is None else linear.bias)
        if ONEDNN:
            self.packed = torch.ops.onednn.qlinear_prepack(self.integers.cpu(), None)

    def forward(self, x):
        q = (x if x.dtype == torch.uint8 else on_grid(x, self.grid)).flatten(0, -2)
        if ONEDNN and q.is_cpu and not torch.compiler.is_compiling():
            y = self.at_once(q)
        else:
            shifted = (q - SHIFT).view(torch.int8)  # uint8 wraps around
            sums = int_mm(shifted, self.integers).sub_(self.shift)  # exact
            y = self.activation(sums.float().mul_(self.scale).add_(self.bias))
            y = y if self.next is None else on_grid(y, self.next)
        if x.dtype != torch.uint8 and self.next is None:  # int8 has no NaN: its row gets it again
            y[x.flatten(0, -2).amax(dim=-1).isnan()] = torch.nan
        return y.view(*x.shape[:-1], -1)

    def at_once(self, q):
        """The same by one kernel: products, scale, bias, activation, and the next grid."""
        to = (1.0, 0, torch.float32) if self.next is None else (
            self.next.scale.item(), int(self.next.zero_point), torch.uint8)
        y = torch.ops.onednn.qlinear_pointwise(  # weights' zero points are 0
            q, 1.0, int(self.grid.zero_point), self.packed, self.scale, 0 * self.shift, self.bias,
            *to, self.post_op, [], "none")
        return y if self.next is None else y.clamp_(max=2 ** self.next.n_bits - 1)


def on_grid(x, tap):
    """x as integers, uint8, on the grid of a calibrated tap."""
    return quantize(x, tap.scale, tap.zero_point, tap.n_bits).to(torch.uint8)


def pairs(model):
    """(module, name of its Linear, module of its tap, name of that tap, does it go straight into
    the Linear, so that nothing else can read it?), four per block."""
    before = model, "embedding_norm_tap"  # post-LN: a layer's input is the output of the one before
    for block in model.layers:
        attention, into_attention, into_ffn = block.attention, (block, "norm1_tap"), "norm2_tap"
        if not block.pre_norm:
            into_attention, into_ffn, before = before, "norm1_tap", (block, "layer_output_tap")
        yield attention, "qkv", *into_attention, False
        yield attention, "proj", attention, "context_tap", True
        yield block, "ffn_up", block, into_ffn, False
        yield block, "ffn_down", block, "ffn_hidden_tap", True


@torch.no_grad()
def to_integer(model):
    """A copy of a calibrated model (quantize_model's) that multiplies integers: for evaluation.

    Raises UserError where int8 cannot follow: more than 8 bits, a range that is not calibrated, a
    quantizer of another kind, a scale for part of a row, a module that is more than a Linear.
    """
    model = copy.deepcopy(model)
    for parent, name, place, tap_name, straight in pairs(model):
        linear, tap = getattr(parent, name), getattr(place, tap_name)
        setattr(parent, name, IntegerLinear(*checked(linear, tap, f"{name} behind {tap_name}")))
        if straight:
            setattr(place, tap_name, Tap())  # its Linear rounds
    for block in model.layers:
        if model.config.activation in ("gelu", "relu"):  # as oneDNN calls them, too
            block.ffn_up.next, block.ffn_up.post_op = block.ffn_down.grid, model.config.activation
            block.ffn_up.activation, block.activation = block.activation, nn.Identity()
    return model.requires_grad_(False).eval()


def checked(linear, tap, name):
    grid = getattr(linear, "weight_grid", None)
    if type(tap) is not ActivationQuantizer or grid is None:
        raise UserError(f"{name}: expected a static grid for the tensor, and one for the weights")
    if type(linear).forward is not nn.Linear.forward:
        raise UserError(f"{name}: {type(linear).__name__} computes something else than a Linear")
    scale, _, n_bits, symmetric = grid
    if max(n_bits, tap.n_bits) > 8 or not symmetric:
        raise UserError(f"{name}: int8 holds at most 8 bits, and weights of either sign")
    if len(linear.weight) % len(scale):
        raise UserError(f"{name}: a row of weights needs one scale; {len(scale)} do not divide "
                        f"{len(linear.weight)} rows")
    if linear.in_features > 2 ** 16:
        raise UserError(f"{name}: int32 holds 65,536 products of int8, not {linear.in_features}")
    if not tap.scale.isfinite():
        raise UserError(f"{name}: not calibrated, its scale is {tap.scale.item()}")
    return linear, tap


# ---- what it is worth ----

@flags.one_line_errors
def main(argv=None):
    parser = flags.Parser(__doc__)
    flags.add_run_flags(parser, seeds=None)
    parser.add_argument("--bits", type=flags.number(int, low=2, high=8), default=8,
                        help="of weights and activations, 2 to 8")
    args = parser.parse_args(argv)
    rows = []
    for run in open_runs(args):
        simulated = quantize_model(run.model, args.bits, args.bits)
        run.calibrate(simulated, 0, args.batches)
        model, states = to_integer(simulated), list(last_states(run, run.model, args.eval_batches))
        metric = lambda model: scores(run, model, states, args.eval_batches)["metric"]
        rows.append({
            "run": run.name, "metric": run.model.metric, "bits": args.bits,
            "simulated": metric(simulated), "integer": metric(model),
            "bytes": sum(x.nbytes for x in model.state_dict().values()),
            "bytes_fp32": sum(x.nbytes for x in run.model.parameters())})
    write_json(args.json, rows)
    print(markdown([{
        "run": row["run"], "simulated": f"{row['simulated']:.4g}",
        "on integers": f"{row['integer']:.4g}",
        "MB (fp32)": f"{row['bytes'] / 1e6:.3g} ({row['bytes_fp32'] / 1e6:.3g})"} for row in rows]))


if __name__ == "__main__":
    main()
