"""Look at trained runs: the paper's figures (sec. 3, Figures 1-3, 8-14) and the numbers behind them.

    python analyze.py runs/bert-vanilla-s0                               where outliers sit, what each head does
    python analyze.py runs/bert-vanilla-s0 --layer 2 --head 3            look at that head
    python analyze.py runs/bert-* --curves                               norms and kurtosis over training
    python analyze.py runs/bert-vanilla-s0 runs/bert-clipped-s0 --compare    one tap of two runs, and the 8-bit grid
"""
import json
import shlex
import sys
from itertools import starmap
from pathlib import Path

import numpy as np
import torch

from minq import flags
from minq.analysis import (Report, delimiter_share, group_shares, outlier_measures, record, survey, token_groups,
                           token_names, worst_dimension)
from minq.data import open_data
from minq.errors import UserError, one_line_errors
from minq.model import from_checkpoint
from minq.outliers import is_outlier, watch
from minq.quant import affine_parameters
from minq.training import load_checkpoint, pick_device, require_same_data, to_device
from quantize import NORM_COLUMN

BITS = 8      # of the grid that --compare draws
EXAMPLES = 3  # validation samples that a head is shown on


@one_line_errors
def main(argv=None):
    # ---- arguments ----
    parser = flags.Parser(__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run's folder")
    parser.add_argument("--layer", type=flags.positive, help="look at this layer, from 1; by default the one after the worst outliers")
    parser.add_argument("--head", type=flags.positive, help="look at this head, from 1; by default the one that owns the worst dimension")
    parser.add_argument("--gates", action="store_true", help="also show the gates of the layer, token by token (gated runs)")
    parser.add_argument("--curves", action="store_true", help="loss, norms and kurtosis of all RUNs against steps")
    parser.add_argument("--compare", action="store_true", help="one activation of two RUNs, with the 8-bit grid over it")
    parser.add_argument("--batches", type=flags.positive, help="validation batches of the run's own batch size; by default 16")
    parser.add_argument("--data", help="where the runs' data is now")
    parser.add_argument("--device", help="cpu, cuda, cuda:N or mps; by default the best there is")
    parser.add_argument("--out", help="folder for the pictures; by default figures/ in the (first) run")
    parser.add_argument("--html", action="store_true", help="also write analysis.html there: pictures and numbers on one page")
    args = parser.parse_args(argv)
    mode = "curves" if args.curves else "compare" if args.compare else "run"
    check(args, mode)

    report = Report(Path(args.out or Path(args.runs[0], "figures")))
    {"run": analyze, "curves": curves, "compare": compare}[mode](args, report)
    if args.html:
        command = shlex.join(["python", "analyze.py", *(sys.argv[1:] if argv is None else argv)])
        report.write_page(" and ".join(args.runs), command)
    report.close()


def check(args, mode):
    """A flag that this mode would not read is an error."""
    if args.curves and args.compare:
        raise UserError("--curves and --compare are two different pictures; give one of them")
    if args.compare and len(args.runs) != 2:
        raise UserError(f"--compare needs two runs, got {len(args.runs)}: {' '.join(args.runs)}")
    if mode == "run" and len(args.runs) > 1:
        raise UserError(f"got {len(args.runs)} runs: give one, or several with --curves, or two with --compare")
    unread = {"run": (), "curves": ("layer", "head", "gates", "batches", "data", "device"), "compare": ("head", "gates")}[mode]
    for flag in unread:
        if getattr(args, flag):
            raise UserError(f"--{flag} has no meaning with --{mode}")
    if len(set(args.runs)) < len(args.runs):
        raise UserError(f"the same run twice: {' '.join(args.runs)}")


# ---- one run ----

@torch.no_grad()
def analyze(args, report):
    # ---- run ----
    (name,) = args.runs
    device = pick_device(args.device)
    checkpoint, model, data, batches = open_run(name, args, device)
    config, family, tap = model.config, checkpoint["family"], NORM_COLUMN[checkpoint["family"]]
    for flag, chosen, most in (("layer", args.layer, config.layers), ("head", args.head, config.heads)):
        if chosen and chosen > most:
            raise UserError(f"--{flag} {chosen}: {name} has {flag}s 1 to {most}")
    if args.gates and model.layers[0].attention.gate is None:
        raise UserError(f"--gates: {name} has no gates; its attention is {config.attention}")
    is_text = family != "vit"
    is_bytes = is_text and checkpoint["args"]["vocab_size"] is None and checkpoint["args"]["data"] != "backcopy"

    # ---- measure ----
    found = survey(model, batches(), device, tap, config.vocab_size if is_text else None)
    outliers = found["outliers"]
    any_in = {t: outliers[t]["by_dimension"].sum() > 0 for t in outliers}
    worst_layer, dimension = worst_dimension(outliers[tap])
    layer = args.layer - 1 if args.layer else min(worst_layer + 1, config.layers - 1)
    head = args.head - 1 if args.head else dimension // (config.width // config.heads)
    names = token_names(data.text, is_bytes) if is_text else ["[CLS]", *map(str, range(config.seq_len - 1))]

    # ---- where outliers sit ----
    settings = {key: value for key, value in checkpoint["args"].items() if value is not None and value is not False}
    report.say(f"{name}: {family}, {config.attention} attention, step {checkpoint['step']}; measured on {found['samples']} "
               f"validation samples of {config.seq_len} tokens. Layers and heads count from 1, positions and dimensions from 0.")
    report.say("trained with " + ", ".join(f"{key} {value}" for key, value in settings.items()))
    report.heading("where outliers sit (beyond 6 standard deviations)")
    report.table(["tap", "layer", "inf norm", "kurtosis (not excess)", "outliers a sample", "worst dimension", "its head", "its share of outliers"],
                 [dimension_row(t, i, outliers[t], found["samples"], config) for t in outliers for i in range(config.layers)])
    for t in outliers:
        if not any_in[t]:
            report.say(f"No value of {t} is an outlier in any layer: the figures of {t} show the largest |x| instead, "
                       "and the worst dimension is the one with the largest.")
        kind, quantity = ("by", "outliers") if any_in[t] else ("peak_by", "largest |x|, mean over samples")
        report.draw(f"outliers-{t}", f"{quantity.capitalize()} of {t} by position and by dimension (Figures 1 and 8b)",
                    lambda f: f.histograms(outliers[t][f"{kind}_position"], outliers[t][f"{kind}_dimension"], quantity, f"{name}: {t}"))
    report.draw("norms", "Infinity norm and kurtosis of every layer (Figure 8a)",
                lambda f: f.norms_by_layer(*({t: outliers[t][m] for t in outliers} for m in ("inf_norm", "kurtosis")), name))
    kind, quantity = ("by", "outliers") if any_in[tap] else ("peak_by", "largest |x|, mean over samples")
    if is_text:
        report_tokens(report, name, found, token_groups(names, is_bytes), tap, any_in[tap], is_bytes)
    else:
        report.draw("patches", f"{quantity.capitalize()} of {tap} over the image (Figure 8c)",
                    lambda f: f.patch_maps(on_patches(outliers[tap][f"{kind}_position"]), quantity, f"{name}: {tap}"))

    # ---- what each head does ----
    report.heading("what each head does, the most idle first")
    measures = found["heads"]
    columns = {"update": "update", "sink_rate": "sink rate", "sink_value": "sink's value", "zeros": "zeros %", "ones": "ones %",
               "score_range": "softmax input range"} | ({"gate": "gate"} if "gate" in measures else {})
    order = sorted(np.ndindex(config.layers, config.heads), key=lambda at: measures["update"][at])
    report.table(["layer", "head", *columns.values(), "sink"],
                 [[at[0] + 1, at[1] + 1] + [f"{measures[key][at] * (100 if key in ('zeros', 'ones') else 1):.3g}" for key in columns]
                  + [names[found["sinks"][at]]] for at in order])
    report.say("update: norm of what the head hands on / mean norm of its values; sink rate: share of attention on the "
               f"most-attended token, mean over queries (even attention over all tokens: {1 / config.seq_len:.3g}); sink's value: "
               "its norm / mean norm; zeros, ones: of the unmasked probabilities; sink: the commonest one. "
               "Defined in minq/analysis.py, head_measures.")
    report.draw("heads", "The mechanism: a sink that takes all and gives nothing is a head that does nothing",
                lambda f: f.heads(measures["sink_rate"], measures["sink_value"], measures["score_range"], 1 / config.seq_len,
                                  f"{name}: heads, numbered layer.head"))
    if found["gate_counts"] is not None:
        report.draw("gates", "How open the gates are", lambda f: f.gate_histograms(found["gate_counts"], f"{name}: gates"))

    # ---- one head at work ----
    inputs, _ = to_device(next(batches()), device)
    count = min(EXAMPLES, len(inputs[0]))
    with record(model, ("probs", "values", "context", "gate", tap)) as kept:
        model(*inputs)
    probs, values = kept["probs"][layer][:count, head], kept["values"][layer][:count, head]  # (N, T, T), (N, T, d_head)
    product = kept["context"][layer].unflatten(-1, (config.heads, -1))[:count, :, head]  # (N, T, d_head)
    chosen = f"layer {layer + 1}, head {head + 1}"
    why = f"owns dimension {dimension}, the worst of {tap} in layer {worst_layer + 1}" if not args.layer and not args.head else "as asked"
    report.heading(f"{chosen} at work ({why})")
    sequences = [[names[i] for i in row] for row in inputs[0][:count].tolist()] if is_text else [names] * count
    if is_text:
        product_name = "probabilities × values" + (" × gate" if kept["gate"][layer] is not None else "")
        for i in range(count):
            report.draw(f"head-{i + 1}", f"Attention probabilities, values and their product in {chosen} (Figure 2)", lambda f: f.head_on_text(
                sequences[i], numpy(probs[i]), numpy(values[i]), numpy(product[i]), product_name, f"{name}: {chosen}, validation sequence {i + 1}"))
    else:
        report.draw("head", f"Outliers and attention in {chosen} (Figure 3)", lambda f: head_on_images(
            f, inputs[0][:count], kept[tap][max(layer - 1, 0)][:count], probs, values, f"{name}: {chosen}, and {tap} of layer {max(layer, 1)}"))
    if args.gates:
        for i in range(count):
            report.draw(f"gates-{i + 1}", f"Gates of layer {layer + 1}, token by token", lambda f: f.gates_on_tokens(
                sequences[i], numpy(kept["gate"][layer][i]), f"{name}: gates of layer {layer + 1}, validation sample {i + 1}"))
    report.draw("magnitudes", "One sample's activation over channels and tokens (blog, Figure 1)", lambda f: f.magnitudes(
        {f"{tap} of layer {worst_layer + 1}": numpy(kept[tap][worst_layer][0])}, name))


def dimension_row(tap, layer, outliers, samples, config):
    """A row of the first table; without outliers the worst dimension is the one with the largest mean peak."""
    counts, peaks = outliers["by_dimension"][layer], outliers["peak_by_dimension"][layer]
    worst = int(np.argmax(counts if counts.sum() else peaks))
    return [tap, layer + 1, f"{outliers['inf_norm'][layer]:.3g}", f"{outliers['kurtosis'][layer]:.3g}", f"{counts.sum() / samples:.3g}", worst,
            worst // (config.width // config.heads) + 1, f"{100 * counts[worst] / counts.sum():.1f}%" if counts.sum() else "none"]


def report_tokens(report, name, found, groups, tap, any_outliers, is_bytes):
    """Which tokens carry the outliers of all layers, beside how common those tokens are."""
    counts, quantity = (found["tokens_of_outliers"], f"outliers of {tap}") if any_outliers else (
        found["tokens_of_peaks"], f"each sample's largest |x| of {tap}")
    carriers, tokens = group_shares(groups, counts.sum(axis=0)), group_shares(groups, found["tokens"])
    shown = sorted((group for group in tokens if carriers[group] or tokens[group]), key=lambda group: -carriers[group])
    report.heading("which tokens carry them")
    report.table(["tokens", quantity, "all tokens"], [[g, f"{100 * carriers[g]:.1f}%", f"{100 * tokens[g]:.1f}%"] for g in shown])
    if is_bytes:
        report.say(f"delimiters ([CLS], [SEP], newline, space, punctuation) carry {100 * delimiter_share(carriers):.1f}% of {quantity}; "
                   f"they are {100 * delimiter_share(tokens):.1f}% of all tokens")
    report.draw("tokens", f"Which tokens carry {quantity}", lambda f: f.shares(
        shown, [carriers[g] for g in shown], [tokens[g] for g in shown], quantity, name))


def head_on_images(figures, images, x, probs, values, title):
    """Figure 3 of N images: x (N, T, d) is the activation whose outliers are shown; [CLS] is no patch and left out of maps."""
    counts = numpy(is_outlier(x).sum(dim=2))[:, 1:]  # (N, patches)
    peaks = numpy(x.abs().amax(dim=2))[:, 1:]
    any_outliers = counts.any()
    marked = counts > 0 if any_outliers else peaks == peaks.max(axis=1, keepdims=True)
    sizes = numpy(values.abs().mean(dim=2))[:, 1:]  # (N, patches)
    means = [[size[mark].mean() if mark.any() else np.nan for mark in (m, ~m)] for size, m in zip(sizes, marked)]
    return figures.head_on_images(numpy(images.permute(0, 2, 3, 1)), on_patches(counts if any_outliers else peaks, cls=False),
                                  "outliers" if any_outliers else "largest |x| (no outliers)",
                                  on_patches(numpy(probs.sum(dim=1))[:, 1:], cls=False), numpy(probs), np.array(means),
                                  ("outlier\npatches" if any_outliers else "largest\n|x|", "other\npatches"), title)


def on_patches(positions, cls=True):
    """(N, T) -> (N, rows, columns): token positions back in the image; `cls`: the first one is [CLS], which has no place in it."""
    patches = np.asarray(positions)[:, 1 if cls else 0:]
    side = int(patches.shape[1] ** 0.5)
    return patches.reshape(len(patches), side, side)


def numpy(x):
    return x.detach().float().cpu().numpy()


# ---- several runs ----

def curves(args, report):
    """Every run's metrics.jsonl in one picture."""
    runs = {}
    for name in args.runs:
        try:
            lines = [json.loads(line) for line in Path(name, "metrics.jsonl").read_text().splitlines()]
        except (OSError, json.JSONDecodeError):
            raise UserError(f"{name}: no run here; expected a folder with metrics.jsonl") from None
        if not lines:
            raise UserError(f"{name}: nothing is logged yet")
        steps, metric = [line["step"] for line in lines], "accuracy" if "accuracy" in lines[0] else "perplexity"
        runs[name] = {"training loss": (steps, [line["loss"] for line in lines]), metric: (steps, [line[metric] for line in lines])}
        for tap in ("ffn_output", "layer_output"):
            runs[name][f"max inf norm of {tap}"] = (steps, [max(line[tap]["inf_norm"]) for line in lines])
            runs[name][f"avg kurtosis of {tap}, not excess"] = (steps, [np.mean(line[tap]["kurtosis"]) for line in lines])
    if len({tuple(quantities) for quantities in runs.values()}) > 1:
        raise UserError(f"--curves: {' '.join(args.runs)}: some have a perplexity and some an accuracy; give runs of one kind")
    report.heading("over training: first -> last evaluation")
    quantities = list(next(iter(runs.values())))
    report.table(["run", "steps", *quantities], [[name, series[quantities[0]][0][-1]] + [
        f"{series[q][1][0]:.4g} -> {series[q][1][-1]:.4g}" for q in quantities] for name, series in runs.items()])
    report.draw("curves", "Over training (blog, Figures 3, 5 and 6)", lambda f: f.curves(runs, "over training"))


@torch.no_grad()
def compare(args, report):
    """One activation of two runs on the first validation batch, and the grid of its smallest and largest value."""
    device = pick_device(args.device)
    opened = {name: open_run(name, args, device) for name in args.runs}
    (first, *_), (second, *_) = opened.values()
    if first["family"] != second["family"]:
        raise UserError(f"--compare: {args.runs[0]} is a run of {first['family']}, {args.runs[1]} of {second['family']}; expected one family")
    tap = NORM_COLUMN[first["family"]]
    layers = min(model.config.layers for _, model, _, _ in opened.values())
    if args.layer and args.layer > layers:
        raise UserError(f"--layer {args.layer}: these runs have layers 1 to {layers}")

    activations, found = {}, {}
    for name, (_, model, _, batches) in opened.items():
        with watch(model, (tap,), outlier_measures) as watched, record(model, (tap,)) as kept:
            for i, batch in enumerate(batches()):
                model(*to_device(batch, device)[0])
                if i == 0:
                    activations[name] = [x[:] for x in kept[tap]]
        found[name] = watched.mean[tap]
    layer = args.layer - 1 if args.layer else int(np.argmax(found[args.runs[0]]["inf_norm"][:layers]))
    activations = {name: activation[layer].float().cpu() for name, activation in activations.items()}  # (B, T, d)
    grids = {name: affine_parameters(*torch.aminmax(x), BITS) for name, x in activations.items()}
    scales, zero_points = ({name: grid[i].item() for name, grid in grids.items()} for i in (0, 1))

    report.heading(f"{tap} of layer {layer + 1}, and the grid of {BITS} bits from its smallest to its largest value")
    report.table(["run", "inf norm", "kurtosis (not excess)", "grid step", "levels for the middle 99%"],
                 [[name, f"{found[name]['inf_norm'][layer]:.3g}", f"{found[name]['kurtosis'][layer]:.3g}", f"{scales[name]:.3g}",
                   levels(x.numpy(), scales[name])] for name, x in activations.items()])
    title = f"{tap} of layer {layer + 1}"
    report.draw("grids", f"Histograms of {title}, and the {BITS}-bit grid over them (red)", lambda f: f.grids(
        {name: numpy(x.flatten()) for name, x in activations.items()}, scales, zero_points, BITS, title))
    report.draw("magnitudes", f"{title.capitalize()} of the first sample over channels and tokens (blog, Figure 1)",
                lambda f: f.magnitudes({name: numpy(x[0]) for name, x in activations.items()}, title))


def levels(x, scale):
    """How many grid points lie from the 0.5th to the 99.5th percentile."""
    low, high = np.percentile(x, (0.5, 99.5))
    return int(round(high / scale) - round(low / scale)) + 1


def open_run(name, args, device):
    """(checkpoint, model, data, a function that gives the validation batches) of a run."""
    checkpoint = load_checkpoint(name)
    model = from_checkpoint(checkpoint, name).to(device).eval()
    run_args = checkpoint["args"] | ({"data": args.data} if args.data else {})
    data = open_data(checkpoint["family"], run_args)
    if not args.data:
        require_same_data(run_args["data"], data.sha256, checkpoint)
    return checkpoint, model, data, lambda: starmap(data.to_model, data.validation_batches(run_args["batch_size"], args.batches or 16))


if __name__ == "__main__":
    main()
