"""What quantization does to a model inside, and which tensor did it (paper, sec. 3).

    fidelity(quantized, floating_states(run))     # {"sqnr": 1.9, "cosine": 0.79}
    by_kind(run, build)                           # one kind of tap quantized at a time, the worst first

Perplexity forgives: much can move inside a model before the right token loses its place. The signal-to-
quantization-noise ratio of the last hidden states does not:

    SQNR = 10 log10 (sum of h^2 / sum of (h_quantized - h)^2)     in dB

h is the output of the last layer (BERT) or of the final norm (OPT, ViT) for the same inputs, in floating
point and quantized. At 0 dB the error is as large as the signal; a bit more of precision is worth 6 dB.
"""
import math
from contextlib import contextmanager, nullcontext

import torch
import torch.nn.functional as F
from torch.nn.utils import parametrize
from tqdm import tqdm

from minq.outliers import listening
from minq.quant import ActivationQuantizer, WeightQuantizer, switched
from minq.training import evaluate, to_device


# ---- how far the last hidden states have moved ----

def floating_states(run, batches=None):
    """(inputs, the last hidden states of the run's model) of each validation batch."""
    for batch in run.validation(batches):
        inputs, _ = to_device(batch, run.device)
        yield inputs, last_hidden(run.model, inputs)


@contextmanager
def last_states(model):
    """While active, the last hidden states of each forward pass of `model` are kept; yields the list of them:
    (B, T, width), or (B, width) where only [CLS] is left; float32."""
    passes = []

    def hear(tap, place, x):
        if place == 0:
            passes.append(None)
        passes[-1] = x.float()  # the last place stays

    with listening(model, (model.hidden_tap,), hear):
        yield passes


@torch.no_grad()
def last_hidden(model, inputs):
    with last_states(model) as passes:
        model(*inputs)
    return passes[-1]


def nearness(pairs):
    """SQNR in dB, and the mean cosine over tokens, of (the last hidden states, those they should be) of each batch."""
    signal = error = cosines = tokens = 0
    for moved, h in pairs:
        signal += h.square().sum(dtype=torch.float64).item()
        error += (moved - h).square().sum(dtype=torch.float64).item()
        cosines += F.cosine_similarity(moved, h, dim=-1).sum(dtype=torch.float64).item()
        tokens += h[..., 0].numel()
    ratio = math.inf if error == 0 else signal / error
    return {"sqnr": -math.inf if ratio == 0 else 10 * math.log10(ratio), "cosine": cosines / tokens}


def fidelity(model, states):
    """The `nearness` of `model` to `states`, as `floating_states` gives them."""
    return nearness((last_hidden(model, inputs), h) for inputs, h in states)


def scores(run, model, with_sqnr=True, eval_batches=None, states=None):
    """{metric: value} of a model that stands for the run's, and its fidelity, if asked for or if that is the metric.
    states: the `floating_states`, where they are at hand."""
    metric = run.model.metric
    if metric == "sqnr":
        return fidelity(model, states or floating_states(run, eval_batches))
    with last_states(model) if with_sqnr else nullcontext() as passes:
        found = {metric: evaluate(model, run.validation(eval_batches), run.device)[metric]}
    if with_sqnr:
        found |= nearness(zip(passes, (h for _, h in states or floating_states(run, eval_batches)), strict=True))
    return found


# ---- one tensor at a time ----

def quantizers(model):
    """name -> quantizer: "layers.0.norm1" of a tap, "layers.0.norm1.weight" of a weight."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, ActivationQuantizer):
            found[name.removesuffix("_tap")] = module
        if isinstance(module, WeightQuantizer):
            found[name.replace(".parametrizations.weight.0", ".weight")] = module
    return found


def taps_of(model):
    return [name for name, quantizer in quantizers(model).items() if isinstance(quantizer, ActivationQuantizer)]


def only(model, wanted):
    """A context in which of all quantizers of `model` only those named in `wanted` are active."""
    return switched([quantizer for name, quantizer in quantizers(model).items() if name not in wanted], active=False)


def calibrated(run, build, wanted, batches):
    """A quantized copy of the run's model whose ranges are set while only `wanted` are active."""
    model = build()
    with only(model, wanted):
        run.calibrate(model, seed=0, batches=batches)
    return model


def damage(run, model, wanted, states, eval_batches=None):
    """{"metric": the run's, "sqnr": dB} with only the quantizers named in `wanted` active."""
    with only(model, wanted), parametrize.cached():
        found = scores(run, model, True, eval_batches, states)
    return {"metric": found[run.model.metric], "sqnr": found["sqnr"]}


def by_kind(run, build, batches=16, eval_batches=None):
    """[{tap, metric, sqnr}]: one kind of tap quantized, in all layers, the lowest SQNR first; then all
    activations, all weights, and everything.

    build: a function that gives a quantized copy of the run's model. What a single kind is quantized with
    are the ranges of the floating-point model; the last three rows are calibrated as they are evaluated.
    """
    model, states = calibrated(run, build, (), batches), list(floating_states(run, eval_batches))
    kinds = {}
    for name in taps_of(model):
        kinds.setdefault(name.rpartition(".")[2], []).append(name)
    bar = tqdm(kinds.items(), unit="tap", leave=False)
    rows = [{"tap": kind, **damage(run, model, names, states, eval_batches)} for kind, names in bar]
    rows.sort(key=lambda row: row["sqnr"])
    return rows + altogether(run, build, states, batches, eval_batches)


def altogether(run, build, states, batches=16, eval_batches=None):
    """[{tap, metric, sqnr}] of all activations, all weights, and everything, calibrated as they are evaluated."""
    rows, every, taps = [], set(quantizers(build())), set(taps_of(build()))
    for title, names in (("all activations", taps), ("all weights", every - taps), ("everything", every)):
        model = calibrated(run, build, names, batches)
        rows.append({"tap": title, **damage(run, model, names, states, eval_batches)})
    return rows


def by_layer(run, build, batches=16, eval_batches=None):
    """{tap: [{metric, sqnr}, ... of each layer]} with that tap of that layer quantized; and `altogether`'s rows.

    A tap that a layer does not have gives NaN.
    """
    model, states = calibrated(run, build, (), batches), list(floating_states(run, eval_batches))
    nothing = {"metric": math.nan, "sqnr": math.nan}
    found = {}
    for name in tqdm([name for name in taps_of(model) if name.startswith("layers.")], unit="tensor", leave=False):
        in_layers = found.setdefault(name.rpartition(".")[2], [nothing] * run.model.config.layers)
        in_layers[int(name.split(".")[1])] = damage(run, model, [name], states, eval_batches)
    return found, altogether(run, build, states, batches, eval_batches)
