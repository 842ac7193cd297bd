"""The results of an experiment (reproduce.py) as a table in Markdown and as a figure."""
import json
import math
import re
import statistics
from pathlib import Path

from minq.checkpoints import write_atomically
from minq.errors import UserError
from minq.flags import attention_settings


# ---- means and deviations ----

def mean_and_std(values):
    """Mean and sample standard deviation: None for a single value, NaN where one is not finite."""
    std = None if len(values) == 1 else statistics.stdev(values) if all(map(math.isfinite, values)) else math.nan
    return {"mean": statistics.mean(values), "std": std, "all": values}


def over_seeds(values):
    """Of one list of calibrations a training seed: mean and deviation of the seeds' means, and beside it the
    deviation over calibrations, a mean over seeds."""
    each = [mean_and_std(of_seed) for of_seed in values]
    calibrations = None if each[0]["std"] is None else statistics.mean(seed["std"] for seed in each)
    return mean_and_std([seed["mean"] for seed in each]) | {"calibrations": calibrations, "all": values}


def with_std(result, digits=4):
    """4.52 ±0.01, or 4.52 ±0.01 (0.002): over training seeds, and over calibrations"""
    calibrations = result.get("calibrations")
    return (f"{result['mean']:.{digits}g}" + ("" if result["std"] is None else f" ±{result['std']:.2g}")
            + ("" if calibrations is None else f" ({calibrations:.2g})"))


# ---- the table of quantize.py ----

# settings in --json, beside those of the attention
SHOWN = ("norm", "optimizer", "decay_layernorm", "patch_layernorm", "fake_quant", "seq_len", "steps", "data", "data_sha256")
METRICS = {"perplexity": "ppl ↓", "accuracy": "acc % ↑", "sqnr": "SQNR dB ↑"}


def json_row(run, fp, quantized, outliers):
    """What quantize.py writes of a run with --json: settings that its attention does not read are null."""
    model, config = run.model, vars(run.model.config)
    known = run.checkpoint["args"] | config | {"data_sha256": run.checkpoint["data_sha256"]}
    settings = attention_settings(model.config) | {key: known.get(key) for key in SHOWN}
    by_tap = {tap: {"max_inf_norm": outliers.max_inf_norm(tap), "avg_kurtosis": outliers.avg_kurtosis(tap), **highest(mean)}
              for tap, mean in outliers.mean.items()}
    return {"run": run.name, "family": model.family, "attention": known["attention"],
            "seed": known["seed"], "settings": settings,
            "metric": model.metric, "fp": None if model.metric == "sqnr" else fp, "quantized": quantized,
            "max_inf_norm": outliers.max_inf_norm(model.norm_tap),
            "avg_kurtosis": outliers.avg_kurtosis(*model.kurtosis_taps),
            **highest(outliers.mean[model.norm_tap]), **by_tap, "integer": None}


def highest(mean):
    """Of one tap: max / sigma in the place where it is largest, and the share that goes with it (minq/growth.py)."""
    height, share = max(zip(mean["max_over_sigma"], mean["share"]))
    return {"max_over_sigma": height, "share": share}


def runs_table(rows):
    """The paper's columns in Markdown, a row per run."""
    lines = []
    for row in rows:
        cells = {"run": row["run"], "metric": METRICS[row["metric"]], "FP32": "–" if row["fp"] is None else f"{row['fp']:.4g}",
                 "max inf norm": f"{row['max_inf_norm']:.3g}", "avg kurtosis (not excess)": f"{row['avg_kurtosis']:.3g}"}
        for key, result in row["quantized"].items():
            width = f"W{key.replace('x', 'A')}"
            cells[width] = with_std(result)
            if any("sqnr" in other["quantized"].get(key, {}) for other in rows):
                cells[f"{width}, SQNR dB"] = with_std(result.get("sqnr", result), 3)
                cells[f"{width}, cosine"] = f"{result['cosine']['mean']:.3f}"
        if row["integer"]:
            cells |= integer_columns(row["integer"])
        lines.append(cells)
    columns = {name: "–" for cells in lines for name in cells}  # not every row has them all
    return in_markdown([columns | cells for cells in lines], words=2)


def integer_columns(found):
    """What --integer measured: the metric on real integers, the file, and how much faster a pass is."""
    return {"integers": f"{found['metric']:.4g}", "MB": f"{found['bytes'] / 1e6:.3g}",
            "speed against fp32": f"{found['speedup_fp32']:.2f}x", "against bf16": f"{found['speedup_bf16']:.2f}x"}


def write_rows(rows, path):
    """--json: the table's rows as they are."""
    text = json.dumps(rows, indent=1) + "\n"
    write_atomically(Path(path), lambda new: new.write_text(text))


def taps_table(row):
    """What `--taps` found: the damage of quantizing one kind of tensor."""
    return in_markdown([{"only this is quantized": tap["tap"], METRICS[row["metric"]]: f"{tap['metric']:.4g}",
                         "SQNR dB ↑": f"{tap['sqnr']:.1f}"} for tap in row["taps"]])


def remedies_table(row):
    """What `--remedies` found: a row a remedy, the metric and SQNR at each width."""
    lines = []
    for remedy in row["remedies"]:
        cells = {"remedy": remedy["remedy"]}
        for key in row["remedies"][0]["quantized"]:
            result = remedy["quantized"].get(key)
            if row["metric"] != "sqnr":
                cells[f"W{key.replace('x', 'A')}, {METRICS[row['metric']]}"] = with_std(result) if result else "–"
            cells[f"W{key.replace('x', 'A')}, SQNR dB ↑"] = with_std(result["sqnr"], 3) if result else "–"
        lines.append(cells | {"in floating point": remedy["floats"]})
    return in_markdown(lines)


def remedies_over_seeds(tables):
    """`remedies` of the runs of one row: each figure over training seeds, and over calibrations."""
    def over(results):
        return over_seeds([result["all"] for result in results])

    merged = []
    for of_seeds in zip(*(table["remedies"] for table in tables)):
        quantized = {key: over([found["quantized"][key] for found in of_seeds])
                     | {"sqnr": over([found["quantized"][key]["sqnr"] for found in of_seeds])}
                     for key in of_seeds[0]["quantized"]}
        floats = "; ".join(dict.fromkeys(found["floats"] for found in of_seeds))
        merged.append({"remedy": of_seeds[0]["remedy"], "quantized": quantized, "floats": floats})
    return merged


EXTRA_TABLES = {"taps": taps_table, "remedies": remedies_table}


def in_markdown(rows, words=1):
    """Rows, dicts with the same keys, as a table whose first `words` columns are words, the others numbers."""
    lines = ["| " + " | ".join(line) + " |" for line in (rows[0], *(row.values() for row in rows))]
    lines.insert(1, "|" + "---|" * words + "---:|" * (len(rows[0]) - words))
    return "\n".join(lines)


# ---- columns: what a table shows of a row of results ----

BITS = "bits at which 20% (ViT: 5 points) are lost"


def quantized_columns(row):
    published = [part.strip() for part in row["published"].split("|")] if row["published"] else [""] * 4
    ours = {"FP": row["fp"], "max inf norm": row["max_inf_norm"], "avg kurtosis": row["avg_kurtosis"], "W8A8": row["quantized"]["8x8"]}
    return ({name: with_std(value, 3 if name in ("max inf norm", "avg kurtosis") else 4) for name, value in ours.items()}
            | ({BITS: bits_at_loss(row)} if len(row["quantized"]) > 1 else {})
            | {f"{name} (paper)": value for name, value in zip(ours, published)})


def bits_columns(row):
    """The sweep, what each width costs in brackets, and the width that costs 20%, or 5 points."""
    columns = {"FP": with_std(row["fp"])}
    for key, value in row["quantized"].items():
        columns[f"W{key.replace('x', 'A')}"] = f"{with_std(value)} ({cost(row, value):+.1f}{'' if row['metric'] == 'accuracy' else '%'})"
    return columns | {BITS: bits_at_loss(row)}


def cost(row, value):
    """How much worse than floating point: percent of perplexity, points of accuracy."""
    if row["metric"] == "accuracy":
        return row["fp"]["mean"] - value["mean"]
    return 100 * (value["mean"] / row["fp"]["mean"] - 1)


def bits_at_loss(row):
    """6.24 (6.05, 6.43): where the cost of quantization passes 20% or 5 points, of the mean over training seeds and of
    each seed."""
    limit = 5 if row["metric"] == "accuracy" else 20
    seeds = [row | {"fp": {"mean": fp}, "quantized": {key: {"mean": statistics.mean(value["all"][i])}
                                                      for key, value in row["quantized"].items()}}
             for i, fp in enumerate(row["fp"]["all"])]
    passed = [where_passed(each, limit) for each in (row, *seeds)]
    return passed[0] + (f" ({', '.join(passed[1:])})" if len(seeds) > 1 else "")


def where_passed(row, limit):
    """Interpolated between the two widths beside it."""
    costs = [(int(key.split("x")[0]), cost(row, value)) for key, value in row["quantized"].items()]  # 8 bits first
    costs = [(bits, math.inf if math.isnan(lost) else lost) for bits, lost in costs]  # NaN: all is lost
    if costs[0][1] >= limit:
        return f"over {costs[0][0]}"
    for (bits, below), (_, above) in zip(costs, costs[1:]):
        if above >= limit:
            return f"{bits - (limit - below) / (above - below):.2f}"
    return f"under {costs[-1][0]}"


def law_columns(row):
    """max / sigma of the tap whose norm the paper reports, also in units of sqrt(d), and what eight and six bits cost."""
    height = row["max_over_sigma"]
    eight, six = (f"{cost(row, row['quantized'][key]):+.1f}%" for key in ("8x8", "6x6"))
    return {"FP": with_std(row["fp"]), "max / sigma": with_std(height, 3),
            "over sqrt(d)": f"{height['mean'] / math.sqrt(int(row['x'])):.2g}", "share": with_std(row["share"], 2),
            "max inf norm": with_std(row["max_inf_norm"], 3), "avg kurtosis": with_std(row["avg_kurtosis"], 3),
            "W8A8": eight, "W6A6": six, "bits at which 20% are lost": bits_at_loss(row)}


def blog_columns(row):
    return {"ppl ↓ as trained": with_std(row["as_trained"]), "ppl ↓, fake quantization off": with_std(row["fp"]),
            "ppl ↓ (blog)": row["published"], "training loss": with_std(row["loss"]),
            "largest inf norm of a layer's input": with_std(row["layer_input_norm"], 3),
            "ppl ↓, off, then W8A8 after training": with_std(row["quantized"]["8x8"])}


def runtime_columns(row):
    return {"seconds a step": with_std(row["seconds"], 3), "relative to vanilla": with_std(row["ratio"], 3), "hours (paper)": row["published"]}


COLUMNS = {"quantized": quantized_columns, "bits": bits_columns, "law": law_columns, "blog": blog_columns, "runtime": runtime_columns}


# ---- tables and figures ----

def markdown(table):
    """The table in Markdown."""
    unit = "rounds" if table["columns"] == "runtime" else "steps"
    shortened = f" **Shortened to {table['steps']} {unit}.**" if table["steps"] else ""
    body = a_table_each(table) if table["columns"] == "remedies" else one_table(table)
    return (f"{table['title']}.{shortened} {repetitions(table['rows'])}; "
            f"{made_on(table['machine'])}, PyTorch {table['versions']['torch']}.\n\n{body}\n"
            + (f"\nFailed: {'; '.join(table['failed'])}.\n" if table.get("failed") else ""))


def made_on(machine):
    """The GPU's name, or the processor's."""
    return machine["processor"] if machine["device"] == "cpu" else machine["device"]


def one_table(table):
    """A row for each row of results; columns that are empty throughout are left out."""
    rows = [{"": row["label"], "family": row["family"]} | COLUMNS[table["columns"]](row) for row in table["rows"]]
    if len({row["family"] for row in table["rows"]}) == 1:
        rows = [{name: value for name, value in row.items() if name != "family"} for row in rows]
    shown = [name for name in rows[0] if name == "" or any(row[name] for row in rows)]
    return in_markdown([{name: row[name] for name in shown} for row in rows])


def a_table_each(table):
    """A table of remedies for each row of results, below what the run is."""
    parts = []
    for row in table["rows"]:
        fp = f"{with_std(row['fp'])} in floating point, " if row["fp"] else ""
        parts += [f"**{row['family'].upper()}, {row['label']}**: {fp}max inf norm {with_std(row['max_inf_norm'], 3)}", remedies_table(row)]
    return "\n\n".join(parts)


def repetitions(rows):
    """How often each row was measured, and how long training took."""
    first = rows[0]
    if "seconds" in first:
        return f"{first['precision']}, {len(first['seconds']['all'])} rounds in turns"
    seeds = len(first["seeds"])
    calibrations = len(next(iter(first["quantized"].values()))["all"][0])
    trained = [*(row for row in rows if "training_seconds" in row), *(row["other_rate"] for row in rows if row.get("other_rate"))]
    minutes = [seconds / 60 for row in trained for seconds in row["training_seconds"]["all"]]
    spread = "± over seeds, in brackets over calibrations" if seeds > 1 else "in brackets the deviation over calibrations"
    return (f"{seeds} training seed{'s' if seeds > 1 else ''}, {calibrations} calibrations ({spread}); {len(minutes)} "
            f"trainings of {min(minutes):.1f} to {max(minutes):.1f} minutes")


def draw(table, path, xlabel):
    """The figure of an experiment that has one, beside NAME.json. Needs matplotlib."""
    try:
        from minq import figures, law
    except ImportError:
        return print("pip install -e '.[plots]' draws this as a figure, too")
    if table["columns"] == "law":
        pictures = {path.with_suffix(".png"): law.draw(table)}
    else:
        pictures = {path.with_name(f"{path.stem}-{family}.png"):
                    figures.curves(lines, f"{family}: {table['title']}", xlabel)
                    for family, lines in against_settings(table["rows"]).items()}
    for picture, figure in pictures.items():
        picture.write_bytes(figures.png(figure))
        print(picture)


def against_settings(rows):
    """Quality and outliers over the setting: family -> line -> quantity -> (x, values)."""
    families = {}
    for row in rows:
        line = families.setdefault(row["family"], {}).setdefault(row["line"], {})
        for quantity, value in {f"{row['metric']}, floating point": row["fp"], f"{row['metric']}, W8A8": row["quantized"]["8x8"],
                                "max inf norm": row["max_inf_norm"], "avg kurtosis (not excess)": row["avg_kurtosis"]}.items():
            x, values = line.setdefault(quantity, ([], []))
            x.append(row["x"])
            values.append(value["mean"])
    return families


def with_tables(text, results):
    """A page (README.md, docs/*.md) with the table of results/NAME.md between each pair of marks."""
    def replace(match):
        path = results / f"{match.group(1)}.md"
        if not path.exists():
            raise UserError(f"{path}: no results yet; run: python reproduce.py {match.group(1)}")
        return f"<!-- results/{match.group(1)}.md -->\n{path.read_text()}<!-- end -->"
    return re.sub(r"<!-- results/([\w-]+)\.md -->\n.*?<!-- end -->", replace, text, flags=re.DOTALL)
