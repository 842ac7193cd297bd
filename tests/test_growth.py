"""minq/growth.py: max / sigma and the share of a token's energy, beside the same written out with loops."""
import math

import pytest
import torch

from minq.growth import growth
from minq.outliers import inf_norm, kurtosis


def written_out(sample):
    """(sigma, max / sigma, share) of one sample, a list of tokens that are lists of values."""
    M, token, dimension = max((abs(value), t, j) for t, row in enumerate(sample) for j, value in enumerate(row))
    rest = [value for row in sample for j, value in enumerate(row) if j != dimension]
    mean = sum(rest) / len(rest)
    sigma = math.sqrt(sum((value - mean) ** 2 for value in rest) / len(rest))
    return sigma, M / sigma, M ** 2 / sum(value ** 2 for value in sample[token])


@pytest.mark.parametrize("outlier", (0.0, 30.0, -300.0))
def test_as_written_out(outlier):
    x = torch.randn(3, 5, 7, generator=torch.manual_seed(0)) + 0.5
    x[:, 2, 4] += outlier
    found = growth(x)
    for i, sample in enumerate(x.double().tolist()):
        for name, expected in zip(("sigma", "max_over_sigma", "share"), written_out(sample)):
            assert found[name][i].item() == pytest.approx(expected, rel=1e-4), name


def test_the_papers_metrics_stay():
    x = torch.randn(3, 5, 7)
    assert torch.equal(growth(x)["inf_norm"], inf_norm(x)) and torch.equal(growth(x)["kurtosis"], kurtosis(x))


def test_heads_count_as_tokens():
    x = torch.randn(2, 3, 4, 5)  # (B, H, T, d_head)
    assert all(torch.equal(value, growth(x.flatten(1, 2))[name]) for name, value in growth(x).items() if name != "kurtosis")


def test_the_share_saturates_and_max_over_sigma_does_not():
    """M over a noise of sigma 1 in d dimensions: share M^2 / (M^2 + d - 1), so 0.96 at about 5 sqrt(d)."""
    d = 64
    for M, share in ((5 * math.sqrt(d), 0.962), (10 * math.sqrt(d), 0.99), (100 * math.sqrt(d), 0.9999)):
        x = torch.ones(1, 2, d)
        x[0, 1] = -1  # sigma is 1, and every ordinary value has the square 1
        x[0, 0, 3] = M
        found = growth(x)
        assert found["max_over_sigma"].item() == pytest.approx(M, rel=1e-5)
        assert found["share"].item() == pytest.approx(M ** 2 / (M ** 2 + d - 1), rel=1e-5)
        assert found["share"].item() == pytest.approx(share, abs=0.002)


def test_an_outlier_alone_is_infinitely_high():
    x = torch.zeros(1, 2, 3)
    x[0, 0, 0] = 1.0
    assert growth(x)["share"].item() == 1.0 and math.isinf(growth(x)["max_over_sigma"].item())


@pytest.mark.parametrize("r", (5.0, 50.0, 200.0))
def test_the_height_is_read_back_from_the_kurtosis(r):
    """One value of r among Gaussian ones: docs/law.md computes the published heights this way."""
    law = pytest.importorskip("minq.law")  # needs matplotlib
    n = 128 * 768
    kurtosis_of_all = ((n - 1) * 3 + r ** 4) / n / (((n - 1) + r ** 2) / n) ** 2
    assert law.height_of(kurtosis_of_all, n) == pytest.approx(r, rel=0.02)


def test_the_law_is_drawn():
    law = pytest.importorskip("minq.law")
    row = lambda line, x, heights: {"line": line, "x": x, "max_over_sigma": {"all": heights}}
    figure = law.draw({"title": "law", "rows": [row("BERT, vanilla", "64", [30.0, 20.0]), row("BERT, vanilla", "32", [15.0])]})
    (ax,) = figure.axes
    line = next(line for line in ax.lines if line.get_label() == "BERT, vanilla")
    assert [tuple(point) for point in line.get_xydata()] == [(32.0, 15.0), (64.0, 20.0), (64.0, 30.0)]
