"""The noise budget: what quantization will cost a model, predicted before anything is quantized.

    python -m lab.budget zoo/bert-long-vanilla                 the tensors that cost most at 8 bits
    python -m lab.budget zoo/*-* --bits 8 7 6 --measure                      prediction and truth

Four steps for a blackboard; no number in them is fitted.

1. A uniform grid of b bits over a range R has steps of R / (2^b - 1). Rounding moves a value by at
   most half a step, anywhere in between alike, so it adds noise of variance

       noise = (R / (2^b - 1))^2 / 12

   One value far out sets R for all, and the noise is the same for the smallest. Twice the range
   costs as much as one bit: four times the noise, 6 dB.
2. How much of it arrives? A value x_i moves the last hidden states h by dh/dx_i per unit. Noises of
   different values are independent, so their squares add up, over values, tensors and weights:

       noise / signal = sum over tensors of noise * |dh/dx|^2 / |h|^2

   |dh/dx|^2 is the tensor's gain. One backward pass from h with random signs finds all gains: the
   mean of (sum of s_j dh_j/dx_i)^2 over signs s is the sum of (dh_j/dx_i)^2 (Hutchinson 1990).
   Gains know what a LayerNorm does, which divides a token's noise by the token's own deviation:
   after it noise over signal is what it was before. So in a post-LN model the outlier of a layer
   is paid for twice, where it is written and in the residual sum. A pre-LN model hands it on from
   sum to sum, and each residual tap that it passes rounds everybody with its range.
3. The last LayerNorm divides by what it gets, noise included: of noise / signal = r before it

       SQNR = -10 log10 (2 - 2 / sqrt(1 + r))    which is 1 / r in dB, where r is small

4. What is lost? Small noise e on x costs half of e^T F e nats, F the Fisher information: the mean
   square of d log p(y)/dx for y drawn from the model's own prediction p (a second backward pass):

       nats per prediction = sum over tensors of noise * E[(d log p(y)/dx)^2] / 2
       perplexity = perplexity in floating point * exp(nats)

It is a prediction to first order: good while less than about a third is lost. It misses what is no
rounding noise: values that fall on the grid (zeros), and ranges that clip.
"""
import math
import re
from collections import Counter
from functools import partial
from itertools import product

import torch
import torch.nn.functional as F

from lab.damage import Observer, last_states, scores
from lab.opened import open_runs
from lab.tables import markdown, write_json
from minq import flags
from minq.quant import quantize_model, value_range
from minq.training import to_device


# ---- what noise on each tensor does ----

def gains(run, batches=16, eval_batches=4):
    """{name: {range, sigma, gain: {target: ...}, token_gain: {target: ...}}} of taps and weights.

    range: R, one per scale, (G, 1), G = 1 of a tap. sigma: deviation of the 99.5% smallest values.
    gain: what noise of variance 1 on the tensor adds to "states", noise / signal, and to "nats"
    per prediction, (G, 1). token_gain, of a tap: the same for a variance of each token's R^2.
    """
    model = quantize_model(run.model, 16, 16, quantizer=Observer)  # weights move by 2^-16 of R
    run.calibrate(model, 0, batches)
    heard = {name: m for name, m in model.named_modules() if isinstance(m, Observer)}
    last = [tap for name, tap in heard.items() if name.endswith(f"{model.hidden_tap}_tap")][-1]
    for name, m in model.named_modules():
        if hasattr(m, "weight_grid"):
            heard[f"{name}.weight"], m.x, m.scale = m, m.weight, m.weight_grid[0]
    targets = ("states", "nats") if model.metric == "perplexity" else ("states",)
    found = {name: {"gain": Counter(), "token_gain": Counter()} for name in heard}
    total, draws = Counter(), torch.Generator(run.device).manual_seed(0)

    for (inputs, _), target in product(run.validation(eval_batches), targets):
        model.zero_grad()
        logits, h = model(*to_device(inputs, run.device)).flatten(0, -2), last.x
        if target == "states":
            signs = torch.randint(0, 2, h.shape, generator=draws, device=h.device) * 2 - 1
            (h * signs).sum().backward()
            total[target] += h.square().sum().item()
        else:
            y = logits.softmax(-1).multinomial(1, generator=draws).flatten()
            F.cross_entropy(logits, y, reduction="sum").backward()
            total[target] += 2 * len(y)
        for name, m in heard.items():
            if m.x.grad is None:  # the head of a ViT comes after the states
                continue
            squares, x = m.x.grad.square(), m.x.detach()
            found[name]["gain"][target] += squares.reshape(m.scale.numel(), -1).sum(1, keepdim=True)
            if isinstance(m, Observer):
                span = x.amax(-1).clamp(min=0) - x.amin(-1).clamp(max=0)
                found[name]["token_gain"][target] += (squares.sum(-1) * span.square()).sum()

    for name, tensor in found.items():
        for gain, target in product((tensor["gain"], tensor["token_gain"]), targets):
            gain[target] /= total[target]
        values = heard[name].x.detach().flatten()
        tensor["sigma"] = values[values.abs() <= value_range(values.abs(), 99.5)[1]].std().item()
        tensor["range"] = 65535 * heard[name].scale.view(-1, 1)
    return found


CHANGES = ("clamped at 4 sigma", "a range per token", "in 16 bits")


def noise(tensor, target, bits, change=None):
    """What rounding a tensor adds to noise / signal ("states"), or to the nats that are lost;
    change: one of CHANGES in how it is quantized."""
    span, gain = tensor["range"], tensor["gain"][target]
    if change == CHANGES[0]:
        span = span.clamp(max=8 * tensor["sigma"])
    if change == CHANGES[1] and torch.is_tensor(tensor["token_gain"][target]):  # a weight has none
        span, gain = 1.0, tensor["token_gain"][target]
    if change == CHANGES[2]:
        bits = 16
    return float((gain * (span / (2 ** bits - 1)) ** 2).sum()) / 12


def predict(tensors, bits, changed=(), change=None):
    """{predicted_sqnr in dB, predicted_loss in percent of perplexity}, every tensor in `bits`;
    those named in `changed` with a `change`. A loss of accuracy is not predicted."""
    total = lambda target: sum(noise(x, target, bits, change if name in changed else None)
                               for name, x in tensors.items())
    loss = 100 * math.expm1(min(total("nats"), 50))
    return {"predicted_sqnr": -10 * math.log10(2 - 2 / math.sqrt(1 + total("states"))),
            "predicted_loss": loss or None}


def bits_needed(tensors):
    """The bits at which 20% of perplexity are lost: nats go with 1 / (2^b - 1)^2."""
    nats = sum(noise(x, "nats", 8) for x in tensors.values())
    return math.log2(1 + 255 * math.sqrt(nats / math.log(1.2)))


def measure(run, bits, batches, eval_batches):
    """{metric, measured_sqnr, loss_percent} of the quantized model; of accuracy, points."""
    states = list(last_states(run, run.model, eval_batches))
    fp = scores(run, run.model, states, eval_batches)["metric"]
    model = quantize_model(run.model, bits, bits)
    run.calibrate(model, 0, batches)
    metric, sqnr = scores(run, model, states, eval_batches).values()
    loss = {"perplexity": 100 * (metric / fp - 1), "accuracy": fp - metric}.get(run.model.metric)
    return {"metric": metric, "measured_sqnr": sqnr, "loss_percent": loss}


def of_tap(name, tensor, bits):
    """{tap, layer, range, sigma, noise}, what --json has of a tensor, of weights, too."""
    layer, tap = re.fullmatch(r"(?:layers.(\d+).)?(?:.*?\.)??(\w+.weight|\w+)", name).groups()
    return {"tap": tap.removesuffix("_tap"), "layer": layer and int(layer) + 1,
            "range": tensor["range"].max().item(), "sigma": tensor["sigma"],
            "noise": noise(tensor, "states", bits)}


# ---- in words ----

def print_tables(rows, tensors):
    """What is predicted, and what was measured; the tensors that cost most, and what would help."""
    columns = {"SQNR dB, predicted": "predicted_sqnr", "SQNR dB, measured": "measured_sqnr",
               "loss %, predicted": "predicted_loss", "loss %, measured": "loss_percent"}
    print(f"\n{rows[0]['run']}\n\n" + markdown([{"bits": str(row["bits"])} | {
        title: f"{row[key]:.3g}" for title, key in columns.items() if row.get(key) is not None}
        for row in rows]))
    bits, taps = rows[0]["bits"], dict(zip(tensors, rows[0]["taps"]))
    total = sum(x["noise"] for x in taps.values())
    worst, lines = sorted(taps, key=lambda name: -taps[name]["noise"])[:3], []
    for names in (*([name] for name in worst), worst):
        (x, *more), sqnr = [taps[name] for name in names], partial(predict, tensors, bits, names)
        title = x["tap"] + f", layer {x['layer']}" * bool(x["layer"])
        lines.append({
            "tensor": "all three" if more else title,
            "range / sigma": "" if more else f"{x['range'] / x['sigma']:.3g}",
            "of the noise": f"{sum(tap['noise'] for tap in (x, *more)) / total:.0%}"}
            | {change: f"{sqnr(change)['predicted_sqnr']:.1f}" for change in CHANGES})
    print(f"\nwhat costs most at {bits} bits, and the predicted SQNR if it were ...\n\n"
          + markdown(lines))
    if rows[0]["predicted_loss"] is not None:
        print(f"\n20% are lost at {bits_needed(tensors):.2f} bits, as predicted")


@flags.one_line_errors
def main(argv=None):
    parser = flags.Parser(__doc__)
    flags.add_run_flags(parser, seeds=None)
    add = parser.add_argument
    add("--bits", type=flags.bits, nargs="+", default=[8], help="of weights and activations")
    add("--measure", action="store_true", help="quantize and measure, too")
    args = parser.parse_args(argv)
    found = []
    for run in open_runs(args):
        tensors, rows = gains(run, args.batches), []
        for bits in args.bits:
            rows.append({"run": run.name, "bits": bits, **predict(tensors, bits)})
            if args.measure:
                rows[-1] |= measure(run, bits, args.batches, args.eval_batches)
            rows[-1]["taps"] = [of_tap(name, x, bits) for name, x in tensors.items()]
        print_tables(rows, tensors)
        found += rows
    write_json(args.json, found)


if __name__ == "__main__":
    main()
