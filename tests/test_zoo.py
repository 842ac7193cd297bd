"""zoo/: runs that open as they are, on every machine, and are what its page says."""
import hashlib
import re
from pathlib import Path

import pytest
import torch

from minq.runs import open_run
from minq.training import evaluate
from running import run

ZOO = Path(__file__).parent.parent / "zoo"
PAGE = (ZOO / "README.md").read_text()
RUNS = sorted(path.parent.name for path in ZOO.glob("*/checkpoint.pt"))


def test_the_page_names_each_run_with_its_hash():
    assert RUNS and set(re.findall(r"^([0-9a-f]{64})  zoo/(\S+)/checkpoint.pt$", PAGE, re.MULTILINE)) == {
        (hashlib.sha256((ZOO / name / "checkpoint.pt").read_bytes()).hexdigest(), name) for name in RUNS}
    assert {*re.findall(r"for name in (.*?);", PAGE)[0].split()} == set(RUNS)


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_it_is_small_and_as_good_as_the_page_says(name):
    assert (ZOO / name / "checkpoint.pt").stat().st_size < 5e6
    opened = open_run(ZOO / name, torch.device("cpu"))
    expected = float(re.search(rf"\| zoo/{name} \| \S+ . \| (\S+) ", PAGE).group(1))
    assert evaluate(opened.model, opened.validation(), opened.device)["perplexity"] == pytest.approx(expected, rel=2e-3)
    assert opened.checkpoint["step"] == opened.checkpoint["args"]["steps"]


def test_it_cannot_be_resumed():
    script = f"train_{RUNS[0].split('-')[0]}.py"
    _, err = run(script, "--resume", "--out", ZOO / RUNS[0], code=2)
    assert "weights only" in err and err.count("\n") == 1
