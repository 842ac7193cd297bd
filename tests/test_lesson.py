"""docs/lesson.md keeps its word: it is the notebook, its figures were printed, it quotes the code,
it is no wall of numbers, and it runs."""
import json
import math
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
PAGE, RECORD = ROOT / "docs" / "lesson.md", ROOT / "results" / "lesson.ipynb"
LESSON, ANSWERS = PAGE.read_text().split("\n## Answers")
STATIONS = re.split(r"^## ", LESSON, flags=re.MULTILINE)[1:]
FENCE = re.compile(r"^```(.*?)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


# ---- page, notebook and what was recorded ----

def cells(path):
    """(type, source) of a notebook's cells, without what they printed."""
    return [(cell["cell_type"], "".join(cell["source"]))
            for cell in json.loads(path.read_text())["cells"]]


def test_page_and_notebook_and_record_are_one():
    jupytext = pytest.importorskip("jupytext", reason="pip install -e '.[lesson]'")
    page = jupytext.reads(PAGE.read_text(), fmt="md")
    found = cells(PAGE.with_suffix(".ipynb"))
    assert found == [(x.cell_type, x.source) for x in page.cells], \
        "jupytext --update --to ipynb docs/lesson.md"
    code = lambda cells: [cell for cell in cells if cell[0] == "code"]
    assert code(cells(RECORD)) == code(found), "docs/teaching.md says how to record it"


def test_a_station_has_all_its_parts():
    """A prediction, a command, then what is read; code as it stands; a question with an answer."""
    parts = ("**Predict.**", "```(sh|python)\n", "**Read.**", "**Where it happens:**",
             "**In one sentence:**")
    for n, station in enumerate(STATIONS, 1):
        found = [re.search(part.replace("*", r"\*"), station) for part in (f"^{n}. ", *parts)]
        assert all(found) and found == sorted(found, key=re.Match.start), n
        place = r"happens:\*\*[^(]*\(\.\./([\w/]+\.py)\).*?```py\n(.*?)```"
        ((path, code),) = re.findall(place, station, re.DOTALL)
        source = [line.strip() for line in (ROOT / path).read_text().splitlines()]
        places = [source.index(line.strip()) for line in code.splitlines()]
        assert places == sorted(places) and 1 <= len(places) <= 4, f"{n}: {path} has other lines"
    assert len(STATIONS) == 7 == len(re.findall(r"^\d\. ", ANSWERS, re.MULTILINE))


def tables(text):
    """[[{column: cell}, one per row], one per table] of Markdown."""
    split = lambda line: [" ".join(cell.split()) for cell in line.strip().strip("|").split("|")]
    for block in re.findall(r"(?:^\|.*\n?)+", text, re.MULTILINE):
        head, _, *rows = block.splitlines()
        yield [dict(zip(split(head), split(row), strict=True)) for row in rows]


def test_it_is_no_wall_of_numbers():
    """Per station at most four numbers in running text; tables of at most five columns."""
    assert len(PAGE.read_bytes()) <= 20 * 1024
    for station in STATIONS:
        assert all(len(table[0]) <= 5 for table in tables(station))
        text = re.sub(r"^\|.*$", "", FENCE.sub("", station), flags=re.MULTILINE)
        text = re.sub(r"`[^`]*`|\]\([^)]*\)|W\dA\d|FP32|s²/12", "", text)
        text = re.sub(r"(exercises?|stations?|equations?|layers?) \d( and \d)?", "", text)
        numbers = re.findall(r"(?<![\w.])\d+(?:[.,]\d+)*", text[2:])
        assert len(numbers) <= 4, numbers


def printed():
    """Everything that the recorded lesson printed."""
    recorded = json.loads(RECORD.read_text())["cells"]
    outputs = [output for cell in recorded for output in cell.get("outputs", [])]
    return "\n\n".join("".join(x["text"]) for x in outputs if x.get("name") == "stdout")


def test_figures_were_printed():
    """Each table has columns and rows of one that was printed, each line of output is one; and each
    decimal number of the text was printed, too."""
    was = list(tables(printed()))
    lines = {" ".join(line.split()) for line in printed().splitlines()}
    shown = list(tables(LESSON))
    for table in shown:
        assert any(all(any(row.items() <= x.items() for x in other) for row in table)
                   for other in was), table
    output = [" ".join(x.split()) for kind, text in FENCE.findall(LESSON) if not kind
              for x in text.splitlines()]
    assert len(shown) > 10 and output and not [line for line in output if line not in lines]
    numbers = {float(number) for number in re.findall(r"\d+\.\d+", printed())}
    text = re.sub(r"^\|.*?$|`[^`]*`|\]\([^)]*\)", "", FENCE.sub("", LESSON), flags=re.M)
    decimals = re.findall(r"(?<![\w.])\d+\.\d+", text)
    assert decimals and not [number for number in decimals if float(number) not in numbers]


def test_answers_that_are_numbers():
    answer = dict(re.findall(r"^(\d)\. (.*?)(?=^\d\. |^## )", ANSWERS, re.DOTALL | re.MULTILINE))
    for share, above in ((0.99, 8.03), (0.999, 10.3)):
        assert f"{above}" in answer["2"]
        scores = torch.tensor([above] + [0.0] * 31, dtype=torch.float64)
        assert math.isclose(scores.softmax(dim=0)[0], share, abs_tol=0.05 * (1 - share))
    kinds, tensors, _ = tables(STATIONS[2])
    (wide,) = [float(x["range / sigma"]) for x in tensors if x["tensor"] == "ffn_output, layer 1"]
    by_hand = -10 * math.log10((wide / 255) ** 2 / 12)
    measured = {row["only this in 8 bits"]: float(row["SQNR dB ↑"]) for row in kinds}
    assert f"{by_hand:.1f} dB" in answer["3"]
    assert abs(by_hand - measured["ffn_output"]) < 1


# ---- it runs ----

QUICKER = {"lab.analyze": "--eval-batches 1", "lab.budget": "--batches 1 --eval-batches 1",
           "lab.repair": "--steps 2 --batches 1 --eval-batches 1",
           **dict.fromkeys(("train_opt.py", "train_bert.py"),
                           "--steps 20 --warmup 5 --eval-batches 1")}


def quick(source):
    """A cell in its quick form: a batch, twenty steps, no installing; and commands run in the
    notebook's own process, which spares each the seconds that importing torch takes."""
    def run(command):
        module, script, arguments = command.groups("")
        more = QUICKER.get(script, "--batches 1 --eval-batches 1")
        more = "" if "--curves" in arguments else more
        return f"%run {module}{script} {arguments} {more}"
    source = re.sub(r"^%%sh\n|^%pip.*", "", source, flags=re.MULTILINE)
    return re.sub(r"^python (-m )?(\S+) (.*?)(?:  +#.*)?$", run, source, flags=re.MULTILINE)


@pytest.mark.slow
def test_the_notebook_runs_from_top_to_bottom(tmp_path, monkeypatch):
    for package in ("nbclient", "ipykernel", "matplotlib"):
        pytest.importorskip(package, reason="pip install -e '.[lesson,plots]'")
    import nbclient
    import nbformat

    for folder in ("minq", "lab", "zoo", "docs"):
        shutil.copytree(ROOT / folder, tmp_path / folder,
                        ignore=shutil.ignore_patterns("__pycache__", "figures", "*.png"))
    for script in ("quantize.py", "train_opt.py", "train_bert.py"):
        shutil.copy(ROOT / script, tmp_path)
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=":")
    notebook = nbformat.read(tmp_path / "docs" / "lesson.ipynb", as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for cell in code:
        cell.source = quick(cell.source)
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3", resources={
        "metadata": {"path": tmp_path / "docs"}}).execute()
    for cell in code:  # %run shows an exception and goes on
        errors = [part for part in cell.outputs if part.output_type == "error"]
        text = "".join(part.get("text", "") for part in cell.outputs)
        assert not errors, cell.source + "".join(errors[0].traceback)
        assert "%run" not in cell.source or re.search(r"\n\| |perplexity|SQNR", text), cell.source
        if "nine" in cell.source:
            assert text == re.search(r"```\n(scale.*?)```", LESSON, re.DOTALL)[1]
    assert (tmp_path / "runs" / "mine" / "checkpoint.pt").exists()
