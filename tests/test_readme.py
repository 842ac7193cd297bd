"""The README keeps its word: its links point at what they name, its demonstration prints what it shows."""
import contextlib
import io
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
LINKS = re.findall(r"\[`(\w+)`\]\(([\w/.]+)#L(\d+)\)", README)


@pytest.mark.parametrize("name, file, line", LINKS, ids=[link[0] for link in LINKS])
def test_the_map_points_at_its_definitions(name, file, line):
    lines = (ROOT / file).read_text().splitlines()
    defined = [i for i, text in enumerate(lines, 1) if re.match(rf"(def|class) {name}\b", text)]
    assert defined == [int(line)]


def test_the_demonstration_prints_what_it_shows():
    code, expected = re.search(r"```python\n(import torch\n.*?)```\n\n```\n(.*?)```", README, re.DOTALL).groups()
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(code, {})
    assert out.getvalue() == expected


def test_the_variant_in_the_readme_is_the_one_that_is_tested():
    code = re.search(r"```python\n(class SoftmaxPlusOne.*?)\n\nATTENTIONS", README, re.DOTALL).group(1)
    normal = lambda text: re.sub(r"\n\n", "\n", text).strip()
    assert normal(code) in normal((ROOT / "tests" / "test_variant.py").read_text())
