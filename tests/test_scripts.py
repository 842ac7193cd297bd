"""The scripts, run for real for a few steps, as a person would run them."""
import json
from pathlib import Path

import pytest
import torch

from running import SMALL, SMALL_VIT, logged, run, saved, torchrun, train


ATTENTIONS = {"vanilla": [], "clipped": ["--gamma", "-0.03"], "gated": ["--gate", "mlp", "--gate-hidden", "3"]}


def test_train_three_attentions_and_print_one_table(corpus, tmp_path):
    for attention, options in ATTENTIONS.items():
        out, _ = train(corpus, tmp_path / attention, "--attention", attention, *options)
        assert "perplexity" in out and f"next: python quantize.py {tmp_path / attention}" in out
    lines = logged(tmp_path / "gated")
    assert [line["step"] for line in lines] == [3, 6]
    assert all(len(lines[0][tap][metric]) == 2 for tap in ("ffn_output", "layer_output") for metric in ("inf_norm", "kurtosis"))

    out, _ = run("quantize.py", *(tmp_path / a for a in ATTENTIONS), "--batches", 2, "--json", tmp_path / "table.json")
    assert out.count("\n") == 2 + 3 and "W8A8" in out
    rows = json.loads((tmp_path / "table.json").read_text())
    assert [row["attention"] for row in rows] == list(ATTENTIONS)
    for row in rows:
        result = row["quantized"]["8x8"]
        assert len(result["all"]) == 3 and result["mean"] == pytest.approx(row["fp"], rel=0.05)
        assert row["metric"] == "perplexity" and row["max_inf_norm"] == row["ffn_output"]["max_inf_norm"]
    assert rows[1]["settings"]["gamma"] == -0.03 and rows[0]["settings"]["gamma"] is None
    assert rows[2]["settings"]["gate_hidden"] == 3 and rows[0]["settings"]["gate"] is None


@pytest.mark.slow
def test_sweep_and_best(corpus, tmp_path):
    train(corpus, tmp_path / "run")
    out, _ = run("quantize.py", tmp_path / "run", "--sweep", "--seeds", 1, "--batches", 1, "--w-granularity", "channel")
    assert all(f"W{bits}A{bits}" in out for bits in (8, 7, 6, 5, 4)) and "±" not in out
    out, _ = run("quantize.py", tmp_path / "run", "--best", "--seeds", 1, "--batches", 1, "--w-bits", 4, "--a-bits", 6)
    assert out.count("run W4A6") == 8 and out.count("<- best") == 1 and out.count("| W4A6 |") == 1


@pytest.mark.slow
def test_accumulation_and_two_processes_equal_one_batch(corpus, tmp_path):
    """The global batch is the same however it is sliced, and so are the gradients, up to rounding."""
    train(corpus, tmp_path / "one", "--dropout", "0")
    train(corpus, tmp_path / "accumulated", "--dropout", "0", "--batch-size", "4", "--accumulate", "2")
    torchrun("train_bert.py", *SMALL, "--data", corpus, "--dropout", "0", "--batch-size", "4", "--accumulate", "2", "--out", tmp_path / "two")
    one = saved(tmp_path / "one")["model"]
    for other in ("accumulated", "two"):
        for name, value in saved(tmp_path / other)["model"].items():
            torch.testing.assert_close(value, one[name], rtol=1e-3, atol=2e-5)
    losses = [logged(tmp_path / name)[-1]["loss"] for name in ("one", "accumulated", "two")]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("options", [["--precision", "bf16"], ["--precision", "fp16"], ["--precision", "fp32", "--compile", "--layers", "1"]])
def test_mixed_precision_and_compile(corpus, tmp_path, options):
    out, _ = train(corpus, tmp_path / "run", *options)
    loss = logged(tmp_path / "run")[-1]["loss"]
    assert 4 < loss < 6  # near ln 260 after six steps
    scaler = saved(tmp_path / "run")["scaler"]
    assert bool(scaler) == ("fp16" in options)


def test_a_run_in_the_way_is_refused_and_kept(corpus, tmp_path):
    train(corpus, tmp_path / "run")
    before = (tmp_path / "run" / "checkpoint.pt").read_bytes()
    _, err = train(corpus, tmp_path / "run", code=2)
    assert "already holds a run" in err
    _, err = train(corpus, tmp_path / "run", "--resume", "--lr", "0.5", code=2)
    assert "--lr 0.5 differs from the run's 0.001" in err
    assert (tmp_path / "run" / "checkpoint.pt").read_bytes() == before
    train(corpus, tmp_path / "run", "--overwrite", "--seed", "1")
    assert (tmp_path / "run" / "checkpoint.pt").read_bytes() != before


def test_quantize_refuses_data_that_has_changed(corpus, tmp_path):
    data = tmp_path / "data.txt"
    data.write_text(Path(corpus).read_text())
    train(data, tmp_path / "run")
    data.write_text(Path(corpus).read_text().upper())
    _, err = run("quantize.py", tmp_path / "run", code=2)
    assert "has changed since this run was trained on it" in err and err.count("\n") == 1
    out, _ = run("quantize.py", tmp_path / "run", "--data", corpus, "--seeds", 1, "--batches", 1)
    assert "W8A8" in out


@pytest.mark.parametrize("options, gamma", [
    ([], -1 / 16), (["--alpha", "2"], -2 / 16), (["--gamma", "-0.03"], -0.03), (["--gamma", "0", "--zeta", "1.03"], 0.0),
    (["--preset", "blog"], -0.025), (["--preset", "blog", "--alpha", "2"], -2 / 16), (["--preset", "paper"], -4 / 16)])
def test_gamma_comes_from_the_flag_or_alpha_or_the_preset(corpus, tmp_path, options, gamma):
    train(corpus, tmp_path / "run", "--attention", "clipped", "--steps", "1", "--precision", "fp32", *options)
    checkpoint = saved(tmp_path / "run")
    assert checkpoint["config"]["gamma"] == pytest.approx(gamma)
    assert (checkpoint["args"]["alpha"] is None) == (checkpoint["args"]["gamma"] is not None)


def test_the_default_name_tells_the_settings(corpus, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run("train_bert.py", *SMALL, "--data", corpus, "--attention", "clipped", "--alpha", "2")
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.startswith("bert-clipped-") and folder.name.endswith("-s0")
    assert "-alpha2.0-" in folder.name and "-corpus-" in folder.name


# ---- the other families ----

def test_gamma_per_row_is_an_attention_of_causal_models(corpus, tmp_path):
    options = [*SMALL, "--data", corpus, "--attention", "row-clipped", "--alpha", "2", "--out", tmp_path / "run"]
    run("train_opt.py", *options)
    run("quantize.py", tmp_path / "run", "--batches", 1, "--seeds", 1, "--json", tmp_path / "table.json")
    (row,) = json.loads((tmp_path / "table.json").read_text())
    assert row["attention"] == "row-clipped" and row["settings"]["alpha"] == 2 and row["settings"]["gamma"] is None


def test_opt_trains_samples_and_resumes(corpus, tmp_path):
    command = ["train_opt.py", *SMALL, "--data", corpus, "--decay-layernorm"]
    out, _ = run(*command, "--out", tmp_path / "run")
    assert "perplexity" in out and f"next: python quantize.py {tmp_path / 'run'}" in out
    out, _ = run("train_opt.py", "--sample", 40, "--out", tmp_path / "run")
    again, _ = run("train_opt.py", "--sample", 40, "--out", tmp_path / "run")
    other, _ = run("train_opt.py", "--sample", 40, "--seed", 1, "--out", tmp_path / "run")
    assert out == again != other and 20 <= len(out) <= 41


@pytest.mark.parametrize("options", [["--precision", "bf16", "--rand-augment", "2", "--mixup", "0.8", "--cutmix", "1", "--jitter", "0.4"],
                                     ["--precision", "fp16", "--patch-layernorm", "--clip", "1"],
                                     ["--attention", "gated", "--accumulate", "2", "--epochs", "2", "--warmup", "1"]])
def test_vit_trains_with_its_whole_recipe(cifar, tmp_path, options):
    small = [option for option in SMALL_VIT if "--epochs" not in options or option not in ("--steps", "6")]
    out, _ = run("train_vit.py", *small, "--data", cifar, *options, "--out", tmp_path / "run")
    assert "accuracy" in out
    step = saved(tmp_path / "run")["step"]
    assert step == (2 * (40 // 16) if "--epochs" in options else 6)


@pytest.mark.parametrize("family", ["bert", "opt", "vit"])
def test_every_attention_flag_reaches_the_model(corpus, cifar, tmp_path, family):
    small = [*SMALL_VIT, "--data", cifar] if family == "vit" else [*SMALL, "--data", corpus]
    for attention, settings in (("clipped", {"gamma": -0.02, "zeta": 1.01}),
                                ("gated", {"gate": "mlp", "gate_hidden": 3, "gate_init": 0.25})):
        options = [word for name, value in settings.items() for word in (f"--{name.replace('_', '-')}", value)]
        run(f"train_{family}.py", *small, "--steps", 1, "--attention", attention, *options, "--out", tmp_path / attention)
        config = saved(tmp_path / attention)["config"]
        assert {name: config[name] for name in settings} == settings and config["attention"] == attention


def test_three_families_in_one_table(corpus, cifar, tmp_path):
    train(corpus, tmp_path / "bert")
    run("train_opt.py", *SMALL, "--data", corpus, "--out", tmp_path / "opt")
    run("train_vit.py", *SMALL_VIT, "--data", cifar, "--out", tmp_path / "vit")
    out, _ = run("quantize.py", *(tmp_path / family for family in ("bert", "opt", "vit")), "--batches", 1, "--seeds", 2,
                 "--json", tmp_path / "table.json")
    assert out.count("ppl ↓") == 2 and out.count("acc % ↑") == 1
    rows = json.loads((tmp_path / "table.json").read_text())
    assert [row["metric"] for row in rows] == ["perplexity", "perplexity", "accuracy"]
    assert all(row["max_inf_norm"] == row["layer_output"]["max_inf_norm"] for row in rows[1:])
    assert rows[2]["settings"]["seq_len"] == 17 and rows[2]["settings"]["patch_layernorm"] is False


@pytest.mark.parametrize("family, shown", [("bert", {"--lr": "0.0015", "--gate-hidden": "4", "--attention": "vanilla", "--alpha": "1.0"}),
                                           ("opt", {"--lr": "0.002", "--gate-init": "0.5", "--weight-decay": "0.1"}),
                                           ("vit", {"--patch-size": "8", "--zeta": "1.0", "--crop-scale": "0.6"})])
def test_help_shows_the_values_of_the_default_preset(family, shown, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    out, _ = run(f"train_{family}.py", "--help")
    for flag, value in shown.items():
        (line,) = [line for line in " ".join(out.split()).split(" --") if line.startswith(flag[2:] + " ") and "default" in line]
        assert f"(default {value})" in line


def test_quantize_names_the_tap_that_has_no_finite_range(corpus, tmp_path):
    run("train_opt.py", *SMALL, "--data", corpus, "--out", tmp_path / "run")
    checkpoint = saved(tmp_path / "run")
    for layer in (0, 1):  # finite, but not their sum
        checkpoint["model"][f"layers.{layer}.ffn_down.bias"][3] = 3e38
    torch.save(checkpoint, tmp_path / "run" / "checkpoint.pt")
    _, err = run("quantize.py", tmp_path / "run", "--batches", 1, "--seeds", 1, code=2)
    assert f"{tmp_path / 'run'}: layers.1.layer_output_tap: its calibrated scale is" in err.splitlines()[-1] and "Traceback" not in err


def test_the_best_pair_of_estimators_is_never_one_that_gives_nan(corpus, tmp_path, monkeypatch):
    """NaN compares with nothing: a minimum over it would keep whatever came first."""
    import quantize
    train(corpus, tmp_path / "run")
    found = iter([float("nan"), 3.0, float("inf"), 2.0, float("nan"), 4.0, 5.0, 6.0])
    scores = quantize.scores
    calls = []

    def some(run, model, *rest):
        calls.append(model)
        return scores(run, model, *rest) if len(calls) == 1 else {"perplexity": next(found)}

    monkeypatch.setattr(quantize, "scores", some)
    run("quantize.py", tmp_path / "run", "--best", "--seeds", 1, "--batches", 1, "--json", tmp_path / "table.json")
    (row,) = json.loads((tmp_path / "table.json").read_text())
    assert row["quantized"]["8x8"]["mean"] == 2.0
