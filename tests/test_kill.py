"""Nothing is lost: not by a kill, not by a polite signal, not by a step that goes wrong."""
import math
import re
import signal

import pytest
import torch
import torch.nn.functional as F

from minq import runs
from minq.data import Windows
from running import differences, logged, run, saved, small, start, stopped_at, train


@pytest.mark.slow
def test_runs_that_were_killed_end_as_if_they_had_not_been():
    """A sample of `python -m tests.kill 100`."""
    process = start("-m", "tests.kill", 12)
    out, err = process.communicate()
    assert process.returncode == 0 and out.endswith("differences: []\n"), out + err
    assert int(re.match(r"\d+", out)[0]) >= 12


@pytest.mark.parametrize("command", [
    "train_bert.py --accumulate 2 --precision fp16", "train_opt.py --fake-quant --precision bf16",
    "train_vit.py --rand-augment 2 --mixup 0.8 --cutmix 1", "train_bert.py --optimizer muon",
    "train_bert.py --optimizer muon --precision fp16",  # queries and keys have gains:
    "train_bert.py --attention qk-norm --norm rmsnorm --decay-layernorm"])
def test_what_was_logged_after_the_last_checkpoint_is_logged_again(corpus, cifar, tmp_path,
                                                                   monkeypatch, command):
    script, *options = command.split()
    command = [*small(script, corpus, cifar), *options, "--dropout", 0.1, "--eval-every", 2,
               "--save-every", 3, "--out"]
    run(*command, tmp_path / "whole")
    with stopped_at(3, monkeypatch):
        run(*command, tmp_path / "stopped")
    assert saved(tmp_path / "stopped")["step"] == 3 and len(logged(tmp_path / "stopped")) == 3
    run(script, "--resume", "--out", tmp_path / "stopped")
    assert not differences(tmp_path / "stopped", tmp_path / "whole")


# ---- signals ----

def signals_in(method, monkeypatch, step, *numbers):
    """Have signals arrive once, when batches are drawn: in a training step, or evaluating."""
    real, sent = getattr(Windows, method), []

    def interrupted(self, *args):
        if len(sent) == step:
            for number in numbers:
                signal.raise_signal(number)
        sent.append(1)
        return real(self, *args)

    monkeypatch.setattr(Windows, method, interrupted)


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_at_the_end_of_the_step(corpus, tmp_path, monkeypatch, number, code):
    """The command that goes on names what the run was computed with, and ends as if nothing was."""
    monkeypatch.setattr("train_bert.compiled", lambda model: model)
    before = signal.getsignal(number)
    train(corpus, tmp_path / "whole")
    with monkeypatch.context() as patched:
        signals_in("train_batch", patched, 3, number)
        out, _ = train(corpus, tmp_path / "a b", "--compile", code=code)
    assert out == ("interrupted at step 4, saved. Go on with: python train_bert.py --resume --out "
                   f"'{tmp_path / 'a b'}' --compile --device cpu\n")
    assert saved(tmp_path / "a b")["step"] == 4
    run("train_bert.py", "--resume", "--out", tmp_path / "a b", "--compile", "--device", "cpu")
    assert not differences(tmp_path / "a b", tmp_path / "whole")
    assert signal.getsignal(number) == before


def test_a_second_ctrl_c_ends_an_evaluation_at_once(corpus, tmp_path, monkeypatch):
    for first in (signal.SIGINT, signal.SIGTERM):
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            signals_in("validation_batches", patched, 0, first, signal.SIGINT)
            train(corpus, tmp_path / "run", "--eval-every", 1)
        assert not (tmp_path / "run" / "checkpoint.pt").exists()


# ---- steps that go wrong ----

def losses_times(factor, monkeypatch):
    """Have the loss of each call, counted from 0, multiplied by factor(call)."""
    honest, calls = F.cross_entropy, []

    def wrong(*args, **kwargs):
        calls.append(1)
        return honest(*args, **kwargs) * factor(len(calls) - 1)

    monkeypatch.setattr(F, "cross_entropy", wrong)


@pytest.mark.parametrize("factor, options, step, kept", [
    (lambda call: math.nan if call > 6 else 1.0, "--save-every 2", 40, 6),  # looked at at 20, too
    (lambda call: math.inf if call > 6 else 1.0, "--save-every 2", 40, 6),
    (lambda call: 1e25, "--precision fp16 --save-every 4", 20, 16)])  # 65536 halved 16 times
def test_steps_that_come_to_nothing_end_the_run(corpus, tmp_path, monkeypatch, factor, options,
                                                step, kept):
    """Losses that are not finite, or fp16's gradients that overflow at every loss scale."""
    losses_times(factor, monkeypatch)
    _, err = train(corpus, tmp_path / "run", "--steps", 100, "--eval-every", 100,
                   *options.split(), code=2)
    assert f"step {step}:" in err.splitlines()[-1] and "not finite" in err.splitlines()[-1]
    checkpoint = saved(tmp_path / "run")
    assert checkpoint["step"] == kept and checkpoint["scaler"].get("scale", 1.0) == 1.0
    assert all(value.isfinite().all() for value in checkpoint["model"].values())


def test_every_step_draws_its_own_dropout_and_the_same_again(corpus, tmp_path, monkeypatch):
    """What is random in a step is a function of seed and step."""
    draws, micro_batches = [], runs.Run.micro_batches
    monkeypatch.setattr(runs.Run, "micro_batches", lambda *args: (
        draws.append(tuple(torch.rand(4).tolist())), micro_batches(*args))[1])
    for seed in (0, 1, 0):
        train(corpus, tmp_path / "run", "--seed", seed, "--overwrite")
    assert draws[:6] == draws[12:] and len(set(draws)) == 12
