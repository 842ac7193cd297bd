"""Runs on disk: kept, resumed, opened again, refused."""
import os
import shutil
from pathlib import Path

import pytest
import torch

from minq.flags import UserError
from minq.runs import load_checkpoint, open_run
from running import ROOT, SMALL, differences, logged, run, saved, small, stopped_at, train

CPU = torch.device("cpu")


@pytest.mark.parametrize("script", ["train_bert.py", "train_vit.py"])
def test_calibration_sees_other_batches_than_training_and_each_seed_others(corpus, cifar, tmp_path,
                                                                           script):
    run(*small(script, corpus, cifar), "--steps", 1, "--warmup", 0, "--out", tmp_path / "run")
    opened = open_run(tmp_path / "run", CPU)
    assert not opened.model.training
    trained = [opened.data.to_model(*opened.data.train_batch(0, step, 8))[0] for step in range(4)]
    once, again = ([inputs for seed in range(3) for inputs in opened.calibration_inputs(seed, 4)]
                   for _ in range(2))
    batches = [inputs[0].numpy().tobytes() for inputs in trained + once]
    assert len(set(batches)) == len(batches) == 16 and len(once[0][0]) == 8
    assert batches[4:] == [inputs[0].numpy().tobytes() for inputs in again]


# ---- in the way, and gone on with ----

def test_a_run_in_the_way_is_kept_until_another_has_begun(corpus, tmp_path, monkeypatch):
    train(corpus, tmp_path / "run")
    before = [path.read_bytes() for path in sorted((tmp_path / "run").iterdir())]
    with monkeypatch.context() as patched, pytest.raises(ZeroDivisionError):
        patched.setattr("train_bert.set_lr", lambda *_: 1 / 0)  # in the first step
        train(corpus, tmp_path / "run", "--overwrite")
    assert before == [path.read_bytes() for path in sorted((tmp_path / "run").iterdir())]
    train(corpus, tmp_path / "run", "--overwrite", "--seed", 1, "--eval-every", 6)
    assert saved(tmp_path / "run")["args"]["seed"] == 1 and len(logged(tmp_path / "run")) == 1


@pytest.mark.parametrize("own, other", [
    ("--attention clipped --gamma -0.03", "--gamma -0.05"),
    ("--attention clipped --alpha 2 --zeta 1.01", "--alpha 3"),
    ("--fake-quant --w-bits 4", "--w-bits 8"), ("--lr 0.01 --seed 3", "--lr 0.02")])
def test_a_run_is_resumed_with_its_own_flags_and_no_others(corpus, tmp_path, monkeypatch, own,
                                                           other):
    train(corpus, tmp_path / "whole", *own.split())
    with stopped_at(3, monkeypatch):
        train(corpus, tmp_path / "run", "--save-every", 3, *own.split())
    resume = ["train_bert.py", "--resume", "--out", tmp_path / "run"]
    _, err = run(*resume, *other.split(), code=2)
    assert err.startswith(f"error: {other}") and err.count("\n") == 1
    run(*resume, *own.split()[-2:], "--data", os.path.relpath(corpus))
    assert not differences(tmp_path / "run", tmp_path / "whole")
    log = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    out, _ = run(*resume)  # nothing is left to do
    assert "step 6" in out and (tmp_path / "run" / "metrics.jsonl").read_bytes() == log


# ---- checkpoints that are none ----

class Ran:
    """A pickle that makes a folder where it is loaded."""
    def __reduce__(self):
        return os.mkdir, ("ran",)


@pytest.fixture(scope="module")
def good(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("good") / "run"
    train(corpus, folder, "--steps", 1, "--warmup", 0, "--attention", "gated")
    return folder


@pytest.mark.parametrize("content", [
    b"", b"hello", bytes(5000), b"half", [1, 2], {"model": {}},
    {"family": "bert", "model": Ran()}], ids=str)
def test_a_broken_checkpoint_is_named_and_runs_no_code(good, tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    torch.save(content, "checkpoint.pt")
    if isinstance(content, bytes):
        whole = (good / "checkpoint.pt").read_bytes()
        Path("checkpoint.pt").write_bytes(whole[:20_000] if content == b"half" else content)
    with pytest.raises(UserError, match="checkpoint.pt: truncated, or not a checkpoint of minq"):
        load_checkpoint(".")
    assert os.listdir() == ["checkpoint.pt"]


@pytest.mark.parametrize("changes, message", [
    ({"family": "llama"}, "llama"),
    ({"config": {"attention": "linear"}}, "not of this code: 'linear'"),
    ({"config": {"attention": "vanilla"}}, 'Unexpected key.*: "layers.0.attention.gate.weight"'),
    ({"config": {"width": 64}}, "size mismatch for token_embedding.weight"),
    ({"config": {"experts": 8}}, "unexpected keyword argument 'experts'")], ids=str)
def test_a_foreign_checkpoint_says_what_does_not_fit(good, tmp_path, changes, message):
    checkpoint = saved(good)
    changes["config"] = checkpoint["config"] | changes.get("config", {})
    torch.save(checkpoint | changes, tmp_path / "checkpoint.pt")
    with pytest.raises(UserError, match=f"^{tmp_path}: .*{message}") as raised:
        open_run(tmp_path, CPU)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name, perplexity", [("bert-clipped", "244.7"), ("opt-row", "255.8")])
def test_runs_of_an_older_minq_still_open(name, perplexity, corpus, tmp_path):
    shutil.copytree(ROOT / "tests" / "old" / name, tmp_path / name)
    out, _ = run("quantize.py", tmp_path / name, "--data", corpus, "--batches", 1, "--seeds", 1)
    assert f"| {perplexity} |" in out


# ---- where the data is ----

def test_data_is_found_from_anywhere_or_where_one_says(corpus, tmp_path, monkeypatch):
    """A folder of text may bear the name of a set of images."""
    (tmp_path / "shapes").mkdir()
    text = Path(shutil.copy(corpus, tmp_path / "shapes" / "text.txt"))
    monkeypatch.chdir(tmp_path)
    run("train_bert.py", *SMALL, "--data", "shapes", "--steps", 1, "--warmup", 0, "--out", "run")
    assert saved(Path("run"))["args"]["data"] == str(tmp_path / "shapes")
    monkeypatch.chdir(ROOT)
    quantize = ["quantize.py", tmp_path / "run", "--batches", 1, "--seeds", 1]
    table, _ = run(*quantize)

    text.write_text(text.read_text().upper())
    _, err = run(*quantize, code=2)
    assert "has changed since this run was trained on it" in err and err.count("\n") == 1
    _, err = run("train_bert.py", "--resume", "--out", tmp_path / "run", code=2)
    assert "has changed since this run was trained on it" in err
    assert run(*quantize, "--data", corpus)[0] == table
