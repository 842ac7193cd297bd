"""The results of an experiment (lab/reproduce.py): means over seeds, columns, Markdown, pictures.

A number of a row of results is {"mean", "std", "all"} over its training seeds; one that was also
calibrated several times has `calibrations`, the mean over training seeds of the deviation over
calibrations, and is shown as 4.52 ±0.01 (0.002).
"""
import json
import math
import statistics
from pathlib import Path

import torch

from minq import flags

METRICS = {"perplexity": "ppl ↓", "accuracy": "acc % ↑", "sqnr": "SQNR dB ↑"}
BITS = "bits at which 20% (ViT: 5 points) are lost"


def read_log(folder):
    """The evaluations in `folder`/metrics.jsonl, a dict each; at least one, or UserError."""
    path = Path(folder, "metrics.jsonl")
    try:
        found = [json.loads(line) for line in path.open(encoding="utf-8")]
    except (OSError, ValueError) as error:
        raise flags.UserError(f"{path}: cannot be read: {error}") from None
    if not found:
        raise flags.UserError(f"{path}: nothing is logged yet")
    return found


# ---- means and deviations ----

def mean_and_std(values):
    """Mean and sample standard deviation, which a single value has not; NaN stays NaN."""
    x = torch.tensor(values, dtype=torch.float64)
    std = x.std().item() if len(values) > 1 else None
    return {"mean": x.mean().item(), "std": std, "all": values}


def over_seeds(found):
    """One of what each training seed has found: the numbers in it become mean and deviation."""
    first = found[0]
    if isinstance(first, dict):
        merged = {name: over_seeds([x[name] for x in found]) for name in first}
        if "all" in first:  # of one training seed, over calibrations
            std = merged["std"] and merged["std"]["mean"]
            merged |= merged["mean"] | {"calibrations": std, "all": [x["all"] for x in found]}
        return merged
    if isinstance(first, list):
        return [over_seeds(each) for each in zip(*found)]
    if isinstance(first, str):
        return "; ".join(dict.fromkeys(found))
    return None if first is None else mean_and_std(found)


def with_std(found, digits=4):
    """4.52 ±0.01, or 4.52 ±0.01 (0.002)"""
    std, calibrations = found["std"], found.get("calibrations")
    return (f"{found['mean']:.{digits}g}" + ("" if std is None else f" ±{std:.2g}")
            + ("" if calibrations is None else f" ({calibrations:.2g})"))


def nan_last(x):
    return math.inf if math.isnan(x) else x


def cost(row, found):
    """How much worse than floating point: percent of perplexity, points of accuracy."""
    fp, mean = row["fp"]["mean"], found["mean"]
    return fp - mean if row["metric"] == "accuracy" else 100 * (mean / fp - 1)


def cost_in_words(row, found):
    return f"{cost(row, found):+.1f}" + "%" * (row["metric"] != "accuracy")


def bits_at_loss(row):
    """6.24 (6.05, 6.43): where the cost of quantization passes 20% or 5 points, of the mean over
    training seeds and of each seed."""
    seeds = [row | {"fp": {"mean": fp}, "quantized": {
        key: {"mean": statistics.mean(x["all"][i])} for key, x in row["quantized"].items()}}
        for i, fp in enumerate(row["fp"]["all"])]
    mean, *each = map(where_passed, (row, *seeds))
    return mean + (f" ({', '.join(each)})" if len(each) > 1 else "")


def where_passed(row):
    """Interpolated between the two widths beside it; a cost that is not a number is all."""
    limit = 5 if row["metric"] == "accuracy" else 20
    costs = [(int(key.split("x")[0]), nan_last(cost(row, found)))
             for key, found in row["quantized"].items()]  # 8 bits first
    if costs[0][1] >= limit:
        return f"over {costs[0][0]}"
    for (bits, below), (_, above) in zip(costs, costs[1:]):
        if above >= limit:
            return f"{bits - (limit - below) / (above - below):.2f}"
    return f"under {costs[-1][0]}"


# ---- columns: what a table shows of a row of results ----

def outlier_columns(model, outliers):
    """What tables show of a model's outliers: the paper's two columns, M / sigma where it is
    largest with its share (outliers.growth), and the same of each tap."""
    mean = outliers.mean

    def columns(tap, kurtosis_taps):
        height, share = max(zip(mean[tap]["max_over_sigma"], mean[tap]["share"]))
        return {"max_inf_norm": max(mean[tap]["inf_norm"]), "max_over_sigma": height,
                "avg_kurtosis": outliers.avg_kurtosis(kurtosis_taps), "share": share}

    whole = columns(model.norm_tap, model.kurtosis_taps)
    return whole | {tap: columns(tap, {tap: "kurtosis"}) for tap in mean}


def four(row):
    """The paper's four."""
    return {"FP": row["fp"], "max inf norm": row["max_inf_norm"],
            "avg kurtosis": row["avg_kurtosis"], "W8A8": row["quantized"]["8x8"]}


def in_words(row):
    return {name: with_std(x, 4 if name in ("FP", "W8A8") else 3) for name, x in four(row).items()}


def quantized(row):
    papers = [*map(str.strip, row["published"].split("|")), "", "", ""]
    return (in_words(row) | {BITS: bits_at_loss(row) if len(row["quantized"]) > 1 else ""}
            | {f"{name} (paper)": value for name, value in zip(four(row), papers)})


def bits(row):
    seconds = row.get("training_seconds")
    trained = f"{seconds['mean'] / 60:.0f} min" if seconds else ""
    return {"trained": trained, "FP": with_std(row["fp"])} | {
        f"W{key.replace('x', 'A')}": f"{with_std(x)} ({cost_in_words(row, x)})"
        for key, x in row["quantized"].items()} | {BITS: bits_at_loss(row)}


def outliers(row):
    """The outlier, and what quantization costs."""
    height = with_std(row["max_over_sigma"], 3)
    return {"trained": "", "FP": "", "M / sigma": height} | in_words(row) | bits(row)


def blog(row):
    return {"ppl ↓ as trained": with_std(row["as_trained"]),
            "ppl ↓, fake quantization off": with_std(row["fp"]),
            "ppl ↓ (blog)": row["published"], "training loss": with_std(row["loss"]),
            "largest inf norm of a layer's input": with_std(row["layer_input_norm"], 3),
            "ppl ↓, off, then W8A8 after training": with_std(row["quantized"]["8x8"])}


COLUMNS = {f.__name__: f for f in (quantized, bits, outliers, blog)}


def remedy_columns(row, remedy):
    """The metric, if the run has one, and SQNR at each width; – where the remedy does not apply."""
    cells = {"remedy": remedy["remedy"]}
    for key in row["remedies"][0]["quantized"]:
        found, width = remedy["quantized"].get(key), f"W{key.replace('x', 'A')}"
        if row["metric"] != "sqnr":
            cells[f"{width}, {METRICS[row['metric']]}"] = with_std(found) if found else "–"
        cells[f"{width}, {METRICS['sqnr']}"] = with_std(found["sqnr"], 3) if found else "–"
    return cells | {"in floating point": remedy["floats"]}


# ---- tables ----

def write_json(path, content):
    """What --json FILE asks for, if it was given."""
    if path:
        text = json.dumps(content, indent=1, default=lambda x: x.tolist())  # of NumPy's arrays
        flags.write_atomically(path, text + "\n")


def markdown(rows, words=1):
    """Rows, dicts with the same keys, as a table; its first `words` columns hold words."""
    lines = ["| " + " | ".join(line) + " |" for line in (rows[0], *(row.values() for row in rows))]
    lines.insert(1, "|" + "---|" * words + "---:|" * (len(rows[0]) - words))
    return "\n".join(lines)


def rendered(table):
    """The results of an experiment in Markdown."""
    rows, machine = table["rows"], table["machine"]
    body = remedies(rows) if table["columns"] == "remedies" else one_table(rows, table["columns"])
    if table["columns"] == "bits" and len({row["family"] for row in rows}) == 1:
        body += f"\n\n{in_a_sentence(rows)}"
    # some were recorded before the authors' pool was per token in OPT's FFNs
    body = body.replace("| avg kurtosis |", f"| {table.get('kurtosis', 'avg kurtosis')} |")
    steps = f" **Shortened: --steps {table['steps']}.**" if table["steps"] else ""
    made_on = machine["processor"] if machine["device"] == "cpu" else machine["device"]
    failed = f"\nFailed: {'; '.join(table['failed'])}.\n" if table.get("failed") else ""
    return (f"{table['title']}.{steps}\n{repetitions(rows)}; {made_on}, "
            f"PyTorch {table['versions']['torch']}.\n\n{body}\n{failed}")


def in_a_sentence(rows):
    """What was seen: At 7 bits plain softmax loses 32%, clipped softmax 2%."""
    width = [*rows[0]["quantized"]][1:2] or [*rows[0]["quantized"]]
    first, *rest = (f"{cost(row, row['quantized'][width[0]]):.0f}%" for row in rows)
    rest = [f"{row['label']} {percent}" for row, percent in zip(rows[1:], rest)]
    return (f"At {width[0].split('x')[0]} bits "
            + ", ".join([f"{rows[0]['label']} loses {first}", *rest]) + ".")


def one_table(rows, columns):
    """A line for each row of results; columns that are empty throughout are left out."""
    several = len({row["family"] for row in rows}) > 1
    lines = [{"": row["label"], "family": row["family"] * several} | COLUMNS[columns](row)
             for row in rows]
    shown = [name for name in lines[0] if name == "" or any(line[name] for line in lines)]
    return markdown([{name: line[name] for name in shown} for line in lines])


def remedies(rows):
    """A table of remedies for each row of results, below what the run is."""
    parts = []
    for row in rows:
        fp = f"{with_std(row['fp'])} in floating point, " if row.get("fp") else ""
        norm = with_std(row["max_inf_norm"], 3) if "max_inf_norm" in row else "not measured"
        parts += [f"**{row['family'].upper()}, {row['label']}**: {fp}max inf norm {norm}",
                  markdown([remedy_columns(row, remedy) for remedy in row["remedies"]])]
    return "\n\n".join(parts)


def repetitions(rows):
    """How often each row was measured, and how long training took. (± is the deviation over
    training seeds, in brackets stands that over calibrations.)"""
    seeds = max(len(row["seeds"]) for row in rows)
    calibrations = len([*rows[0]["quantized"].values()][0]["all"][0])
    minutes = [s / 60 for x in rows for s in x.get("training_seconds", {"all": []})["all"]]
    count = lambda n, what: f"{n} {what}{'s' * (n > 1)}"
    lasted = f"{min(minutes):.1f} to {max(minutes):.1f} minutes"
    return (f"{count(seeds, 'training seed')}, {count(calibrations, 'calibration')}; "
            f"{count(len(minutes), 'training')} of {lasted}")


def save_pictures(folder, pictures):
    """Draw into a folder: name -> (function of lab/figures.py, its arguments). Without matplotlib
    a line says how to get it."""
    try:
        from lab import figures
    except ModuleNotFoundError:
        return print("no pictures without matplotlib; get it with: pip install -e '.[plots]'")
    with flags.writing(folder):
        Path(folder).mkdir(parents=True, exist_ok=True)
        for name, (function, *arguments) in pictures.items():
            getattr(figures, function)(*arguments).savefig(Path(folder, f"{name}.png"))
    print(f"in {folder}: {' '.join(f'{name}.png' for name in pictures)}")
