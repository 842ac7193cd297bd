"""Wrong command lines and broken files, over all scripts: exit code 2, one line that names flag or file, value and
what to do; no traceback, nothing left behind, nothing on the disk lost. (Files broken at random: test_fuzz.py.)"""
import json
import os
import pickle
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from running import ROOT, SMALL, run, saved, start

TINY = "--layers 1 --width 16 --heads 2 --batch-size 4 --steps 1 --eval-every 1 --eval-batches 1 --device cpu --precision fp32"
COMMANDS = {  # what stands before the flags of a row
    "train_bert": f"{TINY} --seq-len 8 --data corpus.txt --out new",
    "train_opt": f"{TINY} --seq-len 8 --data corpus.txt --out new",
    "train_vit": f"{TINY} --patch-size 16 --data cifar --out new",
    "quantize": "", "analyze": "", "reproduce": "", "bench": "", "pretrained": "",
}


class Ran:
    """A pickle that makes a folder where it is loaded."""
    def __reduce__(self):
        return os.mkdir, ("ran",)


@pytest.fixture(scope="module")
def world(tmp_path_factory, corpus, cifar):
    """A folder with four runs, data, and what is broken of either."""
    folder = tmp_path_factory.mktemp("world")
    shutil.copy(corpus, folder / "corpus.txt")
    shutil.copytree(cifar, folder / "cifar")
    here = os.getcwd()
    os.chdir(folder)
    try:
        for name, more in (("bert", ""), ("gated", "--attention gated"), ("small", "--width 8")):
            run("train_bert.py", *shlex.split(f"{COMMANDS['train_bert']} {more} --out {name}"))
        run("train_opt.py", *shlex.split(f"{COMMANDS['train_opt']} --out opt"))
        run("train_vit.py", *shlex.split(f"{COMMANDS['train_vit']} --out vit"))
        broken_runs(Path())
        broken_data(Path())
    finally:
        os.chdir(here)
    return folder


def broken_runs(folder):
    """bert-WHAT: a copy of the run bert with something changed in its checkpoint; log-WHAT: in its log."""
    whole = (folder / "bert" / "checkpoint.pt").read_bytes()

    def spoil(name, change):
        shutil.copytree(folder / "bert", folder / f"bert-{name}")
        torch.save(change(saved(folder / "bert")), folder / f"bert-{name}" / "checkpoint.pt")

    for name, content in {"empty": b"", "half": whole[:len(whole) // 2], "text": b"hello", "zeros": bytes(5000),
                          "code": pickle.dumps(Ran())}.items():
        shutil.copytree(folder / "bert", folder / f"bert-{name}")
        (folder / f"bert-{name}" / "checkpoint.pt").write_bytes(content)
    shutil.copytree(folder / "bert", folder / "bert-folder")
    (folder / "bert-folder" / "checkpoint.pt").unlink()
    (folder / "bert-folder" / "checkpoint.pt").mkdir()

    weight = "layers.0.ffn_up.weight"
    spoil("packed-code", lambda c: {"format": "minq 1", "model": Ran()})
    spoil("list", lambda c: [1, 2])
    spoil("tensor", lambda c: torch.zeros(3))
    spoil("other-format", lambda c: c | {"format": "minq 2"})
    for key in ("args", "config", "model", "family", "step", "data_sha256"):
        spoil(f"no-{key}", lambda c: {name: c[name] for name in c if name != key})
    for key in ("optimizer", "scaler"):
        spoil(f"no-{key}", lambda c: {name: c[name] for name in c if name != key})
    spoil("args-lr", lambda c: c | {"args": {name: c["args"][name] for name in c["args"] if name != "lr"}})
    spoil("nan", lambda c: c | {"model": {name: w * torch.nan for name, w in c["model"].items()}})
    spoil("inf", lambda c: c | {"model": c["model"] | {weight: c["model"][weight] + torch.inf}})
    spoil("no-weight", lambda c: c | {"model": {name: w for name, w in c["model"].items() if name != weight}})
    spoil("shape", lambda c: c | {"model": c["model"] | {weight: torch.zeros(3, 3)}})
    spoil("integers", lambda c: c | {"model": c["model"] | {weight: torch.ones(64, 16, dtype=torch.long)}})
    spoil("sparse", lambda c: c | {"model": c["model"] | {weight: c["model"][weight].to_sparse()}})
    spoil("string-weight", lambda c: c | {"model": c["model"] | {weight: "heavy"}})
    for key, values in {"width": ("16", 0, -16, 2 ** 40, 16.0, True, [16]), "heads": (0, 3), "layers": ("1", 10 ** 9, 2),
                        "dropout": ("0.1", 7.0, float("nan")), "norm_eps": ("tiny", float("nan")), "zeta": ("1", float("inf")),
                        "attention": ("linear", 3), "activation": ("swish", 7), "seq_len": (10 ** 30, 4), "vocab_size": (100, 2 ** 50)}.items():
        for value in values:
            spoil(f"{key}={value}", lambda c: c | {"config": c["config"] | {key: value}})
    for key, values in {"batch_size": ("8", 0, None), "data": (7, None, ""), "eval_batches": (-1,), "seq_len": (4, "8"),
                        "mask_prob": ("often",)}.items():
        for value in values:
            spoil(f"args-{key}={value}", lambda c: c | {"args": c["args"] | {key: value}})

    for name, content in {"empty": "", "text": "loss went down\n", "list": "[1, 2]\n", "no-step": '{"loss": 1}\n', "no-loss": '{"step": 1}\n',
                          "strings": '{"step": "one"}\n', "deep": "[" * 5000 + "\n"}.items():
        (folder / f"log-{name}").mkdir()
        (folder / f"log-{name}" / "metrics.jsonl").write_text(content)
    (folder / "log-bytes").mkdir()
    (folder / "log-bytes" / "metrics.jsonl").write_bytes(b"\xff\xfe\n")


def broken_data(folder):
    (folder / "empty.txt").touch()
    (folder / "short.txt").write_text("ten bytes!")
    (folder / "nothing").mkdir()
    (folder / "odd.bin").write_bytes(bytes(1001))
    (folder / "empty.bin").touch()
    (folder / "folder.bin").mkdir()
    np.full(5000, 70, dtype="<u2").tofile(folder / "seventy.bin")
    np.full(5000, 7, dtype="<u2").tofile(folder / "words.bin")
    (folder / "words.json").write_text('["one", 2]')
    os.symlink("nowhere", folder / "dangling")

    images, labels = np.zeros((40, 8, 8, 3), dtype=np.uint8), np.zeros(40, dtype=np.int64)
    for name, arrays in {"float": (images.astype(float), labels), "grey": (images[..., 0], labels), "flat": (images[:, :4], labels),
                         "no-pixels": (images[:, :0, :0], labels), "objects": (np.array([None] * 40), labels), "fewer": (images, labels[:7]),
                         "float-labels": (images, labels.astype(float)), "negative": (images, labels - 1), "one": (images[:1], labels[:1]),
                         "huge-labels": (images, labels + 2 ** 40), "sixty": (images, labels + 59)}.items():
        (folder / f"npy-{name}").mkdir()
        np.save(folder / f"npy-{name}" / "images.npy", arrays[0])
        np.save(folder / f"npy-{name}" / "labels.npy", arrays[1])
    shutil.copytree(folder / "npy-fewer", folder / "npy-cut")
    os.truncate(folder / "npy-cut" / "images.npy", 1000)
    for name, change in {"cut": lambda path: os.truncate(path, 3000), "none": Path.unlink, "empty": lambda path: os.truncate(path, 0)}.items():
        shutil.copytree(folder / "cifar", folder / f"cifar-{name}")
        change(folder / f"cifar-{name}" / "test_batch.bin")
    for name, content in {"empty": "", "text": "{", "list": "[]", "gpt": '{"model_type": "gpt2"}', "strings": '{"model_type": "bert", "hidden_size": "8"}'}.items():
        (folder / f"published-{name}").mkdir()
        (folder / f"published-{name}" / "config.json").write_text(content)
        torch.save({"a": torch.zeros(2)}, folder / f"published-{name}" / "pytorch_model.bin")


def contents(folder):
    return {str(path): path.lstat().st_mtime_ns if path.is_file() or path.is_symlink() else None for path in folder.rglob("*")}


# ---- the table: a command, and what its one line must hold ----

LONG = "x" * 300
ROWS = """
train_bert --heads 5                            | --heads 5 does not divide --width 16
train_bert --attention clipped --gamma 0.1      | --gamma: 0.1: expected at most 0
train_bert --attention clipped --gamma=-inf     | --gamma: -inf: expected a finite number
train_bert --attention clipped --zeta 0.9       | --zeta: 0.9: expected at least 1
train_bert --attention clipped --zeta inf       | --zeta: inf: expected a finite number
train_bert --attention clipped --alpha nan      | --alpha: nan: expected a finite number
train_bert --attention clipped --alpha inf      | --alpha: inf: expected a finite number
train_bert --attention clipped --alpha 2 --gamma -0.1 | --alpha 2 and --gamma -0.1 both set gamma; give one of them
train_bert --attention row-clipped              | --attention row-clipped needs a causal model
train_bert --gate mlp                           | --gate mlp needs --attention gated, not vanilla
train_bert --gate-init 0.3                      | --gate-init 0.3 needs --attention gated
train_bert --gamma -0.1                         | --gamma -0.1 needs --attention clipped
train_bert --attention gated --gate-hidden 8    | --gate-hidden 8 needs --gate mlp, not linear
train_bert --attention gated --gate-init 1      | --gate-init: 1: expected above 0 and below 1
train_bert --attention gated --gate-init nan    | --gate-init: nan: expected a finite number
train_bert --attention linear                   | --attention: invalid choice: 'linear'
train_bert --activation swish                   | --activation: invalid choice: 'swish'
train_bert --positions none                     | --positions: invalid choice: 'none'
train_bert --preset huge                        | --preset: invalid choice: 'huge'
train_bert --steps many                         | --steps: invalid whole number value: 'many'
train_bert --steps 1e3                          | --steps: invalid whole number value: '1e3'
train_bert --steps 0                            | --steps: 0: expected at least 1
train_bert --steps -5                           | --steps: -5: expected at least 1
train_bert --steps 1000000000000000000000       | --steps: 1000000000000000000000: expected at most 18 digits
train_bert --eval-every 0                       | --eval-every: 0: expected at least 1
train_bert --save-every 0                       | --save-every: 0: expected at least 1
train_bert --eval-batches 0                     | --eval-batches: 0: expected at least 1
train_bert --seed -1                            | --seed: -1: expected at least 0
train_bert --seed 5000000000                    | --seed: 5000000000: expected at least 0 and below
train_bert --lr 0                               | --lr: 0: expected above 0
train_bert --lr inf                             | --lr: inf: expected a finite number
train_bert --lr nan                             | --lr: nan: expected a finite number
train_bert --lr fast                            | --lr: invalid number value: 'fast'
train_bert --weight-decay inf                   | --weight-decay: inf: expected a finite number
train_bert --weight-decay -1                    | --weight-decay: -1: expected at least 0
train_bert --clip inf                           | --clip: inf: expected a finite number
train_bert --clip 0                             | --clip: 0: expected above 0
train_bert --dropout nan                        | --dropout: nan: expected a finite number
train_bert --dropout 1                          | --dropout: 1: expected at least 0 and below 1
train_bert --init-std inf                       | --init-std: inf: expected a finite number
train_bert --mask-prob nan                      | --mask-prob: nan: expected a finite number
train_bert --mask-prob 0                        | --mask-prob: 0: expected above 0
train_bert --warmup -1                          | --warmup: -1: expected at least 0
train_bert --layers 1000000000                  | --layers 1000000000 | GiB of memory, this machine has | make one of them smaller
train_bert --width 1000000                      | --width 1000000 | make one of them smaller
train_bert --ffn 1000000000000                  | --ffn 1000000000000 | make one of them smaller
train_bert --batch-size 100000000000            | --batch-size 100000000000 | make one of them smaller
train_bert --accumulate 100000000000            | --accumulate 100000000000 | make one of them smaller
train_bert --seq-len 100000000000               | --seq-len 100000000000 | make one of them smaller
train_bert --seq-len 2                          | --seq-len 2 leaves no room beside the special tokens; expected at least 3
train_bert --seq-len 5000                       | --data: its validation part has 2250 tokens, fewer than one sequence of --seq-len 5000
train_bert --fake-quant --a-bits 1              | --a-bits: 1: expected at least 2 and at most 16
train_bert --fake-quant --w-bits 17             | --w-bits: 17: expected at least 2 and at most 16
train_bert --a-bits 4                           | --a-bits 4 needs --fake-quant
train_bert --fake-quant-granularity token       | --fake-quant-granularity token needs --fake-quant
train_bert --fake-quant --fake-quant-granularity channel | invalid choice: 'channel'
train_bert --precision fp8                      | --precision: invalid choice: 'fp8'
train_bert --device toaster                     | --device toaster: expected cpu, cuda
train_bert --device meta                        | --device meta: expected cpu, cuda
train_bert --device cuda:99                     | --device cuda:99: this machine has no
train_bert --learning-rate 1                    | unrecognized arguments: --learning-rate 1
train_bert --lr                                 | --lr: expected one argument
train_bert bert                                 | unrecognized arguments: bert
train_bert --out ''                             | --out: is empty; expected a name
train_bert --data ''                            | --data: is empty; expected a name
train_bert --out corpus.txt                     | --out corpus.txt: cannot be written
train_bert --out corpus.txt/run                 | corpus.txt/run | Not a directory
train_bert --out LONG                           | File name too long
train_bert --out bert                           | --out bert: already holds a run; continue it with --resume
train_bert --resume --overwrite --out bert      | --resume continues the run in --out, --overwrite replaces it; give one of them
train_bert --resume                             | new: no run here; expected a folder with checkpoint.pt
train_bert --resume --out bert --lr 0.5         | --lr 0.5 differs from the run's
train_bert --resume --out bert-nan              | is not finite
train_bert --resume --out bert-half             | bert-half/checkpoint.pt: truncated, or not a checkpoint of minq
train_bert --resume --out bert-no-optimizer     | --resume: bert-no-optimizer has weights only
train_bert --resume --out bert-no-scaler        | --resume: bert-no-scaler has weights only
train_bert --resume --out bert-args-lr          | --resume: bert-args-lr does not tell its lr
train_bert --data nowhere                       | nowhere: no such file or folder; built in: stdlib
train_bert --data dangling                      | dangling: no such file or folder
train_bert --data LONG                          | File name too long
train_bert --data empty.txt                     | empty.txt: is empty; expected text
train_bert --data nothing                       | nothing: is empty; expected text
train_bert --data short.txt                     | its validation part has 1 tokens, fewer than one sequence of --seq-len 8
train_bert --data words.bin                     | words.bin needs --vocab-size, the number of its tokens
train_bert --vocab-size 70                      | --vocab-size 70 is for .bin files of tokens
train_bert --special-ids 0,1,2,3                | --special-ids [0, 1, 2, 3] is for .bin files of tokens
train_bert --data odd.bin --vocab-size 70       | odd.bin: has 1001 bytes; expected uint16 tokens
train_bert --data empty.bin --vocab-size 70     | empty.bin: has 0 bytes
train_bert --data folder.bin --vocab-size 70    | folder.bin: no such file
train_bert --data seventy.bin --vocab-size 70   | seventy.bin: holds token 70, but --vocab-size is 70
train_bert --data words.bin --vocab-size 70     | words.json: expected a list of words, one a token id
train_bert --data seventy.bin --vocab-size 100000 | --vocab-size: 100000: expected at least 1 and at most 65536
train_bert --special-ids 1,2,3                  | --special-ids: 1,2,3: expected four different ids
train_bert --special-ids 1,2,3,4,1              | --special-ids: 1,2,3,4,1: expected four different ids
train_bert --special-ids 1,1,2,3                | --special-ids: 1,1,2,3: expected four different ids
train_bert --special-ids a,b,c,d                | --special-ids: invalid special_ids value: 'a,b,c,d'
train_bert --special-ids 1,2,3,10000000000      | --special-ids: 10000000000: expected at least 0 and at most 65539
train_opt --sample 0                            | --sample: 0: expected at least 1
train_opt --sample 5                            | new: no run here; expected a folder with checkpoint.pt
train_opt --sample 5 --out bert                 | bert: a run of bert, expected one of opt
train_opt --resume --out bert                   | bert: a run of bert, expected one of opt
train_opt --lr inf                              | --lr: inf: expected a finite number
train_opt --attention row-clipped --gamma -0.1  | --gamma -0.1 needs --attention clipped, not row-clipped
train_opt --mask-prob 0.1                       | unrecognized arguments: --mask-prob 0.1
train_opt --width 1000000                       | make one of them smaller
train_opt --data seventy.bin --vocab-size 60    | seventy.bin: holds token 70, but --vocab-size is 60
train_opt --out bert-text                       | --out bert-text: already holds a run
train_vit --patch-size 5                        | --patch-size 5 does not divide the images' 32 pixels
train_vit --patch-size 64                       | --patch-size 64 does not divide the images' 32 pixels
train_vit --epochs 2                            | --steps 1 and --epochs 2 both set the length; give one of them
train_vit --crop-scale 2                        | --crop-scale: 2: expected at least 0 and at most 1
train_vit --crop-scale nan                      | --crop-scale: nan: expected a finite number
train_vit --flip 1.5                            | --flip: 1.5: expected at least 0 and at most 1
train_vit --jitter inf                          | --jitter: inf: expected a finite number
train_vit --mixup inf                           | --mixup: inf: expected a finite number
train_vit --cutmix nan                          | --cutmix: nan: expected a finite number
train_vit --label-smoothing 1                   | --label-smoothing: 1: expected at least 0 and below 1
train_vit --rand-magnitude 11                   | --rand-magnitude: 11: expected at least 0 and at most 10
train_vit --rand-augment 1000000000             | --rand-augment: 1000000000: expected at least 0 and at most 100
train_vit --image-size 0                        | --image-size: 0: expected at least 1
train_vit --image-size 10000000                 | --image-size 10000000 | make one of them smaller
train_vit --seq-len 8                           | unrecognized arguments: --seq-len 8
train_vit --data nowhere                        | nowhere: no such folder; built in: shapes, cifar10
train_vit --data corpus.txt                     | corpus.txt: no such folder
train_vit --data nothing                        | nothing: no images in it; expected data_batch_*.bin
train_vit --data cifar-cut                      | test_batch.bin has 3000 bytes; expected records of 3073
train_vit --data cifar-none                     | cannot be read: No such file or directory | test_batch.bin
train_vit --data cifar-empty                    | has 40 images to train on and 0 to validate with
train_vit --data npy-float                      | npy-float: images are float64 of shape (40, 8, 8, 3); expected uint8
train_vit --data npy-grey                       | npy-grey: images are uint8 of shape (40, 8, 8)
train_vit --data npy-flat                       | npy-flat: images are uint8 of shape (40, 4, 8, 3)
train_vit --data npy-no-pixels                  | npy-no-pixels: images are uint8 of shape (40, 0, 0, 3)
train_vit --data npy-objects                    | npy-objects: images.npy or labels.npy is no array
train_vit --data npy-cut                        | npy-cut: images.npy or labels.npy is no array
train_vit --data npy-fewer                      | npy-fewer: labels are int64 of shape (7,); expected integers of shape (40,)
train_vit --data npy-float-labels               | npy-float-labels: labels are float64
train_vit --data npy-negative                   | npy-negative: labels run from -1 to -1; expected 0 to
train_vit --data npy-huge-labels                | npy-huge-labels: labels run from
train_vit --data npy-one                        | npy-one: has 0 images to train on and 1 to validate with; expected some of both
quantize                                        | the following arguments are required: RUN
quantize nothing                                | nothing: no run here; expected a folder with checkpoint.pt
quantize corpus.txt                             | corpus.txt: not a model that --export wrote
quantize LONG                                   | File name too long
quantize bert bert                              | bert is named twice; expected each once
quantize bert opt ./bert/                       | ./bert/ is named twice; expected each once
quantize bert --w-bits 1                        | --w-bits: 1: expected at least 2 and at most 16
quantize bert --a-bits 17                       | --a-bits: 17: expected at least 2 and at most 16
quantize bert --a-bits eight                    | --a-bits: invalid whole number value: 'eight'
quantize bert --bits 4                          | --bits 4 needs --remedies
quantize bert --remedies --bits 4 4             | --bits: 4 is named twice
quantize bert --w-estimator best                | --w-estimator: invalid choice: 'best'
quantize bert --a-estimator p50                 | --a-estimator: invalid choice: 'p50'
quantize bert --w-granularity row               | --w-granularity: invalid choice: 'row'
quantize bert --batches 0                       | --batches: 0: expected at least 1
quantize bert --seeds 0                         | --seeds: 0: expected at least 1
quantize bert --eval-batches -1                 | --eval-batches: -1: expected at least 1
quantize bert --json nowhere/table.json         | --json: nowhere/table.json: cannot be written: there is no folder nowhere
quantize bert --json nothing                    | --json: nothing: cannot be written: is a folder
quantize bert --data nowhere                    | --data nowhere: no such file or folder
quantize bert --data short.txt                  | fewer than one sequence of --seq-len 8
quantize bert --data ''                         | --data: is empty; expected a name
quantize vit --data npy-sixty                   | vit: its model has | its data
quantize bert --device cuda:99                  | --device cuda:99: this machine has no
quantize bert-empty                             | bert-empty/checkpoint.pt: truncated, or not a checkpoint of minq
quantize bert-half                              | bert-half/checkpoint.pt: truncated, or not a checkpoint of minq
quantize bert-text                              | bert-text/checkpoint.pt: truncated, or not a checkpoint of minq
quantize bert-zeros                             | bert-zeros/checkpoint.pt: truncated, or not a checkpoint of minq
quantize bert-folder                            | bert-folder: no run here
quantize bert-code                              | bert-code/checkpoint.pt: truncated, or not a checkpoint of minq
quantize bert-packed-code                       | bert-packed-code/checkpoint.pt: truncated, or not a checkpoint of minq
quantize bert-list                              | bert-list/checkpoint.pt: not a checkpoint of minq
quantize bert-tensor                            | bert-tensor/checkpoint.pt: not a checkpoint of minq
quantize bert-other-format                      | bert-other-format/checkpoint.pt: not a checkpoint of minq
quantize bert-no-args                           | bert-no-args/checkpoint.pt: its args is no dict
quantize bert-no-config                         | its config is no dict
quantize bert-no-model                          | its model is no dict
quantize bert-no-family                         | its family is no str
quantize bert-no-step                           | its step is no int
quantize bert-no-data_sha256                    | its data_sha256 is no str
quantize bert bert-nan                          | bert-nan/checkpoint.pt: | is not finite | train it again
quantize bert-inf                               | bert-inf/checkpoint.pt: layers.0.ffn_up.weight is not finite
quantize bert-no-weight                         | Missing key(s) in state_dict: "layers.0.ffn_up.weight"
quantize bert-shape                             | size mismatch for layers.0.ffn_up.weight
quantize bert-string-weight                     | layers.0.ffn_up.weight is no tensor of floating-point numbers
quantize bert-integers                          | layers.0.ffn_up.weight is no tensor of floating-point numbers
quantize bert-sparse                            | layers.0.ffn_up.weight is no tensor of floating-point numbers
quantize bert-width=16                          | bert-width=16
quantize bert-width=0                           | bert-width=0
quantize bert-width=-16                         | bert-width=-16
quantize bert-width=1099511627776               | bert-width=1099511627776
quantize bert-width=16.0                        | width is 16.0, expected int
quantize bert-width=[16]                        | bert-width=[16]
quantize bert-heads=0                           | bert-heads=0: its settings do not fit
quantize bert-heads=3                           | bert-heads=3: its settings do not fit minq's Bert: --heads 3 does not divide
quantize bert-layers=1                          | layers is '1', expected int
quantize bert-layers=1000000000                 | bert-layers=1000000000: its settings do not fit minq's Bert: 1000000000 layers
quantize bert-layers=2                          | Missing key(s) in state_dict
quantize bert-dropout=0.1                       | dropout is '0.1', expected float
quantize bert-dropout=7.0                       | bert-dropout=7.0: its settings do not fit
quantize bert-dropout=nan                       | dropout is nan, expected a finite number
quantize bert-norm_eps=tiny                     | norm_eps is 'tiny', expected float
quantize bert-norm_eps=nan                      | norm_eps is nan, expected a finite number
quantize bert-zeta=1                            | zeta is '1', expected float
quantize bert-zeta=inf                          | zeta is inf, expected a finite number
quantize bert-attention=linear                  | its attention is 'linear'; expected one of vanilla
quantize bert-attention=3                       | its attention is 3; expected one of vanilla
quantize bert-activation=swish                  | bert-activation=swish: its settings do not fit
quantize bert-seq_len=4                         | size mismatch for position_embedding.weight
quantize bert-vocab_size=100                    | size mismatch for token_embedding.weight
quantize bert-args-batch_size=8                 | its args have batch_size '8'
quantize bert-args-batch_size=0                 | its args have batch_size 0
quantize bert-args-batch_size=None              | its args have batch_size None
quantize bert-args-data=7                       | its args have data 7
quantize bert-args-data=                        | its args have data ''
quantize bert-args-eval_batches=-1              | its args have eval_batches -1
quantize bert-args-seq_len=4                    | its model has seq_len 8, its data 4
quantize bert-args-mask_prob=often              | its args have mask_prob 'often'
analyze                                         | the following arguments are required: RUN
analyze nothing                                 | nothing: no run here
analyze bert --layer 3                          | --layer 3: bert has layers 1 to 1
analyze bert --head 5                           | --head 5: bert has heads 1 to 2
analyze bert --head 0                           | --head: 0: expected at least 1
analyze bert --batches 0                        | --batches: 0: expected at least 1
analyze bert --gates                            | --gates: bert has no gates; its attention is vanilla
analyze bert --compare                          | --compare needs two runs, got 1
analyze bert opt                                | give one, or several with --curves, or two with --compare
analyze bert bert --curves                      | bert is named twice
analyze bert ../world0/bert --compare           | is named twice
analyze bert opt --compare                      | runs of bert and opt; expected one family
analyze bert gated --compare --layer 3          | --layer 3: these runs have layers 1 to 1
analyze bert gated --compare --head 1           | --head has no meaning with --compare
analyze bert --curves --layer 1                 | --layer has no meaning with --curves
analyze bert --damage --head 1                  | --head has no meaning with --damage
analyze bert gated --curves --compare           | --curves and --compare are different pictures; give one of them
analyze bert vit --curves                       | expected runs with the same metric
analyze nothing --curves                        | nothing: no run here; expected a folder with metrics.jsonl
analyze log-empty --curves                      | log-empty: nothing is logged yet
analyze log-text --curves                       | log-text/metrics.jsonl: line 1 is no evaluation
analyze log-list --curves                       | log-list/metrics.jsonl: line 1 is no evaluation
analyze log-no-step --curves                    | log-no-step/metrics.jsonl: line 1 is no evaluation
analyze log-strings --curves                    | log-strings/metrics.jsonl: line 1 is no evaluation
analyze log-deep --curves                       | log-deep/metrics.jsonl: line 1 is no evaluation
analyze log-bytes --curves                      | log-bytes: no run here
analyze log-no-loss --curves                    | log-no-loss: metrics.jsonl
analyze bert --data nowhere                     | --data nowhere: no such file
analyze bert --batches 1 --out corpus.txt       | corpus.txt: cannot be written
analyze bert-nan                                | is not finite
analyze bert-no-args --damage                   | its args is no dict
reproduce                                       | nothing to do; name some of
reproduce table9                                | table9: no such experiment; expected some of
reproduce blog blog                             | blog is named twice
reproduce blog --seeds 0                        | --seeds: 0: expected at least 1
reproduce blog --steps 0                        | --steps: 0: expected at least 1
reproduce blog --jobs 0                         | --jobs: 0: expected at least 1
reproduce blog --preset laptops                 | --preset: invalid choice: 'laptops'
reproduce blog --verify --results nothing       | nothing/blog.json: no results yet; run: python reproduce.py blog
reproduce blog --results ''                     | --results: is empty
reproduce --write-docs --results nothing        | no results yet; run: python reproduce.py
bench nothing                                   | nothing: no such group; expected some of bert opt vit
bench --rounds 0                                | --rounds: 0: expected at least 1
bench --rounds all                              | --rounds: invalid whole number value: 'all'
bench data data                                 | data is named twice
bench data --dropout 1                          | --dropout: 1: expected at least 0 and below 1
bench data --dropout nan                        | --dropout: nan: expected a finite number
bench data --device toaster                     | --device toaster: expected cpu, cuda
bench data --precision fp8                      | --precision: invalid choice: 'fp8'
pretrained                                      | the following arguments are required: NAME
pretrained ''                                   | NAME: is empty; expected a name
pretrained a/b/c                                | a/b/c: no such folder, and no model's id
pretrained nothing                              | nothing/config.json: cannot be read: No such file
pretrained published-empty                      | published-empty/config.json: is no JSON
pretrained published-text                       | published-text/config.json: is no JSON
pretrained published-list                       | published-list/config.json: holds a list; expected an object
pretrained published-gpt                        | its model_type is 'gpt2'; expected one of bert, opt
pretrained published-strings                    | max_position_embeddings is None
pretrained cifar --out bert                     | --out bert: already exists; replace it with --overwrite
pretrained cifar --out corpus.txt --overwrite   | --out corpus.txt: holds no run; --overwrite replaces nothing else
pretrained cifar --batch-size 0                 | --batch-size: 0: expected at least 1
pretrained cifar --seq-len x                    | --seq-len: invalid whole number value: 'x'
"""
TABLE = [[part.strip() for part in row.split("|")] for row in ROWS.strip().splitlines()]


def test_the_table_is_long_enough_and_names_every_script():
    assert len(TABLE) >= 100 and {row[0].split()[0] for row in TABLE} == set(COMMANDS)
    assert {script.stem for script in ROOT.glob("*.py")} == set(COMMANDS)


@pytest.mark.parametrize("command, messages", [pytest.param(row[0], row[1:], id=row[0]) for row in TABLE])
def test_wrong_input(world, monkeypatch, command, messages):
    script, *typed = shlex.split(command.replace("LONG", LONG))
    monkeypatch.chdir(world)
    before = contents(world)
    out, err = run(f"{script}.py", *shlex.split(COMMANDS[script]), *typed, code=2)
    assert err.startswith("error: ") and err.count("\n") == 1 and not out
    for message in messages:
        assert message in err
    assert contents(world) == before


@pytest.mark.slow
@pytest.mark.parametrize("command", ["train_bert --lr inf", "quantize bert-nan", "bench --rounds 0"])
def test_as_a_process(world, command):
    script, *typed = shlex.split(command)
    before = contents(world)
    process = start(ROOT / f"{script}.py", *shlex.split(COMMANDS[script]), *typed, cwd=world)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 2 and err.startswith("error: ") and err.count("\n") == 1 and not out
    assert contents(world) == before


# ---- what no flag can tell beforehand ----

@pytest.mark.parametrize("error, message", [
    (MemoryError(), "there is not enough memory; make a batch smaller (--batch-size"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 12000 bytes. Error"), "allocate 12000 bytes"),
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0"), "to allocate 20.00 MiB"),
    (OSError(5, "Input/output error", "corpus.txt"), "corpus.txt: Input/output error")])
@pytest.mark.parametrize("out", ["new", "bert"])
def test_a_first_step_that_fails_leaves_nothing_and_replaces_nothing(world, monkeypatch, error, message, out):
    import train_bert

    def fails(*_, **__):
        raise error
    monkeypatch.setattr(train_bert.F, "cross_entropy", fails)
    monkeypatch.chdir(world)
    before = contents(world)
    _, err = run("train_bert.py", *shlex.split(COMMANDS["train_bert"]), "--out", out, "--overwrite", code=2)
    line = err.splitlines()[-1]  # before it a progress bar
    assert line.startswith("error: ") and message in line and "Traceback" not in err
    assert contents(world) == before


def test_a_mistake_of_ours_keeps_its_traceback(world, monkeypatch):
    import train_bert

    def fails(*_, **__):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    monkeypatch.setattr(train_bert.F, "cross_entropy", fails)
    monkeypatch.chdir(world)
    with pytest.raises(RuntimeError, match="mat1"):
        run("train_bert.py", *shlex.split(COMMANDS["train_bert"]))
    assert not Path("new").exists()


def test_sequences_of_one_token_train(world, monkeypatch, tmp_path):
    """Most such batches would have nothing to predict."""
    monkeypatch.chdir(world)
    for more in ("", "--accumulate 3", "--fake-quant"):
        run("train_bert.py", *shlex.split(f"{COMMANDS['train_bert']} --seq-len 3 --batch-size 1 --steps 5 --overwrite {more}"), "--out", tmp_path / "run")
        line = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
        assert np.isfinite(line["val_loss"])




@pytest.mark.slow
def test_compile_without_a_compiler_says_so(corpus, tmp_path):
    environment = os.environ | {"CXX": str(tmp_path / "no-compiler"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    process = start("train_bert.py", *SMALL, "--data", corpus, "--compile", "--out", str(tmp_path / "run"), cwd=ROOT, env=environment)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 2 and "Traceback" not in err
    assert err.splitlines()[-1].startswith("error: --compile: no C++ compiler found")
