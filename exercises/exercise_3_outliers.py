"""Exercise 3: how strong the outliers of an activation are (paper, sec. 5 and footnote 1).

x (B, T, d) is one activation of a batch. Each sample, the T * d numbers of x[b], is measured
alone. With mu and sigma the mean and the standard deviation of a sample's numbers:

    kurtosis = mean((x - mu)^4) / sigma^4

Sigma^2 is mean((x - mu)^2): divide by n, not by n - 1. This is not the excess kurtosis: a Gaussian
has 3. A value is an outlier where it lies more than 6 sigma from mu.

Try it: python exercises/exercise_3_outliers.py
Grade it: pytest exercises/test_3_outliers.py
"""
import torch


def kurtosis(x):
    """x (B, T, d) -> one number per sample (B,)"""
    raise NotImplementedError("x.flatten(1) makes a row of each sample; then the formula, per row")


def is_outlier(x):
    """x (B, T, d) -> True or False for each value (B, T, d)"""
    raise NotImplementedError("compare each value's distance from its sample's mean with 6 sigma")


if __name__ == "__main__":
    torch.manual_seed(0)
    x = torch.randn(2, 64, 128)
    x[1, 5, 7] = 60.0
    print("kurtosis:", kurtosis(x))
    print("outliers:", is_outlier(x).nonzero().tolist())
