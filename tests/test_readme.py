"""The README and docs/ keep their word: links point at what they name, the demonstration prints what it shows."""
import contextlib
import io
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", ROOT / "exercises" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def links(page):
    """(text, file, anchor) of every link and image of a page that stays within the project."""
    prose = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    found = re.findall(r"\[([^\[\]]*)\]\(([^()\s#]*)(?:#([^()\s]*))?\)", prose)
    return [(text, page.parent / target if target else page, anchor) for text, target, anchor in found if "://" not in target]


def anchors(page):
    """What a link can name after the #: the headings, as GitHub writes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


def defines(path, name):
    definition = rf"^\s*((def|class) {name}\b|{name}\s*=)" if name.isupper() else rf"^\s*(def|class) {name}\b"
    return re.search(definition, path.read_text(), re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_point_at_what_they_name(page):
    for text, path, anchor in links(page):
        assert path.exists(), f"[{text}]: there is no {path}"
        assert not anchor or anchor in anchors(path), f"[{text}]: {path.name} has no heading {anchor}"
        name = re.fullmatch(r"`(\w+)`", text)
        assert not name or defines(path, name[1]), f"{name[1]} is not defined in {path.name}"


def test_links_are_found():
    """The test above would pass if it saw no links."""
    assert ("`clipped_softmax`", ROOT / "docs" / "../minq/attention.py", "") in links(ROOT / "docs" / "paper.md")
    assert any(path.name == "outliers-bert.png" for _, path, _ in links(ROOT / "README.md"))
    assert defines(ROOT / "minq" / "attention.py", "ATTENTIONS") and not defines(ROOT / "minq" / "attention.py", "ATTENTION")


def test_the_readme_is_short():
    assert len(README.encode()) <= 12_000


def test_the_demonstration_prints_what_it_shows():
    code, expected = re.search(r"```python\n(import torch\n.*?)```\n\n```\n(.*?)```", README, re.DOTALL).groups()
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(code, {})
    assert out.getvalue() == expected


def test_the_variant_in_the_readme_is_the_one_that_is_tested():
    code = re.search(r"```python\n(class TopFour.*?)\n\nATTENTIONS", README, re.DOTALL).group(1)
    normal = lambda text: re.sub(r"\n\n", "\n", text).strip()
    assert normal(code) in normal((ROOT / "tests" / "test_variant.py").read_text())
