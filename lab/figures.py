"""The paper's figures: arrays in, a matplotlib Figure out. Knows no model; nothing else in this
project imports matplotlib (pip install -e '.[plots]').

    figures.damage(row).savefig("damage.png")

Arrays count layers and heads from 0, the pictures from 1. Positions and dimensions are zero-based
in both, as in the paper. Colours are Okabe and Ito's, told apart with any colour vision (lines by
their dashes, too), and maps of them stay in order when printed grey.
"""
import math
from contextlib import contextmanager

import matplotlib.figure
import matplotlib.style
import numpy as np

COLOURS = BLUE, ORANGE, GREEN, RED, PURPLE, SKY, BLACK = (
    "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000")
AMOUNT, SIGNED = "viridis", "PuOr"  # colour maps: from 0 up, and symmetric about 0
MOST_LABELS = 32                    # more than that cannot be read
STYLE = {"font.size": 11, "axes.titlesize": 11, "text.parse_math": False,
         "legend.frameon": False, "axes.spines.top": False, "axes.spines.right": False,
         "image.interpolation": "nearest", "image.aspect": "auto",
         "axes.prop_cycle": matplotlib.cycler(color=COLOURS, linestyle="- -- -. : - -- -.".split())}


@contextmanager
def sheet(title, rows, columns, width, height, used=None, dark=False, **options):
    """A figure and its axes (rows, columns), to be drawn in this file's style while active; width
    and height in inches, `used`: how many of the axes are, `dark`: bright lines on black."""
    with matplotlib.style.context(["dark_background"] * dark), matplotlib.rc_context(STYLE):
        figure = matplotlib.figure.Figure(figsize=(width, height), dpi=150, layout="constrained")
        figure.suptitle(title, fontsize=12)
        axes = figure.subplots(rows, columns, squeeze=False, **options)
        for ax in axes.flat[used or rows * columns:]:
            ax.set_axis_off()
        yield figure, axes


def above_zero(x):
    """The end of a scale from 0 for all of x, also for an array of zeros."""
    return np.max(x) if np.max(x) > 0 else 1


def plain_log_ticks(axis):
    """5, 10, 20 rather than 5 x 10^0: norms and kurtoses rarely span more than two decades."""
    axis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(matplotlib.ticker.StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(matplotlib.ticker.NullFormatter())


# ---- where outliers sit (Figures 1 and 8) ----

def histograms(outliers, title):
    """Outliers (survey's, of one tap) by position and by dimension, a row per layer; each column on
    one scale. Where there are none in any layer, the largest |x| stand in for them."""
    layers, some = len(outliers["by_position"]), outliers["by_position"].any()
    size = 9, 1.2 + 1.3 * layers
    with sheet(title, layers, 2, *size, sharex="col", sharey="col") as (figure, axes):
        for column, name, colour in zip(axes.T, ("position", "dimension"), (BLUE, GREEN)):
            counts = outliers[f"by_{name}" if some else f"peak_by_{name}"]
            for layer, (ax, x) in enumerate(zip(column, counts)):
                ax.stairs(x, np.arange(len(x) + 1) - 0.5, fill=True, color=colour, linewidth=0.5)
                ax.set_ylim(0, 1.05 * above_zero(counts))
                most = f": {x.max() / x.sum():.0%} at {x.argmax()}" if some and x.any() else ""
                ax.set_title(f"layer {layer + 1}{most}", loc="right", pad=2)
            ax.set_xlabel(f"{name} (from 0)")
        figure.supylabel("outliers per sample" if some else "no outliers: largest |x|")
    return figure


# ---- what a head does (Figures 2, 3, 9-14) ----

def head(panels, title, labels=None):
    """A head on N samples, a row per sample, of panels {name: (N, rows, columns)}. The first is of
    pairs of tokens, if there are N lists of tokens, `labels`. Panels with negative values have one
    scale, each other one has its own (Figures 2 and 3)."""
    signed = above_zero([np.abs(x).max() for x in panels.values() if np.min(x) < 0] or 0)
    rows = len(next(iter(panels.values())))
    with sheet(title, rows, len(panels), 9, 0.5 + 12 / len(panels) * rows) as (figure, axes):
        for column, (name, arrays) in zip(axes.T, panels.items()):
            low = -signed if np.min(arrays) < 0 else 0
            high = -low or above_zero(arrays)
            for ax, x in zip(column, arrays):
                picture = ax.imshow(x, SIGNED if low else AMOUNT, vmin=low, vmax=high)
                ax.set(xticks=[], yticks=[])
            column[0].set_title(name)
            figure.colorbar(picture, ax=column, location="bottom")
        for ax, tokens in zip(axes[:, 0], labels or ()):
            shown = range(0, len(tokens), math.ceil(len(tokens) / MOST_LABELS))
            for axis in ax.xaxis, ax.yaxis:
                axis.set_ticks(shown, [tokens[i] for i in shown], fontsize=8)
            ax.set(xlabel="attended to (key)", ylabel="attends (query)")
    return figure


def damage(row):
    """lab/damage.py's SQNR with `layers`, a cell per tensor with its number: the darker, the more
    harm."""
    kinds = [*row["layers"]]
    sqnr = np.array([[x["sqnr"] for x in places] for places in row["layers"].values()])
    layers, title = range(sqnr.shape[1]), "{run}, {bits} bits".format(**row)
    with sheet(title, 1, 1, 3 + 0.6 * len(layers), 1.5 + 0.3 * len(kinds)) as (figure, axes):
        ax = axes[0, 0]
        image = ax.imshow(sqnr, AMOUNT, vmin=0, vmax=50)
        for (kind, layer), value in np.ndenumerate(sqnr):
            ax.text(layer, kind, f"{value:.0f}", ha="center", va="center",
                    color="white" if value < 25 else "black")
        ax.set(xticks=layers, xticklabels=[layer + 1 for layer in layers], xlabel="layer",
               yticks=range(len(kinds)), yticklabels=kinds)
        figure.colorbar(image, label="SQNR of the last hidden states, dB")
    return figure


# ---- several runs ----

def curves(runs, title):
    """{run: {quantity: (x, values)}}: a panel per quantity, a line per run (blog, Figures 3, 5,
    6). Norms, kurtoses and perplexities are on log scales."""
    quantities = list(next(iter(runs.values())))
    rows, columns = math.ceil(len(quantities) / 2), min(2, len(quantities))
    with sheet(title, rows, columns, 9, 0.9 + 2.5 * rows, len(quantities)) as (figure, axes):
        for ax, quantity in zip(axes.flat, quantities):
            for name, series in runs.items():
                ax.plot(*series[quantity], marker=".", label=name)
            ax.set(xlabel="step", title=quantity)
            if any(word in quantity for word in ("perplexity", "max inf", "kurtosis")):
                ax.set(title=f"{quantity} (log scale)", yscale="log")
                plain_log_ticks(ax.yaxis)
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure
