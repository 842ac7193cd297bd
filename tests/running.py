"""Running the scripts for real, as a person would, for a few steps. What several test files need."""
import contextlib
import importlib
import io
import json
import subprocess
import sys
from pathlib import Path

import torch

from minq import runs

ROOT = Path(__file__).parent.parent
SMALL = ["--layers", "2", "--width", "32", "--heads", "4", "--seq-len", "16", "--batch-size", "8", "--steps", "6",
         "--eval-every", "3", "--eval-batches", "2", "--warmup", "2", "--device", "cpu", "--precision", "fp32"]
SMALL_VIT = [option for option in SMALL if option not in ("--seq-len", "16")] + ["--patch-size", "8"]

TINY_MODELS = {"bert": ("tiny BERT", dict(layers=2, width=8, heads=2, ffn=8, seq_len=128, vocab_size=30522)),  # of workloads.py
               "opt": ("tiny OPT", dict(layers=2, width=8, heads=2, ffn=8, seq_len=16, vocab_size=260)),
               "vit": ("tiny ViT", dict(layers=2, width=8, heads=2, ffn=8, image_size=224, patch_size=112, classes=1000))}


def start(*command, **options):
    return subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def torchrun(script, *arguments):
    """A script in two processes; what it says, if it fails."""
    process = start("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script, *map(str, arguments), cwd=ROOT)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err


def run(script, *arguments, code=0):
    """Call a script's main() in this process, which spares the seconds that importing torch takes."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            importlib.import_module(script.removesuffix(".py")).main([str(argument) for argument in arguments])
            returned = 0
        except SystemExit as exit:
            returned = exit.code
    assert returned == code, err.getvalue()
    return out.getvalue(), err.getvalue()


def train(corpus, out, *more, code=0):
    return run("train_bert.py", *SMALL, "--data", corpus, "--out", out, *more, code=code)


@contextlib.contextmanager
def stopped_at(step, monkeypatch):
    """While active, runs save nothing after `step`: as if they had been killed before their next checkpoint."""
    save = runs.Run.save
    with monkeypatch.context() as patched:
        patched.setattr(runs.Run, "save", lambda self: save(self) if self.step <= step else None)
        yield


def logged(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def saved(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def assert_same_weights(a, b):
    a, b = saved(a)["model"], saved(b)["model"]
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
