"""The pictures of the pages in docs/, drawn from what is recorded in results/.

    python -m lab.pictures --out docs/      # pip install -e '.[plots]'

A dot is a training seed. "Bits needed" stands between two measured widths, where 20% of the
perplexity are lost (tables.where_passed).
"""
import csv
import json
import re
from pathlib import Path
from statistics import mean

import numpy as np

from lab import figures, tables
from minq import flags

RESULTS = Path(__file__).parent.parent / "results"
NEEDED, LOST = "bits needed (20% lost)", "% of perplexity lost"
ABOVE = "perplexity, % above plain softmax"
STYLES = {"vanilla": {"color": figures.RED, "marker": "o", "label": "plain softmax"},
          "clipped": {"color": figures.BLUE, "marker": "s", "label": "clipped softmax"},
          "gated": {"color": figures.GREEN, "marker": "^", "label": "gate"}}


def recorded(name, family="bert"):
    rows = json.loads((RESULTS / f"{name}.json").read_text())["rows"]
    return [row for row in rows if row["family"] == family and row["metric"] == "perplexity"]


def lost(row, found):
    """Percent of perplexity, of each training seed."""
    return [100 * (mean(each) / fp - 1) for each, fp in zip(found["all"], row["fp"]["all"])]


def needed(row):
    """Bits, of each training seed: "6.98 (6.38, 7.38)" has the mean before several."""
    return [*map(float, re.findall(r"[\d.]+", tables.bits_at_loss(row))[-len(row["seeds"]):])]


def bits(ax):
    for row in recorded("bits"):
        style, widths = STYLES[row["attention"]], [*row["quantized"].values()][:4]
        band = zip(*(sorted(lost(row, found)) for found in widths))
        ax.fill_between(list("8765"), *band, color=style["color"], alpha=0.2)
        ax.plot([tables.cost(row, found) for found in widths], "-", **style)
    ax.set(yscale="log", ylabel=LOST, xlabel="bits of weights and activations")


def rates(ax):
    for row in recorded("rates"):
        ax.scatter(row["fp"]["all"], needed(row), 60, **STYLES[row["attention"]],
                   facecolors="none" if "lr" in row["label"] else None)
    ax.set(xlabel="perplexity (learning rate: 1.5e-3 filled, 9e-4 open)", ylabel=NEEDED)


def gamma(norm, bits):
    rows = [row for row in recorded("table4") if row["attention"] != "gated"]
    x = [-100 * (row["settings"]["gamma"] or 0) for row in rows]
    paper = [float(row["published"].split("|")[1].split()[0]) for row in rows]
    norm.plot(x, paper, "k--", marker="x", label="the paper's BERT-base")
    norm.plot(x, [row["max_inf_norm"]["mean"] for row in rows], "-o", label="ours")
    bits.plot(x, [needed(row) for row in rows], "-o")
    norm.set(yscale="log", ylabel="max inf norm", xlabel="-100 gamma (0: plain softmax)")
    bits.set(ylabel=NEEDED, xlabel="-100 gamma (0: plain softmax)")


def cures(bits, paid):
    rows = [*csv.DictReader((RESULTS / "cures-bert-seeds.csv").read_text().splitlines())]
    for row, plain in zip(rows, rows[:2] * len(rows)):
        name, more = row["attention"], 100 * (float(row["FP"]) / float(plain["FP"]) - 1)
        for ax, x, label in ((bits, float(row[NEEDED]), NEEDED), (paid, more, ABOVE)):
            ax.scatter(x, name, 30, **STYLES.get(name, {"color": "black", "marker": "d"}))
            ax.set(xlabel=label)


def remedies(bert, opt):
    for ax, family in ((opt, "opt"), (bert, "bert")):  # OPT has more remedies: a row for each
        for row in recorded("remedies", family):
            for remedy in row["remedies"]:
                for x in lost(row, remedy["quantized"].get("6x6", {"all": []})):
                    ax.scatter(x, remedy["remedy"], 30, **STYLES[row["attention"].split("-")[-1]])
        ax.set(xscale="log", xlabel=f"{LOST} at 6 bits", title=family.upper())


def budget(sqnr, loss):
    for row in json.loads((RESULTS / "budget.json").read_text()):
        style = {"color": figures.COLOURS[8 - row["bits"]], "label": f"{row['bits']} bits"}
        sqnr.scatter(row["predicted_sqnr"], row["measured_sqnr"], 30, **style)
        loss.scatter(row["measured_sqnr"], max(row["loss_percent"], 0.1), 30, **style)
    decibels = np.linspace(-3, 25, 100)
    sqnr.plot(decibels, decibels, "k-")
    loss.plot(decibels, 100 * np.expm1(10 ** (-decibels / 10)), "k-")  # as many nats as noise
    sqnr.set(xlabel="predicted SQNR (dB)", ylabel="measured SQNR (dB)")
    loss.set(xlabel="measured SQNR (dB)", ylabel=LOST, yscale="log")


def removal(ax):
    rows = json.loads((RESULTS / "zoo" / "remove.json").read_text())
    untouched = {row["run"]: row["metric"] for row in rows if row["replacement"] == "none"}
    marks = dict(zip(("zero", "mean", "limit", "control"), zip("os^x", figures.COLOURS)))
    for row in (row for row in rows if row["tokens"] == "all"):
        more, (mark, colour) = row["metric"] / untouched[row["run"]] - 1, marks[row["replacement"]]
        name = row["run"].removeprefix("zoo/")
        ax.plot(100 * more, name, mark, color=colour, label=row["replacement"])
    ax.set(xlabel=f"{LOST} in floating point")


PICTURES = ((bits, 1, 4.5), (bits, 1, 4.5, "dark"), (removal, 1, 4), (rates, 1, 4.5), (gamma, 2, 4),
            (cures, 2, 5.5), (remedies, 2, 5), (budget, 2, 4))


@flags.one_line_errors
def main(argv=None):
    parser = flags.Parser(__doc__)
    parser.add_argument("--out", type=flags.place, required=True, help="folder of the pictures")
    args = parser.parse_args(argv)
    for draw, columns, height, *dark in PICTURES:
        down = draw in (cures, remedies)  # a row for each name
        sheet = figures.sheet(None, 1, columns, 9, height, dark=bool(dark), sharey=down)
        with flags.writing(args.out), sheet as (figure, axes):
            draw(*axes[0])
            for axis in (axis for ax in axes[0] for axis in (ax.xaxis, ax.yaxis)):
                if axis.get_scale() == "log":
                    figures.plain_log_ticks(axis)
            axes[0, 0].yaxis.set_inverted(down)
            legend = dict(zip(*axes[0, 0].get_legend_handles_labels()[::-1]))
            figure.legend(legend.values(), legend, loc="outside upper center", ncols=4)
            figure.savefig(Path(args.out, "-".join((draw.__name__, *dark)) + ".png"))


if __name__ == "__main__":
    main()
