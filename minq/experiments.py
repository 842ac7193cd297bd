"""The experiments of the paper and of the blog as data: what reproduce.py runs, and what they found.

A row is a training run and its quantization. Its flags are the same at every scale unless `laptop` says otherwise;
what they are added to is the recipe of its family, at the scale of a laptop or of the paper.
"""
import shlex
from dataclasses import dataclass, field

RECIPES = {
    "laptop": {"bert": "", "opt": "", "vit": ""},
    "paper": {
        "bert": "--preset paper --data tokens.bin --vocab-size 30522 --special-ids 0,101,102,103",
        "opt": "--preset paper --data tokens.bin --vocab-size 50272",
        "vit": "--preset paper --data imagenet/"},
}


@dataclass(frozen=True)
class Row:
    label: str
    family: str
    flags: str = ""             # of its training script
    published: str = ""         # FP | max inf norm | avg kurtosis | W8A8; of the blog, the perplexity
    laptop: str | None = None   # flags at the scale of a laptop, where they differ

    def flags_at(self, scale):
        return self.laptop if scale == "laptop" and self.laptop is not None else self.flags


@dataclass(frozen=True)
class Experiment:
    title: str
    rows: tuple
    columns: str = "quantized"  # a key of reproduce.COLUMNS
    seeds: int = 1              # training seeds
    quantize: str = ""          # flags of quantize.py
    recipes: dict = field(default_factory=dict)  # {scale: {family: flags}} instead of RECIPES'

    def settings(self, row, scale):
        """The flags of a row's training script, a list."""
        recipe = {**RECIPES[scale], **self.recipes.get(scale, {})}[row.family]
        return shlex.split(f"{recipe} {row.flags_at(scale)}")


CS, GA = "--attention clipped", "--attention gated"

# ---- the blog: training in eight bits ----

BLOG = (
    Row("Vanilla", "bert", "", "5.055"),
    Row("CS", "bert", f"{CS} --gamma -0.025", "4.975", laptop=CS),
    Row("GA", "bert", f"{GA} --gate mlp --gate-hidden 16", "5.004"),
    Row("Vanilla-FQ", "bert", "--fake-quant", "542.705"),
    Row("CS-FQ", "bert", f"{CS} --gamma -0.025 --fake-quant", "4.994", laptop=f"{CS} --fake-quant"),
    Row("GA-FQ", "bert", f"{GA} --gate mlp --gate-hidden 16 --fake-quant", "5.301"),
)


def at_bits(row, bits):
    more = f" --w-bits {bits} --a-bits {bits}"
    laptop = None if row.laptop is None else row.laptop + more
    return Row(f"{row.label}, {bits} bits", row.family, row.flags + more, "", laptop)


EXPERIMENTS = {
    "blog": Experiment(
        "Training in eight bits and fewer (the blog's Table 2, Figures 5 and 6)", columns="blog",
        rows=BLOG + tuple(at_bits(row, bits) for bits in (6, 4) for row in BLOG[3:]),
        recipes={"paper": {"bert": "--preset blog"}}),
}
