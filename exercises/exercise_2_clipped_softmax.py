"""Exercise 2: clipped softmax and its gradient (paper, sec. 4.1, eq. 4).

    p = softmax(scores)                            over the last dimension
    y = clip((zeta - gamma) * p + gamma, 0, 1)     gamma <= 0, zeta >= 1

Small probabilities become exactly 0, so a head can leave a token alone with modest scores.

Backward: let g be the gradient of the loss with respect to y. First through the stretch,

    dp = (zeta - gamma) * g      where 0 < y < 1,      and 0 where y was clipped

then through the softmax. There a score moves all probabilities of its row:

    dscores = p * (dp - sum(dp * p))               the sum goes over the row

Try it: python exercises/exercise_2_clipped_softmax.py
Grade it: pytest exercises/test_2_clipped_softmax.py
"""
import torch


def clipped_softmax(scores, gamma, zeta):
    """scores (..., T) -> y (..., T). tensor.softmax is allowed."""
    raise NotImplementedError("softmax over the last dimension, then stretch, then clip")


def clipped_softmax_backward(scores, gamma, zeta, g):
    """scores and g, both (..., T) -> the gradient of scores (..., T), by hand: no autograd."""
    raise NotImplementedError("p again, dp from g and the clipping, then dscores from dp and p")


if __name__ == "__main__":
    scores = torch.tensor([4.0, 2.0, 0.0, -2.0])
    print("softmax:        ", scores.softmax(-1))
    print("clipped softmax:", clipped_softmax(scores, gamma=-0.05, zeta=1.0))
    g = torch.tensor([0.0, 1.0, 0.0, 0.0])
    print("gradient:       ", clipped_softmax_backward(scores, -0.05, 1.0, g))
