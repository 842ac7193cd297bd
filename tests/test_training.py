"""Schedules, parameter groups, precision, evaluation."""
import math
import os

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils import parametrize

from minq.errors import UserError
from minq.model import Bert, BertConfig
from minq.quant import quantize_model
from minq.training import (autocast, cosine_schedule, crowded, evaluate, exp, linear_schedule, parameter_groups, pick_device,
                           seed_step)
from running import train


def test_linear_schedule_rises_from_0_to_1_and_falls_to_0():
    assert [linear_schedule(step, 10, 110) for step in (0, 5, 10, 60, 110)] == [0, 0.5, 1, 0.5, 0]
    assert linear_schedule(0, 0, 10) == 1


def test_cosine_schedule_is_the_papers_for_vit():
    lr = [1e-3 * cosine_schedule(step, 20, 300) for step in (0, 10, 20, 160, 300)]
    assert lr == pytest.approx([1e-6, 5.005e-4, 1e-3, (1e-3 + 1e-5) / 2, 1e-5])


def small(**settings):
    torch.manual_seed(0)
    return Bert(BertConfig(layers=2, width=32, heads=4, ffn=64, seq_len=12, **settings))


@pytest.mark.parametrize("decay_layernorm", [False, True])
def test_biases_never_decay_and_gammas_only_when_asked(decay_layernorm):
    model = small(attention="gated", gate="mlp")
    names = {id(p): name for name, p in model.named_parameters()}
    decayed, kept = ({names[id(p)] for p in group["params"]} for group in parameter_groups(model, 0.1, decay_layernorm))
    gammas = {name for name in names.values() if "norm" in name and name.endswith("weight")}
    assert decayed | kept == set(names.values()) and not decayed & kept
    assert all("bias" not in name for name in decayed)
    assert all("bias" in name or name in gammas for name in kept)
    assert gammas <= (decayed if decay_layernorm else kept) and len(gammas) == 6


def test_perplexity_is_of_all_predictions_not_a_mean_of_batches():
    model = small()
    tokens = torch.randint(256, (4, 12))
    batches = [((tokens, torch.arange(2)), torch.tensor([1, 2])), ((tokens, torch.arange(30)), torch.arange(30))]
    loss = torch.cat([F.cross_entropy(model.eval()(*inputs), targets, reduction="none") for inputs, targets in batches])
    scores = evaluate(model.train(), batches, torch.device("cpu"))
    assert scores["perplexity"] == pytest.approx(math.exp(loss.mean().item()), rel=1e-5)
    assert model.training


def test_randomness_of_a_step_depends_on_seed_step_and_rank():
    draw = lambda *key: seed_step(*key) or torch.rand(3)
    assert torch.equal(draw(1, 5, 0), draw(1, 5, 0))
    draws = [draw(*key) for key in ((1, 5, 0), (1, 6, 0), (2, 5, 0), (1, 5, 1))]
    assert all(not torch.equal(a, b) for i, a in enumerate(draws) for b in draws[:i])


@pytest.mark.parametrize("precision, dtype", [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_autocast_multiplies_in_the_asked_precision(precision, dtype):
    with autocast(torch.device("cpu"), precision):
        assert torch.nn.Linear(4, 4)(torch.ones(1, 4)).dtype == dtype


def test_an_unknown_device_is_named():
    with pytest.raises(UserError, match="--device toaster"):
        pick_device("toaster")
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="no CUDA device"):
            pick_device("cuda")


def test_a_loss_that_is_not_a_number_stays_one():
    """A NaN is no infinite perplexity, which is what the lab looks for."""
    broken, tokens = small(), torch.randint(256, (2, 12))
    broken.token_embedding.weight.data[0, 0] = torch.nan
    scores = evaluate(broken.eval(), [((tokens.clamp(max=0),), tokens)], torch.device("cpu"))
    assert math.isnan(scores["loss"]) and math.isnan(scores["perplexity"])
    assert exp(1000.0) == math.inf and exp(2.0) == math.exp(2.0)


class RMSNorm(nn.Module):
    """A student's norm in place of LayerNorm: a gain, no bias."""

    def __init__(self, width, eps=1e-6):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x):
        return self.weight * x * (x.square().mean(-1, keepdim=True) + self.eps).rsqrt()


@pytest.mark.parametrize("decay_layernorm", [False, True])
def test_any_norms_gain_is_treated_as_layernorms(decay_layernorm, monkeypatch):
    monkeypatch.setattr(nn, "LayerNorm", RMSNorm)
    model = small(attention="gated", gate="mlp")
    decayed, undecayed = parameter_groups(model, 0.1, decay_layernorm)
    ids = {id(p) for p in decayed["params"]}
    gains = [m.weight for m in model.modules() if isinstance(m, RMSNorm)]
    assert len(gains) == 2 * 2 + 2 and all((id(gain) in ids) == decay_layernorm for gain in gains)
    gate = model.layers[0].attention.gate
    assert id(gate.weight1) in ids and id(gate.bias1) not in ids and id(gate.bias2) not in ids
    assert id(model.layers[0].ffn_up.weight) in ids and id(model.layers[0].ffn_up.bias) not in ids
    quantized = quantize_model(model)
    norms = [m for m in quantized.modules() if isinstance(m, RMSNorm)]
    assert [parametrize.is_parametrized(m, "weight") for m in norms] == [True] * 5 + [False]  # the last is the head's


@pytest.mark.parametrize("threads, load, device, noted", [
    (2, 4.0, "cpu", True),   # two trainings of two threads each, on two cores
    (2, 2.1, "cpu", False),  # one, and a little beside it
    (1, 9.0, "cpu", False),  # its one thread waits for nobody
    (2, 9.0, "meta", False)])
def test_a_crowded_machine_is_noted(monkeypatch, threads, load, device, noted):
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 0.0, 0.0), raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    note = crowded(torch.device(device))
    assert bool(note) == noted and (not noted or "OMP_NUM_THREADS=1" in note)


def test_a_run_notes_it_once(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr("minq.runs.crowded", lambda device: "note: crowded")
    _, err = train(corpus, tmp_path / "run", "--steps", "60", "--eval-every", "60")
    assert err.count("note: crowded") == 1
