"""How far an outlier grows with the width of the model: max / sigma against d (docs/law.md).

A LayerNorm lets an outlier pay until it holds nearly all the energy of its token (minq/growth.py), so
max / sigma should end near a few times sqrt(d), whatever the model. `reproduce.py law` trains the points,
this file has the published ones and draws both.
"""
import math

from minq.figures import line_style, plain_log_ticks, sheet, style


def height_of(kurtosis, n):
    """max / sigma of one outlier among n - 1 Gaussian values, given their kurtosis (not excess).

    It is (3 n + r^4) / n over ((n + r^2) / n)^2: a quadratic equation in r^2.
    """
    root = math.sqrt(kurtosis ** 2 + (n - kurtosis) * (kurtosis - 3))
    return math.sqrt(n * (kurtosis + root) / (n - kurtosis))


# (label, d, max / sigma), from Table 2's kurtosis of a sample's T * d values. One outlier a sample is assumed, and
# the kurtosis is a mean over layers, with and without outliers: good to a factor of 1.5.
PUBLISHED = (  # a line break moves a label off its neighbour
    ("BERT-base", 768, height_of(3076, 128 * 768)),
    ("OPT-125m", 768, height_of(1777, 512 * 768)),
    ("ViT-S/16", 384, height_of(1018.3, 197 * 384)),
    ("BERT-base, clipped\n", 768, height_of(80, 128 * 768)),
    ("\nOPT-125m, gated", 768, height_of(18.9, 512 * 768)),
    ("\n\nViT-S/16,\npatch LN, gated", 384, height_of(19.9, 197 * 384)),
)


@style
def draw(table):
    """max / sigma over d, a line per family and attention, on log scales; dotted: 1, 2, 5 and 10 times sqrt(d)."""
    figure, axes = sheet(table["title"], 1, 1, 8, 5.5)
    ax, lines = axes.flat[0], {}
    for row in table["rows"]:
        for height in row["max_over_sigma"]["all"]:
            lines.setdefault(row["line"], []).append((int(row["x"]), height))
    for i, (line, points) in enumerate(lines.items()):
        ax.plot(*zip(*sorted(points)), marker="o", **line_style(i), label=line)
    for label, d, height in PUBLISHED:
        ax.plot(d, height, "s", color="black", fillstyle="none")
        ax.annotate(label, (d, height), xytext=(-6, 0), textcoords="offset points", ha="right", va="center", fontsize=7)
    widths = (24, 1000)
    for times in (1, 2, 5, 10):
        ax.plot(widths, [times * math.sqrt(d) for d in widths], ":", color="gray", linewidth=0.8)
        ax.annotate(f"{times}√d", (widths[1], times * math.sqrt(widths[1])), fontsize=8, color="gray", va="center")
    ax.set(xscale="log", yscale="log", xlabel="width d", ylabel="max / sigma of the worst layer")
    plain_log_ticks(ax.xaxis)
    plain_log_ticks(ax.yaxis)
    ax.legend(loc="upper left")
    return figure
