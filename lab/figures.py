"""The paper's figures: arrays in, a matplotlib Figure out. Knows no model; nothing else in this
project imports matplotlib (pip install -e '.[plots]').

    figures.histograms(by_position, by_dimension, "outliers", "runs/mine").savefig("outliers.png")

Arrays count layers and heads from 0, the pictures from 1. Positions and dimensions are zero-based
in both, as in the paper. Colours are Okabe and Ito's, told apart with any colour vision (lines by
their dashes, too), and maps of them stay in order when printed grey.
"""
import math
from contextlib import contextmanager

import matplotlib.figure
import numpy as np

COLOURS = BLUE, ORANGE, GREEN, RED, PURPLE, SKY, BLACK = (
    "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000")
AMOUNT, SIGNED = "viridis", "PuOr"  # colour maps: from 0 up, and symmetric about 0
MOST_LABELS = 64                    # more characters than that on an axis cannot be read
STYLE = {"font.size": 8, "axes.titlesize": 9, "axes.labelsize": 9, "legend.frameon": False,
         "axes.spines.top": False, "axes.spines.right": False, "image.interpolation": "nearest",
         "axes.prop_cycle": matplotlib.cycler(color=COLOURS, linestyle="- -- -. : - -- -.".split())}


@contextmanager
def sheet(title, rows, columns, width, height, used=None, **options):
    """A figure and its axes (rows, columns), to be drawn in this file's style while active; width
    and height in inches, `used`: how many of the axes are."""
    with matplotlib.rc_context(STYLE):
        figure = matplotlib.figure.Figure(figsize=(width, height), dpi=150, layout="constrained")
        figure.suptitle(title, fontsize=10, parse_math=False)
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
    with sheet(title, layers, 2, 9, 1 + 1.1 * layers, sharex="col", sharey="col") as (figure, axes):
        for column, name, colour in zip(axes.T, ("position", "dimension"), (BLUE, GREEN)):
            counts = outliers[f"by_{name}" if some else f"peak_by_{name}"]
            for layer, (ax, x) in enumerate(zip(column, counts)):
                ax.stairs(x, np.arange(len(x) + 1) - 0.5, fill=True, color=colour, linewidth=0.5)
                ax.set_ylim(0, 1.05 * above_zero(counts))
                what = f"most at {np.argmax(x)}" if np.max(x) > 0 else "none"
                ax.set_title(f"layer {layer + 1}: {what}", fontsize=8, loc="right", pad=2)
            ax.set_xlabel(f"{name} (from 0)")
        figure.supylabel("outliers per sample" if some else "no outliers: largest |x|", fontsize=9)
    return figure


def norms_by_layer(outliers, title):
    """Infinity norm (8a) and kurtosis (not excess) of each layer: {tap: survey's outliers}."""
    layers = lambda x: [f"{layer + 1}" for layer in range(len(x))]
    return curves({tap: {key: (layers(x[key]), x[key]) for key in ("inf_norm", "kurtosis")}
                   for tap, x in outliers.items()}, f"{title} (kurtosis is not excess)", "layer")


def shares(rows, title):
    """Of groups of tokens, their shares of the outliers and of all tokens: rows of dicts, each a
    group's name and its shares."""
    groups, *columns = zip(*(row.values() for row in rows))
    y, bars = np.arange(len(groups)), zip([*rows[0]][1:], columns, (BLUE, ORANGE), ("", "///"))
    with sheet(title, 1, 1, 7, 1.2 + 0.4 * len(rows)) as (figure, axes):
        ax = axes[0, 0]
        for i, (name, x, colour, hatch) in enumerate(bars):
            ax.barh(y + 0.4 * i - 0.2, x, 0.4, color=colour, hatch=hatch, label=name)
        ax.set(yticks=y, yticklabels=groups, xlabel="share")
        ax.invert_yaxis()
        ax.legend()
    return figure


def maps(panels, label, title, columns=1, width=9, height=2.4, **options):
    """Heatmaps {name: (rows, columns)} in one scale from 0; height: of one, in inches."""
    rows = math.ceil(len(panels) / columns)
    with sheet(title, rows, columns, width, 0.7 + rows * height, len(panels)) as (figure, axes):
        largest = above_zero([np.max(x) for x in panels.values()])
        for ax, (name, x) in zip(axes.flat, panels.items()):
            picture = ax.imshow(x, aspect="auto", cmap=AMOUNT, vmin=0, vmax=largest)
            ax.set(title=name, **options)
        figure.colorbar(picture, ax=axes, label=label)
    return figure


def patch_maps(counts, title):
    """Outliers per sample over the image, for each layer: (L, rows, columns) (8c)."""
    panels, n = {f"layer {layer + 1}": x for layer, x in enumerate(counts)}, min(4, len(counts))
    return maps(panels, "outliers", title, n, 2.3 * n + 0.8, 2.3, xticks=[], yticks=[])


def magnitudes(activations, title):
    """|x| of one sample over channels and tokens, {name: (T, d)} (blog, Figure 1)."""
    panels = {name: np.abs(x) for name, x in activations.items()}
    return maps(panels, "|x|", title, xlabel="hidden dimension (from 0)", ylabel="token position")


# ---- what a head does (Figures 2, 3, 9-14) ----

def label_tokens(axis, labels):
    step = math.ceil(len(labels) / MOST_LABELS)
    axis.set_ticks(range(0, len(labels), step), labels[::step], fontsize=5.5, parse_math=False)
    for label in axis.get_ticklabels() if axis.axis_name == "x" else ():
        label.set_rotation(90 if len(label.get_text()) > 1 else 0)


def head_on_text(labels, probs, values, product, product_name, title):
    """Attention probabilities (T, T), values and product (T, d_head) of a sequence, the two in one
    scale (Figure 2)."""
    largest = above_zero(np.abs((values, product)))
    panels = ((probs, "attention probabilities", AMOUNT, 0, above_zero(probs)),
              (values, "values", SIGNED, -largest, largest),
              (product, product_name, SIGNED, -largest, largest))
    with sheet(title, 1, 3, 11, 6.4, width_ratios=(2, 1, 1)) as (figure, axes):
        for ax, (x, name, colours, low, high) in zip(axes[0], panels):
            picture = ax.imshow(x, colours, aspect="auto", vmin=low, vmax=high)
            ax.set(title=name, xlabel="dimension of the head (from 0)", yticks=[])
            if name != "values":  # its neighbour has the same scale
                figure.colorbar(picture, ax=ax, location="right", shrink=0.6, aspect=30)
        axes[0, 0].set(xlabel="attended to (key)", ylabel="attends (query)")
        for axis in (axes[0, 0].xaxis, axes[0, 0].yaxis, axes[0, 1].yaxis):
            label_tokens(axis, labels)
    return figure


def head_on_images(images, outliers, outlier_name, magnitudes, cumulative, probs, title):
    """A row per image: the image (N, h, w, 3), outliers and cumulative attention over patches
    (N, rows, columns), probabilities (N, T, T), and the mean |value| of the patches with outliers
    and of the others (N, 2), NaN where there is none (Figure 3)."""
    with sheet(title, len(images), 5, 11, 0.6 + 2.1 * len(images)) as (figure, axes):
        for ax, name in zip(axes[0], ("(a) image", f"(b) {outlier_name}", "(c) attention, summed",
                                      "(d) attention probabilities", "(e) mean |value|")):
            ax.set_title(name, fontsize=8)
        for row, line in enumerate(axes):
            for ax, arrays in zip(line, (images, outliers, cumulative, probs)):
                picture = ax.imshow(arrays[row], AMOUNT, vmin=0, vmax=above_zero(arrays[row]))
                ax.set(xticks=[], yticks=[])
                if arrays is not images:
                    figure.colorbar(picture, ax=ax, shrink=0.7)
            line[3].set(xlabel="key", ylabel="query")
            line[4].bar((outlier_name, "others"), magnitudes[row], color=(RED, BLUE))
            line[4].set_ylim(0, 1.1 * above_zero(np.nan_to_num(magnitudes)))
    return figure


def gates_on_tokens(labels, gates, title):
    """Which tokens heads gate off: pi (H, T)."""
    figure = maps({"": gates}, "gate π", title, 1, 11, 0.5 + 0.3 * len(gates), xlabel="token",
                  ylabel="head", yticks=range(len(gates)), yticklabels=range(1, len(gates) + 1))
    label_tokens(figure.axes[0].xaxis, labels)
    return figure


# ---- the mechanism ----

def heads(measures, even, title):
    """Each head a point, numbered layer.head: a sink that takes all, with a value near nothing, is
    a head that does nothing. survey's measures, (L, H) each; `even`: even attention's sink rate."""
    rate, value, spread = (measures[key] for key in ("attention", "sink_value", "score_range"))
    with sheet(title, 1, 1, 7, 4.6) as (figure, axes):
        ax = axes[0, 0]
        points = ax.scatter(rate, value, 45, np.ravel(spread), cmap=AMOUNT, vmin=0, edgecolor="k")
        for layer, head in np.ndindex(rate.shape):
            ax.text(rate[layer, head], value[layer, head], f"   {layer + 1}.{head + 1}", fontsize=7)
        ax.axvline(even, color="grey", linestyle=":", label="even attention")
        ax.axhline(1, color="grey", linestyle="--", label="a value of mean norm")
        ax.set(xlabel="sink rate: share of attention on the most-attended token (log scale)",
               ylabel="norm of its value / mean norm", ylim=(0, 1.1 * above_zero(value)),
               xscale="log", xlim=(min([even, *rate[rate > 0]]) / 1.1, 1.1))
        plain_log_ticks(ax.xaxis)
        figure.legend(loc="outside lower center", ncols=2)
        figure.colorbar(points, ax=ax, label="softmax input range")
    return figure


def gate_histograms(counts, title):
    """How open the gates are: (L, H, bins), counts over [0, 1]; a panel per layer."""
    middles = (np.arange(counts.shape[2]) + 0.5) / counts.shape[2]
    return curves({f"head {head + 1}": {f"layer {layer + 1}: tokens": (middles, x[head])
                                        for layer, x in enumerate(counts)}
                   for head in range(counts.shape[1])}, title, "gate π")


def damage(kinds, sqnr, title):
    """SQNR in dB (kinds, layers), a cell per tensor with its number: the darker, the more harm."""
    layers = range(sqnr.shape[1])
    with sheet(title, 1, 1, 3 + 0.6 * len(layers), 1.5 + 0.3 * len(kinds)) as (figure, axes):
        ax = axes[0, 0]
        image = ax.imshow(sqnr, AMOUNT, aspect="auto", vmin=0, vmax=50)
        for (kind, layer), value in np.ndenumerate(sqnr):
            ax.text(layer, kind, f"{value:.0f}", ha="center", va="center",
                    color="white" if value < 25 else "black")
        ax.set(xticks=layers, xticklabels=[layer + 1 for layer in layers], xlabel="layer",
               yticks=range(len(kinds)), yticklabels=kinds)
        figure.colorbar(image, label="SQNR of the last hidden states, dB")
    return figure


# ---- several runs ----

def grids(values, parameters, n_bits, title):
    """Histograms of one tap, {run: (N,)}, a column per run, and the grid of {run: (scale, zero
    point)} over them.

    Above all values; below those within 16 of the finer grid's steps of 0. Rows share their axes:
    one sees the same distance cut into fewer steps.
    """
    bins = np.histogram_bin_edges(np.concatenate([*values.values()]), 96)
    near = 16 * min(scale for scale, _ in parameters.values())
    with sheet(title, 2, len(values), 9, 5.5, sharex="row", sharey="row") as (figure, axes):
        for (whole, zoom), (name, x) in zip(axes.T, values.items()):
            scale, zero_point = parameters[name]
            points = scale * (np.arange(2 ** n_bits) - zero_point)
            shown = points[np.abs(points) <= near]
            whole.hist(x, bins, color=SKY, log=True)
            whole.vlines(points[::16], 0, 0.1, RED, transform=whole.get_xaxis_transform())
            whole.set(title=f"{name}\nstep {scale:.3g}; every 16th grid point in red")
            zoom.hist(x, np.linspace(-near, near, 97), color=SKY)
            zoom.vlines(shown, 0, 1, RED, transform=zoom.get_xaxis_transform(), linewidth=0.7)
            zoom.set(title=f"near 0: {len(shown)} of {2 ** n_bits} grid points", xlabel="value",
                     xlim=(-near, near))
        figure.supylabel("values (above: log scale)", fontsize=9)
    return figure


def curves(runs, title, xlabel="step"):
    """{run: {quantity: (x, values)}}: a panel per quantity, a line per run (blog, Figures 3, 5 and
    6; the paper's 6 and 7). Norms, kurtoses and perplexities are on log scales."""
    quantities = list(next(iter(runs.values())))
    rows, columns = math.ceil(len(quantities) / 2), min(2, len(quantities))
    with sheet(title, rows, columns, 9, 0.9 + 2.5 * rows, len(quantities)) as (figure, axes):
        for ax, quantity in zip(axes.flat, quantities):
            for name, series in runs.items():
                ax.plot(*series[quantity], marker=".", label=name)
            ax.set(xlabel=xlabel, title=quantity)
            if any(word in quantity for word in ("perplexity", "max inf", "kurtosis")):
                ax.set(title=f"{quantity} (log scale)", yscale="log")
                plain_log_ticks(ax.yaxis)
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


# ---- how far an outlier grows with the width of the model (docs/law.md) ----

def height_of(kurtosis, n):
    """max / sigma of one outlier among n - 1 Gaussian values, given their kurtosis (not excess).

    It is (3 n + r^4) / n over ((n + r^2) / n)^2: a quadratic equation in r^2.
    """
    root = math.sqrt(kurtosis ** 2 + (n - kurtosis) * (kurtosis - 3))
    return math.sqrt(n * (kurtosis + root) / (n - kurtosis))


# (label, d, max / sigma), from Table 2's kurtosis of a sample's T * d values. One outlier per
# sample is assumed, and the kurtosis is a mean over layers, with and without outliers: good to a
# factor of 1.5. A line break moves a label off its neighbour.
PUBLISHED = (
    ("BERT-base", 768, height_of(3076, 128 * 768)),
    ("OPT-125m", 768, height_of(1777, 512 * 768)),
    ("ViT-S/16", 384, height_of(1018.3, 197 * 384)),
    ("BERT-base, clipped\n", 768, height_of(80, 128 * 768)),
    ("\nOPT-125m, gated", 768, height_of(18.9, 512 * 768)),
    ("\n\nViT-S/16,\npatch LN, gated", 384, height_of(19.9, 197 * 384)))


def law(table):
    """max / sigma over d, a line per family and attention, on log scales, of the results that
    `lab.reproduce law` has; squares: PUBLISHED; dotted: 1, 2, 5 and 10 times sqrt(d)."""
    lines, widths = {}, np.array((24, 1000))
    for row in table["rows"]:
        points = lines.setdefault(row["line"], [])
        points += [(int(row["x"]), height) for height in row["max_over_sigma"]["all"]]
    with sheet(table["title"], 1, 1, 8, 5.5) as (figure, axes):
        ax = axes[0, 0]
        for line, points in lines.items():
            ax.plot(*zip(*sorted(points)), marker="o", label=line)
        for label, d, height in PUBLISHED:
            ax.plot(d, height, "s", color="black", fillstyle="none")
            ax.text(0.97 * d, height, label, fontsize=7, ha="right", va="center")
        for times in (1, 2, 5, 10):
            ax.plot(widths, times * np.sqrt(widths), ":", color="grey", linewidth=0.8)
            ax.text(1000, times * math.sqrt(1000), f" {times}√d", color="grey", va="center")
        ax.set(xscale="log", yscale="log", xlabel="width d", ylabel="max / sigma, worst layer")
        plain_log_ticks(ax.xaxis)
        plain_log_ticks(ax.yaxis)
        ax.legend(loc="upper left")
    return figure
