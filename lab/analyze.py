"""Look at trained runs: the paper's figures (sec. 3, Figures 1-3, 8-14), and their numbers.

    python -m lab.analyze runs/bert-vanilla-s0             where outliers sit, what each head does
    python -m lab.analyze runs/bert-vanilla-s0 --layer 2 --head 3                that head at work
    python -m lab.analyze runs/bert-* --curves             norms and kurtosis over training
    python -m lab.analyze runs/bert-vanilla-s0 runs/bert-clipped-s0 --compare    one activation of
                                                           both, and the 8-bit grid over it

An outlier is more than 6 standard deviations from its sample's mean. Layers and heads count from 1,
positions and dimensions from 0. Delimiters are [CLS], [SEP], newline, space and punctuation.

update: norm of what a head hands on / mean norm of its values; the smaller, the more idle
sink: the commonest most-attended token; sink rate: its share of a query's attention (if even, 1/T)
sink value: its norm / mean norm; zeros, ones: fraction of the probabilities, masked ones left out
score range: largest - smallest softmax input of a query; gate: mean of pi, where there is a gate
"""
import json
from pathlib import Path

import numpy as np
import torch

import lab.cures  # noqa: F401, runs with such an attention open
from lab.survey import (OUTLIER_TAPS, group_shares, on_patches, outlier_patches, record, survey,
                        token_groups, token_names, worst_dimension)
from lab.tables import markdown, pictures_with, read_log
from minq import flags
from minq.quant import affine_parameters, value_range
from minq.runs import open_run
from minq.training import pick_device, to_device

BATCHES = 16  # validation batches, unless told


@flags.one_line_errors
@torch.no_grad()
def main(argv=None):
    # ---- arguments ----
    parser = flags.Parser(__doc__)
    flags.add_run_flags(parser, batches=None, seeds=None)
    add = parser.add_argument
    add("--batches", type=flags.positive, dest="eval_batches", help="the same; here 16 by default")
    add("--layer", type=flags.positive, help="from 1; by default the one after the outliers")
    add("--head", type=flags.positive, help="from 1; by default that of the worst dimension")
    add("--gates", action="store_true", help="also show that layer's gates, token by token")
    add("--curves", action="store_true", help="loss, norms and kurtosis of RUNs against steps")
    add("--compare", action="store_true", help="one activation of two RUNs, and the 8-bit grid")
    add("--out", type=flags.place, help="folder of the pictures; by default figures/ in a RUN")
    args = parser.parse_args(argv)
    mode = curves if args.curves else compare if args.compare else analyze
    if args.curves and args.compare or not args.curves and len(args.runs) != 1 + args.compare:
        raise flags.UserError("expected one RUN, two with --compare, or several with --curves")
    unread = {curves: "layer head gates eval_batches data", compare: "head gates", analyze: ""}
    for name in unread[mode].split():
        if getattr(args, name):
            raise flags.UserError(f"{flags.option(name)} changes nothing with --{mode.__name__}")

    # ---- measure and print, write, draw ----
    numbers, pictures = mode(args)  # pictures: name -> (function of lab/figures.py, its arguments)
    if args.json:
        flags.write_atomically(args.json, json.dumps(numbers, default=lambda x: x.tolist()) + "\n")
    if (figures := pictures_with()) is None:
        return
    folder = Path(args.out or Path(args.runs[0], "figures"))
    with flags.writing(f"--out {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        for name, (function, *arguments) in pictures.items():
            getattr(figures, function)(*arguments).savefig(folder / f"{name}.png")
    print(f"in {folder}: {' '.join(f'{name}.png' for name in pictures)}")


def table(title, rows):
    """Print rows, dicts of words and numbers."""
    cell = lambda x: f"{x:.3g}" if isinstance(x, (float, np.floating)) else str(x)
    print(f"\n{title}\n\n{markdown([{k: cell(x) for k, x in row.items()} for row in rows])}")


def opened(args, name, family=None):
    """An OpenedRun, which has the layer, head and gates that `args` ask for."""
    run = open_run(name, pick_device(args.device), args.data, family)
    heads, gates = run.model.config.heads, run.model.layers[0].attention.gate is not None
    for flag, most in ("layer", len(run.model.layers)), ("head", heads), ("gates", gates):
        if (getattr(args, flag) or 0) > most:
            raise flags.UserError(f"--{flag} {getattr(args, flag)}: {name} has {int(most)}")
    return run


def analyze(args):
    """One run: where its outliers sit, which tokens carry them, what its heads do."""
    run = opened(args, *args.runs)
    name, config, tap = run.name, run.model.config, run.model.norm_tap
    text, L, H = getattr(run.data, "text", None), config.layers, config.heads
    names = token_names(text) if text else [*map(str, range(config.seq_len))]
    batches = run.validation(args.eval_batches or BATCHES)
    got = survey(run.model, batches, run.device, tap, text and len(names))
    outliers, heads, carriers = (got[key] for key in ("outliers", "heads", "tokens_of_outliers"))
    settings = run.checkpoint["args"] | flags.attention_settings(config)
    print(f"{name}: {run.model.family}, {config.attention} attention, step {run.checkpoint['step']}"
          f", on {got['samples']} validation samples of {config.seq_len} tokens.\nTrained with "
          + ", ".join(f"{k} {x}" for k, x in settings.items() if str(x) not in ("None", "False") and
                      (settings.get("fake_quant") or "_bits" not in k and "fake_quant" not in k)))

    # ---- where outliers sit (Figures 1 and 8) ----
    rows, pictures = [], {"norms": ("norms_by_layer", outliers, name)}
    for kind, x in outliers.items():
        pictures[f"outliers-{kind}"] = "histograms", x, f"{name}: {kind}"
        for layer in range(L):
            row = {"tap": kind, "layer": layer + 1, "inf norm": x["inf_norm"][layer],
                   "kurtosis (not excess)": x["kurtosis"][layer],
                   "outliers per sample": x["by_position"][layer].sum()}
            for axis in ("position", "dimension"):
                counts = x[f"by_{axis}"][layer]
                worst = np.lexsort((x[f"peak_by_{axis}"][layer], counts))[-1]
                row |= {f"worst {axis}": worst, f"outliers in this {axis}": counts[worst]}
            rows.append(row | {"its head": worst * H // config.width + 1})
    table("where outliers sit", rows)

    # ---- which tokens carry them ----
    if text:
        what = f"outliers of {tap}"
        if not carriers.any():
            what, carriers = f"each sample's largest |x| of {tap}", got["tokens_of_peaks"]
        groups = token_groups(names, text.is_bytes)
        shares, every = (group_shares(groups, x) for x in (carriers.sum(axis=0), got["tokens"]))
        rows = [{"tokens": group, f"share of {what}": shares[group], "of all tokens": every[group]}
                for group in sorted(shares, key=shares.get, reverse=True) if every[group]]
        table("which tokens carry them", rows)
        pictures["tokens"] = "shares", rows, name
    elif outliers[tap]["by_position"].any():
        pictures["patches"] = "patch_maps", on_patches(outliers[tap]["by_position"]), name

    # ---- what heads do ----
    over_even = heads["attention"] / heads["even"]
    table("what each head does, the most attention on one token first", [
        {"layer": at[0] + 1, "head": at[1] + 1, "sink": names[got["sinks"][at]]}
        | {key.replace("_", " "): x[at] for key, x in heads.items()}
        for at in sorted(np.ndindex(L, H), key=over_even.__getitem__, reverse=True)])
    print("\n" + __doc__.rpartition("\n\n")[2])
    pictures["heads"] = "heads", heads, 1 / config.seq_len, f"{name}: heads, numbered layer.head"
    if "pi" in heads:
        pictures["gates"] = "gate_histograms", got["gate_counts"], f"{name}: gates"

    # ---- one head on two validation samples (Figures 2 and 3) ----
    source, dimension = worst_dimension(outliers[tap])
    layer = args.layer - 1 if args.layer else min(source + 1, L - 1)  # outliers act in the next one
    owner = dimension * H // config.width
    head = args.head - 1 if args.head else owner
    title, where = f"{name}: layer {layer + 1}, head {head + 1}", f"{tap} of layer {source + 1}"
    print(f"{title} at work; the worst dimension of {where} is {dimension}, head {owner + 1}'s\n")
    batch, _ = to_device(next(run.validation()), run.device)
    inputs = batch[0][:2]  # without BERT's positions: they count through the whole batch
    with record(run.model, ("probs", "values", "context", "gate_output", tap)) as kept:
        run.model(inputs)
    array = lambda x: x.float().cpu().numpy()
    probs, values = array(kept["probs"][layer][:, head]), array(kept["values"][layer][:, head])
    product = array(kept["context"][layer].chunk(H, dim=-1)[head])  # (N, T, d_head)
    pictures["magnitudes"] = "magnitudes", {where: array(kept[tap][source][0])}, name
    if text:
        labels = [[names[i] for i in sequence] for sequence in inputs.tolist()]
        what = "probabilities × values" + " × gate" * ("pi" in heads)
        for i, sequence in enumerate(zip(labels, probs, values, product)):
            pictures[f"head-{i}"] = "head_on_text", *sequence, what, f"{title}, sequence {i}"
    else:
        labels, before = [names] * len(inputs), max(layer - 1, 0)  # whose output enters the layer
        patches = outlier_patches(array(kept[tap][before]), values)
        pictures["head"] = ("head_on_images", array(inputs.permute(0, 2, 3, 1)), *patches,
                            on_patches(probs.sum(axis=1)), probs, f"{title}, outliers of {tap}")
    for i, sequence in enumerate(labels if args.gates else ()):
        pi = array(kept["gate_output"][layer][i].reshape(H, len(sequence), -1).mean(dim=-1))
        pictures[f"gates-{i}"] = "gates_on_tokens", sequence, pi, f"{name}: layer {layer + 1} ({i})"
    return {"run": name} | got, pictures


def curves(args):
    """Several runs: their metrics.jsonl over training."""
    rows, runs = [], {}
    for name in args.runs:
        log = read_log(name)
        metric = "accuracy" if "accuracy" in log[0] else "perplexity"
        series = {key: [line[key] for line in log] for key in ("step", "loss", metric)}
        for tap in ("layer_input", *OUTLIER_TAPS):
            series[f"max inf norm, {tap}"] = [max(line[tap]["inf_norm"]) for line in log]
            series[f"avg kurtosis, {tap}"] = [np.mean(line[tap]["kurtosis"]) for line in log]
        rows.append({"run": name} | {k: f"{x[0]:.5g} → {x[-1]:.5g}" for k, x in series.items()})
        runs[name] = {key: (series["step"], x) for key, x in series.items() if key != "step"}
    if len(set(map(tuple, rows))) > 1:
        raise flags.UserError("--curves: text and images; expected runs with the same metric")
    table("over training, first → last evaluation (kurtosis is not excess)", rows)
    return runs, {"curves": ("curves", runs, "over training (kurtosis is not excess)")}


def compare(args, bits=8):
    """Two runs: an activation of the last validation batch, and the grid from its smallest to its
    largest value. Norm and kurtosis are means over all batches."""
    rows, x, grids, family, layer = [], {}, {}, None, args.layer and args.layer - 1
    for name in args.runs:
        run = opened(args, name, family)
        family, tap = run.model.family, run.model.norm_tap
        with record(run.model, (tap,)) as kept:
            found = survey(run.model, run.validation(args.eval_batches or BATCHES), run.device, tap)
        norms, kurtosis = (found["outliers"][tap][key] for key in ("inf_norm", "kurtosis"))
        layer = int(np.argmax(norms)) if layer is None else layer
        values = kept[tap][layer].float().cpu()  # (B, T, d)
        scale, zero_point = (n.item() for n in affine_parameters(*value_range(values), bits))
        levels = 1 + np.ptp((np.percentile(values, (0.5, 99.5)) / scale).round())
        rows.append({"run": name, "inf norm": norms[layer], "grid step": scale,
                     "kurtosis (not excess)": kurtosis[layer], "levels for the middle 99%": levels})
        x[name], grids[name] = values.numpy(), (scale, zero_point)
    title = f"{tap} of layer {layer + 1}"
    table(f"{title}, and a grid of {bits} bits from its smallest to its largest value", rows)
    return rows, {"grids": ("grids", {name: x[name].ravel() for name in x}, grids, bits, title),
                  "magnitudes": ("magnitudes", {name: x[name][0] for name in x}, title)}


if __name__ == "__main__":
    main()
