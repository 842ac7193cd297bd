"""The metrics against their formulas in numpy and scipy, and written out in loops."""
import math
import re

import numpy as np
import pytest
import scipy.stats
import torch

from lab.survey import is_outlier
from minq.attention import Tap
from minq.model import FAMILIES
from minq.outliers import growth, inf_norm, kurtosis, watch
from small import inputs, small


def test_norms_and_outliers_equal_numpy_and_scipy():
    x = torch.randn(3, 50, 40, generator=torch.Generator().manual_seed(0))
    x[1, 7, 5], x[2, :, 9] = -60.0, x[2, :, 9] + 25.0
    x[0] *= 0.01  # no epsilon
    for sample, inf, kurt, far in zip(x.double().numpy(), inf_norm(x), kurtosis(x), is_outlier(x)):
        assert inf.item() == pytest.approx(np.abs(sample).max())
        expected = scipy.stats.kurtosis(sample, axis=None, fisher=False)
        assert kurt.item() == pytest.approx(expected, rel=1e-4)
        expected = np.abs(sample - sample.mean()) > 6 * sample.std()  # footnote 1
        assert np.array_equal(far.numpy(), expected) and (far.any() or inf < 6)


# ---- growth ----

def written_out(sample):
    """(sigma, max / sigma, share) of one sample, a list of tokens that are lists of values."""
    M, token, dimension = max((abs(value), t, j) for t, row in enumerate(sample)
                              for j, value in enumerate(row))
    rest = [value for row in sample for j, value in enumerate(row) if j != dimension]
    mean = sum(rest) / len(rest)
    sigma = math.sqrt(sum((value - mean) ** 2 for value in rest) / len(rest))
    return sigma, M / sigma, M ** 2 / sum(value ** 2 for value in sample[token])


@pytest.mark.parametrize("outlier", (0.0, 30.0, -300.0))
@pytest.mark.parametrize("shape", [(3, 5, 7), (2, 3, 4, 5)])  # heads count as tokens
def test_growth_is_what_is_written_out(outlier, shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)) + 0.5
    x[..., 2, 4] += outlier
    found = growth(x)
    assert torch.equal(found["inf_norm"], inf_norm(x))
    assert torch.equal(found["kurtosis"], kurtosis(x))
    for i, sample in enumerate(x.flatten(1, -2).double().tolist()):
        measured = [found[name][i].item() for name in ("sigma", "max_over_sigma", "share")]
        assert measured == pytest.approx(written_out(sample), rel=1e-4)
    alone = growth(torch.eye(24)[7].view(1, 4, 6))  # what one value is, beside zeros
    assert alone["max_over_sigma"] == math.inf and alone["share"] == 1


# ---- watching a model ----

POOLS = {  # the tensors whose kurtosis the authors' code averages; the norm is the first one's
    "bert": ("ffn_output", "layer_output"), "vit": ("layer_output", "ffn_output"),
    "opt": ("layer_output", "ffn_output", "attention.attention_output", "norm1", "norm2")}


@pytest.mark.parametrize("family", FAMILIES)
def test_watch_averages_over_samples_then_over_the_authors_tensors(family):
    model, x, seen = small(family, layers=3).eval(), inputs(family, n=6), {}
    names = [f"layers.{i}.{tap}_tap" for tap in POOLS[family] for i in range(3)]
    for name in names + ["final_norm_tap"] * (family == "opt"):
        model.get_submodule(name).register_forward_hook(
            lambda module, args, out, name=name: seen.update({name: out}))
    model(x)
    flat = lambda name: family == "opt" and re.search("norm2|ffn", name)  # tokens, for its hooks
    kurtoses = [kurtosis(out.flatten(0, 1) if flat(name) else out).mean().item()
                for name, out in seen.items()]
    norms = [inf_norm(seen[name]).mean().item() for name in names[:3]]
    with watch(model, ("ffn_output", *model.kurtosis_taps)) as outliers:
        for part in (x[:1], x[1:]):
            model(part)
    assert outliers.mean[model.norm_tap]["inf_norm"] == pytest.approx(norms, rel=1e-5)
    found = outliers.avg_kurtosis(model.kurtosis_taps)
    assert found == pytest.approx(np.mean(kurtoses), rel=1e-5)


@pytest.mark.parametrize("tap, shape", [
    ("probs", (2, 4)), ("layer_input", (2, 12)), ("gate_output", (2, 4))])
def test_watch_takes_any_tap_and_measure_and_leaves_no_hook(tap, shape):
    model = small(attention="gated")
    with watch(model, (tap,), lambda x: {"sums": x.flatten(2).sum(-1)}) as sums:
        model(inputs())
    found = np.array(sums.mean[tap]["sums"])  # rows of probabilities sum to 1
    assert found.shape == shape and (tap != "probs" or np.allclose(found, 12))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("tap, message", [
    ("none", "no tap named none"), ("mine", "nothing has passed .* tap mine in place 0")])
def test_a_tap_that_is_not_there_or_that_nothing_passes_is_an_error(tap, message):
    model = small()
    model.layers[1].attention.mine_tap = Tap()  # a student's, not called yet
    with pytest.raises(KeyError, match=message), watch(model, (tap,)):
        model(inputs())
