"""Outliers are replaced as by hand, and where there are none a model stays as it is."""
import json

import numpy as np
import pytest
import torch

from lab.damage import last_states, scores
from lab.remove import KINDS, REPLACEMENTS, Marked, Replaced, limits, removed
from running import opened, run
from small import inputs, small
from test_damage import RUNS

X = 3 * torch.randn(4, 12, 32, generator=torch.Generator().manual_seed(1))
IS_DELIMITER, MEAN = torch.arange(260) % 2, torch.randn(3, 32)


def kinds(tokens):
    """Of each token its place in KINDS, by hand."""
    return torch.tensor([[bool(t) * (2 - int(i) % 2) for t, i in enumerate(x)] for x in tokens])


@pytest.mark.parametrize("how", REPLACEMENTS)
def test_each_value_is_replaced_by_hand(how):
    marked = Marked(torch.nn.Embedding(260, 32), IS_DELIMITER)
    marked(inputs())
    replaced = lambda tokens: Replaced(torch.nn.Identity(), marked, -4, 5, MEAN, tokens, how)(X)
    found, kind, beyond = replaced("all"), kinds(inputs()), (X < -4) | (X > 5)
    for i, name in enumerate(KINDS):
        assert torch.equal(replaced(name), torch.where((kind == i)[..., None], found, X))
    if how == "control":  # as many of each token; of these, what is beyond itself stays
        moved, n = (found != X).sum(dim=2), beyond.sum(dim=2)
        assert (moved <= n).all() and 0.7 * n.sum() < moved.sum()
        assert torch.equal(found, X * ((found == X) | beyond))
    for b, t, d in np.ndindex(*X.shape) if how != "control" else ():
        x = X[b, t, d].item()
        new = {"zero": 0.0, "mean": MEAN[kind[b, t], d], "limit": -4.0 if x < 0 else 5.0}[how]
        assert found[b, t, d] == (new if x < -4 or x > 5 else x)


@pytest.mark.parametrize("family", ("bert", "opt", "vit"))
@torch.no_grad()
def test_limits_and_means_are_their_formulas(family):
    model, seen, batches = small(family).eval(), [], [inputs(family, seed) for seed in range(3)]
    if family != "vit":  # which has no delimiters
        model.token_embedding = Marked(model.token_embedding, IS_DELIMITER)
    model.layers[1].residual1_tap.register_forward_hook(lambda m, args, x: seen.append(x.double()))
    known, far = (limits(model, [(x,) for x in batches], "residual1", s) for s in (2.0, 1e3))
    x, (low, high, means) = torch.cat(seen[:3]).numpy(), known[2]
    kind = kinds(torch.cat(batches) if family != "vit" else np.zeros(x.shape[:2])).flatten().numpy()
    found = [x.reshape(-1, 32)[kind == i].mean(axis=0) for i in set(kind)]
    np.testing.assert_allclose(means[sorted(set(kind))], found, atol=1e-5)
    assert [low, high] == pytest.approx(x[:, 1:].mean() + np.array([-2, 2]) * x[:, 1:].std(), 1e-4)
    for how in REPLACEMENTS:
        for at, same in (far, True), (known, False):  # nothing is beyond; something is
            changed = removed(model, "residual1", at, [1, 2], "all", how)
            assert torch.equal(changed(batches[0]), model(batches[0])) == same


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_the_table(runs, name, tmp_path):
    words = runs / name, "--tap", "ffn_output", "--sigma", 1, "--batches", 1, "--eval-batches", 1
    run("lab.remove", *words, "--tokens", "start", "all", "--json", tmp_path / "x.json")
    _, *rows = json.loads((tmp_path / "x.json").read_text())
    assert [row["sqnr"] for row in rows] == sorted(row["sqnr"] for row in rows) and len(rows) == 8
    again = opened(runs / name)
    states = list(last_states(again, again.model, 1))
    for layer, at in limits(again.model, again.calibration_inputs(0, 1), "ffn_output", 1.0).items():
        tap = again.model.layers[layer - 1].ffn_output_tap  # clamped by a hook
        tap.register_forward_hook(lambda m, args, x, at=at: x.clamp(*at[:2]))
    expected = scores(again, again.model, states, 1).items()
    assert [expected <= row.items() for row in rows if row["tokens"] == "all"].count(True) == 1
