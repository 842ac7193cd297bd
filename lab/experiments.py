"""The experiments of the paper, of the blog and of this lab, read from experiments.toml.

Its first lines say what a row and an experiment hold; lab/reproduce.py runs them.
"""
import shlex
import tomllib
from dataclasses import dataclass, field
from pathlib import Path

FILE = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
RECIPES, QUANTIZE = FILE["recipes"], FILE["quantize"]


@dataclass(frozen=True)
class Row:
    label: str
    family: str
    flags: str = ""      # of its training script
    published: str = ""  # FP | max inf norm | avg kurtosis | W8A8; or what its table shows
    laptop: str = ""     # flags at the scale of a laptop, where they differ
    line: str = ""       # in a figure: the row's line,
    x: str = ""          # and its place on the x-axis
    source: str = ""     # a published checkpoint (lab/convert.py) instead of a training run


@dataclass(frozen=True)
class Experiment:
    title: str
    rows: tuple
    columns: str = "quantized"  # a key of tables.COLUMNS, or remedies
    seeds: int = 1              # training seeds
    quantize: str = ""          # flags of quantize.py, beside QUANTIZE's
    laptop: dict = field(default_factory=dict)  # family -> flags, instead of RECIPES'
    paper: dict = field(default_factory=dict)
    xlabel: str = ""            # of the figure, if it has one
    then: str = ""              # what is said below the table

    def settings(self, row, scale):
        """The flags of a row's training script, a list."""
        recipe = (RECIPES[scale] | getattr(self, scale))[row.family]
        return shlex.split(f"{recipe} {scale == 'laptop' and row.laptop or row.flags}")


def rows_of(name):
    entry = FILE["experiments"][name]
    return (*(Row(**row) for row in entry.get("rows", ())),
            *(row for other in entry.get("rows_of", ()) for row in rows_of(other)))


EXPERIMENTS = {name: Experiment(rows=rows_of(name), **{key: value for key, value in entry.items()
                                                       if key not in ("rows", "rows_of")})
               for name, entry in FILE["experiments"].items()}
