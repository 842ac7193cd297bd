"""The classroom test: a student's own softmax, named in one place, works everywhere."""
import inspect
import json
import re
import shutil

import pytest
import torch
import torch.nn as nn

from minq import attention, model, quant
from running import ROOT, SMALL, SMALL_VIT, run, saved, start


class TopFour(nn.Module):
    """A softmax over the four largest scores of a row: all other probabilities are exactly 0."""

    def forward(self, scores):
        fourth = scores.topk(min(4, scores.shape[-1]), dim=-1).values[..., -1:]
        return scores.masked_fill(scores < fourth, -torch.inf).softmax(dim=-1)


@pytest.fixture(autouse=True)
def top_four(monkeypatch):
    monkeypatch.setitem(attention.ATTENTIONS, "top-four", lambda config: (TopFour(), None))


def test_it_is_a_softmax_over_four():
    x = torch.tensor([[5.0, 1.0, 3.0, -2.0, 4.0, 2.0], [1.0, 2.0, -torch.inf, -torch.inf, -torch.inf, -torch.inf]])
    p = TopFour()(x)
    torch.testing.assert_close(p[0, [0, 4, 2, 5]], x[0, [0, 4, 2, 5]].softmax(-1))
    assert p[0, 1] == p[0, 3] == 0
    torch.testing.assert_close(p[1], x[1].softmax(-1))  # a masked row with fewer than four stays a plain softmax


@pytest.mark.parametrize("family", ["bert", "opt", "vit"])
def test_it_trains_quantizes_and_is_measured(family, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 500)
    data = [] if family == "vit" else ["--data", text]
    small = SMALL_VIT if family == "vit" else SMALL
    run(f"train_{family}.py", *small, *data, "--attention", "top-four", "--out", tmp_path / "run")
    run("quantize.py", tmp_path / "run", "--batches", 1, "--seeds", 1, "--json", tmp_path / "table.json")
    (row,) = json.loads((tmp_path / "table.json").read_text())
    assert row["attention"] == "top-four" and row["family"] == family
    assert row["quantized"]["8x8"]["mean"] == pytest.approx(row["fp"], rel=0.2) and row["avg_kurtosis"] > 1


def test_a_flag_that_it_does_not_read_is_refused(corpus, tmp_path):
    _, err = run("train_bert.py", *SMALL, "--data", corpus, "--attention", "top-four", "--gamma", "-0.03", "--out", tmp_path / "run", code=2)
    assert "--gamma -0.03 needs --attention clipped, not top-four" in err and not (tmp_path / "run").exists()


def with_pi_quantized():
    """SelfAttention with the two lines of docs/exercises.md, edit 3."""
    page, source = (ROOT / "docs" / "exercises.md").read_text(), inspect.getsource(attention.SelfAttention)
    declared = re.search(r"^self\.pi_tap = .*", page, re.MULTILINE).group()
    called = re.search(r"^context = context \* .*", page, re.MULTILINE).group()
    last_tap, eq5 = "self.context_tap, self.attention_output_tap = Tap(), Tap()\n", r"context = context \* pi.*# eq\. 5"
    assert source.count(last_tap) == 1 and len(re.findall(eq5, source)) == 1
    edited = re.sub(eq5, called, source.replace(last_tap, f"{last_tap}        {declared}\n"))
    namespace = dict(vars(attention))
    exec(edited, namespace)
    return namespace["SelfAttention"]


@pytest.mark.parametrize("attention_with_a_gate", ["gated", "value-gate"])
def test_the_edit_that_quantizes_pi_opens_a_run_of_before(attention_with_a_gate, corpus, tmp_path, monkeypatch):
    run("train_opt.py", *SMALL, "--data", corpus, "--attention", attention_with_a_gate, "--out", tmp_path / "run")
    rows = []
    for edited in (False, True):
        if edited:
            variant = with_pi_quantized()
            for module in (model, quant):
                monkeypatch.setattr(module, "SelfAttention", variant)
        run("quantize.py", tmp_path / "run", "--batches", 1, "--seeds", 1, "--a-bits", 3, "--json", tmp_path / "table.json")
        rows += json.loads((tmp_path / "table.json").read_text())
    before, after = rows
    assert after["fp"] == before["fp"] and after["quantized"]["8x3"]["mean"] != before["quantized"]["8x3"]["mean"]


class SoftmaxPlus(nn.Module):
    """The same with a number of its own: exp(x_i) / (n + sum_j exp(x_j))."""

    def __init__(self, n):
        super().__init__()
        self.n = n

    def forward(self, scores):
        top = scores.amax(dim=-1, keepdim=True).clamp(min=0)
        e = (scores - top).exp()
        return e / (self.n * (-top).exp() + e.sum(dim=-1, keepdim=True))


def with_a_parameter(folder, forget=None):
    """A copy of the project in which a student has added --attention plus --offset N, in three places; or forgot one."""
    for name in ("minq", "train_bert.py", "train_opt.py", "train_vit.py", "quantize.py"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, folder / name)
    edits = {
        "attention": ("\n# ---- multi-head self-attention", "\n" + inspect.getsource(SoftmaxPlus) + "\n\n"
                      "ATTENTIONS['plus'] = lambda c: (SoftmaxPlus(c.offset), None)\n"),
        "model": ("    gate: str = \"linear\"", "    offset: float = 1.0\n"),
        "flags": ("    add(\"--gate\",", "    add(\"--offset\", \"n of the softmax plus n\", type=number(float, low=0))\n"),
        "read": ("READ_BY = {", None)}
    for name, (place, new) in edits.items():
        if name == forget:
            continue
        path = folder / "minq" / f"{'flags' if name == 'read' else name}.py"
        text = path.read_text()
        assert text.count(place) == 1
        path.write_text(text.replace(place, new + place if new else place + '"offset": ("plus",), '))


@pytest.mark.slow
@pytest.mark.parametrize("forget, message", [
    (None, None), ("model", "type object 'Config' has no attribute 'offset'"), ("flags", "unrecognized arguments: --offset 2"),
    ("read", "KeyError: 'offset'")])
def test_a_parameter_of_its_own_is_three_files_and_none_is_forgotten_silently(forget, message, corpus, tmp_path):
    with_a_parameter(tmp_path, forget)
    for family in ("bert", "opt", "vit") if forget is None else ("opt",):
        small = SMALL_VIT if family == "vit" else [*SMALL, "--data", corpus]
        process = start(f"train_{family}.py", *small, "--steps", "1", "--attention", "plus", "--offset", "2", "--out", f"runs/{family}",
                        cwd=tmp_path)
        _, err = process.communicate(timeout=120)
        assert (process.returncode == 0) == (forget is None), err
        if forget is None:
            assert saved(tmp_path / "runs" / family)["config"]["offset"] == 2
        else:
            assert message in err
    if forget is None:
        process = start("quantize.py", "runs/bert", "runs/opt", "runs/vit", "--batches", "1", "--seeds", "1", "--json", "table.json",
                        cwd=tmp_path)
        assert process.wait(timeout=120) == 0, process.stderr.read()
        assert [row["settings"]["offset"] for row in json.loads((tmp_path / "table.json").read_text())] == [2, 2, 2]
