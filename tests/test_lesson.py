"""docs/lesson.md keeps its word: it is the notebook, its figures were printed, its code stands where it says, and it runs."""
import json
import math
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "lesson.md").read_text()
STATIONS = re.split(r"^## ", PAGE.split("\n## Answers")[0], flags=re.MULTILINE)[1:]
PARTS = ("**Where it happens:**", "**Notice:**", "**Change one thing:**", "**In one sentence:**")
ANSWERS = PAGE.split("\n## Answers")[1].split("\n## ")[0]


# ---- page and notebook ----

def cells(path):
    """(type, source, tags) of a notebook's cells, without what they printed."""
    found = json.loads(path.read_text())["cells"]
    return [(cell["cell_type"], "".join(cell["source"]), cell["metadata"].get("tags", [])) for cell in found]


def test_page_and_notebook_are_one():
    jupytext = pytest.importorskip("jupytext", reason="pip install -e '.[lesson]'")
    made = [(cell.cell_type, cell.source, cell.metadata.get("tags", [])) for cell in jupytext.reads(PAGE, fmt="md").cells]
    assert cells(ROOT / "docs" / "lesson.ipynb") == made, "jupytext --update --to ipynb docs/lesson.md"


def test_what_was_recorded_is_this_lesson():
    code = lambda path: [cell for cell in cells(path) if cell[0] == "code"]
    assert code(ROOT / "results" / "lesson.ipynb") == code(ROOT / "docs" / "lesson.ipynb"), "docs/teaching.md says how to record it"


def test_a_station_has_all_its_parts():
    assert [station[:2] for station in STATIONS] == [f"{n}." for n in range(1, 9)]
    for station in STATIONS:
        places = [station.find(part) for part in ("```", *PARTS)]
        assert -1 not in places and places == sorted(places), station.splitlines()[0]
        assert re.search(r"\n\n\*\*[^*\n]*\?\*\*|\n\n\*\*So far[^*]*\*\*[^*]*\?", station), "no question: " + station.splitlines()[0]
    assert re.findall(r"^(\d)\. ", ANSWERS, re.MULTILINE) == [str(n) for n in range(1, 9)]


# ---- figures ----

def printed():
    """Everything that the recorded lesson printed."""
    recorded = json.loads((ROOT / "results" / "lesson.ipynb").read_text())["cells"]
    return "".join("".join(output["text"]) for cell in recorded for output in cell.get("outputs", []) if output.get("name") == "stdout")


def shown(page):
    """The rows of tables and the lines of output that a page shows, spaces evened out."""
    rows = [line for line in page.splitlines() if line.startswith("| ")]
    fenced = re.findall(r"^```(.*?)\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    blocks = [block for language, block in fenced if not language]
    return [" ".join(line.split()) for line in rows + [line for block in blocks for line in block.splitlines()]]


def not_printed(page, output):
    """Of what a page shows, what the commands did not print; then its decimal numbers that stand nowhere in the output."""
    lines = {" ".join(line.split()) for line in output.splitlines()}
    decimals = {float(number) for number in re.findall(r"\d+\.\d+", output)}
    return ([line for line in shown(page) if line not in lines],
            [number for number in re.findall(r"(?<![\w.])\d+\.\d+", prose(page)) if float(number) not in decimals])


def prose(page):
    """A page without code and tables."""
    text = re.sub(r"^```.*?^```$", "", page, flags=re.DOTALL | re.MULTILINE)
    return "\n".join(line for line in text.splitlines() if not line.startswith("|"))


def test_figures_were_printed():
    lines, decimals = not_printed("".join(STATIONS), printed())
    assert not lines, "the lesson shows what its commands did not print"
    assert not decimals, "the text has numbers that no command printed"


def test_a_wrong_figure_would_be_seen():
    output = printed()
    assert len(shown(PAGE)) > 30
    for line in shown(PAGE):
        digit = re.search(r"\d(?=\D*$)", line)
        if digit:
            wrong = line[:digit.start()] + str((int(digit[0]) + 1) % 10) + line[digit.end():]
            assert not_printed(wrong if wrong.startswith("| ") else f"```\n{wrong}\n```", output)[0] == [wrong]


def test_the_answer_to_station_4():
    for share, above in ((0.99, 8.03), (0.999, 10.3)):
        assert f"{above}" in ANSWERS.split("\n4.")[1].split("\n5.")[0]
        scores = torch.tensor([above] + [0.0] * 31, dtype=torch.float64)
        assert math.isclose(scores.softmax(dim=0)[0], share, abs_tol=0.05 * (1 - share))


# ---- code ----

@pytest.mark.parametrize("station", STATIONS, ids=lambda station: station.split(".")[0])
def test_quoted_lines_stand_in_the_file(station):
    ((link, code),) = re.findall(r"\*\*Where it happens:\*\*(.*?)```py\n(.*?)```", station, re.DOTALL)
    source = [line.strip() for line in (ROOT / "docs" / re.search(r"\((\.\./[\w/]+\.py)\)", link)[1]).read_text().splitlines()]
    places = [source.index(line.strip()) for line in code.splitlines()]
    assert places == sorted(places) and 1 <= len(places) <= 4


# ---- it runs ----

QUICKER = {"quantize.py": "--batches 1 --eval-batches 1", "analyze.py": "--batches 1", "train_opt.py": "--steps 20 --eval-batches 1"}


def quick(source):
    """A cell in its quick form: a batch, twenty steps, no installing; and commands run in the notebook's own process,
    which spares each the seconds that importing torch takes."""
    lines = []
    for line in source.replace("%%sh\n", "").splitlines():
        command = re.fullmatch(r"python (\w+\.py) (.*?)(?:  +#.*)?", line)
        if command:
            script, arguments = command.groups()
            line = f"%run {script} {arguments} {'' if '--curves' in line else QUICKER.get(script, '')}"
        lines.append("" if line.startswith("%pip") else line)
    return "\n".join(lines)


@pytest.mark.slow
def test_the_notebook_runs_from_top_to_bottom(tmp_path, monkeypatch):
    for package in ("nbclient", "ipykernel", "matplotlib"):
        pytest.importorskip(package, reason="pip install -e '.[lesson,plots]'")
    import nbclient
    import nbformat

    for folder in ("minq", "zoo", "docs"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__", "figures", "*.png"))
    for script in ("pretrained.py", "quantize.py", "analyze.py", "train_opt.py"):
        shutil.copy(ROOT / script, tmp_path)
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=":")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # station 2 must do without
    notebook = nbformat.read(tmp_path / "docs" / "lesson.ipynb", as_version=4)
    for cell in notebook.cells:
        cell.source = quick(cell.source) if cell.cell_type == "code" else cell.source
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": tmp_path / "docs"}}).execute()

    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for cell in code:  # %run shows an exception and goes on
        errors = [part for part in cell.outputs if part.output_type == "error"]
        assert not errors or "raises-exception" in cell.metadata.get("tags", []), cell.source + "".join(errors[0].traceback)
    output = {cell.source: "".join(part.get("text", "") for part in cell.outputs) for cell in code}
    first = re.search(r"```\n(scale.*?)```", PAGE, re.DOTALL)[1]
    assert next(text for source, text in output.items() if "nine" in source) == first
    for source, text in output.items():
        tables = re.findall(r"^%run (?:quantize|analyze)", source, re.MULTILINE)
        assert not tables or "MiniLM" in source or "\n| " in text, source
    assert (tmp_path / "runs" / "mine" / "checkpoint.pt").exists()
