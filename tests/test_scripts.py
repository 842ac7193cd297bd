"""The scripts, run for real for a few steps, as a person would run them."""
import json
import math
import sys

import numpy as np
import pytest
import torch

from minq import augment as A
from minq.data import IGNORE
from minq.model import FAMILIES
from minq.runs import OpenedRun, open_run
from running import SMALL, differences, logged, run, saved, small, stopped_at, train

CPU = torch.device("cpu")


# ---- the loop, written a second time in plain operations ----

# Of the peak learning rate in four steps of which two are warm-up, and weights of the averages
LINEAR, COSINE = (0.0, 0.5, 1.0, 0.5), (0.001, 0.5005, 1.0, 0.505)  # C.1 and C.2; C.3
BETAS = {"bert": (0.9, 0.999), "opt": (0.9, 0.95), "vit": (0.9, 0.999)}


def reference_loss(model, data, args, step):
    """The mean over the global batch, at once and without a loss of PyTorch's."""
    size = args["batch_size"] * args["accumulate"]
    inputs, labels = data.train_batch(args["seed"], step, size)
    if model.family == "vit":
        draws = A.Draws((args["seed"] * 1_000_003 + step) * 1_009, size=size)
        strengths = {name: args[name] for name in A.PIECES}
        images, targets = A.augment(*data.to_float(inputs, labels), 10, draws, 32, **strengths)
        return -(targets * model(images).log_softmax(-1)).sum() / size
    if model.family == "opt":
        asked = labels[:, :-1] != IGNORE  # each token is asked for the next, unless it is special
        assert (np.where(asked, labels[:, :-1], inputs[:, 1:]) == inputs[:, 1:]).all()
        assert np.array_equal(asked, inputs[:, 1:] < 256)
    logits = model(torch.tensor(inputs))
    labels = torch.tensor(labels)
    chosen, log_p = labels != IGNORE, logits.log_softmax(-1)
    return -log_p[chosen].gather(1, labels[chosen][:, None]).mean()


def reference(opened):
    """A run's model trained again by AdamW (Loshchilov & Hutter), its losses, where it began."""
    args, family = opened.checkpoint["args"], opened.model.family
    torch.manual_seed(args["seed"])
    model = FAMILIES[family](opened.model.config)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    first, second = ({name: torch.zeros_like(p) for name, p in before.items()} for _ in range(2))
    (beta1, beta2), losses = BETAS[family], []
    for step, multiplier in enumerate(COSINE if family == "vit" else LINEAR):
        lr = args["lr"] * multiplier
        loss = reference_loss(model, opened.data, args, step)
        model.zero_grad()
        loss.backward()
        losses.append(loss.item())
        norm = sum(p.grad.square().sum() for p in model.parameters()).sqrt()
        for name, p in model.named_parameters():
            grad, m, v = p.grad * min(1, args["clip"] / norm.item()), first[name], second[name]
            m += (1 - beta1) * (grad - m)
            v += (1 - beta2) * (grad.square() - v)
            update = m / (1 - beta1 ** (step + 1))
            update /= (v / (1 - beta2 ** (step + 1))).sqrt() + 1e-8
            decays = name.endswith("weight") and ("norm" not in name or args["decay_layernorm"])
            p.data -= lr * (update + args["weight_decay"] * decays * p.data)
    return model, losses, before


@pytest.mark.parametrize("command, tolerance", [
    ("train_bert.py --accumulate 2 --mask-prob 0.3", 1e-5),
    ("train_bert.py --data README.md --documents lines", 1e-5),
    ("train_opt.py --data README.md --documents lines --accumulate 2", 1e-5),
    ("train_bert.py --precision fp16 --decay-layernorm", 1e-2),
    ("train_opt.py --accumulate 2 --decay-layernorm", 1e-5),
    ("train_opt.py --precision fp16", 0.2), ("train_vit.py --precision fp16", 1e-2),
    ("train_vit.py --accumulate 2 --rand-augment 2 --jitter 0.4 --mixup 0.8 --cutmix 1", 1e-5)])
def test_the_loop_is_adamw_on_the_mean_of_the_global_batch(corpus, cifar, tmp_path, command,
                                                           tolerance):
    script, *flags = command.split()
    flags += "--steps 4 --eval-every 4 --lr 0.01 --weight-decay 0.3 --clip 0.5 --seed 3".split()
    run(*small(script, corpus, cifar), *flags, "--out", tmp_path / "run")
    opened = open_run(tmp_path / "run", CPU)
    model, losses, before = reference(opened)
    found = dict(opened.model.named_parameters())
    for name, p in model.named_parameters():
        error, change = found[name] - p, p - before[name]
        if name.endswith("qkv.bias"):  # no gradient but noise: a softmax forgets the keys' bias
            error[32:64] = 0.0
        assert error.norm() < tolerance * change.norm(), name
    assert logged(tmp_path / "run")[-1]["loss"] == pytest.approx(sum(losses) / 4, rel=tolerance)
    scaler = opened.checkpoint["scaler"]  # none of fp16's steps was skipped
    assert scaler["_growth_tracker"] == 4 if "fp16" in command else scaler == {}


@pytest.mark.slow
def test_a_compiled_run_resumes(corpus, tmp_path, monkeypatch):
    options = ["--layers", 1, "--save-every", 3, "--eval-every", 2]
    train(corpus, tmp_path / "whole", "--compile", *options)
    with stopped_at(3, monkeypatch):
        train(corpus, tmp_path / "stopped", "--compile", *options)
    run("train_bert.py", "--resume", "--compile", "--out", tmp_path / "stopped")
    assert not differences(tmp_path / "whole", tmp_path / "stopped")


# ---- settings ----

@pytest.mark.parametrize("options, gamma", [
    ("", -1 / 16), ("--alpha 2", -2 / 16), ("--gamma -0.03", -0.03), ("--gamma 0 --zeta 1.03", 0.0),
    ("--preset blog", -0.025), ("--preset blog --alpha 2", -2 / 16), ("--preset paper", -4 / 16)])
def test_gamma_comes_from_the_flag_or_alpha_or_the_preset(corpus, tmp_path, options, gamma):
    clipped = ["--attention", "clipped", "--steps", 1, "--warmup", 0, *options.split()]
    train(corpus, tmp_path / "run", *clipped)
    checkpoint = saved(tmp_path / "run")
    assert checkpoint["config"]["gamma"] == pytest.approx(gamma)
    assert (checkpoint["args"]["alpha"] is None) == (checkpoint["args"]["gamma"] is not None)


@pytest.mark.parametrize("options, warmup", [
    ("--steps 101", 100), ("--steps 100", 10), ("--steps 1", 0), ("--steps 9 --warmup 8", 8)])
def test_a_presets_warm_up_fits_into_the_run(monkeypatch, options, warmup):
    seen = []
    monkeypatch.setattr("train_opt.Run", lambda args, *_: seen.append(args) or sys.exit(0))
    run("train_opt.py", *options.split(), "--data", "README.md", "--device", "cpu")
    assert seen[0].warmup == warmup


@pytest.mark.parametrize("script", ["train_bert.py", "train_opt.py"])
def test_most_batches_have_nothing_to_predict(tmp_path, script):
    tokens = np.zeros(20_000, "<u2")  # [PAD]
    tokens[:500] = tokens[18_500:18_600] = 7
    tokens.tofile(tmp_path / "t.bin")
    run(*small(script, tmp_path / "t.bin", None), "--vocab-size", 9, "--special-ids", "0,1,2,3",
        "--batch-size", 2, "--out", tmp_path / "run")
    data, first = open_run(tmp_path / "run", CPU).data, logged(tmp_path / "run")[0]
    assert (data.train_batch(0, 0, 2)[1] == IGNORE).all()
    assert math.isfinite(first["loss"]) and math.isnan(first["perplexity"])
    run("quantize.py", tmp_path / "run", "--seeds", 1, "--batches", 2)


def test_the_default_name_tells_the_settings_and_the_same_command_resumes(corpus, tmp_path,
                                                                          monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = ["train_bert.py", *SMALL, "--data", corpus, "--attention", "clipped", "--alpha", "2"]
    with stopped_at(3, monkeypatch):
        run(*command, "--save-every", 3)
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.startswith("bert-clipped-") and folder.name.endswith("-s0")
    assert "-alpha2.0-" in folder.name and "-corpus-" in folder.name
    run(*command, "--resume")
    assert saved(folder)["step"] == 6


def test_epochs_are_passes_over_the_images(cifar, tmp_path):
    command = [word for word in small("train_vit.py", None, cifar) if word not in ("--steps", "6")]
    run(*command, "--epochs", 2, "--accumulate", 2, "--out", tmp_path / "run")
    assert saved(tmp_path / "run")["step"] == 2 * (40 // 16)


# ---- text from an OPT ----

def test_a_sample_keeps_the_start_token_in_the_window(corpus, tmp_path):
    """Written out: beyond T tokens, too, the first place is [CLS]'s (257), where heads park."""
    run("train_opt.py", *SMALL, "--data", corpus, "--out", tmp_path / "run")
    sample = ["train_opt.py", "--sample", 40, "--out", tmp_path / "run", "--device", "cpu"]
    model = open_run(tmp_path / "run", CPU).model
    for seed in (0, 1):
        text = []
        torch.manual_seed(seed)
        for _ in range(40):
            with torch.no_grad():
                logits = model(torch.tensor([[257, *text[-15:]]]))[0, -1]
            probabilities = torch.cat((logits[:256].softmax(0), torch.zeros(4)))
            text.append(probabilities.multinomial(1).item())
        out, _ = run(*sample, "--seed", seed)
        assert out == bytes(text).decode(errors="replace") + "\n"


# ---- quantize.py ----

RUNS = {"vanilla": "train_bert.py", "clipped": "train_bert.py --attention clipped --gamma -0.03",
        "gated": "train_bert.py --attention gated --gate mlp --gate-hidden 3",
        "row": "train_opt.py --attention row-clipped --alpha 2",
        "vit": "train_vit.py --attention gated --gate all-heads --gate-init 0.25"}


def test_what_was_trained_is_quantized_in_one_table(corpus, cifar, tmp_path):
    for name, command in RUNS.items():
        script, *flags = command.split()
        out, _ = run(*small(script, corpus, cifar), *flags, "--out", tmp_path / name)
        assert f"\nnext: python quantize.py {tmp_path / name}\n" in out
        assert [line["step"] for line in logged(tmp_path / name)] == [3, 6]
    out, _ = run("quantize.py", *(tmp_path / name for name in RUNS), "--batches", 2,
                 "--bits", 8, 4, "--json", tmp_path / "table.json")
    assert out.count("\n") == 2 + 5 and "| W8A8 | W4A4 |" in out
    assert out.count("ppl ↓") == 4 and out.count("acc % ↑") == 1
    rows = dict(zip(RUNS, json.loads((tmp_path / "table.json").read_text())))
    for name, row in rows.items():
        result = row["quantized"]["8x8"]
        assert len(result["all"]) == 3 and list(row["quantized"]) == ["8x8", "4x4"]
        assert result["mean"] == pytest.approx(row["fp"], rel=0.05 if name != "vit" else 0.5)
        assert row["metric"] == ("accuracy" if name == "vit" else "perplexity")
        last = logged(tmp_path / name)[-1]
        assert row["fp"] == last[row["metric"]] == last[f"float_{row['metric']}"]
    settings = {name: row["settings"] for name, row in rows.items()}
    for name, expected in {"gamma": [None, -0.03, None, None, None],
                           "alpha": [None, None, None, 2.0, None],
                           "gate": [None, None, "mlp", None, "all-heads"],
                           "gate_hidden": [None, None, 3, None, 4],
                           "gate_init": [None, None, 0.5, None, 0.25],
                           "seq_len": [16, 16, 16, 16, 17]}.items():
        assert [settings[run][name] for run in RUNS] == expected, name


def test_the_best_pair_of_estimators_is_never_one_that_gives_nan(corpus, tmp_path, monkeypatch):
    """NaN compares with nothing: a minimum over it would keep whatever came first."""
    train(corpus, tmp_path / "run")
    found, score = iter([math.nan, 3.0, math.inf, 2.0, math.nan, 4.0, 5.0, 6.0]), OpenedRun.score
    monkeypatch.setattr(OpenedRun, "score", lambda run, model, *_: (
        score(run, model) if model is run.model else next(found)))
    run("quantize.py", tmp_path / "run", "--best", "--seeds", 1, "--batches", 1,
        "--w-bits", 4, "--a-bits", 6, "--json", tmp_path / "table.json")
    (row,) = json.loads((tmp_path / "table.json").read_text())
    assert row["quantized"]["4x6"]["mean"] == 2.0
