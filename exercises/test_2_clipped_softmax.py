"""Grades exercise_2_clipped_softmax.py: eq. 4 in loops, and PyTorch's autograd."""
import math

import torch

from exercises.grading import check

GAMMA, ZETA = -0.1, 1.05
# Both rows have entries below the lower threshold, the second has one above the upper.
SCORES = torch.tensor([[[2.0, 1.0, -1.0, -2.0], [6.0, 1.0, 0.0, -1.0]]], dtype=torch.float64)
G = torch.tensor([[[1.0, -2.0, 3.0, 0.5], [2.0, 1.0, -1.0, 4.0]]], dtype=torch.float64)


def by_hand(row, gamma, zeta):
    total = sum(math.exp(score) for score in row)
    return [min(max((zeta - gamma) * math.exp(score) / total + gamma, 0.0), 1.0) for score in row]


def test_gamma_0_and_zeta_1_are_the_plain_softmax(solution):
    scores = torch.sin(torch.arange(120.0)).view(2, 3, 4, 5)
    y = solution.clipped_softmax(scores, 0.0, 1.0)
    check("clipped softmax with gamma = 0 and zeta = 1", y, scores.softmax(-1), {
        f"you normalized over dimension {dim}: it is the last one that sums to 1":
            scores.softmax(dim) for dim in range(3)})


def test_large_scores_do_not_overflow(solution):
    y = solution.clipped_softmax(torch.tensor([1000.0, 999.0]), 0.0, 1.0)
    check("clipped softmax of 1000 and 999", y, torch.tensor([math.e, 1.0]) / (math.e + 1), {
        "exp(1000) overflows: subtract the row's maximum first, or use tensor.softmax":
            torch.tensor([math.nan, math.nan])})


def test_it_is_equation_4(solution):
    p = SCORES.softmax(-1)
    expected = torch.tensor([[by_hand(row, GAMMA, ZETA) for row in SCORES[0].tolist()]])
    stretched = (ZETA - GAMMA) * p + GAMMA
    check("eq. 4", solution.clipped_softmax(SCORES.clone(), GAMMA, ZETA), expected, {
        "you did not clip after the stretch: values below 0 or above 1 are left": stretched,
        "you clipped at 0 only: with zeta > 1 some values pass 1": stretched.clip(min=0),
        "you clipped at 1 only: with gamma < 0 some values fall below 0": stretched.clip(max=1),
        "you stretched by zeta: the factor is zeta - gamma": (ZETA * p + GAMMA).clip(0, 1),
        "you stretched by zeta + gamma: the factor is zeta - gamma":
            ((ZETA + GAMMA) * p + GAMMA).clip(0, 1),
        "you forgot to add gamma: nothing reaches 0": ((ZETA - GAMMA) * p).clip(0, 1),
        "you stretched the scores: the stretch goes around the softmax":
            ((ZETA - GAMMA) * SCORES + GAMMA).softmax(-1),
        "you normalized again after clipping: a clipped row may sum to less than 1":
            expected / expected.sum(-1, keepdim=True),
        "you gave the plain softmax: nothing was stretched": p})


def gradients(gamma, zeta):
    """What autograd says, and what common mistakes give."""
    scores = SCORES.clone().requires_grad_()
    p = scores.softmax(-1)
    y = ((zeta - gamma) * p + gamma).clip(0, 1)
    (expected,) = torch.autograd.grad(y, scores, G)
    p, y, stretch = p.detach(), y.detach(), zeta - gamma
    passes = (y > 0) & (y < 1)
    through_softmax = lambda dp: p * (dp - (dp * p).sum(-1, keepdim=True))
    dp = stretch * G * passes
    rule = "dp is 0 where y was clipped, but the score there still moves the rest of its row"
    return expected, {
        "you forgot the stretch: dp = (zeta - gamma) * g": through_softmax(G * passes),
        "you let g pass where y was clipped: a clipped value does not move, so its dp is 0":
            through_softmax(stretch * G),
        "you let g pass where y was clipped, and forgot the stretch": through_softmax(G),
        f"you set dscores to 0 where y was clipped: {rule}": through_softmax(stretch * G) * passes,
        f"you set dscores to 0 where y was clipped, too: {rule}": through_softmax(dp) * passes,
        "you took p * (1 - p) as the softmax's gradient: a score moves all of its row":
            dp * p * (1 - p),
        "you left out the sum: when one probability grows, the others of its row shrink": dp * p,
        "you summed over the wrong dimension: the sum goes over the row":
            p * (dp - (dp * p).sum(-2, keepdim=True)),
        "you summed over the whole tensor: each row has a sum of its own":
            p * (dp - (dp * p).sum()),
        "you used y for p in the last line: p is the softmax, before the stretch":
            y * (dp - (dp * y).sum(-1, keepdim=True)),
        "you left g out: it is the gradient that arrives from the loss":
            through_softmax(stretch * passes),
        "your gradient has the wrong sign": -expected,
        "you stopped at dp: go on through the softmax": dp}


def test_the_gradient_where_nothing_is_clipped(solution):
    got = solution.clipped_softmax_backward(SCORES.clone(), 0.0, 1.0, G.clone())
    check("the gradient of the plain softmax", got, *gradients(0.0, 1.0))


def test_the_gradient_where_some_are_clipped(solution):
    got = solution.clipped_softmax_backward(SCORES.clone(), GAMMA, ZETA, G.clone())
    check("the gradient of the clipped softmax", got, *gradients(GAMMA, ZETA))
