"""What can be done about outliers after training: the remedies of quantization, side by side.

    python -m lab.remedies runs/bert-vanilla-s0 --bits 8 6 4

The paper's attention keeps outliers from growing. These treat a model that has them. Each entry of
REMEDIES is quantize_model with one thing changed, mostly the quantizer in the taps. Its docstring
says the formula, the source, what stays in floating point, and what a chip would have to do for it.

x is (B, T, d): tokens by hidden dimensions. Tensors of other shapes (queries, scores, a [CLS] token
alone) are quantized as ever, unless a class says otherwise.
"""
import copy
import math
from functools import lru_cache, partial

import torch
import torch.nn as nn
from tqdm import tqdm

from lab.damage import last_states, scores
from lab.opened import open_runs
from lab.remove import limits, removed
from lab.tables import markdown, mean_and_std, remedy_columns, write_json
from minq import flags
from minq.fake_quant import token_range
from minq.outliers import listening
from minq.quant import (A_ESTIMATORS, ActivationQuantizer, affine_parameters, fake_quantize,
                        quantize_model)


# ---- other quantizers ----

class PerToken(ActivationQuantizer):
    """Each token has a scale and a zero point of its own, taken when it arrives (ZeroQuant, Yao et
    al. 2022): a token with an outlier coarsens its own grid only. Nothing is calibrated and nothing
    stays in floating point; but a chip must find each row's range before it can round the row, and
    multiply each row's sums by another scale. (In probs @ values the scales stand inside the sum,
    and no integer kernel can follow: minq/fake_quant.py.)"""

    def on_grid(self, x):
        return fake_quantize(x, *affine_parameters(*token_range(x), self.n_bits), self.n_bits)


class OutlierColumns(ActivationQuantizer):
    """Columns (hidden dimensions) with a value beyond 6 stay in floating point (LLM.int8, Dettmers
    et al. 2022); the others share one grid, made without them. Which columns: those that passed 6
    in calibration. (The paper looks at each input as it arrives, gives the others a scale per
    token, and keeps the columns' weights in fp16, too; here weights stay on their grid.) A chip
    must gather these columns, multiply them in fp16, and add the two products."""
    threshold = 6.0

    def observe(self, x):
        if x.dim() == 3:
            beyond = x.abs().flatten(0, 1).amax(dim=0) > self.threshold  # (d,)
            self.columns = beyond | getattr(self, "columns", beyond)
            x = x if self.columns.all() else x[..., ~self.columns]  # then no grid is used
        super().observe(x)

    def on_grid(self, x):
        on_grid = super().on_grid(x)
        return torch.where(self.columns, x, on_grid) if x.dim() == 3 else on_grid


class Groups(ActivationQuantizer):
    """The hidden dimensions in K groups with a grid each (per-embedding-group, Bondarenko et al.
    2021): an outlier dimension coarsens its own group only. With `permute`, dimensions are first
    sorted by their range in the first batch, so that the wide ones share a group. Nothing stays in
    floating point; a chip adds up K partial products, each in its own scale. A permutation can be
    folded into the weights on either side if all that is added shares it, so the paper has one per
    layer, for the FFN's input, output and sum; here each tap has its own."""

    def __init__(self, n_bits, estimator, K=6, permute=False):
        super().__init__(n_bits, estimator)
        self.K, self.permute, self.estimator = K, permute, estimator

    def observe(self, x):
        super().observe(x)
        if x.dim() != 3:
            return
        if not hasattr(self, "groups"):
            spread = x.amax(dim=(0, 1)) - x.amin(dim=(0, 1))  # (d,)
            order = (spread * self.permute).argsort(stable=True)
            self.groups = order.tensor_split(min(self.K, len(order)))
            self.ranges = [A_ESTIMATORS[self.estimator]() for _ in self.groups]
        scale, zero_point = torch.empty(2, x.shape[-1], device=x.device)
        for group, seen in zip(self.groups, self.ranges):
            seen.update(x[..., group])
            scale[group], zero_point[group] = affine_parameters(seen.low, seen.high, self.n_bits)
        self.scale, self.zero_point = scale, zero_point


@lru_cache
def hadamard(d):
    """An orthogonal (d, d) matrix. Its entries are all +-1 / sqrt(d) where d is 2^k (Sylvester's
    Hadamard matrix), or 2^k times 12 or 20 (those of Paley in its place: 384, 768, 1280). In any
    other d the odd rest is Hartley's transform, where QuaRot has tables."""
    H, rest = torch.ones(1, 1), d
    while rest % 2 == 0 and rest not in (12, 20):
        H, rest = torch.cat((torch.cat((H, H), 1), torch.cat((H, -H), 1))), rest // 2
    q = rest - (rest % 2 == 0)
    k, block = torch.arange(q), torch.ones(rest, rest)
    if q < rest:  # a prime of the form 4 n - 1
        squares = torch.full((q,), -1.0).index_fill(0, k * k % q, 1.0)  # is it one, modulo q?
        block[1:, 0], block[1:, 1:] = -1.0, squares[(k[:, None] - k) % q]
    else:
        block = sum(f(2 * math.pi / q * k[:, None] * k) for f in (torch.cos, torch.sin))
    return torch.kron(H, block) / math.sqrt(d)


class Rotated(ActivationQuantizer):
    """x H, quantize, H^T, with H orthogonal (QuaRot, Ashkboos et al. 2024: a Hadamard matrix): one
    value of M becomes d values of M / sqrt(d). Nothing stays in floating point. In a pre-LN model a
    chip need not know: with gamma folded into the Linears behind each LayerNorm, and its
    subtraction of the mean into those before, H goes into the embedding, W_o and W_down (on the
    output side), H^T into W_qkv, W_up and the output layer (on the input side), and the residual
    stream is rotated throughout. Only the context and the FFN's hidden units must be multiplied as
    they arrive. Post-LN must multiply everywhere: its gamma goes into the next residual sum, too,
    and cannot be folded away."""

    def forward(self, x):
        if x.dim() != 3:
            return super().forward(x)
        H = hadamard(x.shape[-1]).to(x.device)
        return (super().forward(x.float() @ H) @ H.T).to(x.dtype)


class SinkInFloat(ActivationQuantizer):
    """The start token skips all activation quantizers and does not enter their ranges (PrefixQuant,
    Chen et al. 2024, and CushionCache, Son et al. 2024, where it is a prefix of a few tokens,
    searched for). It helps as far as outliers stand there. In a causal model that token never
    changes: its keys and values are computed once, and a chip loads them in fp16. A BERT's [CLS]
    sees the sentence: a chip must compute it in fp16 each time, beside the others. (A ViT's patch
    embedding has no [CLS] yet: there it is the first patch.)"""

    def forward(self, x):
        if x.dim() == 2:
            return super().forward(x)
        return torch.cat((x[..., :1, :], super().forward(x[..., 1:, :])), dim=-2)


# ---- other models: model, calibration inputs -> a copy to be quantized ----

def clamped(model, inputs, sigma, tap="ffn_output"):
    """A copy of `model` in which each layer's `tap` is clamped at mean -+ sigma deviations, static
    limits from calibration (lab/remove.py). It changes what the model computes, and costs what it
    then loses; nothing stays in floating point, and a chip need not know: rounding to a grid that
    ends at the limits clamps. (A percentile does so at every tap, and leaves it to the number of
    outliers how many of them it clips.)"""
    return removed(model, tap, limits(model, inputs, tap, sigma))


@torch.no_grad()
def smooth(model, inputs, alpha=0.5):
    """A smoothed copy of `model`, or None where that is impossible (SmoothQuant, Xiao et al. 2022).

    s_j = max |X_j|^alpha / max |W_j|^(1 - alpha) per hidden dimension j; X / s is folded into gamma
    and beta of the LayerNorm before, s into the columns of W. The floating-point output is the
    same, nothing stays in floating point, and a chip need not know. It reaches what a LayerNorm
    hands to a Linear, and nothing else: a residual sum has no weight behind it that could take s,
    and that is where outliers stand. Post-LN: None, its LayerNorms feed the residual sum as well.
    Norms without a gain: None, they have nothing that could take 1 / s. (Here gamma / s is
    quantized, too; the paper leaves LayerNorm in fp16.)
    """
    if not model.config.pre_norm or model.layers[0].norm1.weight is None:
        return None
    model, peaks = copy.deepcopy(model), {}
    peaks_of = lambda tap, layer: peaks.setdefault((tap, layer), [])
    hear = lambda tap, layer, x: peaks_of(tap, layer).append(x.abs().amax(dim=(0, 1)))
    with listening(model, ("norm1", "norm2"), hear):
        for batch in inputs:
            model(*batch)
    for i, block in enumerate(model.layers):
        s = shift(block.norm1, block.attention.qkv, peaks_of("norm1", i), alpha)
        if block.attention.gate is not None:
            block.attention.gate = UnsmoothedGate(block.attention.gate, s)
        shift(block.norm2, block.ffn_up, peaks_of("norm2", i), alpha)
    return model


class UnsmoothedGate(nn.Module):
    """A gate behind a smoothed LayerNorm: it sees what it saw before, x times s."""

    def __init__(self, gate, s):
        super().__init__()
        self.gate, self.s = gate, s  # s: (d,)

    def forward(self, x, v):
        return self.gate(x * self.s, v)


def shift(norm, linear, peaks, alpha):
    """Divide what `norm` gives by s, (d,), and multiply the columns of `linear`'s weight by it."""
    largest, weight = torch.stack(peaks).amax(dim=0), linear.weight.abs().amax(dim=0)
    s = largest.clamp(min=1e-5) ** alpha / weight.clamp(min=1e-5) ** (1 - alpha)
    for p in norm.parameters():
        p /= s
    linear.weight *= s
    return s


# ---- by name: model, bits, calibration inputs -> a quantized copy to be calibrated, or None ----

def plain(prepare=lambda model, inputs: model, **settings):
    """quantize_model with these settings, after `prepare`. A scale per row of a weight costs a chip
    one more factor per output; ranges by MSE or percentile (sec. C.4) cost it nothing. Neither
    keeps anything in floating point."""
    quantized = lambda model, bits: model and quantize_model(model, bits, bits, **settings)
    return lambda model, bits, inputs: quantized(prepare(model, inputs), bits)  # None stays None


REMEDIES = {
    "none": plain(),
    "weights per channel": plain(w_granularity="channel"),
    "MSE weights, p99.999 activations": plain(w_estimator="mse", a_estimator="p99.999"),
    "clamp at 4 sigma": plain(partial(clamped, sigma=4)),
    "clamp at 6 sigma": plain(partial(clamped, sigma=6)),
    "dynamic per token": plain(quantizer=PerToken),
    "outlier columns in floating point": plain(quantizer=OutlierColumns),
    "SmoothQuant": plain(smooth),
    "6 groups of dimensions": plain(quantizer=partial(Groups, K=6)),
    "6 groups, permuted by range": plain(quantizer=partial(Groups, K=6, permute=True)),
    "Hadamard rotation": plain(quantizer=Rotated),
    "start token in floating point": plain(quantizer=SinkInFloat),
    "per token, weights per channel": plain(quantizer=PerToken, w_granularity="channel"),
}


def floats(model):
    """What a quantized model keeps in floating point because of its remedy, in words."""
    kept = [m.columns for m in model.modules() if hasattr(m, "columns")]
    if kept:
        return f"{sum(int(columns.sum()) for columns in kept)} of {sum(map(len, kept))} columns"
    return "1 token" * any(isinstance(module, SinkInFloat) for module in model.modules())


def compare(run, widths=(8, 6, 4), seeds=3, batches=16, eval_batches=None):
    """[{remedy, quantized: {"8x8": {mean, std, all, sqnr: {mean, std, all}}, ...}, floats}]; one
    that does not apply has an empty `quantized`. `floats` is of the first width and calibration."""
    rows, states = [], list(last_states(run, run.model, eval_batches))
    for name, remedy in tqdm(REMEDIES.items(), unit="remedy", leave=False):
        rows.append({"remedy": name, "quantized": {}, "floats": ""})
        for bits in widths:
            models = [remedy(run.model, bits, run.calibration_inputs(seed, batches))
                      for seed in range(seeds)]
            if None in models:
                break
            for seed, model in enumerate(models):
                run.calibrate(model, seed, batches)
            found = [scores(run, model, states, eval_batches) for model in models]
            of = lambda score: mean_and_std([each[score] for each in found])
            rows[-1]["quantized"][f"{bits}x{bits}"] = of("metric") | {"sqnr": of("sqnr")}
            rows[-1]["floats"] = rows[-1]["floats"] or floats(models[0])
    return rows


@flags.one_line_errors
def main(argv=None):
    parser = flags.Parser(__doc__)
    flags.add_run_flags(parser)
    parser.add_argument("--bits", type=flags.bits, nargs="+", default=[8, 6, 4], help="widths")
    args, rows = parser.parse_args(argv), []
    for run in open_runs(args):
        rows.append({"run": run.name, "metric": run.model.metric, "remedies": compare(
            run, args.bits, args.seeds, args.batches, args.eval_batches)})
        table = [remedy_columns(rows[-1], remedy) for remedy in rows[-1]["remedies"]]
        fp = "an encoder" if run.model.metric == "sqnr" else (
            f"{run.model.metric} {run.score(run.model, args.eval_batches):.4g} in floating point")
        write_json(args.json, rows)
        print(f"\n{run.name}: {fp}\n\n{markdown(table)}")


if __name__ == "__main__":
    main()
