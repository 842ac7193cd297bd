"""Schedules, parameter groups, precision, evaluation; and every attention through the scripts."""
import json
import math
import re

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from lab.cures import ATTENTIONS, NORMS
from minq.data import IGNORE
from minq.model import FAMILIES
from minq.outliers import growth, watch
from minq.quant import quantize_model
from lab.tables import mean_and_std, outlier_columns, with_std
from minq.training import (autocast, cosine_schedule, evaluate, linear_schedule, parameter_groups,
                           pick_precision, seed_step, step_seed)
from running import logged, run
from running import small as options_of
from small import inputs, small

CPU = torch.device("cpu")


def test_schedules_rise_and_fall_as_the_appendix_says():
    assert [linear_schedule(step, 10, 110) for step in (0, 5, 10, 60, 110)] == [0, 0.5, 1, 0.5, 0]
    assert linear_schedule(0, 0, 10) == 1 and linear_schedule(5, 5, 5) == 0
    lr = [1e-3 * cosine_schedule(step, 20, 300) for step in (0, 10, 20, 160, 300)]
    assert lr == pytest.approx([1e-6, 5.005e-4, 1e-3, (1e-3 + 1e-5) / 2, 1e-5])


# ---- what decays ----

@pytest.mark.parametrize("decay_layernorm", [False, True])
@pytest.mark.parametrize("norm", ["layernorm", "rms"])
@pytest.mark.parametrize("shape", [(4,), (4, 1, 1), (4, 8)])
def test_what_decays_and_what_is_quantized(shape, norm, decay_layernorm, monkeypatch):
    """Matrices decay; biases and what a softmax holds never do, a norm's gain only when asked.
    Gains are quantized, what a softmax holds is not."""
    monkeypatch.setitem(NORMS, "rms", lambda c: nn.RMSNorm(c.width))
    own = nn.Softmax(dim=-1)  # a student's
    own.weight = nn.Parameter(torch.full(shape, 2.0))
    monkeypatch.setitem(ATTENTIONS, "own", lambda c: ATTENTIONS["gated"](c)._replace(softmax=own))
    model = small(attention="own", gate="mlp", norm=norm)
    model.temperature = nn.Parameter(torch.ones(4, 1, 1))  # a number per head is no matrix
    names = {id(p): name for name, p in model.named_parameters()}
    decayed, kept = ({names[id(p)] for p in group["params"]}
                     for group in parameter_groups(model, 0.1, decay_layernorm))
    assert decayed | kept == set(names.values()) and not decayed & kept
    gains = {name for name in names.values() if "norm" in name and name.endswith("weight")}
    free = {name for name in names.values() if re.search("bias|softmax|temperature", name)}
    assert len(gains) == 6 and kept == free | (set() if decay_layernorm else gains)

    modules = quantize_model(model).named_modules()
    on_grid = {name for name, module in modules if hasattr(module, "weight_grid")}
    assert {name.removesuffix(".weight") for name in gains} - on_grid == {"head.norm"}
    assert not re.search(r"\.(softmax|gate)", " ".join(on_grid))


# ---- randomness, device and precision ----

def test_randomness_of_a_step_depends_on_seed_step_and_rank():
    keys = [(1, 5, 0), (1, 6, 0), (2, 5, 0), (1, 5, 1)]
    draws = [seed_step(*key) or torch.rand(3) for key in keys + keys]
    assert len({tuple(draw.tolist()) for draw in draws}) == 4
    assert len({step_seed(seed, step) for seed in range(9) for step in range(99)}) == 9 * 99


@pytest.mark.parametrize("precision, dtype", [
    ("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_autocast_multiplies_in_the_asked_precision(precision, dtype):
    with autocast(CPU, pick_precision(precision, CPU)):
        assert nn.Linear(4, 4)(torch.ones(1, 4)).dtype == dtype
    assert pick_precision(None, CPU) in ("fp32", "bf16")


# ---- evaluation ----

def test_perplexity_is_of_all_predictions_not_a_mean_of_batches():
    model, tokens, positions = small().eval(), inputs(), (torch.arange(2), torch.arange(30))
    logits = [model(tokens, p) for p in positions]
    targets = [torch.where(p % 3 == 0, x.argmax(-1), p) for p, x in zip(positions, logits)]
    scores = evaluate(model.train(), zip(zip((tokens, tokens), positions), targets), CPU)
    logits, targets = torch.cat(logits), torch.cat(targets)
    loss, right = F.cross_entropy(logits, targets).item(), (logits.argmax(-1) == targets).sum()
    expected = pytest.approx([loss, math.exp(loss)], rel=1e-5)
    assert [scores["loss"], scores["perplexity"]] == expected and model.training
    assert scores["accuracy"] == pytest.approx(100 * right.item() / 32) and 11 <= right < 32


@pytest.mark.parametrize("logit, perplexity", [
    (math.nan, math.nan), (2.0, 1 + math.exp(2)), (2000.0, math.inf)])
def test_a_loss_that_is_not_a_number_stays_one(logit, perplexity):
    """A NaN is no infinite perplexity, which is what the lab looks for."""
    model = nn.Flatten(0, -2)
    batches = [((torch.tensor([[[0.0, logit]]]),), torch.tensor([x])) for x in (0, IGNORE)]
    scores, of_nothing = evaluate(model, batches, CPU), evaluate(model, batches[1:], CPU)
    assert scores["perplexity"] == pytest.approx(perplexity, nan_ok=True)
    assert all(map(math.isnan, of_nothing.values()))  # what is ignored counts nowhere


@pytest.mark.parametrize("values, mean, std, shown", [
    ([4.5, 4.52, 4.54], 4.52, 0.02, "4.52 ±0.02"), ([3.0], 3.0, None, "3"),
    ([1.0, math.nan], math.nan, math.nan, "nan ±nan")])
def test_mean_and_deviation(values, mean, std, shown):
    found = mean_and_std(values)
    assert found["mean"] == pytest.approx(mean, nan_ok=True) and found["all"] == values
    assert found["std"] == (std if std is None else pytest.approx(std, nan_ok=True))
    assert with_std(found) == shown


def test_outlier_columns_are_those_of_the_paper():
    model = small("opt").eval()
    with watch(model, ("ffn_output", *model.kurtosis_taps), growth) as outliers:
        model(inputs("opt"))
    found, mean = outlier_columns(model, outliers), outliers.mean["layer_output"]
    largest = max(range(2), key=mean["max_over_sigma"].__getitem__)
    for column in ("max_over_sigma", "share"):
        assert found[column] == found["layer_output"][column] == mean[column][largest]
    assert found["max_inf_norm"] == max(mean["inf_norm"])
    assert found["avg_kurtosis"] == outliers.avg_kurtosis(model.kurtosis_taps)


# ---- through the scripts ----

EVERY = [f"--attention {name}" for name in ATTENTIONS if name != "row-clipped"] + [
    "--attention clipped --gamma -0.03", "--attention gated --gate mlp", "--norm rmsnorm",
    "--optimizer muon", "--fake-quant --w-bits 4 --fake-quant-granularity tensor"]
SETTINGS = [*(pytest.param(family, options, marks=[pytest.mark.slow] * ((i + j) % 3 > 0))
              for i, options in enumerate(EVERY) for j, family in enumerate(FAMILIES)),
            ("opt", "--attention row-clipped --alpha 2"),
            *(("opt", f"--attention {name} {option}")
              for name in ("learned-sink", "softpick", "kv-bias", "qk-norm")
              for option in ("--precision bf16", "--precision fp16", "--fake-quant"))]


@pytest.mark.parametrize("family, options", SETTINGS)
@pytest.mark.filterwarnings("error")
def test_it_trains_and_quantizes(family, options, corpus, cifar, tmp_path):
    command = options_of(f"train_{family}.py", corpus, cifar)
    short = ["--steps", 3, "--layers", 1, "--eval-batches", 1, "--out", tmp_path / "run"]
    run(*command, *short, *options.split())
    last = logged(tmp_path / "run")[-1]
    run("quantize.py", tmp_path / "run", "--batches", 1, "--seeds", 1, "--json", tmp_path / "json")
    (row,) = json.loads((tmp_path / "json").read_text())
    assert 2 < last["val_loss"] < 6 and row["fp"] == pytest.approx(last[f"float_{row['metric']}"])
    assert row["quantized"]["8x8"]["mean"] == pytest.approx(row["fp"], rel=0.2)
    settings = row["settings"] | {"attention": row["attention"]}
    for name, default in dict(attention="vanilla", norm="layernorm", optimizer="adamw").items():
        typed = re.search(f"--{name} (\\S+)", options)
        assert settings[name] == (typed[1] if typed else default)
    assert settings["fake_quant"] == ("--fake-quant" in options)
