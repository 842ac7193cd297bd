"""How far quantization moves the last hidden states, and which tensor does it."""
import copy
import json
import math

import numpy as np
import pytest
import torch

from lab.damage import damage, last_states, scores, signal_to_noise
from minq.attention import Tap
from minq.outliers import growth, watch
from minq.quant import quantize_model
from running import opened, run

RUNS = {"bert": "layers.1.layer_output_tap", "fake-quant": "layers.1.layer_output_tap",
        "encoder": "layers.1.layer_output_tap", "opt": "final_norm_tap", "vit": "final_norm_tap"}


@torch.no_grad()
def what_passes(model, tap, inputs):
    """The tensor behind a tap, heard by a hook of its own."""
    seen = []
    handle = model.get_submodule(tap).register_forward_hook(lambda m, args, x: seen.append(x))
    model(*inputs)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("name", RUNS)
def test_sqnr_is_its_formula(runs, name):
    run = opened(runs / name)
    model = quantize_model(run.model)
    run.calibrate(model, 0, 2)
    h, moved = (np.concatenate([what_passes(x, RUNS[name], inputs).double().numpy().reshape(-1, 32)
                                for inputs, _ in run.validation()]) for x in (run.model, model))
    states = list(last_states(run, run.model))
    found = signal_to_noise(zip(last_states(run, model), states))
    assert found == pytest.approx(10 * math.log10((h ** 2).sum() / ((moved - h) ** 2).sum()))
    metric = found if name == "encoder" else run.score(model)
    assert scores(run, model, states) == {"metric": metric, "sqnr": found}
    assert scores(run, run.model, states)["sqnr"] == math.inf


@pytest.mark.parametrize("name", RUNS)
def test_one_kind_at_a_time(runs, name):
    run = opened(runs / name)
    rows, states = damage(run, batches=2)["kinds"], list(last_states(run, run.model))
    kinds, together = rows[:-4], rows[-4:]
    taps = {tap.split(".")[-1] for tap, m in run.model.named_modules() if isinstance(m, Tap)}
    assert {f"{row['tap']}_tap" for row in kinds} == taps
    sqnr = [row["sqnr"] for row in kinds]
    assert sqnr == sorted(sqnr) and together[-1]["sqnr"] < sqnr[0]
    for row, title, only in zip(
            together, ("nothing", "all activations", "all weights", "everything"),
            ("", "*_tap", "*.weight", "*"), strict=True):
        model = quantize_model(run.model, only=only)
        run.calibrate(model, 0, 2)
        assert row == {"tap": title} | scores(run, model, states)


@pytest.mark.parametrize("name, tap", [("opt", "ffn_output"), ("vit", "final_norm"),
                                       ("bert", "layer_output")])
def test_alone_it_is_the_float_model_with_that_tensor_rounded(runs, name, tap):
    """In all layers and in the last, by PyTorch's kernel on the float model's range."""
    run = opened(runs / name)
    found = damage(run, bits=6, batches=1, eval_batches=1, layers=True)
    ((inputs, _),), (calibration,) = run.validation(1), run.calibration_inputs(0, 1)

    def expected(places):
        model = copy.deepcopy(run.model)
        for place in places:
            low, high = torch.aminmax(what_passes(run.model, place, calibration))
            grid = (high - low).item() / 63, round((-63 * low / (high - low)).item()), 0, 63
            model.get_submodule(place).register_forward_hook(
                lambda m, args, x, grid=grid: torch.fake_quantize_per_tensor_affine(x, *grid))
        h, moved = (what_passes(x, RUNS[name], inputs) for x in (run.model, model))
        ratio = h.square().sum() / (moved - h).square().sum()
        return pytest.approx(10 * math.log10(ratio), abs=0.02)

    places = [x for x, _ in run.model.named_modules() if x.split(".")[-1] == f"{tap}_tap"]
    assert [row["sqnr"] for row in found["kinds"] if row["tap"] == tap] == [expected(places)]
    if len(places) == 2:
        assert found["layers"][tap][1]["sqnr"] == expected(places[1:])


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_the_script(runs, name, tmp_path):
    out, _ = run("lab.damage", runs / name, "--layers", "--batches", 1, "--eval-batches", 1,
                 "--bits", 6, "--json", tmp_path / "x.json", "--out", tmp_path / "new" / "folder")
    (row,) = json.loads((tmp_path / "x.json").read_text())
    is_encoder, again = name == "encoder", opened(runs / name)
    assert ("| only this in 6 bits | SQNR dB ↑ |" in out) == is_encoder
    assert all(f"| {x['tap']} | " in out for x in row["kinds"]) and out.count("SQNR dB ↑") == 2
    with watch(again.model, row["layers"], growth) as outliers:
        list(last_states(again, again.model, 1))
    for tap, layers in row["layers"].items():
        assert row["growth"][tap] == outliers.mean[tap]
        grown = zip(*(outliers.mean[tap][key] for key in ("max_over_sigma", "share")))
        metric = "{sqnr:.1f}" if is_encoder else "{metric:.4g}"
        for cells in (map("{0[0]:.1f} ({0[1]:.2f})".format, grown),
                      map("{sqnr:.1f}".format_map, layers), map(metric.format_map, layers)):
            assert f"| {tap} | {' | '.join(cells)} |" in out
    assert (tmp_path / "new" / "folder" / f"damage-{name}.png").read_bytes()[1:4] == b"PNG"


@pytest.mark.parametrize("value, expected", [(torch.inf, -math.inf), (torch.nan, math.nan)])
def test_a_ruined_model_has_no_error_but_a_figure(value, expected):
    found = signal_to_noise([(torch.full((2, 3), value), torch.ones(2, 3))])
    assert found == pytest.approx(expected, nan_ok=True)
