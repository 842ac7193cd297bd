"""Wrong command lines and broken files, over all scripts: exit code 2, one line that names flag or
file, value and what to do; no traceback, and nothing on the disk lost."""
import importlib
import io
import os
import shlex
import shutil
import sys
from contextlib import redirect_stdout

import numpy as np
import pytest
import torch

from minq.flags import UserError, one_line_errors
from running import SMALL, run, saved, small, start


def command(script):
    """What stands before the words of a row."""
    if opened := {"quantize.py": "vit", "lab.remove": "bert"}.get(script):
        return [script, opened]
    return [*small(f"{script}.py", "corpus.txt", "cifar"), "--out", "new"]


@pytest.fixture(scope="module")
def world(tmp_path_factory, corpus, cifar):
    """A folder with three runs, data, and what is broken of either."""
    folder, here = tmp_path_factory.mktemp("world"), os.getcwd()
    os.chdir(folder)
    shutil.copy(corpus, "corpus.txt")
    shutil.copytree(cifar, "cifar")
    for name in ("bert", "opt", "vit"):
        run(*command(f"train_{name}"), "--out", name)
    for name in ("nothing", "weights", "sixty"):
        os.mkdir(name)
    checkpoint = saved(folder / "bert")
    torch.save({k: x for k, x in checkpoint.items() if k != "optimizer"}, "weights/checkpoint.pt")
    (folder / "short.txt").write_text("ten bytes!")
    np.full(5000, 70, dtype="<u2").tofile("seventy.bin")
    for part in ("", "val_"):
        np.save(f"sixty/{part}images.npy", np.zeros((40, 8, 8, 3), dtype=np.uint8))
        np.save(f"sixty/{part}labels.npy", np.arange(40) % 2 * 59)
    os.chdir(here)
    return folder


def contents(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("[!.]*") if path.is_file()}


# ---- values that a flag does not take ----

VALUES = """
train_bert --steps many 1e3 0 -5 1000000000000000000000 --eval-every 0 --save-every 0 --warmup -1
train_bert --seed -1 5000000000 --lr 0 inf nan fast --weight-decay inf -1 --clip inf 0
train_bert --dropout nan 1 --init-std inf --mask-prob nan 0 --eval-batches 0 --accumulate 0
train_bert --gamma 0.1 -inf --zeta 0.9 inf --alpha nan inf --gate-init 1 nan --heads 0 5 --layers 0
train_bert --attention linear --activation swish --preset huge --precision fp8 --optimizer sgd
train_bert --device toaster meta cuda cuda:99 --a-bits 1 --w-bits 17 --vocab-size 0 100000
train_bert --fake-quant-granularity channel --special-ids 1,2,3 1,2,3,4,1 1,1,2,3 a,b,c,d
train_opt --sample 0 --lr inf --gate none --norm batchnorm --positions normal --mask-prob 0.1
train_vit --crop-scale 2 nan --flip 1.5 --jitter inf --mixup inf --cutmix nan --rand-magnitude 11
train_vit --rand-augment 1000000000 --image-size 0 --patch-size 5 64 --epochs 0 --seq-len 8
quantize.py --bits 1 --w-bits 1 --a-bits 17 eight --w-estimator best --a-estimator p50 --seeds 0
quantize.py --batches 0 --eval-batches -1 --w-granularity row --json nowhere/table.json nothing
lab.remove --tap queries norm2 --layers 0 9 --tokens some --sigma 0 nan
"""


def rows_of(text):
    """Of lines SCRIPT --flag value value --flag value: (script, [--flag=value], what it names)."""
    for script, *words in map(str.split, text.strip().splitlines()):
        flag = None
        for word in words:
            flag = word if word.startswith("--") else flag
            if word != flag:
                yield script, [f"{flag}={word}"], [flag, word]


# ---- a command, and what its one line must hold ----

ROWS = """
train_bert --alpha 2 --gamma -0.1 --attention clipped | --alpha 2 | --gamma -0.1
train_bert --attention row-clipped            | --attention row-clipped needs a causal model
train_bert --gate mlp                         | --gate mlp needs --attention gated
train_bert --gamma -0.1                       | --gamma -0.1 needs --attention clipped
train_bert --attention gated --gate-hidden 8  | --gate-hidden 8 needs --gate mlp, not linear
train_bert --fused --attention clipped        | --fused needs a plain softmax
train_bert --a-bits 4                         | --a-bits | needs --fake-quant
train_bert --norm rmsnorm --decay-layernorm   | --decay-layernorm would change nothing
train_bert --seq-len 5000                     | --seq-len 5000 | 2250 tokens
train_bert --ffn 1000000000000                | out of memory
train_bert --warmup 6                         | --warmup 6: expected fewer than --steps 6
train_bert --learning-rate 1                  | unrecognized arguments: --learning-rate 1
train_bert --out ''                           | --out: is empty
train_bert --out corpus.txt                   | --out corpus.txt: cannot be written | File exists
train_bert --out bert                         | --out bert: | --resume | --overwrite
train_bert --out bert --resume --overwrite    | --resume | --overwrite | give one
train_bert --resume                           | new: no run here
train_bert --resume --out bert --lr 0.5       | --lr 0.5 | 0.0015
train_bert --resume --out weights             | weights has weights only
train_bert --data nowhere                     | nowhere: | No such file | built in: | stdlib
train_bert --data short.txt                   | 9 tokens | --seq-len 16
train_bert --data seventy.bin                 | seventy.bin: | --vocab-size
train_bert --data seventy.bin --vocab-size 70 | seventy.bin: holds token 70 | --vocab-size
train_opt --sample 5 --out bert               | bert: a run of bert, expected one of opt
train_opt --attention row-clipped --gamma -1  | --gamma -1.0 needs --attention clipped
train_vit --epochs 2                          | --steps 6 | --epochs 2 | give one
train_vit --cutmix 1 --batch-size 7           | --batch-size 7: | pairs
train_vit --data nothing                      | nothing/images.npy | built in: shapes, cifar10
quantize.py nothing                           | nothing: no run here
quantize.py --data sixty                      | vit: its model has classes 10, the data 60
"""
TABLE = [*rows_of(VALUES)]
for words, *messages in (map(str.strip, row.split("|")) for row in ROWS.strip().splitlines()):
    script, *typed = shlex.split(words)
    TABLE.append((script, typed, messages))


@pytest.mark.parametrize("script, typed, messages", TABLE)
def test_wrong_input(world, monkeypatch, script, typed, messages):
    monkeypatch.chdir(world)
    before = contents(world)
    out, err = run(*command(script), *typed, code=2)
    line = err.splitlines()[-1]  # before it a progress bar
    assert line.startswith("error: ") and "Traceback" not in err and not out
    assert all(message in line for message in messages), line
    assert contents(world) == before


@pytest.mark.slow
def test_as_a_process_and_without_a_compiler(corpus, tmp_path):
    nowhere = {"CXX": str(tmp_path / "none"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    process = start("train_bert.py", *SMALL, "--data", corpus, "--out", tmp_path / "run",
                    "--compile", env=os.environ | nowhere)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 2 and not out and "Traceback" not in err
    assert err.splitlines()[-1].startswith("error: --compile: ")


# ---- what no flag can tell beforehand ----

def fails(error):
    raise error


@pytest.mark.parametrize("action, line", [
    (lambda: fails(UserError("--x 1: wrong")), "error: --x 1: wrong\n"),
    (lambda: fails(torch.OutOfMemoryError("CUDA is full")), "error: out of memory: CUDA is full; "),
    (lambda: np.zeros(10 ** 15), "error: out of memory: Unable to allocate 7.11 PiB "),
    (lambda: torch.zeros(10 ** 15), "error: out of memory: "),
    (lambda: torch.full((2,), 300, dtype=torch.int8), None),  # "... without overflow"
    (lambda: torch.ones(2, 3) @ torch.ones(2, 3), None), (lambda: {}["key"], None),
    (lambda: open("/nowhere/file"), None)])
def test_only_wrong_input_and_a_lack_of_memory_become_a_line(capsys, action, line):
    """What else goes wrong is a mistake of the code, and keeps its traceback."""
    with pytest.raises(SystemExit if line else Exception) as raised:
        one_line_errors(lambda argv: action())()
    err = capsys.readouterr().err
    assert err.startswith(line) and err.count("\n") == 1 if line else not err
    assert not line or raised.value.code == 2


# ---- output that goes nowhere, or in another encoding ----

@pytest.mark.parametrize("script", [
    "quantize", "lab.damage", pytest.param("lab.remedies", marks=pytest.mark.slow), "lab.analyze",
    "lab.integer"])
def test_numbers_are_written_before_they_are_printed(world, tmp_path, script):
    class Closed(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    options = [] if script == "lab.analyze" else ["--batches", "1"]
    with redirect_stdout(Closed()), pytest.raises(BrokenPipeError):
        importlib.import_module(script).main(
            [str(world / "bert"), *options, "--eval-batches", "1", "--json", f"{tmp_path}/x.json"])
    assert (tmp_path / "x.json").stat().st_size > 100


def test_what_an_encoding_lacks_becomes_a_question_mark(monkeypatch):
    out = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    monkeypatch.setattr(sys, "stdout", out)
    one_line_errors(lambda argv: print("ö ± ↑", flush=True))()
    assert out.buffer.getvalue() == "ö ± ?".encode("cp1252") + os.linesep.encode()


@pytest.mark.slow
def test_names_beyond_ascii_in_a_locale_without_them(corpus, tmp_path):
    shutil.copy(corpus, tmp_path / "tëxt→.txt")
    for script, *options in [
            small("train_bert.py", tmp_path / "tëxt→.txt", None) + ["--out", tmp_path / "rün→"],
            ["train_bert.py", "--resume", "--out", tmp_path / "rün→"],
            ["quantize.py", tmp_path / "rün→", "--batches", 1, "--json", tmp_path / "→.json"]]:
        process = start(script, *options, env=os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0"})
        assert process.wait(timeout=120) == 0, process.stderr.read()
    assert (tmp_path / "→.json").exists()
