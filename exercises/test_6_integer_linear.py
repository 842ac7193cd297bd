"""Grades exercise_6_integer_linear.py: sums of Python's integers, and PyTorch's floats."""
import torch
import torch.nn.functional as F

from exercises.grading import check


def integers(N, d_in, d_out):
    """q_x and q_w that use all of their grids."""
    q_x = (torch.arange(N * d_in) * 37 % 256).view(N, d_in).to(torch.uint8)
    q_w = (torch.arange(d_out * d_in) * 91 % 256 - 128).view(d_out, d_in).to(torch.int8)
    return q_x, q_w


def by_hand(q_x, z, q_w):
    dot = lambda row, weights: sum((x - z) * w for x, w in zip(row, weights))
    return torch.tensor([[dot(row, weights) for weights in q_w.tolist()] for row in q_x.tolist()])


def wrapped(x, bits):
    """What is left of an integer that does not fit into `bits` bits."""
    return (x + 2 ** (bits - 1)) % 2 ** bits - 2 ** (bits - 1)


def test_the_sum_is_exact(solution):
    z, (q_x, q_w) = 100, integers(4, 50, 3)
    expected, x, w = by_hand(q_x, z, q_w), q_x.long(), q_w.long()
    signed = wrapped(x, 8)
    check("the sum", solution.accumulate(q_x.clone(), z, q_w.clone()), expected, {
        "you forgot the zero point: level z stands for 0, so subtract z from q_x": x @ w.T,
        "you added z: q_x - z": (x + z) @ w.T,
        "you subtracted z once, not z times the sum of the row of q_w": x @ w.T - z,
        "you subtracted z times the sum of all of q_w: each row has a sum of its own":
            x @ w.T - z * w.sum(),
        "you subtracted z times the sums of q_x's rows, as if the weights had a zero point":
            x @ w.T - z * x.sum(1, keepdim=True),
        "you subtracted the sums of q_w's rows without z": x @ w.T - w.sum(1),
        "you subtracted z from both": (x - z) @ (w - z).T,
        "your sums are in 8 bits and overflow: convert to int32 before you multiply":
            wrapped(x @ w.T, 8) - z * w.sum(1),
        "your sums are in 16 bits and overflow: convert to int32 before you multiply":
            wrapped(x @ w.T, 16) - z * w.sum(1),
        "your sums are in 16 bits, and overflow: convert to int32 before you multiply":
            wrapped(expected, 16),
        "you read q_x as int8, so its levels above 127 became negative: convert uint8 to int32":
            signed @ w.T - z * w.sum(1),
        "you subtracted z in uint8, which has no negative numbers: convert to int32 first":
            (x - z) % 256 @ w.T}, tolerance=0)


def test_the_sum_is_of_integers(solution):
    """Floats of 32 bits hold whole numbers up to 2^24 only."""
    q_x = torch.full((1, 8191), 255, dtype=torch.uint8)
    q_w = torch.full((1, 8191), 127, dtype=torch.int8)
    got, exact = solution.accumulate(q_x, 0, q_w), 8191 * 255 * 127  # an odd number
    kind = getattr(got, "dtype", type(got))
    words = f"your sum is {kind}, expected torch.int32: integers add exactly, floats do not"
    assert kind in (torch.int32, torch.int64), words
    check("the sum of 8191 products, which no float can hold", got, torch.tensor([[exact]]), {
        "your sums are in 16 bits and overflow: convert to int32":
            torch.tensor([[wrapped(exact, 16)]])}, tolerance=0)


def test_y_has_scales_and_bias(solution):
    z, s_x, s_w = 100, 0.5, 0.25
    q_x, q_w = integers(4, 50, 3)
    bias = torch.tensor([100.0, -200.0, 300.0])
    total = by_hand(q_x, z, q_w).double()
    scaled = s_x * s_w * total
    y = solution.integer_linear(q_x.clone(), s_x, z, q_w.clone(), s_w, bias.clone())
    check("y", y, scaled + bias, {
        "you forgot the bias": scaled,
        "you scaled the bias, too: it is added after the scales": s_x * s_w * (total + bias),
        "you forgot s_w: both scales multiply the sum": s_x * total + bias,
        "you forgot s_x: both scales multiply the sum": s_w * total + bias,
        "you added the scales: they multiply": (s_x + s_w) * total + bias,
        "you divided by the scales: a step is s wide, so multiply": total / (s_x * s_w) + bias,
        "you forgot the scales: y is no integer": total + bias,
        "you rounded y: it is a float": (scaled + bias).round(),
        "you cut y's fraction off: it is a float": (scaled + bias).trunc()})


def test_each_row_of_weights_may_have_its_scale(solution):
    q_x, q_w = integers(3, 50, 3)  # as many rows of x as of w
    s_w = torch.tensor([0.1, 1.0, 10.0])
    total = by_hand(q_x, 7, q_w).double()
    y = solution.integer_linear(q_x, 0.5, 7, q_w, s_w, torch.zeros(3))
    check("y with a scale per row of weights", y, 0.5 * s_w * total, {
        "you gave the scales to the rows of x: they belong to the columns of y, (d_out,)":
            0.5 * s_w[:, None] * total,
        "you used one scale for all rows of weights: s_w may be (d_out,)": 0.5 * s_w[0] * total})


def test_it_gives_what_simulated_quantization_gives(solution):
    x = 1 + 2 * torch.sin(torch.arange(160.0)).view(5, 32)
    weight = torch.cos(torch.arange(96.0) ** 2).view(3, 32)
    s_x, z, s_w, bias = 4 / 255, 64, weight.abs().max().item() / 127, torch.tensor([1.0, 2.0, 3.0])
    q_x = ((x / s_x).round() + z).clip(0, 255).to(torch.uint8)
    q_w = (weight / s_w).round().to(torch.int8)
    simulated = F.linear(s_x * (q_x.float() - z), s_w * q_w.float(), bias)
    y = solution.integer_linear(q_x, s_x, z, q_w, s_w, bias)
    check("y, against the same in floats", y, simulated, tolerance=1e-4)
