"""Gives each test file what it grades: test_1_quantizer.py gets exercise_1_quantizer.py."""
import importlib

import pytest


@pytest.fixture
def solution(request):
    name = request.module.__name__.rpartition(".")[2]
    return importlib.import_module("exercises." + name.replace("test_", "exercise_"))
