"""How far an outlier has grown, and how far it still pays to grow.

    with watch(model, ("ffn_output",), growth) as outliers:
        ...
    outliers.mean["ffn_output"]["max_over_sigma"], outliers.mean["ffn_output"]["share"]

A LayerNorm divides a token by its own standard deviation. A dimension that stands M above the others'
sigma has the share M^2 / (M^2 + (d - 1) sigma^2) of its token's energy; once that is nearly 1 the
normalized token hardly changes any more, whatever M does, and there is nothing left to gain. At a share
of 0.96 M / sigma is about 5 sqrt(d): the wider the model, the larger an outlier pays (docs/law.md).
"""
import torch

from minq.outliers import norms_and_kurtosis


def growth(x):
    """For `watch`: the paper's metrics, and of each sample's largest |value|, M, in (B, ..., d):

    sigma           standard deviation of all values but those in M's dimension, (B,)
    max_over_sigma  M / sigma, (B,)
    share           M^2 / sum of squares of M's token: its dimension's share of its energy, (B,)

    What lies between B and d counts as tokens: (B, T, d), or (B, H, T, d_head) of queries.
    """
    metrics = norms_and_kurtosis(x)
    x = x.float().flatten(1, -2)  # (B, tokens, d)
    samples, d = torch.arange(len(x), device=x.device), x.shape[-1]
    top, place = x.abs().flatten(1).max(dim=1)  # (B,)
    token, dimension = place // d, place % d
    share = top.square() / x[samples, token].square().sum(dim=1)

    others, n = x.clone(), x.shape[1] * (d - 1)
    others[samples, :, dimension] = 0.0
    mean = others.sum(dim=(1, 2), keepdim=True) / n
    squares = (others - mean).square()
    squares[samples, :, dimension] = 0.0
    sigma = (squares.sum(dim=(1, 2)) / n).sqrt()
    return metrics | {"sigma": sigma, "max_over_sigma": top / sigma, "share": share}
