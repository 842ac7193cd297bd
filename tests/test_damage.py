"""How far quantization moves the last hidden states, and which tensor does it."""
import copy
import json
import math

import numpy as np
import pytest
import torch

from minq.damage import by_kind, by_layer, fidelity, floating_states, last_hidden, only, quantizers, scores
from minq.growth import growth
from minq.outliers import watch
from minq.quant import ActivationQuantizer, affine_parameters, calibrating, fake_quantize, quantize_model
from minq.runs import open_run
from minq.training import evaluate
from running import SMALL, SMALL_VIT, run


@pytest.fixture(scope="module")
def runs(corpus, cifar, tmp_path_factory):
    """A tiny run of every family, and one trained in eight bits."""
    folder = tmp_path_factory.mktemp("runs")
    run("train_bert.py", *SMALL, "--data", corpus, "--out", folder / "bert")
    run("train_bert.py", *SMALL, "--data", corpus, "--fake-quant", "--attention", "gated", "--out", folder / "fake-quant")
    run("train_opt.py", *SMALL, "--data", corpus, "--out", folder / "opt")
    run("train_vit.py", *SMALL_VIT, "--data", cifar, "--out", folder / "vit")
    return folder


RUNS = ["bert", "fake-quant", "opt", "vit"]


def opened(runs, name):
    run = open_run(runs / name, torch.device("cpu"))
    return run, lambda: quantize_model(copy.deepcopy(run.model))


@pytest.mark.parametrize("name", RUNS)
def test_sqnr_and_cosine_are_their_formulas(runs, name):
    run, build = opened(runs, name)
    model = build()
    run.calibrate(model, 0, 2)
    found = fidelity(model, floating_states(run))
    last = {"bert": "layers.1.layer_output_tap", "fake-quant": "layers.1.layer_output_tap"}.get(name, "final_norm_tap")
    signal = error = 0.0
    cosines = []
    for inputs, _ in run.validation():
        pair = []
        for each in (run.model, model):
            seen = []
            handle = each.get_submodule(last).register_forward_hook(lambda m, a, x: seen.append(x.detach().double().numpy()))
            each(*inputs)
            handle.remove()
            pair.append(seen[0].reshape(-1, 32))
        h, moved = pair
        signal += (h ** 2).sum()
        error += ((moved - h) ** 2).sum()
        cosines += [a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in zip(h, moved)]
    assert found["sqnr"] == pytest.approx(10 * math.log10(signal / error), abs=1e-3)
    assert found["cosine"] == pytest.approx(np.mean(cosines), abs=1e-6)
    metric = run.model.metric
    assert scores(run, model) == found | {metric: evaluate(model, run.validation(), run.device)[metric]}  # in one pass
    assert fidelity(run.model, floating_states(run)) == {"sqnr": math.inf, "cosine": pytest.approx(1, abs=1e-6)}


@pytest.mark.parametrize("name", RUNS)
def test_one_kind_at_a_time(runs, name):
    run, build = opened(runs, name)
    rows = by_kind(run, build, batches=2)
    kinds, last = [row["tap"] for row in rows[:-3]], [row["tap"] for row in rows[-3:]]
    assert last == ["all activations", "all weights", "everything"]
    assert set(kinds) == {tap.rpartition(".")[2] for tap, q in quantizers(build()).items() if isinstance(q, ActivationQuantizer)}
    sqnr = [row["sqnr"] for row in rows[:-3]]
    assert sqnr == sorted(sqnr) and rows[-1]["sqnr"] < sqnr[0]
    plain = build()
    run.calibrate(plain, 0, 2)
    assert rows[-1]["sqnr"] == pytest.approx(fidelity(plain, floating_states(run))["sqnr"])


@pytest.mark.parametrize("name", RUNS)
def test_with_nothing_quantized_nothing_moves(runs, name):
    run, build = opened(runs, name)
    model = build()
    with only(model, ()):
        run.calibrate(model, 0, 1)
        assert fidelity(model, floating_states(run))["sqnr"] > 100


@torch.no_grad()
def test_a_single_tap_is_the_float_model_with_that_tensor_rounded(runs):
    run, build = opened(runs, "opt")
    found, altogether = by_layer(run, build, batches=1, eval_batches=1)
    (inputs,) = run.calibration_inputs(0, 1)
    tap = run.model.layers[1].ffn_output_tap
    seen = []
    handle = tap.register_forward_hook(lambda m, a, x: seen.append(x))
    run.model(*inputs)
    handle.remove()
    grid = affine_parameters(*torch.aminmax(seen[0]), 8)  # of the floating-point model, one batch
    ((batch, h),) = floating_states(run, 1)
    handle = tap.register_forward_hook(lambda m, a, x: fake_quantize(x, *grid, 8))
    moved = last_hidden(run.model, batch)
    handle.remove()
    expected = 10 * math.log10(h.square().sum() / (moved - h).square().sum())
    assert found["ffn_output"][1]["sqnr"] == pytest.approx(expected, abs=1e-2)
    assert altogether == by_kind(run, build, batches=1, eval_batches=1)[-3:]


def test_only_switches_the_others_off_and_back_on(runs):
    run, build = opened(runs, "bert")
    model = build()
    with only(model, ["layers.0.ffn_output", "layers.1.ffn_up.weight"]):
        active = [name for name, quantizer in quantizers(model).items() if quantizer.active]
        assert sorted(active) == ["layers.0.ffn_output", "layers.1.ffn_up.weight"]
        with calibrating(model):
            model(torch.randint(256, (2, 16)))
    assert all(quantizer.active and not getattr(quantizer, "estimating", False) for quantizer in quantizers(model).values())


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_the_scripts_show_it(runs, name, tmp_path):
    out, _ = run("quantize.py", runs / name, "--seeds", 1, "--batches", 1, "--sqnr", "--taps", "--json", tmp_path / "table.json")
    (row,) = json.loads((tmp_path / "table.json").read_text())
    assert {"mean", "std", "all"} == row["quantized"]["8x8"]["sqnr"].keys() and "W8A8, SQNR dB" in out
    assert all(tap.keys() == {"tap", "metric", "sqnr"} and not tap["tap"].endswith("_tap") for tap in row["taps"])
    assert all(f"| {tap['tap']} |" in out for tap in row["taps"])
    out, _ = run("analyze.py", runs / name, "--damage", "--batches", 1, "--out", tmp_path)
    assert "| ffn_output | " in out and "| layer 2 |" in out and "| all weights | " in out
    opened_run = open_run(runs / name, torch.device("cpu"))
    with watch(opened_run.model, ("ffn_output",), growth) as outliers, torch.no_grad():
        for batch in opened_run.validation(1):
            opened_run.model(*batch[0])
    mean = outliers.mean["ffn_output"]
    cells = [f"{height:.1f} ({share:.2f})" for height, share in zip(mean["max_over_sigma"], mean["share"])]
    assert f"| ffn_output | {' | '.join(cells)} |" in out


def test_damage_is_a_picture_of_its_own(runs):
    _, err = run("analyze.py", runs / "bert", "--damage", "--curves", code=2)
    assert "--curves and --damage are different pictures" in err and err.count("\n") == 1
    _, err = run("analyze.py", runs / "bert", "--damage", "--layer", 1, code=2)
    assert "--layer has no meaning with --damage" in err and err.count("\n") == 1


@torch.no_grad()
def test_a_ruined_model_has_no_error_but_a_figure(runs):
    """An infinite error, or a NaN, in the hidden states."""
    run, _ = opened(runs, "opt")
    for value, expected in ((torch.inf, -math.inf), (torch.nan, math.nan)):
        broken = copy.deepcopy(run.model)
        broken.final_norm_tap.register_forward_hook(lambda m, a, x, value=value: torch.full_like(x, value))
        assert fidelity(broken, floating_states(run, 1))["sqnr"] == pytest.approx(expected, nan_ok=True)
