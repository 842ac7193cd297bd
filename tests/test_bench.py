"""lab/bench.py: the peers are the same models, what is counted and timed is what it says."""
import argparse
import json
from itertools import product

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from lab import bench, peers, timing
from lab.convert import convert
from running import ROOT, run

TINY = dict(layers=2, width=48, heads=4, ffn=100, seq_len=20, image_size=32, patch_size=16,
            batch_size=3)


@pytest.fixture
def args(monkeypatch):
    """Settings, of models that are tiny."""
    for table in (bench.TASKS, bench.LAPTOP):
        for family, (title, recipe) in table.items():
            monkeypatch.setitem(table, family, (title, recipe | TINY))
    monkeypatch.setattr(bench, "compiled", lambda model: model)
    return argparse.Namespace(device=torch.device("cpu"), precision="fp32", quick=False, rounds=2)


# ---- the peers ----

@pytest.mark.slow
@pytest.mark.parametrize("family, attention", [*product(bench.TASKS, ("sdpa", "eager"))])
@torch.no_grad()
def test_hugging_faces_model_is_ours(family, attention, args, tmp_path):
    """With its weights and sizes ours gives its logits, and its loss on the batch that is timed."""
    pytest.importorskip("transformers")
    recipe = bench.TASKS[family][1]
    timed = bench.new_model(family, recipe, args)
    theirs = peers.hugging_face(timed, attention).eval()
    for p in theirs.parameters():
        p += 0.1 * torch.randn_like(p)  # biases and norms that matter
    theirs.save_pretrained(tmp_path)
    ours = convert(tmp_path, recipe["seq_len"]).eval()
    assert str(ours) == str(timed)  # the sizes of all Linears, embeddings and norms
    assert ours.config.heads == timed.config.heads

    (inputs, targets), (x, labels) = bench.batch(family, recipe)
    logits, loss = ours(inputs[0]), theirs(x, labels=labels).loss
    difference = lambda: (theirs(x).logits - ours(inputs[0])).abs().max() / logits.abs().max()
    assert difference() < 1e-5
    our_loss = bench.loss_of(ours, inputs, targets)()
    if family == "opt":  # theirs has no target for the last token
        our_loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), targets[:, :-1].flatten())
    torch.testing.assert_close(our_loss, loss, rtol=1e-5, atol=0)
    for layer in ours.layers:
        layer.norm1, layer.norm2 = layer.norm2, layer.norm1
    assert difference() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["QAT", "int8 training", "int8"])
@torch.no_grad()
def test_torchao_quantizes_all_linears_but_the_last(kind, args):
    pytest.importorskip("torchao")
    model = bench.new_model("vit", bench.TASKS["vit"][1], args).eval()
    x = torch.rand(3, 3, 32, 32)
    before, plain = model(x), lambda m: type(m) is nn.Linear and type(m.weight) is nn.Parameter
    peers.torchao(kind, model)
    assert [name for name, m in model.named_modules() if plain(m)] == ["head"]
    assert 0 < (model(x) - before).abs().max() < 0.1 * before.abs().max()


# ---- what is timed ----

@pytest.mark.slow
@pytest.mark.parametrize("installed", [peers.INSTALLED, set()])
def test_quick_times_every_group(installed, args, monkeypatch, tmp_path):
    monkeypatch.setattr(peers, "INSTALLED", installed)
    out, _ = run("lab.bench", "--quick", "--precision", "fp32", "--json", tmp_path / "times.json")
    rows = json.loads((tmp_path / "times.json").read_text())
    assert {row["group"] for row in rows} == set(bench.GROUPS)
    assert all(row["title"] in out and row["reference"] in row["seconds"] for row in rows)
    timed = {name: seconds for row in rows for name, seconds in row["seconds"].items()}
    assert all(len(seconds) == 1 and seconds[0] > 0 for seconds in timed.values())
    assert ("Hugging Face, sdpa" in timed) == ("transformers" in installed)
    assert ("torchao's QAT" in timed) == ("torchao" in installed)


@pytest.mark.slow
def test_the_rooflines_product_has_the_steps_operations(args):
    title, recipe = bench.TASKS["opt"]
    bench.TASKS["opt"] = title, recipe | dict(batch_size=9)
    steps = {name: functions for name, functions, _ in bench.roofline(args)}
    counted = []
    for name in ("step", "product"):
        with FlopCounterMode(display=False) as counter:
            steps[f"{title}: a training step"][name]()
        counted.append(counter.get_total_flops())
    model = bench.new_model("opt", recipe, args)
    weights = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
    attention = 2 * 2 * 20 * 48  # two products in two layers
    assert counted[0] == 3 * 2 * 9 * 20 * (weights + attention)  # backward has two for each
    assert 0 <= counted[0] - counted[1] < 2 * 2048 ** 2


def test_finished_runs_are_timed_as_they_were_trained(monkeypatch):
    made, make = [], bench.training_step
    monkeypatch.setattr(bench, "training_step", lambda *args: made.append(args[-2:]) or make(*args))
    folders = {name: ROOT / "zoo" / name for name in ("bert-vanilla", "opt-gated")}
    seconds = bench.run_seconds(folders, 2, torch.device("cpu"))
    assert made == [("bf16", "adamw")] * 2
    assert all(len(each) == 2 and min(each) > 0 for each in seconds.values())


def test_ratios_are_of_the_same_round(capsys):
    calls = []
    functions = {name: lambda name=name: calls.append(name) for name in "ab"}
    seconds = timing.in_turns(functions, 2, torch.device("cpu"))
    assert calls == [*"ababab"] and [len(each) for each in seconds.values()] == [2, 2]
    timing.report("title", {"a": [1.0, 2.0, 9.0], "b": [2.0, 2.0, 3.0]}, "b")
    assert "2000.0 ms    1.00x  (0.50-3.00)" in capsys.readouterr().out
