"""Runs on disk: kept, resumed, opened again, refused."""
import shutil

import pytest
import torch

from minq.checkpoints import claim, forget_after, from_checkpoint, load_checkpoint, write_atomically
from minq.errors import UserError
from minq.model import FAMILIES, Bert, BertConfig
from minq.runs import require_family
from running import ROOT, run, stopped_at, train

OLD = ROOT / "tests" / "old"  # runs of three steps made at commit 42c73d8


def save(folder, **changes):
    torch.manual_seed(0)
    model = Bert(BertConfig(layers=2, width=32, heads=4, ffn=64, seq_len=12, attention="gated", gate="mlp", gate_hidden=3))
    folder.mkdir()
    claim(folder, overwrite=False)
    state = {"format": "minq 1", "family": "bert", "config": {**vars(model.config)}, "model": model.state_dict(),
             "step": 1, "args": {}, "data_sha256": ""}
    torch.save(state | changes, folder / "checkpoint.pt")
    return model


def test_a_checkpoint_rebuilds_its_model(tmp_path):
    model, tokens = save(tmp_path / "run").eval(), torch.randint(256, (2, 12))
    again = from_checkpoint(load_checkpoint(tmp_path / "run"), "run").eval()
    assert again.config == model.config and torch.equal(again(tokens), model(tokens))


def test_an_interrupted_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def fail(new):
        new.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, fail)
    assert path.read_text() == "old"


def test_a_run_is_not_replaced_unless_asked(tmp_path):
    save(tmp_path / "run")
    with pytest.raises(UserError, match="already holds a run"):
        claim(tmp_path / "run", overwrite=False)
    assert load_checkpoint(tmp_path / "run")["step"] == 1
    claim(tmp_path / "run", overwrite=True)
    assert not (tmp_path / "run" / "checkpoint.pt").exists()


def test_metrics_after_the_checkpoint_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"step": 4, "lo')
    forget_after(tmp_path, 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


@pytest.mark.parametrize("break_it, message", [
    (lambda path: path.write_bytes(path.read_bytes()[:1000]), "truncated"),
    (lambda path: path.write_bytes(b"hello"), "not a checkpoint of minq"),
    (lambda path: path.write_bytes(b""), "not a checkpoint of minq"),
    (lambda path: torch.save([1, 2], path), "not a checkpoint of minq"),
    (lambda path: torch.save({"model": {}}, path), "not a checkpoint of minq"),
    (lambda path: path.unlink(), "no run here")])
def test_a_broken_checkpoint_is_named(tmp_path, break_it, message):
    save(tmp_path / "run")
    break_it(tmp_path / "run" / "checkpoint.pt")
    with pytest.raises(UserError, match=message):
        load_checkpoint(tmp_path / "run")


@pytest.mark.parametrize("changes, message", [
    ({"family": "llama"}, "its family is 'llama'"),
    ({"config": {"attention": "linear"}}, "its attention is 'linear'"),
    ({"config": {"attention": "vanilla", "layers": 2, "width": 32, "ffn": 64, "seq_len": 12}},
     'Unexpected key.*: "layers.0.attention.gate.weight1"'),
    ({"config": {"attention": "gated", "layers": 2, "width": 32, "ffn": 64, "seq_len": 12}},
     'Missing key.*: "layers.0.attention.gate.weight"'),
    ({"config": {"attention": "gated", "gate": "mlp", "gate_hidden": 3, "layers": 2, "width": 64, "ffn": 64, "seq_len": 12}}, "size mismatch for token_embedding.weight"),
    ({"config": {"attention": "vanilla", "experts": 8}}, "unexpected keyword argument 'experts'")])
def test_a_foreign_checkpoint_says_what_does_not_fit(tmp_path, changes, message):
    save(tmp_path / "run", **changes)
    with pytest.raises(UserError, match=message) as raised:
        from_checkpoint(load_checkpoint(tmp_path / "run"), "run")
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 700


def test_a_checkpoint_can_hold_no_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return print, ("executed",)
    (tmp_path / "run").mkdir()
    torch.save({"format": "minq 1", "x": Evil()}, tmp_path / "run" / "checkpoint.pt")
    with pytest.raises(UserError, match="not a checkpoint of minq"):
        load_checkpoint(tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("name, perplexity", [("bert-clipped", "244.7"), ("opt-row", "255.8")])
def test_runs_of_an_older_minq_still_open(name, perplexity, corpus, tmp_path):
    shutil.copytree(OLD / name, tmp_path / name)
    out, _ = run("quantize.py", tmp_path / name, "--data", corpus, "--batches", 1, "--seeds", 1)
    assert f"| {perplexity} |" in out
    out, _ = run("analyze.py", tmp_path / name, "--data", corpus, "--batches", 1)
    assert ("row-clipped attention" if name == "opt-row" else "clipped attention") in out


# ---- what a student's new family may get wrong ----

class PreConfig(BertConfig):  # no @dataclass: its default does not count
    pre_norm: bool = True


@pytest.mark.parametrize("attributes, message", [
    ({"family": "pre"}, "FAMILIES knows no Pre by the name 'pre'"),
    ({"family": "bert"}, "FAMILIES knows no Pre by the name 'bert'"),
    ({"family": "pre", "config_class": PreConfig}, "Pre has a BertConfig; expected PreConfig, a @dataclass")])
def test_a_family_that_could_not_be_opened_does_not_train(attributes, message, monkeypatch):
    Pre = type("Pre", (Bert,), attributes)
    if "config_class" in attributes:
        monkeypatch.setitem(FAMILIES, "pre", Pre)
    with pytest.raises(TypeError, match=message):
        require_family(Pre(BertConfig(layers=1, width=8, heads=2)))


def test_a_config_that_forgot_to_be_a_dataclass_is_named(monkeypatch):
    Pre = type("Pre", (Bert,), {"family": "pre", "config_class": PreConfig})
    monkeypatch.setitem(FAMILIES, "pre", Pre)
    with pytest.raises(TypeError, match="expected PreConfig, a @dataclass"):
        require_family(Pre(PreConfig(layers=1, width=8, heads=2)))


def test_resuming_with_another_optimizer_or_model_is_refused(corpus, tmp_path, monkeypatch):
    with stopped_at(3, monkeypatch):
        train(corpus, tmp_path / "run", "--save-every", "3")
    command = ["train_bert.py", "--resume", "--out", tmp_path / "run"]
    for other, message in (("SGD", "the script's SGD is not the run's optimizer"), ("Adam", "they differ in")):
        with monkeypatch.context() as patched:
            build = getattr(torch.optim, other)
            patched.setattr(torch.optim, "AdamW", lambda groups, lr, betas, fused: build(groups, lr=lr))
            _, err = run(*command, code=2)
            assert message in err and err.count("\n") == 1
    _, err = run(*command, "--activation", "relu", code=2)
    assert "--activation relu differs from the run's gelu" in err
    with monkeypatch.context() as patched:
        patched.setattr(torch.nn, "LayerNorm", torch.nn.RMSNorm)
        _, err = run(*command, code=2)
        assert "its checkpoint does not fit minq's Bert" in err and "embedding_norm.bias" in err and err.count("\n") == 1
    run(*command)
