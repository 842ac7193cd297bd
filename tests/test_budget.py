"""The noise budget: its gains beside noise that is added, its sum beside quantization."""
import json
import math

import pytest
import torch

from lab import budget
from lab.damage import last_hidden, signal_to_noise
from minq.quant import quantize_model
from running import ROOT, opened, run

ZOO = {"post-LN": "zoo/bert-long-vanilla", "pre-LN": "zoo/opt-gated", "cured": "zoo/bert-gated"}


@pytest.fixture(scope="module")
def known():
    found = {}
    for kind, name in ZOO.items():
        found[kind] = opened(ROOT / name)
        found[kind, "tensors"] = budget.gains(found[kind])
    return found


class Noisy(torch.nn.Module):
    """Adds noise of a given variance to what passes."""

    def __init__(self, variance):
        super().__init__()
        self.std = math.sqrt(variance)

    def forward(self, x):
        return x + self.std * torch.randn_like(x)


@pytest.mark.slow
@pytest.mark.parametrize("tap", ["layers.0.ffn_output_tap", "layers.2.attention.probs_tap",
                                 "layers.3.layer_output_tap", "embedding_sum_tap"])
@pytest.mark.parametrize("kind", ZOO)
@torch.no_grad()
def test_gains_are_what_noise_does(known, kind, tap):
    """Noise with a thousandth of the signal at the end: its power and the nats are the gains'."""
    torch.manual_seed(0)
    zoo_run, gain = known[kind], known[kind, "tensors"][tap]["gain"]
    noisy = quantize_model(zoo_run.model, only="nothing")
    noisy.set_submodule(tap, Noisy(1e-3 / gain["states"]))
    pairs, nats, predictions = [], 0.0, 0
    for inputs, _ in zoo_run.validation(4):
        pairs.append([last_hidden(model, inputs) for model in (noisy, zoo_run.model)])
        p, q = (model(*inputs).double().log_softmax(-1) for model in (zoo_run.model, noisy))
        nats += (p.exp() * (p - q)).sum().item()
        predictions += p[..., 0].numel()
    assert signal_to_noise(pairs) == pytest.approx(30, abs=0.4)
    assert nats / predictions == pytest.approx(1e-3 * gain["nats"] / gain["states"], rel=0.25)


@pytest.mark.slow
@pytest.mark.parametrize("kind, bits", [("post-LN", 8), ("pre-LN", 7), ("cured", 6)])
def test_the_budget_is_what_quantization_costs(known, kind, bits):
    predicted = budget.predict(known[kind, "tensors"], bits)
    measured = budget.measure(known[kind], bits, 16, 16)
    assert predicted["predicted_sqnr"] == pytest.approx(measured["measured_sqnr"], abs=1.2)
    assert predicted["predicted_loss"] == pytest.approx(measured["loss_percent"], rel=0.5)


@pytest.mark.slow
def test_a_bit_is_worth_six_db_and_a_range_per_token_is_a_sum_over_tokens(known):
    tensors = known["pre-LN", "tensors"]
    decibels = [budget.predict(tensors, bits)["predicted_sqnr"] for bits in (12, 13)]
    assert decibels[1] - decibels[0] == pytest.approx(20 * math.log10(2), abs=0.02)
    bits = budget.bits_needed(tensors)
    span = {"range": torch.tensor(3.0), "sigma": 0.1, "gain": {"nats": torch.tensor(2.0)},
            "token_gain": {"nats": torch.tensor(5.0)}}  # sum of g^2 R_t^2 / sum of g^2 is 5 / 2
    step = 1 / 255 ** 2 / 12
    values = [budget.noise(span, "nats", 8, how) / step for how in (None, *budget.CHANGES)]
    assert values == pytest.approx([2 * 9, 2 * 0.64, 5, 2 * 9 * (255 / 65535) ** 2], rel=1e-5)
    total = sum(budget.noise(x, "nats", 8) for x in tensors.values())
    assert total * (255 / (2 ** bits - 1)) ** 2 == pytest.approx(math.log(1.2))


@pytest.mark.parametrize("family", ["bert", "opt", "vit"])
def test_the_command_on_every_family(runs, tmp_path, family):
    out, _ = run("lab.budget", runs / family, "--bits", 8, 6, "--batches", 2, "--measure",
                 "--json", tmp_path / "b.json")
    rows = json.loads((tmp_path / "b.json").read_text())
    assert [row["bits"] for row in rows] == [8, 6] and "all three" in out
    for row in rows:
        assert row["predicted_sqnr"] == pytest.approx(row["measured_sqnr"], abs=3)
        assert (row["predicted_loss"] is None) == (family == "vit")
        r = sum(x["noise"] for x in row["taps"])
        assert row["predicted_sqnr"] == pytest.approx(-10 * math.log10(2 - 2 / math.sqrt(1 + r)))
        for tap in ("ffn_output", "qkv.weight"):
            assert {x["layer"] for x in row["taps"] if x["tap"] == tap} == {1, 2}
        assert {x["layer"] for x in row["taps"]} == {1, 2, None}
