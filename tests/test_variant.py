"""The classroom test: a student's own softmax, named in one place, works everywhere."""
import json

import pytest
import torch
import torch.nn as nn

from minq import attention
from running import SMALL, SMALL_VIT, run


class SoftmaxPlusOne(nn.Module):
    """exp(x_i) / (1 + sum_j exp(x_j)): a row may sum to less than one."""

    def forward(self, scores):
        top = scores.amax(dim=-1, keepdim=True).clamp(min=0)
        e = (scores - top).exp()
        return e / ((-top).exp() + e.sum(dim=-1, keepdim=True))


@pytest.fixture(autouse=True)
def plus_one(monkeypatch):
    monkeypatch.setitem(attention.ATTENTIONS, "plus-one", lambda config: (SoftmaxPlusOne(), None))


def test_its_denominator_is_one_more():
    x = torch.tensor([[-90.0, -95.0], [0.0, 1.0], [80.0, 85.0]])
    expected = x.double().exp() / (1 + x.double().exp().sum(-1, keepdim=True))
    torch.testing.assert_close(SoftmaxPlusOne()(x).double(), expected, rtol=1e-5, atol=1e-30)


@pytest.mark.parametrize("family", ["bert", "opt", "vit"])
def test_it_trains_quantizes_and_is_measured(family, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 500)
    data = [] if family == "vit" else ["--data", text]
    small = SMALL_VIT if family == "vit" else SMALL
    run(f"train_{family}.py", *small, *data, "--attention", "plus-one", "--out", tmp_path / "run")
    run("quantize.py", tmp_path / "run", "--batches", 1, "--seeds", 1, "--json", tmp_path / "table.json")
    (row,) = json.loads((tmp_path / "table.json").read_text())
    assert row["attention"] == "plus-one" and row["family"] == family
    assert row["quantized"]["8x8"]["mean"] == pytest.approx(row["fp"], rel=0.2) and row["avg_kurtosis"] > 1
