"""lab/bench.py: the peers are the same models, what is counted and timed is what it says."""
import sys
from itertools import product

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from lab import bench
from lab.convert import convert
from running import run

TINY = dict(layers=2, width=48, heads=4, ffn=100, seq_len=20, image_size=32, patch_size=16,
            batch_size=3, dropout=0.0, precision="fp32")
CPU = torch.device("cpu")


@pytest.fixture
def tiny(monkeypatch):
    """All that is timed is tiny."""
    for recipe in (*bench.TASKS.values(), *bench.LAPTOP.values()):
        for name, size in TINY.items():
            monkeypatch.setitem(recipe, name, size)
    monkeypatch.setattr(bench, "compiled", lambda model: model)


# ---- the peers ----

@pytest.mark.slow
@pytest.mark.parametrize("family, attention", [*product(bench.TASKS, ("sdpa", "eager"))])
@torch.no_grad()
def test_hugging_faces_model_is_ours(family, attention, tiny, tmp_path):
    """With its weights and sizes ours gives its logits, and its loss on the batch that is timed."""
    pytest.importorskip("transformers")
    recipe = bench.TASKS[family]
    timed = bench.new_model(recipe)
    theirs = bench.hugging_face(attention, timed).eval()
    for p in theirs.parameters():
        p += 0.1 * torch.randn_like(p)  # biases and norms that matter
    theirs.save_pretrained(tmp_path)
    ours = convert(tmp_path, recipe["seq_len"]).eval()
    assert str(ours) == str(timed)  # the sizes of all Linears, embeddings and norms
    assert ours.config.heads == timed.config.heads

    (inputs, targets), (x, labels) = bench.batch(timed, 3)
    logits, loss = ours(inputs[0]), theirs(x, labels=labels).loss
    difference = lambda: (theirs(x).logits - ours(inputs[0])).abs().max() / logits.abs().max()
    assert difference() < 1e-5
    predicted = ours(*inputs)
    if family == "opt":  # theirs has no target for the last token
        predicted, targets = predicted[:, :-1], targets[:, :-1]
    our_loss = F.cross_entropy(predicted.flatten(0, -2), targets.flatten())
    torch.testing.assert_close(our_loss, loss, rtol=1e-5, atol=0)
    for layer in ours.layers:
        layer.norm1, layer.norm2 = layer.norm2, layer.norm1
    assert difference() > 1e-3


@pytest.mark.slow
@torch.no_grad()
def test_torchao_quantizes_all_linears_but_the_last(tiny):
    pytest.importorskip("torchao")
    model = bench.new_model(bench.TASKS["vit"]).eval()
    x = torch.rand(3, 3, 32, 32)
    before, plain = model(x), lambda m: type(m) is nn.Linear and type(m.weight) is nn.Parameter
    bench.torchao(model)
    assert [name for name, m in model.named_modules() if plain(m)] == ["head"]
    assert 0 < (model(x) - before).abs().max() < 0.1 * before.abs().max()


# ---- what is timed ----

@pytest.mark.slow
@pytest.mark.parametrize("missing", [(), ("transformers", "torchao")])
def test_every_group_times_ours_and_the_peers_that_are_installed(missing, tiny, monkeypatch):
    for package in ("transformers", "torchao"):
        pytest.importorskip(package)
    for package in missing:
        monkeypatch.setitem(sys.modules, package, None)
    out, _ = run("lab.bench", "--quick", "--precision", "fp32", "--device", "cpu")
    tables = [block.splitlines() for block in out.split("\n\n")[1:]]
    assert out.startswith("cpu fp32") and len(tables) == 3 + 3 + 4 + 1 + 4 + 3
    assert all(title in out for title in ("BERT-base", "ViT-S/16", "laptop opt", "a pass, eager"))
    for _, *lines in tables:
        assert len(lines) > 1 and lines[0].endswith("1.00x  (1.00-1.00)")
    for peer in ("Hugging Face, sdpa", "int8 Linears (torchao)"):
        assert (peer in out) != bool(missing)


def test_a_step_is_of_the_recipes_batch_and_moves_the_weights(tiny, monkeypatch):
    """As the recipe says it: its batch size and precision, and what is prepared."""
    sizes, made = [], []
    monkeypatch.setattr(bench, "batch", lambda model, size, batch=bench.batch: (
        sizes.append(size) or batch(model, size)))
    prepare = lambda model: made.append((model, [p.clone() for p in model.parameters()])) or model
    monkeypatch.setattr(bench, "compiled", lambda model: made.append(model) or model)
    bench.training_step(bench.TASKS["vit"] | {"compile": True}, CPU)
    assert made.pop().family == "vit" and sizes.pop() == 3
    for family in bench.TASKS:
        bench.training_step(bench.TASKS[family] | {"prepare": prepare}, CPU)()
        model, before = made.pop()
        assert model.family == family and sizes.pop() == 3
        assert all(p.grad is None for p in model.parameters())
        moved = [not torch.equal(p, old) for p, old in zip(model.parameters(), before)]
        assert sum(moved) > 0.9 * len(moved)


@pytest.mark.slow
def test_the_rooflines_product_has_the_steps_operations(tiny):
    recipe = bench.TASKS["opt"]
    recipe["batch_size"] = 9
    steps = dict(bench.roofline(CPU, {"precision": "fp32"}))[f"{recipe['title']}: a training step"]
    counted = []
    for name in ("step", "product"):
        with FlopCounterMode(display=False) as counter:
            steps[name]()
        counted.append(counter.get_total_flops())
    model = bench.new_model(recipe)
    weights = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
    attention = 2 * 2 * 20 * 48  # two products in two layers
    assert counted[0] == 3 * 2 * 9 * 20 * (weights + attention)  # backward has two for each
    assert 0 <= counted[0] - counted[1] < 2 * 2048 ** 2


def test_ratios_are_of_the_same_round(capsys):
    calls = []
    functions = {name: lambda name=name: calls.append(name) for name in "ab"}
    seconds = bench.in_turns(functions, 2, CPU)
    assert calls == [*"ababab"] and [len(each) for each in seconds.values()] == [2, 2]
    bench.report("title", {"b": [2.0, 2.0, 3.0], "a": [1.0, 2.0, 9.0]})
    assert "2000.0 ms    1.00x  (0.50-3.00)" in capsys.readouterr().out
