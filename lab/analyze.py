"""Look at trained runs: the paper's figures (sec. 3, Figures 1-3, 8-14), and their numbers.

    python -m lab.analyze runs/bert-vanilla-s0             where outliers sit, what each head does
    python -m lab.analyze runs/bert-vanilla-s0 --layer 2 --head 3                that head at work
    python -m lab.analyze runs/bert-* --curves             norms and kurtosis over training
    python -m lab.analyze runs/opt-vanilla-backcopy-s0 --by-trigger    where heads have work to do

An outlier is more than 6 standard deviations from its sample's mean. Layers and heads count from 1,
positions and dimensions from 0. Delimiters: [CLS], [SEP], spaces, line ends and punctuation.

sink: the commonest most-attended token; attention: mean probability of each sample's own
even: what even attention would give it; parks: attention above 0.3 and above twice even
update: norm of what a head hands on, before its gate / mean norm of its values
even update: the same if it averaged independent values evenly; pi: mean of the gate, if any
sink value: its norm / mean norm; zeros, ones: fraction of the probabilities, masked ones left out
score range: largest - smallest softmax input of a query
"""
from pathlib import Path

import numpy as np
import torch

from lab.opened import open_runs
from lab.survey import (OUTLIER_TAPS, at_triggers, is_delimiter, record, survey, token_names,
                        worst_dimension)
from lab.tables import markdown, read_log, save_pictures, write_json
from minq import flags
from minq.training import to_device


@flags.one_line_errors
@torch.no_grad()
def main(argv=None):
    # ---- arguments ----
    parser = flags.Parser(__doc__)
    flags.add_run_flags(parser, batches=None, seeds=None)
    add = parser.add_argument
    add("--layer", type=flags.positive, help="from 1; by default the one after the outliers")
    add("--head", type=flags.positive, help="from 1; by default that of the worst dimension")
    add("--curves", action="store_true", help="loss, norms and kurtosis of RUNs against steps")
    add("--by-trigger", action="store_true", help="attention where a head must copy, and elsewhere")
    add("--out", type=flags.place, help="folder of the pictures; by default figures/ in a RUN")
    args = parser.parse_args(argv)
    mode = curves if args.curves else by_trigger if args.by_trigger else analyze
    if mode is not curves and len(args.runs) > 1:
        raise flags.UserError(f"RUN {args.runs[1]}: expected one RUN, or several with --curves")

    # ---- measure and print, write, draw ----
    numbers, pictures, *printed = mode(args)  # name -> (function of lab/figures.py, its arguments)
    write_json(args.json, numbers)
    print(*printed, sep="\n\n")
    if pictures:
        save_pictures(args.out or Path(args.runs[0], "figures"), pictures)


def table(title, rows):
    """Rows, dicts of words and numbers, in Markdown."""
    cell = lambda x: f"{x:.3g}" if isinstance(x, (float, np.floating)) else str(x)
    return f"{title}\n\n{markdown([{k: cell(x) for k, x in row.items()} for row in rows])}"


def analyze(args):
    """One run: where its outliers sit, which tokens carry them, what its heads do."""
    (run,), (name,) = open_runs(args), args.runs
    config, tap, text = run.model.config, run.model.norm_tap, getattr(run.data, "text", None)
    L, H = config.layers, config.heads
    for flag, most in ("layer", L), ("head", H):
        if (getattr(args, flag) or 0) > most:
            raise flags.UserError(f"--{flag} {getattr(args, flag)}: {name} has {most}")
    names = token_names(text) if text else [*map(str, range(config.seq_len))]
    batches = run.validation(args.eval_batches or 16)
    got = survey(run.model, batches, run.device, tap, text and len(names))
    outliers, heads = got["outliers"], got["heads"]
    settings = [f", {k} {x}" for k, x in flags.attention_settings(config).items() if x is not None]
    printed = [f"{name}: {run.model.family}, {config.attention} attention{''.join(settings)}, "
               f"step {run.checkpoint['step']}, on {got['samples']} validation samples"]

    # ---- where outliers sit (Figures 1 and 8) ----
    rows, pictures = [], {}
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
    printed.append(table("where outliers sit", rows))

    # ---- which tokens carry them ----
    if text:
        shares, every = (got[x] / max(got[x].sum(), 1) for x in ("tokens_of_outliers", "tokens"))
        ten, ends = np.argsort(-shares, kind="stable")[:10], [*map(is_delimiter, names)]
        printed.append(table("which tokens carry them: the ten that carry most", [
            {"token": token, f"share of outliers of {tap}": shares[i].sum(),
             "of all tokens": every[i].sum()}
            for token, i in (*((names[i], i) for i in ten), ("all delimiters", ends))]))

    # ---- what heads do ----
    over_even = heads["attention"] / heads["even"]
    printed += [table("what each head does, sorted by attention / even", [
        {"layer": at[0] + 1, "head": at[1] + 1, "sink": names[got["sinks"][at]]}
        | {key.replace("_", " "): x[at] for key, x in heads.items()}
        for at in sorted(np.ndindex(L, H), key=over_even.__getitem__, reverse=True)]),
        __doc__.rpartition("\n\n")[2]]

    # ---- one head on two validation samples (Figures 2 and 3) ----
    source, dimension = worst_dimension(outliers[tap])
    layer = args.layer - 1 if args.layer else min(source + 1, L - 1)  # outliers act in the next one
    head = args.head - 1 if args.head else dimension * H // config.width
    title = f"{name}: layer {layer + 1}, head {head + 1}"
    printed.append(f"{title} at work; the worst dimension of {tap} of layer {source + 1} is "
                   f"{dimension}")
    batch, _ = to_device(next(run.validation()), run.device)
    inputs = batch[0][:2]  # without BERT's positions: they count through the whole batch
    with record(run.model, ("probs", "values", "context")) as kept:
        run.model(inputs)
    T, array = config.seq_len, lambda x: x.float().cpu().numpy()
    probs = array(kept["probs"][layer][:, head, :, :T])  # what stands behind them is no token
    values = array(kept["values"][layer][:, head, :T])
    product = array(kept["context"][layer].chunk(H, dim=-1)[head])  # (N, T, d_head)
    what = "probabilities × values" + " × gate" * ("pi" in heads)
    panels = {"attention": probs, "values": values, what: product}
    labels = text and [[names[i] for i in sequence] for sequence in inputs.tolist()]
    pictures["head"] = "head", panels, title, labels
    return {"run": name} | got, pictures, *printed


def by_trigger(args):
    """A run on the backcopy task: what its heads attend to where they must copy, and elsewhere."""
    (run,) = open_runs(args, "opt")
    if (data := args.data or run.checkpoint["args"]["data"]) != "backcopy":
        raise flags.UserError(f"--by-trigger {run.name}: its data is {data}, not backcopy")
    found = at_triggers(run.model, run.validation(args.eval_batches or 16), run.device)
    return {"run": run.name} | found, {}, table(
        f"{run.name}: the mean probability of the start token and of the token before; pi", [
        {"layer": layer + 1, "head": head + 1}
        | {f"{where}: {key}": x[layer][head] for where, measures in found.items()
           for key, x in measures.items()}
        for layer, head in np.ndindex(run.model.config.layers, run.model.config.heads)])


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
    title = "over training (kurtosis is not excess)"
    return runs, {"curves": ("curves", runs, title)}, table(f"{title}, first → last", rows)


if __name__ == "__main__":
    main()
