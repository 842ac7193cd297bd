"""docs/lesson.md keeps its word: it is the notebook, its figures were printed, it quotes the code,
and it runs."""
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


# ---- page, notebook and what was recorded ----

def cells(path):
    """(type, source, tags) of a notebook's cells, without what they printed."""
    return [(cell["cell_type"], "".join(cell["source"]), cell["metadata"].get("tags", []))
            for cell in json.loads(path.read_text())["cells"]]


def test_page_and_notebook_and_record_are_one():
    jupytext = pytest.importorskip("jupytext", reason="pip install -e '.[lesson]'")
    made = [(cell.cell_type, cell.source, cell.metadata.get("tags", []))
            for cell in jupytext.reads(PAGE.read_text(), fmt="md").cells]
    found = cells(PAGE.with_suffix(".ipynb"))
    assert found == made, "jupytext --update --to ipynb docs/lesson.md"
    code = lambda cells: [cell for cell in cells if cell[0] == "code"]
    assert code(cells(RECORD)) == code(found), "docs/teaching.md says how to record it"


def test_a_station_has_all_its_parts():
    parts = "Where it happens", "Notice", "Change one thing", "In one sentence"
    for n, station in enumerate(STATIONS, 1):
        places = [station.find(x) for x in (f"{n}. ", "```", *(f"**{part}:**" for part in parts))]
        assert -1 not in places and places == sorted(places), n
        place = r"happens:\*\*[^(]*\(\.\./([\w/]+\.py)\).*?```py\n(.*?)```"
        ((path, code),) = re.findall(place, station, re.DOTALL)
        source = [line.strip() for line in (ROOT / path).read_text().splitlines()]
        places = [source.index(line.strip()) for line in code.splitlines()]
        assert places == sorted(places) and 1 <= len(places) <= 4, f"{n}: {path} has other lines"
    assert len(STATIONS) == 8 == len(re.findall(r"^\d\. ", ANSWERS, re.MULTILINE))


def printed():
    """Everything that the recorded lesson printed."""
    recorded = json.loads(RECORD.read_text())["cells"]
    outputs = [output for cell in recorded for output in cell.get("outputs", [])]
    return "".join("".join(x["text"]) for x in outputs if x.get("name") == "stdout")


def shown(page):
    """The rows of tables and the lines of output that a page shows, spaces evened out."""
    fenced = re.findall(r"^```(.*?)\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    blocks = [line for language, block in fenced if not language for line in block.splitlines()]
    rows = [line for line in page.splitlines() if line.startswith("| ")]
    return [" ".join(line.split()) for line in rows + blocks]


def test_figures_were_printed():
    """Each row and line as it is; each decimal number of the text somewhere."""
    lines = {" ".join(line.split()) for line in printed().splitlines()}
    assert len(shown(LESSON)) > 30 and not [line for line in shown(LESSON) if line not in lines]
    numbers = {float(number) for number in re.findall(r"\d+\.\d+", printed())}
    text = re.sub(r"^```.*?^```$|^\|.*?$", "", LESSON, flags=re.DOTALL | re.MULTILINE)
    decimals = re.findall(r"(?<![\w.])\d+\.\d+", text)
    assert decimals and not [number for number in decimals if float(number) not in numbers]


def test_the_answer_to_station_4():
    for share, above in ((0.99, 8.03), (0.999, 10.3)):
        assert f"{above}" in ANSWERS.split("\n4.")[1].split("\n5.")[0]
        scores = torch.tensor([above] + [0.0] * 31, dtype=torch.float64)
        assert math.isclose(scores.softmax(dim=0)[0], share, abs_tol=0.05 * (1 - share))


# ---- it runs ----

QUICKER = {"lab.analyze": "--eval-batches 1", "lab.convert": "",
           "train_opt.py": "--steps 20 --eval-batches 1"}


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
    for script in ("quantize.py", "train_opt.py"):
        shutil.copy(ROOT / script, tmp_path)
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=":")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # station 2 must do without
    notebook = nbformat.read(tmp_path / "docs" / "lesson.ipynb", as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for cell in code:
        cell.source = quick(cell.source)
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3", resources={
        "metadata": {"path": tmp_path / "docs"}}).execute()
    for cell in code:  # %run shows an exception and goes on
        errors = [part for part in cell.outputs if part.output_type == "error"]
        text = "".join(part.get("text", "") for part in cell.outputs)
        if "raises-exception" not in cell.metadata.get("tags", []):
            assert not errors, cell.source + "".join(errors[0].traceback)
            assert "%run" not in cell.source or "\n| " in text, cell.source
        if "nine" in cell.source:
            assert text == re.search(r"```\n(scale.*?)```", LESSON, re.DOTALL)[1]
    assert (tmp_path / "runs" / "mine" / "checkpoint.pt").exists()
