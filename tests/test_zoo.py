"""zoo/: runs that open as they are, on every machine, and are what its page says."""
import hashlib
import re
from pathlib import Path

import pytest
import torch

from lab.tables import read_log
from minq.runs import open_run

ZOO = Path(__file__).parent.parent / "zoo"
PAGE = (ZOO / "README.md").read_text()
RUNS = sorted(path.parent.name for path in ZOO.glob("*/checkpoint.pt"))


def test_the_page_names_each_run_with_its_hash():
    hashes = re.findall(r"^([0-9a-f]{64})  zoo/(\S+)/checkpoint.pt$", PAGE, re.MULTILINE)
    assert RUNS and set(hashes) == {
        (hashlib.sha256((ZOO / name / "checkpoint.pt").read_bytes()).hexdigest(), name)
        for name in RUNS}
    assert {*re.search(r'for name in "(.*)"', PAGE)[1].split()} == set(RUNS)


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_it_is_small_and_as_good_as_the_page_says(name):
    assert (ZOO / name / "checkpoint.pt").stat().st_size < 5e6
    opened = open_run(ZOO / name, torch.device("cpu"))
    expected = float(re.search(rf"\| zoo/{name} \| \S+ . \| (\S+) ", PAGE)[1])
    assert opened.score(opened.model) == pytest.approx(expected, rel=2e-3)
    steps = opened.checkpoint["args"]["steps"]
    assert opened.checkpoint["step"] == steps == read_log(ZOO / name)[-1]["step"]
