"""Running the scripts for a few steps, as a person would: what several test files need."""
import contextlib
import importlib
import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

from minq import runs

ROOT = Path(__file__).parent.parent
SMALL = ("--layers 2 --width 32 --heads 4 --batch-size 8 --steps 6 --eval-every 3 --eval-batches 2 "
         "--warmup 2 --device cpu --precision fp32 --seq-len 16").split()
SMALL_VIT = [*SMALL[:-2], "--patch-size", "8"]


def make_corpus(folder):
    """A file of text."""
    path = folder / "corpus.txt"
    path.write_text("the quick brown fox jumps over the lazy dog. " * 500)
    return path


def make_cifar(folder):
    """Sixty random images in CIFAR-10's layout."""
    records = np.random.default_rng(0).integers(0, 256, (60, 3073), dtype=np.uint8)
    records[:, 0] %= 10
    records[:40].tofile(folder / "data_batch_1.bin")
    records[40:].tofile(folder / "test_batch.bin")
    return folder


def start(*command, **options):
    """A process that runs Python on `command`, in the project's root unless told."""
    pipe, options = subprocess.PIPE, {"cwd": ROOT} | options
    return subprocess.Popen([sys.executable, *map(str, command)], stdin=pipe, stdout=pipe,
                            stderr=pipe, text=True, **options)


def run(script, *arguments, code=0):
    """Call a script's main() here, without the seconds that importing torch takes: (out, err)."""
    out, err, returned = io.StringIO(), io.StringIO(), 0
    main = importlib.import_module(script.removesuffix(".py")).main
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as exit:
            returned = exit.code
    assert returned == code, err.getvalue()
    return out.getvalue(), err.getvalue()


def train(corpus, out, *more, code=0):
    return run("train_bert.py", *SMALL, "--data", corpus, "--out", out, *more, code=code)


def small(script, corpus, cifar):
    """A script's command for a small model on its data."""
    if script == "train_vit.py":
        return [script, *SMALL_VIT, "--data", cifar]
    return [script, *SMALL, "--data", corpus]


@contextlib.contextmanager
def stopped_at(step, monkeypatch):
    """While active, runs save nothing after `step`, as if they were killed before they could."""
    save = runs.Run.save
    with monkeypatch.context() as patched:
        saves = lambda self: save(self) if self.step <= step else None
        patched.setattr(runs.Run, "save", saves)
        yield


def opened(folder):
    return runs.open_run(folder, torch.device("cpu"))


def logged(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def saved(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def same(a, b):
    """Whether two nested values are equal, bit for bit."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def differences(a, b):
    """What is not the same in two runs' folders, bit for bit, but for their times and flags."""
    logs = [(folder / "metrics.jsonl").read_bytes() for folder in (a, b)]
    lost = ["metrics.jsonl"] * (logs[0] != logs[1])
    a, b = saved(a), saved(b)
    ignored = ("args", "seconds")
    return lost + [key for key in a | b if key not in ignored and not same(a.get(key), b.get(key))]


def assert_same_weights(a, b):
    assert same(saved(a)["model"], saved(b)["model"])
