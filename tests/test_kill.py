"""Nothing is lost: not by a kill, not by a polite signal."""
import re
import signal
import subprocess
import sys
import time

import pytest
import torch

from minq import runs
from running import ROOT, SMALL, SMALL_VIT, assert_same_weights, logged, run, saved, start, stopped_at


@pytest.mark.slow
def test_runs_that_were_killed_end_as_if_they_had_not_been():
    """A sample of `python -m tests.kill --times 100`."""
    found = subprocess.run([sys.executable, "-m", "tests.kill", "--times", "5"], cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr
    kills, *_, runs, identical = map(int, re.search(r"^all +(.*)$", found.stdout, re.M)[1].split())
    assert kills >= 5 and runs == identical >= 1


@pytest.mark.parametrize("script, options", [
    ("train_bert.py", "--accumulate 2 --precision fp16"), ("train_opt.py", "--fake-quant"),
    ("train_vit.py", "--rand-augment 2 --mixup 0.8 --cutmix 1")])
def test_what_was_logged_after_the_last_checkpoint_is_logged_again(corpus, cifar, tmp_path, monkeypatch, script, options):
    small = [*SMALL_VIT, "--data", cifar] if script == "train_vit.py" else [*SMALL, "--data", corpus]
    command = [script, *small, *options.split(), "--dropout", "0.1", "--eval-every", "2", "--save-every", "3", "--out"]
    run(*command, tmp_path / "whole")
    with stopped_at(3, monkeypatch):
        run(*command, tmp_path / "stopped")
    assert saved(tmp_path / "stopped")["step"] == 3 and len(logged(tmp_path / "stopped")) == 3
    run(script, "--resume", "--out", tmp_path / "stopped")
    assert_same_weights(tmp_path / "stopped", tmp_path / "whole")
    assert (tmp_path / "stopped" / "metrics.jsonl").read_text() == (tmp_path / "whole" / "metrics.jsonl").read_text()


def test_the_command_that_goes_on_names_what_the_run_was_computed_with(corpus, tmp_path, monkeypatch):
    """Compiled or on another device the same steps round otherwise, and resuming takes neither from the checkpoint."""
    monkeypatch.setattr(torch, "compile", lambda model: model)
    monkeypatch.setattr(runs.Run, "look", lambda *_: signal.raise_signal(signal.SIGINT))
    monkeypatch.setattr(runs, "LOOK_EVERY", 4)
    command = ["train_bert.py", *SMALL, "--data", corpus, "--compile", "--out", tmp_path / "run"]
    out, _ = run(*command, code=130)
    assert out == f"interrupted at step 5, saved. Go on with: python train_bert.py --resume --out {tmp_path / 'run'} --compile --device cpu\n"


@pytest.mark.slow
@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_at_the_next_step(corpus, tmp_path, number, code):
    process = start("train_bert.py", *SMALL, "--data", corpus, "--steps", "1000000", "--save-every", "1000000",
                    "--out", str(tmp_path / "run"), cwd=ROOT)
    while not (tmp_path / "run" / "metrics.jsonl").exists() or len(logged(tmp_path / "run")) < 2:
        time.sleep(0.05)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == code and "Traceback" not in err
    step = saved(tmp_path / "run")["step"]
    assert f"interrupted at step {step}, saved. Go on with: python train_bert.py --resume --out {tmp_path / 'run'} --device cpu\n" in out
    assert 0 <= step - logged(tmp_path / "run")[-1]["step"] < 3  # it is evaluated every third step
