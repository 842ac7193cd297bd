"""The shape of the house: what ruff takes for an error (its settings are in pyproject.toml), how
long lines and files may be, and who imports whom."""
import ast
import functools
import io
import tokenize

import pytest

from running import ROOT, start

FILES = [path for folder in (".", "minq", "lab", "tests", "exercises")
         for path in (ROOT / folder).glob("*.py")]
SILENT = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT,
          tokenize.ENDMARKER}


def code_lines(source):
    """How many lines are neither blank nor comment nor docstring."""
    found = {line for token in tokenize.generate_tokens(io.StringIO(source).readline)
             if token.type not in SILENT for line in range(token.start[0], token.end[0] + 1)}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and (
                ast.get_docstring(node)):
            found -= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return len(found)


def path_of(module):
    return ROOT / f"{module.replace('.', '/')}.py"


@functools.cache
def imported(module):
    """Which modules of the house a module imports, also within a function."""
    names = set()
    for node in ast.walk(ast.parse(path_of(module).read_text())):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            source = getattr(node, "module", None)
            names |= {source, *(alias.name for alias in node.names),
                      *(f"{source}.{alias.name}" for alias in node.names)}
    return {name for name in names if name and path_of(name).exists()}


def floor(name, above=()):
    """0 for a module that imports no other; else one more than the highest that it imports."""
    assert name not in above, f"a circle: {' -> '.join((*above, name))}"
    return 1 + max((floor(other, (*above, name)) for other in imported(name)), default=-1)


def test_ruff_finds_nothing():
    process = start("-m", "ruff", "check", "--output-format", "concise", ".")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, out + err


def test_no_line_is_longer_than_100_columns_and_no_file_than_250_lines_of_code():
    long = [f"{path.relative_to(ROOT)}:{i}" for path in FILES
            for i, line in enumerate(path.read_text().splitlines(), 1) if len(line) > 100]
    long += [str(path) for path in FILES if code_lines(path.read_text()) > 250
             and path.parent.name != "tests"]
    assert not long


def test_arrows_point_one_way_over_at_most_five_floors():
    minq, lab = ([f"{house}.{path.stem}" for path in (ROOT / house).glob("*.py")
                  if path.stem != "__init__"] for house in ("minq", "lab"))
    assert max(map(floor, minq)) < 5 and len(minq) <= 12
    assert all(floor(name) < 20 for name in lab)  # no circle there either
    assert not {other for name in minq for other in imported(name) if other not in minq}


@pytest.mark.slow
@pytest.mark.parametrize("script, most", [("train_bert", 9), ("quantize", 7)])
def test_a_script_imports_few_modules(script, most):
    tell = f"import {script}, sys; print(*(m for m in sys.modules if m.startswith('minq.')))"
    out, err = start("-c", tell).communicate(timeout=60)
    assert 0 < len(out.split()) <= most, out + err
