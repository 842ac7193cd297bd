"""Grades exercise_4_gate.py: eq. 6 and 7 in loops."""
import math

import torch
import torch.nn as nn

from exercises.grading import check

B, T, WIDTH, HEADS, D_HEAD = 2, 5, 12, 3, 4


def test_weight_and_bias_are_parameters(solution):
    gate = solution.LinearGate(WIDTH, HEADS)
    for name, shape in (("weight", (HEADS, D_HEAD)), ("bias", (HEADS,))):
        value = getattr(gate, name, None)
        assert value is not None, f"your gate has no self.{name}"
        trained = isinstance(value, nn.Parameter)
        assert trained, f"self.{name} is no nn.Parameter: it would not be trained"
        yours = tuple(value.shape)
        assert yours == shape, f"self.{name}: the shape is {shape}, yours is {yours}"


def test_it_is_equations_6_and_7(solution):
    gate = solution.LinearGate(WIDTH, HEADS, gate_init=0.25)
    weight = torch.cos(torch.arange(12.0)).view(HEADS, D_HEAD)
    bias = torch.tensor([0.5, -1.0, 2.0])
    with torch.no_grad():
        gate.weight.copy_(weight)
        gate.bias.copy_(bias)
    x = torch.sin(torch.arange(120.0)).view(B, T, WIDTH)
    pi_hat = torch.zeros(B, HEADS, T)
    for b in range(B):
        for h in range(HEADS):
            for t in range(T):
                own = x[b, t, h * D_HEAD:(h + 1) * D_HEAD]
                pi_hat[b, h, t] = bias[h] + sum(own[i] * weight[h, i] for i in range(D_HEAD))
    pi = pi_hat.sigmoid()
    interleaved = torch.einsum("btdh,hd->bht", x.unflatten(-1, (D_HEAD, HEADS)), weight)
    interleaved += bias[:, None]
    first_slice = torch.einsum("btd,hd->bht", x[:, :, :D_HEAD], weight) + bias[:, None]
    by_time = torch.einsum("bhtd,hd->bht", x.view(B, HEADS, T, D_HEAD), weight) + bias[:, None]
    check("pi", gate(x.clone()), pi, {
        "you forgot the bias": (pi_hat - bias[:, None]).sigmoid(),
        "you returned pi_hat: the sigmoid (eq. 7) is missing": pi_hat,
        "you took a softmax over the heads: each gate opens by itself": pi_hat.softmax(1),
        "you took a softmax over the tokens: each gate opens by itself": pi_hat.softmax(-1),
        "you returned (B, T, heads): expected (B, heads, T)": pi.mT,
        "you dealt the dimensions out one by one: unflatten(-1, (heads, d_head)) gives neighbours":
            interleaved.sigmoid(),
        "all your heads see the first slice of x: head h has its own": first_slice.sigmoid(),
        "you viewed x as (B, heads, T, d_head): that mixes tokens. Split, then move":
            by_time.sigmoid(),
        "you gave all tokens one pi: each has its own":
            pi_hat.mean(-1, keepdim=True).expand_as(pi).sigmoid()})


def test_it_starts_at_pi_init(solution):
    for pi_init in (0.25, 0.9):
        gate = solution.LinearGate(WIDTH, HEADS, gate_init=pi_init)
        ones = torch.ones(B, HEADS, T)
        sigmoid = lambda z: 1 / (1 + math.exp(-z))
        pi = gate(torch.zeros(B, T, WIDTH))
        check(f"pi of a gate with pi_init {pi_init}, where x is 0", pi, pi_init * ones, {
            "your bias is pi_init itself: the sigmoid comes after it, so take its inverse":
                sigmoid(pi_init) * ones,
            "your bias has the wrong sign: the gate starts at 1 - pi_init": (1 - pi_init) * ones,
            "your bias is sigmoid(pi_init): it is the inverse of the sigmoid that you need":
                sigmoid(sigmoid(pi_init)) * ones,
            "your bias is log(pi_init): the inverse of the sigmoid is log(p / (1 - p))":
                sigmoid(math.log(pi_init)) * ones,
            "your bias is 0: every gate starts at 0.5": 0.5 * ones,
            "you returned pi_hat: the sigmoid (eq. 7) is missing":
                math.log(pi_init / (1 - pi_init)) * ones,
            "you returned (B, T, heads): expected (B, heads, T)": pi_init * ones.mT})


def test_its_weights_are_random_and_small(solution):
    torch.manual_seed(0)
    heads, d_head = 16, 64
    weight = solution.LinearGate(heads * d_head, heads).weight.detach()
    bound, largest = 1 / math.sqrt(d_head), weight.abs().max().item()
    assert largest > 0, "your weights start at 0: all gates would learn alike"
    assert len(weight.unique()) > 1, "your weights are all the same: they must be random"
    words = "your weights have one sign only: uniform in +-1 / sqrt(d_head)"
    assert weight.min() < 0 < weight.max(), words
    words = f"your largest weight is {largest:.3g}, expected almost 1 / sqrt(d_head) = {bound:.3g}"
    assert largest < 1.001 * bound, f"{words}: are they uniform in that range?"
    assert largest > 0.9 * bound, f"{words}: did you take the width for d_head?"
    words = "your weights are not uniform: too many are near 0"
    assert weight.std() > 0.9 * bound / math.sqrt(3), words


def test_weight_and_bias_learn(solution):
    gate = solution.LinearGate(WIDTH, HEADS)
    pi = gate(torch.ones(B, T, WIDTH))
    assert pi.requires_grad, "no gradient reaches the gate: is there a detach, .data or no_grad?"
    pi.sum().backward()
    for name in ("weight", "bias"):
        gradient = getattr(gate, name).grad
        reached = gradient is not None and (gradient != 0).any()
        assert reached, f"no gradient reaches self.{name}: is it used, without .data or detach?"
