"""Going on from a trained model: what --from takes over, and training in eight bits."""
import argparse
import json

import pytest
import torch

from lab.damage import last_hidden
from lab.remove import limits, removed
from lab.repair import LearnedQuantizer, student_of, train
from minq.quant import ActivationQuantizer, quantize_model
from running import assert_same_weights, opened, run, saved, stopped_at

IDENTITY = ["gated", "gated --gate mlp --gate-init 0.3", "gated --gate all-heads --gate-init 0.1",
            "headwise-gate", "elementwise-gate", "value-gate", "learned-sink"]


def begun(runs, tmp_path, family, *flags):
    """A run from `runs` after one step at a rate of nearly 0, opened, and what was printed."""
    out, _ = run(f"train_{family}.py", "--from", runs / family, "--steps", 1, "--warmup", 0,
                 "--lr", 1e-12, "--weight-decay", 0, "--device", "cpu", "--precision", "fp32",
                 "--out", tmp_path / "new", *flags)
    return opened(tmp_path / "new"), out


@pytest.mark.parametrize("family, attention", [
    *(("bert", attention) for attention in IDENTITY), ("opt", IDENTITY[1]), ("vit", IDENTITY[2])])
def test_a_gate_starts_as_the_identity(runs, tmp_path, family, attention):
    before = opened(runs / family)
    after, _ = begun(runs, tmp_path, family, "--attention", *attention.split())
    assert after.model.config.attention != "vanilla"
    inputs = next(before.validation(1))[0]
    assert after.data.sha256 == before.data.sha256
    wanted, found = before.model(*inputs), after.model(*inputs)
    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max() + 1e-5
    gates = [x for block in after.model.layers if block.attention.gate
             for x in block.attention.gate.parameters()]
    assert all(x.requires_grad for x in gates)


def test_other_attentions_say_how_far_off_they_begin(runs, tmp_path):
    before = opened(runs / "bert")
    after, out = begun(runs, tmp_path, "bert", "--attention", "clipped", "--alpha", 4)
    inputs = next(before.validation(1))[0]
    h, moved = last_hidden(before.model, inputs), last_hidden(after.model, inputs)
    sqnr = 10 * (h.square().sum() / (moved - h).square().sum()).log10().item()
    assert f"begins at {sqnr:.1f} dB" in out


def test_a_run_remembers_where_it_came_from_and_resumes(runs, tmp_path, monkeypatch):
    flags = ["--from", runs / "bert", "--attention", "gated", "--batch-size", 8, "--device", "cpu",
             "--precision", "fp32", "--eval-batches", 2, "--warmup", 1, "--steps", 4]
    run("train_bert.py", *flags, "--out", tmp_path / "whole")
    assert saved(tmp_path / "whole")["args"]["from"] == str(runs / "bert")
    with stopped_at(2, monkeypatch):
        run("train_bert.py", *flags, "--save-every", 2, "--out", tmp_path / "cut")
    out, _ = run("train_bert.py", "--resume", "--out", tmp_path / "cut")
    assert "begins" not in out
    assert_same_weights(tmp_path / "cut", tmp_path / "whole")


@pytest.mark.parametrize("flags, wanted", [
    ("--width 64", "--width 64: the run --from has 32"),
    pytest.param("--data backcopy", "vocab_size 68; the run --from has 260",
                 marks=pytest.mark.slow),
    ("--from nowhere", "no run here"),
    ("--from {opt}", "a run of opt, expected one of bert"),
])
def test_what_does_not_fit_is_one_line(runs, tmp_path, flags, wanted):
    words = flags.format(opt=runs / "opt").split()
    _, err = run("train_bert.py", "--from", runs / "bert", *words, "--steps", 1, "--out",
                 tmp_path / "r", code=2)
    assert wanted in err and err.count("\n") == 1
    assert not (tmp_path / "r" / "checkpoint.pt").exists()


def test_a_learned_quantizer_rounds_as_ever_and_learns_its_range():
    """d/dx is 1 within the range and 0 beyond. Beyond, x becomes low or high; within, the scale
    (high - low) / (2^b - 1) multiplies round(x / s), whose gradient is that of x / s."""
    tap = ActivationQuantizer(4)
    with torch.no_grad():
        tap.observe(torch.tensor([-0.5, 1.0]))  # s = 0.1, z = 5
    learned = LearnedQuantizer(tap)
    x = torch.tensor([-2.0, -0.33, 0.0, 0.47, 0.86, 3.0, 4.0], requires_grad=True)
    y = learned(x)
    torch.testing.assert_close(y, tap.on_grid(x))
    y.sum().backward()
    torch.testing.assert_close(x.grad, torch.tensor([0.0, 1, 1, 1, 1, 0, 0]))
    within = (0.3 + 0.0 + 0.3 + 0.4) / 15
    wanted = torch.tensor([1 - within, 2 + within]) * torch.tensor([-0.5, 1.0])
    torch.testing.assert_close(learned.logs.grad, 200 * wanted)


def test_every_weight_that_is_rounded_learns_in_floating_point(runs):
    args = argparse.Namespace(attention=None, clamp=None, bits=3, batches=1, eval_batches=1,
                              steps=3, batch_size=4, lr=1e-2, seed=0)
    trained = opened(runs / "bert")
    student, floats = student_of(trained, args)
    before = {module: w.clone() for module, w in floats.items()}
    train(trained, student, floats, args)
    assert floats and all((w != before[module]).any() for module, w in floats.items())


@pytest.mark.slow
@pytest.mark.parametrize("family, flags", [("bert", ""), ("bert", "--attention gated"),
                                           ("opt", "--clamp 1")])
def test_training_in_few_bits_repairs(runs, tmp_path, family, flags):
    """At step 0 it is what quantize_model makes of it (a gate is the identity, its factor 2 in the
    output projection moves no grid); then it gets better."""
    run("lab.repair", runs / family, "--steps", 60, "--bits", 3, "--lr", 5e-4, *flags.split(),
        "--json", tmp_path / "r.json", "--batches", 4, "--eval-batches", 2)
    found, again = json.loads((tmp_path / "r.json").read_text())[0], opened(runs / family)
    first, *_, last = found["curve"]
    assert found["run"] == str(runs / family) and last["step"] == 60
    model = again.model
    if "--clamp" in flags:
        known = limits(model, again.calibration_inputs(0, 4), "ffn_output", 1)
        model = removed(model, "ffn_output", known, None, "start")
    model = quantize_model(model, 3, 3, "mse")
    again.calibrate(model, 0, 4)
    assert first["metric"] == pytest.approx(again.score(model, 2), rel=1e-3)
    assert last["metric"] < first["metric"] and last["sqnr"] > first["sqnr"] + 1.5
