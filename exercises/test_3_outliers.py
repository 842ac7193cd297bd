"""Grades exercise_3_outliers.py: the definitions in loops."""
import math

import torch

from exercises.grading import check


def sample(b):
    """Twelve numbers that are not symmetric about 0."""
    return torch.tensor([math.sin(7 * b + i) + 0.1 * i for i in range(12)]).view(3, 4)


def moments(numbers):
    """(mean, mean square, mean fourth power of the deviations), by hand"""
    mu = sum(numbers) / len(numbers)
    return mu, *(sum((v - mu) ** power for v in numbers) / len(numbers) for power in (2, 4))


def by_hand(x):
    """-> (B,)"""
    _, variance, fourth = zip(*(moments(sample.flatten().tolist()) for sample in x))
    return torch.tensor([f / v ** 2 for f, v in zip(fourth, variance)])


def test_kurtosis_is_the_formula_for_each_sample(solution):
    x = torch.stack([sample(b) + 2 for b in range(5)])
    flat, expected = x.flatten(1), by_hand(x)
    deviations = lambda dims: x - x.mean(dims, keepdim=True)
    over = lambda dims: deviations(dims).pow(4).mean(dims) / x.var(dims, correction=0).square()
    from_mean = deviations((1, 2)).flatten(1)
    check("the kurtosis of 5 samples", solution.kurtosis(x.clone()), expected, {
        "you measured the whole batch at once: each sample has a kurtosis of its own":
            over((0, 1, 2)),
        "you took the mean over samples: give each sample's own": expected.mean(),
        "you measured each token: a sample is all of its (T, d) numbers": over(-1),
        "you measured each dimension of each sample: a sample is all of its (T, d) numbers":
            over(1),
        "you measured over the batch: a sample is (T, d), the batch is not part of it":
            over((0, 1)),
        "you subtracted 3: that is the excess kurtosis; here a Gaussian has 3": expected - 3,
        "you divided by n - 1: torch.std and torch.var do, unless you say correction=0":
            expected * (11 / 12) ** 2,
        "you forgot to subtract the mean": flat.pow(4).mean(1) / flat.square().mean(1).square(),
        "you subtracted the mean above but not below the line":
            from_mean.pow(4).mean(1) / flat.square().mean(1).square(),
        "you divided by sigma^2: it is sigma^4":
            from_mean.pow(4).mean(1) / from_mean.square().mean(1),
        "you divided by sigma^8: the variance is sigma^2 already":
            from_mean.pow(4).mean(1) / from_mean.square().mean(1).pow(4),
        "you took the third power: that is the skewness":
            from_mean.pow(3).mean(1) / from_mean.square().mean(1).pow(1.5)})


def test_kurtosis_does_not_depend_on_the_scale(solution):
    x = sample(0)[None]
    what = ("kurtosis of x / 50, which is that of x. (Is there an epsilon below the line? Do the "
            "powers match?)")
    check(what, solution.kurtosis(x / 50), solution.kurtosis(x.clone()))


def test_a_gaussian_has_3(solution):
    x = torch.randn(1, 500, 400, generator=torch.Generator().manual_seed(0))
    check("the kurtosis of a Gaussian", solution.kurtosis(x), torch.tensor([3.0]), tolerance=0.02)


def waves():
    """Two samples about 10, of 1000 values within 1.5 sigma; the second 100 times as wide. Each has
    a value 7 sigma above and one 7 sigma below its mean, and one at 5 sigma."""
    x = torch.sin(torch.arange(2000.0)).view(2, 20, 50)
    x[:, 3, 4], x[:, 5, 6], x[:, 7, 8] = 5.5, -5.5, 4.0
    expected = torch.zeros(2, 20, 50, dtype=torch.bool)
    expected[:, 3, 4] = expected[:, 5, 6] = True
    return 10 + x * torch.tensor([1.0, 100.0])[:, None, None], expected


def test_an_outlier_lies_6_sigma_from_its_samples_mean(solution):
    x, expected = waves()
    got = solution.is_outlier(x.clone())
    kind = getattr(got, "dtype", type(got))
    assert kind == torch.bool, f"you returned {kind}: expected True or False for each value"
    flat = x.flatten(1)
    std, mean = torch.std_mean(flat, 1, keepdim=True)
    beyond = lambda distance, bound: (distance > bound).view_as(x)
    distance = (flat - mean).abs()
    per_token = (x - x.mean(-1, keepdim=True)).abs() > 6 * x.std(-1, keepdim=True)
    check("the outliers", got, expected, {
        "you found none below the mean: take the distance's absolute value":
            beyond(flat - mean, 6 * std),
        "you measured from 0: an outlier lies far from the mean": beyond(flat.abs(), 6 * std),
        "you took mean and sigma of the whole batch: each sample has its own":
            (x - x.mean()).abs() > 6 * x.std(),
        "you took mean and sigma of each token: a sample is all of its (T, d) numbers": per_token,
        "you drew the line at 3 sigma: it is 6": beyond(distance, 3 * std),
        "you compared with the variance: sigma is its root": beyond(distance, 6 * std.square()),
        "you marked the values that are no outliers": ~expected})
