"""Look at trained runs: the paper's figures (sec. 3, Figures 1-3, 8-14) and the numbers behind them.

    python analyze.py runs/bert-vanilla-s0                                   where outliers sit, what each head does
    python analyze.py runs/bert-vanilla-s0 --layer 2 --head 3                that head at work
    python analyze.py runs/bert-* --curves                                   norms and kurtosis over training
    python analyze.py runs/bert-vanilla-s0 runs/bert-clipped-s0 --compare    one activation of both, and the 8-bit grid
    python analyze.py runs/bert-vanilla-s0 --damage                          which tensor eight bits ruin
"""
import copy
import shlex
import sys
from pathlib import Path

import numpy as np
import torch

from minq import flags
from minq.analysis import array, on_patches, outlier_patches, record, survey, token_names, worst_dimension
from minq.checkpoints import read_log
from minq.damage import by_layer
from minq.errors import UserError, one_line_errors
from minq.growth import growth
from minq.outliers import watch
from minq.quant import affine_parameters, quantize_model
from minq.report import Report, histogram_of, report_heads, report_outliers, report_tokens
from minq.runs import open_run
from minq.training import pick_device, to_device

BITS = 8      # of the grid that --compare draws, and of --damage
DAMAGE_BATCHES = 2
BATCHES = 16  # validation batches, unless told
EXAMPLES = 2  # validation samples on which a head is shown


@one_line_errors
def main(argv=None):
    # ---- arguments ----
    parser = flags.Parser(__doc__)
    parser.add_argument("runs", nargs="+", action=flags.Distinct, metavar="RUN", help="a run's folder")
    parser.add_argument("--layer", type=flags.positive, help="layer to look at, from 1; by default after the outliers")
    parser.add_argument("--head", type=flags.positive, help="head to look at, from 1; by default the worst dimension's")
    parser.add_argument("--gates", action="store_true", help="also show that layer's gates, token by token")
    parser.add_argument("--curves", action="store_true", help="loss, norms and kurtosis of all RUNs against steps")
    parser.add_argument("--compare", action="store_true", help="one activation of two RUNs, and the 8-bit grid over it")
    parser.add_argument("--damage", action="store_true", help="quantize one tensor at a time: what it does to the last hidden states")
    parser.add_argument("--batches", type=flags.positive, help=f"validation batches, of the run's own size; by default {BATCHES}, with --damage {DAMAGE_BATCHES}")
    parser.add_argument("--data", type=flags.place, help="where the runs' data is now")
    parser.add_argument("--device", help="cpu, cuda, cuda:N or mps; by default the best there is")
    parser.add_argument("--out", type=flags.place, help="folder for the pictures; by default figures/ in the (first) run")
    parser.add_argument("--html", action="store_true", help="also write pictures and numbers as a page, analysis.html")
    args = parser.parse_args(argv)
    mode = check_mode(args)

    report = Report(Path(args.out or Path(args.runs[0], "figures")))
    mode(args, report)
    if args.html:
        typed = sys.argv[1:] if argv is None else argv
        report.write_page(" and ".join(args.runs), shlex.join(["python", "analyze.py", *typed]))
    report.close()


def check_mode(args):
    """Which of the functions below is asked for. A flag that it would not read is an error."""
    chosen = [mode for mode in (curves, compare, damage) if getattr(args, mode.__name__)]
    if len(chosen) > 1:
        raise UserError(" and ".join(f"--{mode.__name__}" for mode in chosen) + " are different pictures; give one of them")
    mode = chosen[0] if chosen else analyze
    if mode is compare and len(args.runs) != 2:
        raise UserError(f"--compare needs two runs, got {len(args.runs)}: {' '.join(args.runs)}")
    if mode in (analyze, damage) and len(args.runs) > 1:
        raise UserError(f"got {len(args.runs)} runs: give one, or several with --curves, or two with --compare")
    unread = {curves: ("layer", "head", "gates", "batches", "data", "device"), compare: ("head", "gates"),
              damage: ("layer", "head", "gates"), analyze: ()}
    for flag in unread[mode]:
        if getattr(args, flag):
            raise UserError(f"--{flag} has no meaning with --{mode.__name__}")
    return mode


# ---- one run ----

@torch.no_grad()
def analyze(args, report):
    # ---- the run, and all that could be wrong with it ----
    (name,) = args.runs
    device = pick_device(args.device)
    run = open_run(name, device, args.data)
    model, config, family = run.model, run.model.config, run.model.family
    for flag, chosen, most in (("layer", args.layer, config.layers), ("head", args.head, config.heads)):
        if chosen and chosen > most:
            raise UserError(f"--{flag} {chosen}: {name} has {flag}s 1 to {most}")
    if args.gates and model.layers[0].attention.gate is None:
        raise UserError(f"--gates: {name} has no gates; its attention is {config.attention}")

    # ---- measure ----
    tap = model.norm_tap
    is_text = hasattr(config, "vocab_size")
    found = survey(model, run.validation(args.batches or BATCHES), device, tap, config.vocab_size if is_text else None)
    worst_layer, dimension = worst_dimension(found["outliers"][tap])
    layer = args.layer - 1 if args.layer else min(worst_layer + 1, config.layers - 1)  # outliers act in the next layer
    owner = dimension // (config.width // config.heads)
    head = args.head - 1 if args.head else owner

    # ---- where outliers sit ----
    report.say(f"{name}: {family}, {config.attention} attention, step {run.checkpoint['step']}, measured on "
               f"{found['samples']} validation samples of {config.seq_len} tokens.\n"
               "Layers and heads count from 1, positions and dimensions from 0.")
    settings = run.checkpoint["args"] | flags.attention_settings(config)
    report.say("Trained with " + ", ".join(f"{key} {value}" for key, value in settings.items()
                                           if value is not None and value is not False) + ".")
    report_outliers(report, name, found, config)
    if is_text:
        names = token_names(run.data.text)
        report_tokens(report, name, found, names, tap, run.data.text.is_bytes)
    else:
        side = config.image_size // config.patch_size
        names = ["[CLS]", *(f"{i // side},{i % side}" for i in range(side ** 2))]
        _, by_position, quantity = histogram_of(found["outliers"][tap])
        report.draw("patches", f"{quantity} of {tap} over the image (Figure 8c)",
                    lambda f: f.patch_maps(on_patches(by_position), quantity, f"{name}: {tap}"))

    # ---- what heads do ----
    report_heads(report, name, found, names, config)
    inputs, _ = to_device(next(run.validation()), device)
    inputs = [inputs[0][:EXAMPLES]]  # without the positions that BERT predicts: they count through the whole batch
    with record(model, ("probs", "values", "context", "gate_output", tap)) as kept:
        model(*inputs)
    probs, values = array(kept["probs"][layer][:, head]), array(kept["values"][layer][:, head])  # (N, T, T or d_head)
    product = array(kept["context"][layer].unflatten(-1, (config.heads, -1))[:, :, head])  # (N, T, d_head)
    which = f"layer {layer + 1}, head {head + 1}"
    report.heading(f"{which} at work; the worst dimension of {tap} is {dimension} in layer {worst_layer + 1}, "
                   f"and head {owner + 1} owns it")
    if is_text:
        labels = [[names[i] for i in sequence] for sequence in inputs[0].tolist()]
        product_name = "probabilities × values" + (" × gate" if "gate" in found["heads"] else "")
        for i, title in enumerate(f"{name}: {which}, validation sequence {i}" for i in range(len(labels))):
            report.draw(f"head-{i}", f"Attention probabilities, values and their product, {which} (Figure 2)",
                        lambda f: f.head_on_text(labels[i], probs[i], values[i], product[i], product_name, title))
    else:
        labels = [names] * len(inputs[0])
        source = max(layer - 1, 0)  # the activation that enters the layer, except for the first
        patches = outlier_patches(array(kept[tap][source]), values)
        attended = on_patches(probs.sum(axis=1))
        report.draw("head", f"Outliers of {tap} in layer {source + 1} and attention in {which} (Figure 3)",
                    lambda f: f.head_on_images(array(inputs[0].permute(0, 2, 3, 1)), *patches, attended, probs,
                                               f"{name}: {tap} of layer {source + 1}, attention in {which}"))
    if args.gates:
        pi = kept["gate_output"][layer]
        pi = pi.reshape(*pi.shape[:3], -1).mean(dim=-1)  # (N, H, T): of a gate on every dimension their mean
        for i, gates in enumerate(array(pi)):
            report.draw(f"gates-{i}", f"Gates of layer {layer + 1}, token by token", lambda f: f.gates_on_tokens(
                labels[i], gates, f"{name}: gates of layer {layer + 1}, validation sample {i}"))
    report.draw("magnitudes", "Outliers stand in channels (blog, Figure 1)", lambda f: f.magnitudes(
        {f"{tap} of layer {worst_layer + 1}": array(kept[tap][worst_layer][0])}, f"{name}: one validation sample"))


@torch.no_grad()
def damage(args, report):
    """Every tensor of every layer: how far its outliers have grown, and what it does alone in eight bits."""
    (name,) = args.runs
    run, batches = open_run(name, pick_device(args.device), args.data), args.batches or DAMAGE_BATCHES
    build = lambda: quantize_model(copy.deepcopy(run.model), BITS, BITS)
    found, altogether = by_layer(run, build, eval_batches=batches)
    kinds, metric = list(found), run.model.metric
    with watch(run.model, kinds, growth) as outliers:
        for batch in run.validation(batches):
            run.model(*to_device(batch, run.device)[0])
    layers = [f"layer {layer + 1}" for layer in range(run.model.config.layers)]
    only = f"only one tensor of one layer in {BITS} bits"

    report.heading("how far outliers have grown (minq/growth.py): max / sigma, and in brackets the share of that token's energy")
    mean = outliers.mean
    report.table(["tap", *layers], [[kind, *(f"{height:.1f} ({share:.2f})" for height, share in
                                            zip(mean[kind]["max_over_sigma"], mean[kind]["share"]))] for kind in kinds])
    sqnr = {kind: [layer["sqnr"] for layer in found[kind]] for kind in kinds}
    title = f"SQNR of the last hidden states in dB, with {only}"
    report.heading(title)
    report.table(["tap", *layers], [[kind, *(f"{value:.1f}" for value in sqnr[kind])] for kind in kinds])
    if metric != "sqnr":
        report.heading(f"{metric}, with {only}")
        report.table(["tap", *layers], [[kind, *(f"{layer['metric']:.4g}" for layer in found[kind])] for kind in kinds])
    report.heading(f"all together in {BITS} bits")
    report.table(["quantized", metric, "SQNR, dB"],
                 [[row["tap"], f"{row['metric']:.4g}", f"{row['sqnr']:.1f}"] for row in altogether])
    report.draw("damage", title, lambda f: f.damage(kinds, np.array(list(sqnr.values())), f"{name}: one tensor in {BITS} bits"))


# ---- several runs ----

def curves(args, report):
    """Every run's metrics.jsonl in one picture."""
    runs = {}
    for name in args.runs:
        try:
            runs[name] = curves_of(read_log(name))
        except (KeyError, TypeError, IndexError, ValueError) as error:
            reason = error if isinstance(error, UserError) else f"{name}: metrics.jsonl: no evaluations of a training script ({error})"
            raise UserError(reason) from None
    quantities = list(runs[args.runs[0]])
    if any(list(run) != quantities for run in runs.values()):
        raise UserError(f"--curves {' '.join(args.runs)}: text and images; expected runs with the same metric")
    report.heading("over training: first -> last evaluation")
    report.table(["run", "steps", *quantities], [
        [name, run["training loss"][0][-1], *(f"{values[0]:.4g} -> {values[-1]:.4g}" for _, values in run.values())]
        for name, run in runs.items()])
    report.draw("curves", "Over training (blog, Figures 3, 5 and 6)", lambda f: f.curves(runs, "over training"))


def curves_of(lines):
    """quantity -> (steps, values) of the lines of a metrics.jsonl."""
    metric = "accuracy" if "accuracy" in lines[0] else "perplexity"
    found = {"training loss": [line["loss"] for line in lines], metric: [line[metric] for line in lines],
             "max inf norm, layer_input": [max(line["layer_input"]["inf_norm"]) for line in lines]}
    for tap in ("ffn_output", "layer_output"):
        found[f"max inf norm, {tap}"] = [max(line[tap]["inf_norm"]) for line in lines]
        found[f"avg kurtosis (not excess), {tap}"] = [np.mean(line[tap]["kurtosis"]) for line in lines]
    return {quantity: ([line["step"] for line in lines], values) for quantity, values in found.items()}


@torch.no_grad()
def compare(args, report):
    """One activation of two runs, on the first validation batch, and the grid from its smallest to largest value."""
    device = pick_device(args.device)
    opened = [open_run(name, device, args.data) for name in args.runs]
    families = [run.model.family for run in opened]
    if families[0] != families[1]:
        raise UserError(f"--compare {' '.join(args.runs)}: runs of {' and '.join(families)}; expected one family")
    layers = min(run.model.config.layers for run in opened)
    if args.layer and args.layer > layers:
        raise UserError(f"--layer {args.layer}: these runs have layers 1 to {layers}")

    # ---- measure ----
    tap = opened[0].model.norm_tap
    norms, first = {}, {}  # per run: the metrics of every layer; the activations of the first batch
    for run in opened:
        name, model = run.name, run.model
        with watch(model, (tap,)) as outliers, record(model, (tap,)) as kept:
            for batch in run.validation(args.batches or BATCHES):
                model(*to_device(batch, device)[0])
                first.setdefault(name, list(kept[tap]))
        norms[name] = outliers.mean[tap]
    layer = args.layer - 1 if args.layer else int(np.argmax(norms[args.runs[0]]["inf_norm"][:layers]))
    x = {name: array(activations[layer]) for name, activations in first.items()}  # (B, T, d)
    grids = {name: affine_parameters(*torch.aminmax(torch.from_numpy(x[name])), BITS) for name in x}
    grids = {name: (scale.item(), zero_point.item()) for name, (scale, zero_point) in grids.items()}

    # ---- report ----
    title = f"{tap} of layer {layer + 1}"
    report.heading(f"{title}, and a grid of {BITS} bits from its smallest to its largest value")
    middle = {name: np.percentile(x[name], (0.5, 99.5)) / grids[name][0] for name in x}  # in steps
    report.table(["run", "inf norm", "kurtosis (not excess)", "grid step", "levels for the middle 99% of values"],
                 [[name, f"{norms[name]['inf_norm'][layer]:.3g}", f"{norms[name]['kurtosis'][layer]:.3g}",
                   f"{grids[name][0]:.3g}", int(np.diff(middle[name].round()).item()) + 1] for name in x])
    report.draw("grids", f"Histograms of {title}, and the {BITS}-bit grid over them (red)",
                lambda f: f.grids({name: x[name].ravel() for name in x}, grids, BITS, title))
    report.draw("magnitudes", f"One sample of {title} over channels and tokens (blog, Figure 1)",
                lambda f: f.magnitudes({name: x[name][0] for name in x}, title))


if __name__ == "__main__":
    main()
