"""The paper's figures: arrays in, a matplotlib Figure out. Knows no model; matplotlib is imported nowhere else.

    figures.histograms(by_position, by_dimension, "outliers", "runs/mine").savefig("outliers.png")

Arrays count layers and heads from 0, the pictures from 1. Positions and dimensions are zero-based in both,
as in the paper. Colours are Okabe and Ito's, told apart with any colour vision, and maps of them that stay
in order when printed grey.
"""
import io
import math

import matplotlib
import numpy as np
from matplotlib.figure import Figure

COLOURS = BLUE, ORANGE, GREEN, RED, PURPLE, SKY, BLACK = (
    "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000")
LINES = ("-", "--", "-.", ":")
AMOUNT, SIGNED = "viridis", "PuOr"  # colour maps: from 0 up, and symmetric about 0
MOST_LABELS = 64                    # more characters than that on an axis cannot be read
style = matplotlib.rc_context({"font.size": 9, "axes.titlesize": 9, "axes.labelsize": 9, "legend.fontsize": 8,
                               "legend.frameon": False, "axes.spines.top": False, "axes.spines.right": False})


def sheet(title, rows, columns, width, height, **options):
    """(figure, axes (rows, columns)); width and height in inches."""
    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    figure.suptitle(title, fontsize=10, parse_math=False)
    axes = figure.subplots(rows, columns, squeeze=False, **options)
    for ax in axes.flat:
        ax.tick_params(labelsize=8)
    return figure, axes


def line_style(i):
    """Told apart by dashes, too."""
    return {"color": COLOURS[i % len(COLOURS)], "linestyle": LINES[i % len(LINES)]}


def png(figure):
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()



# ---- where outliers sit (Figures 1 and 8) ----

@style
def histograms(by_position, by_dimension, quantity, title):
    """A row per layer, counts over positions (L, T) and over dimensions (L, d); each column on one scale."""
    layers = len(by_position)
    figure, axes = sheet(title, layers, 2, 9, 1 + 1.1 * layers, sharex="col", sharey="col")
    columns = ((by_position, BLUE, "token position"), (by_dimension, GREEN, "hidden dimension"))
    for column, (counts, colour, name) in enumerate(columns):
        for layer, ax in enumerate(axes[:, column]):
            edges = np.arange(len(counts[layer]) + 1) - 0.5
            ax.stairs(counts[layer], edges, fill=True, color=colour, linewidth=0.5)  # the line keeps a lone one visible
            ax.set_ylim(0, 1.05 * above_zero(np.max(counts)))
            worst = int(np.argmax(counts[layer]))
            what = f"most at {worst}" if counts[layer][worst] > 0 else "none"
            ax.set_title(f"layer {layer + 1}: {what}", fontsize=8, loc="right", pad=2)
        axes[-1, column].set_xlabel(f"{name} (from 0)")
    figure.supylabel(quantity, fontsize=9)
    return figure


@style
def norms_by_layer(norms, kurtoses, title):
    """The infinity norm (8a) and the kurtosis of each layer, {tap: (L,)} each."""
    figure, axes = sheet(title, 1, 2, 9, 3)
    labels = ("infinity norm, mean over samples", "kurtosis, not excess (log scale)")
    for ax, series, name in zip(axes[0], (norms, kurtoses), labels):
        for i, (tap, values) in enumerate(series.items()):
            ax.plot(range(1, len(values) + 1), values, marker="o", **line_style(i), label=tap)
        ax.set(xlabel="layer", ylabel=name, xticks=range(1, len(values) + 1))
    axes[0, 0].set_ylim(bottom=0)
    axes[0, 1].set_yscale("log")
    axes[0, 1].axhline(3, color="grey", linewidth=1, label="a Gaussian has 3")
    plain_log_ticks(axes[0, 1].yaxis)
    axes[0, 0].legend()
    axes[0, 1].legend()
    return figure


def plain_log_ticks(axis):
    """5, 10, 20 rather than 5 x 10^0: norms and kurtoses rarely span more than two decades."""
    axis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(matplotlib.ticker.StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(matplotlib.ticker.NullFormatter())


@style
def shares(groups, of_outliers, of_tokens, quantity, title):
    """Per group of tokens, its share of the outliers beside its share of all tokens, (groups,) each."""
    figure, axes = sheet(title, 1, 1, 7, 1.2 + 0.4 * len(groups))
    ax, y = axes[0, 0], np.arange(len(groups))
    ax.barh(y - 0.2, 100 * np.asarray(of_outliers), 0.4, color=BLUE, label=quantity)
    ax.barh(y + 0.2, 100 * np.asarray(of_tokens), 0.4, color=ORANGE, hatch="///", edgecolor="white", label="all tokens")
    ax.set_yticks(y, groups)
    ax.invert_yaxis()
    ax.set_xlabel("share (%)")
    ax.legend(loc="lower right")
    return figure


@style
def patch_maps(maps, quantity, title):
    """A heatmap over the image per layer, (L, rows, columns), all in one scale (8c)."""
    rows, columns = rows_and_columns(len(maps))
    figure, axes = sheet(title, rows, columns, 2.3 * columns, 0.7 + 2.3 * rows)
    for ax in axes.flat[len(maps):]:
        ax.set_axis_off()
    for layer, values in enumerate(maps):
        picture = axes.flat[layer].imshow(values, cmap=AMOUNT, vmin=0, vmax=above_zero(np.max(maps)))
        axes.flat[layer].set(title=f"layer {layer + 1}", xticks=[], yticks=[])
    figure.colorbar(picture, ax=axes, label=quantity, shrink=0.8)
    return figure


def rows_and_columns(panels):
    columns = min(4, panels)
    return math.ceil(panels / columns), columns


def above_zero(x):
    """The end of a colour scale from 0, also for an array of zeros."""
    return x if x > 0 else 1


# ---- what a head does (Figures 2, 3, 9-14) ----

def label_tokens(axis, labels):
    step = math.ceil(len(labels) / MOST_LABELS)
    axis.set_ticks(range(0, len(labels), step), labels[::step], fontsize=5.5, family="monospace", parse_math=False)
    axis.set_tick_params(length=0, pad=1)
    if axis.axis_name == "x":
        for label in axis.get_ticklabels():
            label.set_rotation(90 if len(label.get_text()) > 1 else 0)


@style
def head_on_text(labels, probs, values, product, product_name, title):
    """Attention probabilities (T, T), values and product (T, d_head) of a sequence, both in one scale (Figure 2)."""
    figure, axes = sheet(title, 1, 3, 11, 6.4, width_ratios=(2, 1, 1))
    largest = above_zero(max(np.abs(values).max(), np.abs(product).max()))
    panels = ((probs, "attention probabilities", dict(cmap=AMOUNT, vmin=0, vmax=above_zero(np.max(probs)))),
              (values, "values", dict(cmap=SIGNED, vmin=-largest, vmax=largest)),
              (product, product_name, dict(cmap=SIGNED, vmin=-largest, vmax=largest)))
    for ax, (x, name, scale) in zip(axes[0], panels):
        picture = ax.imshow(x, aspect="auto", interpolation="nearest", **scale)
        ax.set_title(name)
        if name != "values":  # its neighbour has the same scale
            figure.colorbar(picture, ax=ax, location="right", shrink=0.6, aspect=30)
    for axis in (axes[0, 0].xaxis, axes[0, 0].yaxis, axes[0, 1].yaxis):
        label_tokens(axis, labels)
    axes[0, 2].set_yticks([])  # its rows are its neighbour's
    axes[0, 0].set(xlabel="attended to (key)", ylabel="attends (query)")
    axes[0, 1].set_xlabel("dimension of the head (from 0)")
    axes[0, 2].set_xlabel("dimension of the head (from 0)")
    return figure


@style
def head_on_images(images, outliers, outlier_name, magnitudes, magnitude_names, cumulative, probs, title):
    """A row per image: the image (N, h, w, 3), outliers and cumulative attention over patches (N, rows, columns),
    probabilities (N, T, T), and the mean |value| of two kinds of patches (N, 2), NaN where there is none (Figure 3)."""
    figure, axes = sheet(title, len(images), 5, 11, 0.6 + 2.1 * len(images))
    names = ("input image", outlier_name, "cumulative attention", "attention probabilities", "mean |value|")
    for row, line in enumerate(axes):
        line[0].imshow(images[row])
        for ax, arrays in zip(line[1:4], (outliers, cumulative, probs)):
            picture = ax.imshow(arrays[row], cmap=AMOUNT, vmin=0, vmax=above_zero(np.max(arrays)))
            figure.colorbar(picture, ax=ax, shrink=0.7)
        for ax in line[:4]:
            ax.set(xticks=[], yticks=[])
        line[3].set(xlabel="key", ylabel="query")
        line[4].bar(magnitude_names, np.nan_to_num(magnitudes[row]), color=(RED, BLUE))
        line[4].set_ylim(0, 1.1 * above_zero(np.nanmax(magnitudes)))
        for x in np.flatnonzero(np.isnan(magnitudes[row])):
            line[4].text(x, 0, "none", ha="center", va="bottom")
        for ax, letter, name in zip(line, "abcde", names):
            ax.set_title(f"({letter}) {name}" if row == 0 else "", fontsize=8)
    return figure


# ---- the mechanism ----

@style
def damage(kinds, sqnr, title):
    """SQNR in dB (kinds, layers), a cell per tensor with its number; the darker, the more harm it does."""
    figure, axes = sheet(title, 1, 1, 3 + 0.6 * sqnr.shape[1], 1.5 + 0.3 * len(kinds))
    ax = axes[0, 0]
    image = ax.imshow(sqnr, cmap="viridis", aspect="auto", vmin=0, vmax=50)
    for row, column in np.ndindex(sqnr.shape):
        if np.isfinite(sqnr[row, column]):
            ax.text(column, row, f"{sqnr[row, column]:.0f}", ha="center", va="center", fontsize=8,
                    color="white" if sqnr[row, column] < 25 else "black")
    ax.set_xticks(range(sqnr.shape[1]), range(1, sqnr.shape[1] + 1))
    ax.set_yticks(range(len(kinds)), kinds)
    ax.set_xlabel("layer")
    figure.colorbar(image, label="SQNR of the last hidden states, dB")
    return figure


@style
def heads(sink_rate, sink_value, score_range, even, title):
    """Each head a point, numbered layer.head: a sink that takes all, with a value near nothing, is a head that
    does nothing. (L, H) each; `even` is the sink rate of even attention."""
    figure, axes = sheet(title, 1, 1, 7, 4.6)
    ax = axes[0, 0]
    points = ax.scatter(sink_rate, sink_value, c=np.ravel(score_range), cmap=AMOUNT, vmin=0,  # (1, 4) would be a colour
                        vmax=above_zero(np.max(score_range)), s=45, edgecolor="black", linewidth=0.5)
    for at in np.ndindex(np.shape(sink_rate)):
        ax.annotate(f"{at[0] + 1}.{at[1] + 1}", (sink_rate[at], sink_value[at]), (4, 4), textcoords="offset points",
                    fontsize=7)
    ax.axvline(even, color="grey", linestyle=":", linewidth=1)
    ax.annotate("even attention", (even, 0), (3, 3), xycoords=("data", "axes fraction"), textcoords="offset points",
                rotation=90, va="bottom", fontsize=7, color="dimgrey")
    ax.axhline(1, color="grey", linestyle=":", linewidth=1)
    ax.set(xlabel="sink rate: share of attention on the most-attended token (log scale)", xscale="log",
           ylabel="norm of its value / mean norm")
    plain_log_ticks(ax.xaxis)
    ax.set_xlim(min(even, np.min(sink_rate[sink_rate > 0], initial=even)) / 1.1, 1.1)
    ax.set_ylim(0, above_zero(1.1 * np.max(sink_value)))
    figure.colorbar(points, ax=ax, label="softmax input range")
    return figure


@style
def gate_histograms(counts, title):
    """How open the gates are: (L, H, bins), counts over [0, 1]; a panel per layer, a line per head."""
    layers, n_heads, bins = counts.shape
    rows, columns = rows_and_columns(layers)
    figure, axes = sheet(title, rows, columns, 9, 0.7 + 2.2 * rows, sharex=True, sharey=True)
    for ax in axes.flat[layers:]:
        ax.set_axis_off()
    percent = 100 * counts / np.maximum(counts.sum(axis=-1, keepdims=True), 1)
    for layer in range(layers):
        for head in range(n_heads):
            axes.flat[layer].stairs(percent[layer, head], np.linspace(0, 1, bins + 1), linewidth=1.5,
                                    **line_style(head), label=f"head {head + 1}")
        axes.flat[layer].set(title=f"layer {layer + 1}", xlabel="gate π")
    axes.flat[0].set_ylabel("share of tokens (%)")
    figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside right upper")
    return figure


@style
def gates_on_tokens(labels, gates, title):
    """Which tokens a head gates off: pi (H, T), from 0 to 1."""
    figure, axes = sheet(title, 1, 1, 11, 1.2 + 0.3 * len(gates))
    picture = axes[0, 0].imshow(gates, aspect="auto", cmap=AMOUNT, vmin=0, vmax=1, interpolation="nearest")
    label_tokens(axes[0, 0].xaxis, labels)
    axes[0, 0].set_yticks(range(len(gates)), range(1, len(gates) + 1))
    axes[0, 0].set(xlabel="token", ylabel="head")
    figure.colorbar(picture, ax=axes[0, 0], label="gate π", pad=0.01)
    return figure


# ---- several runs ----

@style
def magnitudes(activations, title):
    """|x| of one sample over channels and tokens, {name: (T, d)}, in one scale (blog, Figure 1)."""
    figure, axes = sheet(title, len(activations), 1, 9, 0.7 + 2.4 * len(activations))
    largest = above_zero(max(np.abs(x).max() for x in activations.values()))
    for ax, (name, x) in zip(axes[:, 0], activations.items()):
        picture = ax.imshow(np.abs(x), aspect="auto", cmap=AMOUNT, vmin=0, vmax=largest, interpolation="nearest")
        ax.set_title(name, parse_math=False)
        ax.set(xlabel="hidden dimension (from 0)", ylabel="token position")
    figure.colorbar(picture, ax=axes, label="|x|")
    return figure


@style
def grids(values, parameters, n_bits, title):
    """Histograms of one tap, {run: (N,)}, a column per run, and the grid of {run: (scale, zero point)} over them.

    Above all values; below those within 16 of the finer grid's steps of 0. Rows share their axes: one sees the
    same distance cut into fewer steps.
    """
    figure, axes = sheet(title, 2, len(values), 4.5 * len(values), 5.5, sharex="row", sharey="row")
    low, high = min(x.min() for x in values.values()), max(x.max() for x in values.values())
    near = 16 * min(scale for scale, _ in parameters.values())
    for column, (name, x) in enumerate(values.items()):
        scale, zero_point = parameters[name]
        points = scale * (np.arange(2 ** n_bits) - zero_point)
        shown = points[np.abs(points) <= near]
        whole, zoom = axes[:, column]
        whole.hist(x, bins=np.linspace(low, high, 97), color=SKY, log=True)
        whole.vlines(points[::16], 0, 0.1, transform=whole.get_xaxis_transform(), color=RED, linewidth=1)
        whole.set_title(f"{name}\nstep {scale:.3g}; every 16th grid point in red", parse_math=False)
        zoom.hist(x, bins=np.linspace(-near, near, 97), color=SKY)
        zoom.vlines(shown, 0, 1, transform=zoom.get_xaxis_transform(), color=RED, linewidth=0.7)
        zoom.set(title=f"near 0: {len(shown)} of {2 ** n_bits} grid points", xlim=(-near, near), xlabel="value")
    axes[0, 0].set_ylabel("values (log scale)")
    axes[1, 0].set_ylabel("values")
    return figure


@style
def curves(runs, title, xlabel="step"):
    """{run: {quantity: (steps, values)}}: a panel per quantity, a line per run (blog, Figures 3, 5 and 6; Figures 6
    and 7, over settings in words instead of steps). Norms, kurtoses and perplexities on log scales."""
    quantities = list(next(iter(runs.values())))
    rows = math.ceil(len(quantities) / 2)
    figure, axes = sheet(title, rows, 2, 9, 0.9 + 2.5 * rows)
    for ax in axes.flat[len(quantities):]:
        ax.set_axis_off()
    for ax, quantity in zip(axes.flat, quantities):
        for i, (name, series) in enumerate(runs.items()):
            ax.plot(*series[quantity], marker=".", **line_style(i), label=name)
        logarithmic = quantity.startswith(("perplexity", "max inf", "avg kurtosis"))
        ax.set(xlabel=xlabel, title=quantity + (" (log scale)" if logarithmic else ""))
        if logarithmic:
            ax.set_yscale("log")
            plain_log_ticks(ax.yaxis)
    figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure
