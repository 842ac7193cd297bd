"""What a linter and a type checker take for an error (their settings are in pyproject.toml)."""
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
@pytest.mark.parametrize("command", (["ruff", "check", "."], ["mypy", "minq"]), ids=("ruff", "mypy"))
def test_it_finds_nothing(command):
    if not importlib.util.find_spec(command[0]):
        pytest.skip(f"{command[0]} is not installed")
    found = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, text=True, capture_output=True)
    assert found.returncode == 0, found.stdout + found.stderr
