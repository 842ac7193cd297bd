"""The pages keep their word: links lead somewhere, commands parse, the README's code runs, and
their English is plain."""
import contextlib
import importlib
import re
import shlex
from pathlib import Path

import pytest

from minq import flags

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", ROOT / "exercises" / "README.md", ROOT / "zoo" / "README.md",
         *sorted((ROOT / "docs").glob("*.md"))]
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


# ---- links ----

def links(page):
    """(text, file, anchor) of every link and image of a page that stays within the project."""
    prose = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    found = re.findall(r"\[([^\[\]]*)\]\(([^()\s#]*)(?:#([^()\s]*))?\)", prose)
    found += re.findall(r'()\bsrc(?:set)?="([^"]*)"()', prose)
    return [(text, page.parent / target if target else page, anchor)
            for text, target, anchor in found if "://" not in target]


def anchors(page):
    """What a link can name after the #: the headings, as GitHub writes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", line).lower().replace(" ", "-") for line in headings}


def defines(path, name):
    definition = rf"^\s*(def|class) {name}\b" + rf"|^{name}(\[.*\])?\s*\|?=" * name.isupper()
    return re.search(definition, path.read_text(), re.MULTILINE)


@each_page
def test_links_point_at_what_they_name(page):
    for text, path, anchor in links(page):
        assert path.exists(), f"[{text}]: there is no {path}"
        assert not anchor or anchor in anchors(path), f"[{text}]: {path.name} has no {anchor}"
        name = re.fullmatch(r"`(\w+)`", text)
        assert not name or defines(path, name[1]), f"{name[1]} is not defined in {path.name}"


def test_links_are_found():
    """The test above would pass if it saw no links."""
    target = ROOT / "docs" / "../minq/attention.py"
    assert ("`clipped_softmax`", target, "") in links(ROOT / "docs" / "paper.md")
    assert defines(target, "ATTENTIONS") and not defines(target, "ATTENTION")


# ---- words ----

CUTE = r"\b(luck\w*|patients?|diseases?|witness\w*|hesitat\w*|nobody|a fifth)\b"  # and vague
SOURCES = [path for folder in ("", "minq", "lab", "zoo", "exercises")
           for kind in ("*.py", "*.toml") for path in (ROOT / folder).glob(kind)]


@pytest.mark.parametrize("path", [*PAGES, *SOURCES],
                         ids=lambda path: str(path.relative_to(ROOT)))
def test_words_are_plain_and_lines_of_pages_short(path):
    text = path.read_text()
    assert not re.findall(CUTE, text, re.IGNORECASE)
    if path.suffix == ".md":
        made = r"^```.*?^```|<!-- results.*?<!-- end -->"
        prose = re.sub(made, "", text, flags=re.DOTALL | re.MULTILINE)
        assert not re.search(r"\brefus", prose)  # scripts may refuse, models do not
        assert not [line for line in prose.splitlines() if len(line) > 120 and line[0] != "|"]


# ---- commands ----

class Parsed(Exception):
    """A script has understood its command line, and shall not run."""


def commands(page):
    """(module, arguments) of every command of ours on a page, with the first value of what a shell
    would put in place of $variables, and something for what a reader would."""
    text = page.read_text().replace("\\\n", " ")
    variables = re.findall(r"^(?:\$ )?(\w+)=\"(.*?)\"|for (\w+) in ([^ ;]+)", text, re.MULTILINE)
    values = {a or c: b or d for a, b, c, d in variables} | {"name": "it"}
    placeholders = {"NAME": "quick", "L": "1", "H": "1", "...": ""}
    for line in re.findall(r"\b(?:python|torchrun) ([^;&|`\n]*)", text):
        line = re.sub(r"\$(\w+)", lambda found: values[found[1]], line)
        words = [placeholders.get(word, word) for word in shlex.split(line, comments=True)]
        script = [i for i, word in enumerate(words) if re.match(r"lab\.|[\w/]+\.py$", word)]
        if script and "FLAGS" not in words:
            yield words[script[0]], [word for word in words[script[0] + 1:] if word]


@each_page
def test_commands_parse(page, monkeypatch):
    """Each with its script's own parser, and its own check of what fits together."""
    parse, read = flags.Parser.parse_args, flags.read_flags

    def parse_args(parser, argv=None, namespace=None):
        args = parse(parser, argv, namespace)
        if argv and namespace is None:  # read_flags, below, has more to say
            raise Parsed
        return args

    def read_flags(*given):
        read(*given)
        raise Parsed

    monkeypatch.setattr(flags.Parser, "parse_args", parse_args)
    monkeypatch.setattr(flags, "read_flags", read_flags)
    for script, arguments in commands(page):
        path = ROOT / (script if script.endswith(".py") else script.replace(".", "/") + ".py")
        assert path.exists(), script
        if path.parent.name in ("lab", ROOT.name):
            module = importlib.import_module(script.removesuffix(".py"))
            with pytest.raises(Parsed) if arguments else contextlib.nullcontext():
                arguments and module.main(arguments)


def test_commands_are_found():
    found = list(commands(ROOT / "README.md"))
    assert ("lab.reproduce", ["quick"]) in found and len(found) > 7
    found = list(commands(ROOT / "zoo" / "README.md"))
    assert any("32" in words and "runs/bert-gated" in words for _, words in found)  # of $bert


# ---- the README ----

def test_the_readme_is_short_and_shows_what_its_first_command_printed():
    assert len(README.encode()) <= 7168
    assert (ROOT / "results" / "quick.md").read_text().strip() in README


# ---- pictures ----

@pytest.mark.slow
def test_pictures_are_of_the_recorded_results_and_shown(tmp_path):
    pytest.importorskip("matplotlib", reason="pip install -e '.[plots]'")
    from lab import pictures
    pictures.main(["--out", str(tmp_path)])
    shown = {path for page in PAGES for _, path, _ in links(page)}
    assert {ROOT / "docs" / path.name for path in tmp_path.iterdir()} <= shown
    assert (tmp_path / "bits-dark.png").read_bytes() != (tmp_path / "bits.png").read_bytes()
    plain = pictures.recorded("bits")[0]  # what docs/results.md says of it
    assert pictures.needed(plain) == [6.38, 7.38]
    lost = pictures.lost(plain, plain["quantized"]["8x8"])
    assert [round(x, 1) for x in lost] == [1.5, 5.3]
    with pytest.raises(SystemExit):
        pictures.main(["--out", str(tmp_path / "nowhere")])
