"""What analyze.py hands over: text and tables on the terminal, pictures in a folder, and a page of both."""
import base64
import html

import numpy as np

from minq.analysis import DELIMITERS, delimiter_share, group_shares, token_groups
from minq.errors import UserError


class Report:
    """Text and tables on the terminal, pictures in a folder, and all of it once more as a page that stands alone.

    Without matplotlib there are no pictures, and `close` says how to get them.
    """

    def __init__(self, folder):
        self.folder, self.parts, self.drawn = folder, [], []
        if any(path.exists() and not path.is_dir() for path in (folder, *folder.parents)):
            raise UserError(f"--out {folder}: cannot be written: a file is in the way")
        try:
            from minq import figures
        except ImportError:
            figures = None
        self.figures = figures

    def heading(self, text):
        print(f"\n{text}\n")
        self.parts.append(f"<h2>{html.escape(text)}</h2>")

    def say(self, text):
        print(text)
        self.parts.append(f"<p>{html.escape(text).replace(chr(10), '<br>')}</p>")

    def table(self, header, rows):
        """In Markdown, as quantize.py prints them."""
        lines = [header, ["---"] * len(header), *rows]
        print("\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n")
        cells = [[f"<td>{html.escape(str(cell))}</td>" for cell in line] for line in (header, *rows)]
        self.parts.append("<table>" + "".join(f"<tr>{''.join(line)}</tr>\n" for line in cells) + "</table>")

    def draw(self, name, caption, make):
        """Save the Figure that `make(figures)` returns as name.png."""
        if self.figures is None:
            return
        png = self.figures.png(make(self.figures))
        self.write(f"{name}.png", png)
        source = base64.b64encode(png).decode()
        self.parts.append(f'<figure><img alt="{html.escape(caption)}" src="data:image/png;base64,{source}">'
                          f"<figcaption>{html.escape(caption)}</figcaption></figure>")

    def write(self, name, content):
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / name).write_bytes(content)
        except OSError as error:
            raise UserError(f"--out {self.folder}: cannot be written: {error.strerror}") from None
        self.drawn.append(name)

    def write_page(self, title, command):
        """analysis.html, with the command that made it."""
        title, command, body = html.escape(title), html.escape(command), "\n".join(self.parts)
        self.write("analysis.html", PAGE.format(title=title, command=command, body=body).encode())

    def close(self):
        if self.figures is None:
            print("no pictures: matplotlib is missing; get it with: pip install -e '.[plots]'")
        if self.drawn:
            print(f"in {self.folder}: {' '.join(self.drawn)}")


# ---- what is said of one run (Figures 1, 2, 8) ----

def histogram_of(outliers):
    """(by dimension, by position, what it counts): outliers or, where there are none in any layer, the largest |x|."""
    if outliers["by_dimension"].any():
        return outliers["by_dimension"], outliers["by_position"], "Outliers"
    return outliers["peak_by_dimension"], outliers["peak_by_position"], "Largest |x|, mean over samples"


def report_outliers(report, name, found, config):
    """Figures 1 and 8 for both taps."""
    report.heading("where outliers sit (beyond 6 standard deviations)")
    rows = []
    for tap, outliers in found["outliers"].items():
        for layer, counts in enumerate(outliers["by_dimension"]):
            places = outliers["by_position"][layer]
            worst = int(np.argmax(counts if counts.any() else outliers["peak_by_dimension"][layer]))
            place = int(np.argmax(places if counts.any() else outliers["peak_by_position"][layer]))
            share = lambda part: f"{100 * part / counts.sum():.1f}%" if counts.any() else "none"
            rows.append([tap, layer + 1, f"{outliers['inf_norm'][layer]:.3g}", f"{outliers['kurtosis'][layer]:.3g}",
                         f"{counts.sum() / found['samples']:.3g}", worst, worst // (config.width // config.heads) + 1,
                         share(counts[worst]), place, share(places[place])])
    report.table(["tap", "layer", "inf norm", "kurtosis (not excess)", "outliers a sample", "worst dimension",
                  "its head", "its share of outliers", "worst position", "its share of outliers"], rows)
    for tap, outliers in found["outliers"].items():
        if not outliers["by_dimension"].any():
            report.say(f"No value of {tap} is an outlier in any layer: the largest |x| stand in for them.")
        by_dimension, by_position, quantity = histogram_of(outliers)
        report.draw(f"outliers-{tap}", f"{quantity} of {tap} by position and by dimension (Figures 1 and 8b)",
                    lambda f: f.histograms(by_position, by_dimension, quantity, f"{name}: {tap}"))
    norms, kurtoses = ({tap: outliers[metric] for tap, outliers in found["outliers"].items()}
                       for metric in ("inf_norm", "kurtosis"))
    report.draw("norms", "Infinity norm and kurtosis of every layer (Figure 8a)",
                lambda f: f.norms_by_layer(norms, kurtoses, name))


def report_tokens(report, name, found, names, tap, is_bytes):
    """Which tokens carry the outliers of all layers, beside how common those tokens are."""
    report.heading("which tokens carry them")
    counts, quantity = found["tokens_of_outliers"].sum(axis=0), f"outliers of {tap}"
    if not counts.any():
        counts, quantity = found["tokens_of_peaks"].sum(axis=0), f"each sample's largest magnitude of {tap}"
    groups = token_groups(names, is_bytes)
    carriers, tokens = group_shares(groups, counts), group_shares(groups, found["tokens"])
    shown = sorted((group for group in tokens if tokens[group]), key=lambda group: -carriers[group])
    report.table(["tokens", f"share of {quantity}", "share of all tokens"],
                 [[group, f"{100 * carriers[group]:.1f}%", f"{100 * tokens[group]:.1f}%"] for group in shown])
    report.say(f"Delimiters ({', '.join(name for name in DELIMITERS if tokens.get(name))}) carry "
               f"{100 * delimiter_share(carriers):.1f}% of {quantity}; "
               f"they are {100 * delimiter_share(tokens):.1f}% of all tokens.")
    report.draw("tokens", f"Which tokens carry the {quantity}", lambda f: f.shares(
        shown, [carriers[group] for group in shown], [tokens[group] for group in shown], quantity, name))


def report_heads(report, name, found, names, config):
    """The mechanism in numbers: a row per head."""
    report.heading("what each head does, the most idle first")
    heads, even = found["heads"], 1 / config.seq_len
    columns = {"update": "update", "sink_rate": "sink rate", "sink_value": "sink's value", "zeros": "zeros",
               "ones": "ones", "score_range": "softmax input range", "gate": "gate"}
    columns = {key: title for key, title in columns.items() if key in heads}
    by_idleness = sorted(np.ndindex(config.layers, config.heads), key=lambda at: heads["update"][at])
    report.table(["layer", "head", *columns.values(), "sink"],
                 [[at[0] + 1, at[1] + 1, *(f"{heads[key][at]:.3g}" for key in columns), names[found["sinks"][at]]]
                  for at in by_idleness])
    report.say(f"""\
update: norm of what a head hands on / mean norm of its values; the smaller, the more idle
sink: the commonest most-attended token; sink rate: its share of a query's attention (even attention: {even:.3g})
sink's value: its norm / mean norm; zeros, ones: fraction of the probabilities, those masked left out
softmax input range: largest - smallest score of a query{"; gate: mean of pi" if "gate" in heads else ""}""")
    report.draw("heads", "The mechanism: a sink that takes all and gives nothing makes a head that does nothing",
                lambda f: f.heads(heads["sink_rate"], heads["sink_value"], heads["score_range"], even,
                                  f"{name}: heads, numbered layer.head"))
    if "gate" in heads:
        report.draw("gates", "How open the gates are",
                    lambda f: f.gate_histograms(found["gate_counts"], f"{name}: gates"))


PAGE = """\
<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>{title}</title>
<style>
body {{ max-width: 70rem; margin: 2rem auto; padding: 0 1rem; font: 1rem/1.5 system-ui, sans-serif; }}
table {{ border-collapse: collapse; font-size: 0.9rem; }}
td {{ padding: 0.1rem 0.7rem; border-bottom: 1px solid #ccc; text-align: right; }}
tr:first-child {{ font-weight: bold; }}
img {{ max-width: 100%; }}
figure {{ margin: 1.5rem 0; }}
figcaption {{ color: #444; }}
</style>
<h1>{title}</h1>
<p>Made by <code>{command}</code></p>
{body}
</html>
"""
