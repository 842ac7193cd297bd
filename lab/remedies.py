"""What can be done about outliers after training: the remedies of quantization, side by side.

    model = REMEDIES["dynamic per token"](copy.deepcopy(run.model), 8, 8, inputs)     # then calibrate it as any other

The paper's attention keeps outliers from growing. These treat a model that has them. Each entry of REMEDIES is
quantize_model with one thing changed, mostly another quantizer in the taps; its docstring says the formula, the source,
what stays in floating point, and what a chip would have to do for it. x is (B, T, d): tokens by hidden dimensions.
Tensors of other shapes (queries, scores, a [CLS] token alone) are quantized as ever, unless a class says otherwise.
"""
import copy
import math
from functools import lru_cache, partial

import torch
import torch.nn as nn
from torch.nn.utils import parametrize
from tqdm import tqdm

from minq.damage import floating_states, scores
from minq.fake_quant import token_range
from minq.outliers import listening
from minq.quant import A_ESTIMATORS, ActivationQuantizer, affine_parameters, fake_quantize, quantize_model
from minq.tables import mean_and_std


class PerToken(ActivationQuantizer):
    """Each token has a scale and a zero point of its own, taken when it arrives (ZeroQuant, Yao et al. 2022): a token
    with an outlier coarsens its own grid only. Nothing is calibrated and nothing stays in floating point; but a
    chip must find each row's range before it can round the row, and multiply each row's sums by another scale.
    (In probs @ values the scales stand inside the sum, and no integer kernel can follow: minq/fake_quant.py.)"""

    def on_grid(self, x):
        return fake_quantize(x, *affine_parameters(*token_range(x), self.n_bits), self.n_bits)


class OutlierColumns(ActivationQuantizer):
    """Columns (hidden dimensions) with a value beyond 6 stay in floating point (LLM.int8, Dettmers et al. 2022);
    the others share one grid, made without them. Which columns: those that passed 6 in calibration. (The paper looks
    at each input as it arrives, gives the others a scale per token, and keeps the columns' weights in fp16, too; here
    weights stay on their grid.) A chip must gather these columns, multiply them in fp16, and add the two products."""
    threshold = 6.0

    def observe(self, x):
        if x.dim() == 3:
            beyond = x.abs().flatten(0, 1).amax(dim=0) > self.threshold  # (d,)
            self.columns = beyond | getattr(self, "columns", beyond)
            if self.columns.all():
                self.columns = torch.zeros_like(beyond)  # keep something to quantize
            x = x[..., ~self.columns]
        super().observe(x)

    def on_grid(self, x):
        return torch.where(self.columns, x, super().on_grid(x)) if x.dim() == 3 else super().on_grid(x)


class Groups(ActivationQuantizer):
    """The hidden dimensions in K groups with a grid each (per-embedding-group, Bondarenko et al. 2021): an outlier
    dimension coarsens its own group only. With `permute`, dimensions are first sorted by their range in the first
    batch, so that the wide ones share a group. Nothing stays in floating point; a chip adds up K partial products,
    each in its own scale. A permutation can be folded into the weights on either side if all that is added shares it,
    so the paper has one a layer, for the FFN's input, output and sum; here each tap has its own."""

    def __init__(self, n_bits, estimator, K=6, permute=False):
        super().__init__(n_bits, estimator)
        self.K, self.permute, self.estimator = K, permute, estimator

    def observe(self, x):
        super().observe(x)
        if x.dim() != 3:
            return
        if not hasattr(self, "groups"):
            spread = x.amax(dim=(0, 1)) - x.amin(dim=(0, 1))  # (d,)
            order = spread.argsort() if self.permute else torch.arange(len(spread), device=x.device)
            self.groups = order.tensor_split(self.K)
            self.ranges = [A_ESTIMATORS[self.estimator]() for _ in self.groups]
        scale, zero_point = torch.empty(2, x.shape[-1], device=x.device)
        for group, seen in zip(self.groups, self.ranges):
            seen.update(x[..., group])
            scale[group], zero_point[group] = affine_parameters(seen.low, seen.high, self.n_bits)
        self.scale, self.zero_point = scale, zero_point


@lru_cache
def hadamard(d):
    """An orthogonal (d, d) matrix all of whose entries are about 1 / sqrt(d): Sylvester's Hadamard matrix of the
    largest power of two in d, times (Kronecker) a cosine transform of the odd rest, where QuaRot has tables."""
    H, odd = torch.ones(1, 1), d
    while odd % 2 == 0:
        H, odd = torch.cat((torch.cat((H, H), 1), torch.cat((H, -H), 1))), odd // 2
    k = torch.arange(odd)
    cosines = torch.cos(math.pi / odd * k[:, None] * (k + 0.5)) * math.sqrt(2)
    cosines[0] = 1.0
    return torch.kron(H, cosines) / math.sqrt(d)


class Rotated(ActivationQuantizer):
    """x H, quantize, H^T, with H orthogonal (QuaRot, Ashkboos et al. 2024: a Hadamard matrix): one value of M becomes
    d values of M / sqrt(d). Nothing stays in floating point. In a pre-LN model a chip need not know: with gamma folded
    into the Linears behind each LayerNorm, and its subtraction of the mean into those before, H goes into the embedding,
    W_o and W_down (on the output side), H^T into W_qkv, W_up and the output layer (on the input side), and the residual
    stream is rotated throughout. Only the context and the FFN's hidden units must be multiplied as they arrive.
    Post-LN must multiply everywhere: its gamma goes into the next residual sum, too, and cannot be folded away."""
    matrix = staticmethod(hadamard)

    def turn(self, x):
        H = self.matrix(x.shape[-1]).to(x.device)  # (d, d)
        return x.float() @ H, H

    def observe(self, x):
        super().observe(self.turn(x)[0] if x.dim() == 3 else x)

    def on_grid(self, x):
        if x.dim() != 3:
            return super().on_grid(x)
        turned, H = self.turn(x)
        return (super().on_grid(turned) @ H.T).to(x.dtype)


class SinkInFloat(ActivationQuantizer):
    """The start token skips all activation quantizers and does not enter their ranges (PrefixQuant, Chen et al. 2024, and
    CushionCache, Son et al. 2024, where it is a prefix of a few tokens, searched for). It helps as far as outliers
    stand there. In a causal model that token never changes: its keys and values are computed once, and a chip loads
    them in fp16. A BERT's [CLS] sees the sentence: a chip must compute it in fp16 each time, beside the others."""

    def observe(self, x):
        super().observe(x[..., 1:, :] if x.dim() > 2 else x)

    def on_grid(self, x):
        if x.dim() == 2:
            return super().on_grid(x)
        return torch.cat((x[..., :1, :], super().on_grid(x[..., 1:, :])), dim=-2)


@torch.no_grad()
def smooth(model, inputs, alpha=0.5):
    """SmoothQuant (Xiao et al. 2022): s_j = max |X_j|^alpha / max |W_j|^(1 - alpha) per hidden dimension j; X / s is folded
    into gamma and beta of the LayerNorm before, s into the columns of W. The floating-point output is the same, nothing
    stays in floating point, and a chip need not know. It reaches what a LayerNorm hands to a Linear, and nothing else: a
    residual sum has no weight behind it that could take s, and that is where outliers stand. Post-LN: None, its LayerNorms
    feed the residual sum as well. Norms without a gain: None, they have nothing that could take 1 / s. (Here gamma / s is
    quantized, too; the paper leaves LayerNorm in fp16.)"""
    if not model.config.pre_norm or model.layers[0].norm1.weight is None:
        return None
    largest = {}

    def hear(tap, place, x):
        peak = x.abs().flatten(0, 1).amax(dim=0)
        largest[tap, place] = torch.maximum(peak, largest.get((tap, place), peak))

    with listening(model, ("norm1", "norm2"), hear):
        for batch in inputs:
            model(*batch)
    for i, block in enumerate(model.layers):
        for tap, norm, linear in (("norm1", block.norm1, block.attention.qkv), ("norm2", block.norm2, block.ffn_up)):
            weight = linear.weight.abs().amax(dim=0)
            s = (largest[tap, i].clamp(min=1e-5) ** alpha / weight.clamp(min=1e-5) ** (1 - alpha))
            for p in norm.parameters():
                p /= s
            linear.weight *= s
            gate = block.attention.gate
            if tap == "norm1" and gate is not None and not getattr(gate, "of_values", False):  # it sees the norm's output, too
                block.attention.gate = nn.Sequential(Times(s), gate)
    return model


class Times(nn.Module):
    def __init__(self, s):
        super().__init__()
        self.register_buffer("s", s)

    def forward(self, x):
        return x * self.s


# ---- by name: a copy of the model, bits, calibration inputs -> the copy, quantized and ready to calibrate; or None ----

def plain(**settings):
    """quantize_model with these settings. A scale per row of a weight costs a chip one more factor per output; ranges by
    MSE or percentile (sec. C.4) cost it nothing. Neither keeps anything in floating point."""
    return lambda model, w_bits, a_bits, inputs: quantize_model(model, w_bits, a_bits, **settings)


def smoothed(model, w_bits, a_bits, inputs):
    model = smooth(model, inputs)
    return None if model is None else quantize_model(model, w_bits, a_bits)


REMEDIES = {
    "none": plain(),
    "weights per channel": plain(w_granularity="channel"),
    "MSE weights, p99.999 activations": plain(w_estimator="mse", a_estimator="p99.999"),
    "dynamic per token": plain(a_quantizer=PerToken),
    "outlier columns in floating point": plain(a_quantizer=OutlierColumns),
    "SmoothQuant": smoothed,
    "6 groups of dimensions": plain(a_quantizer=partial(Groups, K=6)),
    "6 groups, permuted by range": plain(a_quantizer=partial(Groups, K=6, permute=True)),
    "Hadamard rotation": plain(a_quantizer=Rotated),
    "start token in floating point": plain(a_quantizer=SinkInFloat),
    "per token, weights per channel": plain(a_quantizer=PerToken, w_granularity="channel"),
}


def floats(model):
    """What a quantized model keeps in floating point because of its remedy."""
    kept = [module.columns for module in model.modules() if isinstance(module, OutlierColumns) and hasattr(module, "columns")]
    if kept:
        return f"{sum(int(columns.sum()) for columns in kept)} of {sum(map(len, kept))} columns"
    return "1 token" if any(isinstance(module, SinkInFloat) for module in model.modules()) else ""


def compare(run, widths=(8, 6, 4), seeds=3, batches=16, eval_batches=None):
    """[{remedy, quantized: {"8x8": {mean, std, all, sqnr: {...}}, ...}, floats}] for a run; one that does not apply has
    an empty `quantized`."""
    rows, states = [], list(floating_states(run, eval_batches))
    for name, remedy in tqdm(REMEDIES.items(), unit="remedy", leave=False):
        row = {"remedy": name, "quantized": {}, "floats": ""}
        for bits in widths:
            found = []
            for seed in range(seeds):
                model = remedy(copy.deepcopy(run.model), bits, bits, run.calibration_inputs(seed, batches))
                if model is None:
                    break
                run.calibrate(model, seed, batches)
                with parametrize.cached():
                    found.append(scores(run, model, True, eval_batches, states))
                row["floats"] = row["floats"] or floats(model)  # of the first width and calibration
            if found:
                by_name = {score: mean_and_std([each[score] for each in found]) for score in found[0]}
                row["quantized"][f"{bits}x{bits}"] = by_name[run.model.metric] | by_name
        rows.append(row)
    return rows
