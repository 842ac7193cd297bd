"""Grades exercise_1_quantizer.py: eq. 1 by hand, and PyTorch's own kernel."""
import torch

from exercises.grading import check


def parameters(solution, low, high, n_bits):
    pair = solution.affine_parameters(torch.tensor(low), torch.tensor(high), n_bits)
    is_pair = isinstance(pair, tuple) and len(pair) == 2
    assert is_pair, "affine_parameters must return scale, zero_point"
    return pair


def test_the_scale_is_one_step(solution):
    scale, _ = parameters(solution, -1.0, 3.0, 8)
    check("the scale of [-1, 3] in 8 bits", scale, 4 / 255, {
        "you divided by 2^b: between 256 levels there are 255 steps": 4 / 256,
        "you left out low: the span is high - low": 3 / 255,
        "you made a symmetric grid: this one spans low to high, not -high to high": 3 / 127})


def test_the_zero_point_is_a_level(solution):
    _, zero_point = parameters(solution, -1.0, 3.0, 8)
    check("the zero point of [-1, 3] in 8 bits", zero_point, 64, {
        "your zero point is not a whole number: 0 itself must be one of the levels": 63.75,
        "your zero point has the wrong sign: low must become level 0, so z = round(-low / s)": -64,
        "you cut the zero point's fraction off: round it": 63,
        "you gave no zero point: level 0 stands for low, not for 0": 0})


def test_the_grid_contains_0(solution):
    for low, high, wanted in ((2.0, 4.0, (0, 4)), (-4.0, -2.0, (-4, 0))):
        scale, zero_point = parameters(solution, low, high, 4)
        first, last = (float(scale * (level - zero_point)) for level in (0, 15))
        grid = f"for values from {low:g} to {high:g}"
        assert first <= 1e-6 and last >= -1e-6, \
            f"your grid does not contain 0: {grid} it goes from {first:.3g} to {last:.3g}"
        stretched = f"of the grid {grid}, once it is stretched to contain 0"
        check(f"the first level {stretched}", first, wanted[0])
        check(f"the last level {stretched}", last, wanted[1])


def test_small_values_have_a_small_scale(solution):
    scale, _ = parameters(solution, -1e-6, 1e-6, 8)
    steps = 2e-6 / scale
    assert 254.9 < steps < 255.1, \
        (f"values from -1e-6 to 1e-6 get {steps:.3g} steps instead of 255: is the least scale that "
         "you allow too large?")


def test_halves_go_to_the_even_level(solution):
    one, zero = torch.tensor(1.0), torch.tensor(0.0)
    x = torch.tensor([0.5, 1.5, 2.5, 3.5])
    got = solution.quantize(x.clone(), one, zero, 4)
    check("0.5, 1.5, 2.5, 3.5 with s = 1 and z = 0", got, torch.tensor([0, 2, 2, 4]), {
        "you rounded halves up: torch rounds halves to even, so that errors cancel":
            torch.tensor([1, 2, 3, 4]),
        "you cut fractions off: round to the nearest level": torch.tensor([0, 1, 2, 3]),
        "you did not round: levels are whole numbers": x})


def test_z_is_added_after_rounding(solution):
    x = torch.tensor([0.5, 1.5, 2.5, 3.5])
    got = solution.quantize(x, torch.tensor(1.0), torch.tensor(3.0), 4)
    check("0.5, 1.5, 2.5, 3.5 with s = 1 and z = 3", got, torch.tensor([3, 5, 5, 7]), {
        "you added z before rounding: where z is odd, halves then go the other way":
            torch.tensor([4, 4, 6, 6]),
        "you forgot to add z": torch.tensor([0, 2, 2, 4]),
        "you subtracted z: it is added here, and subtracted on the way back":
            torch.tensor([0, 0, 0, 1])})


def test_what_is_out_of_range_is_clipped(solution):
    x = torch.tensor([-100.0, 0.0, 100.0])
    got = solution.quantize(x, torch.tensor(1.0), torch.tensor(3.0), 4)
    check("-100, 0, 100 in 4 bits with s = 1 and z = 3", got, torch.tensor([0, 3, 15]), {
        "your levels leave the grid: clip them to 0 .. 2^b - 1": torch.tensor([-97, 3, 103]),
        "your grid is one level too long: 4 bits are 0 .. 15": torch.tensor([0, 3, 16]),
        "you clipped before adding z: clip last": torch.tensor([3, 3, 18]),
        "your grid is the signed one, -8 .. 7: activations have 0 .. 15": torch.tensor([-8, 3, 7])})


def test_a_tensor_of_zeros_has_a_grid_too(solution):
    scale, zero_point = parameters(solution, 0.0, 0.0, 8)
    assert scale > 0, f"the scale of a tensor of zeros is {float(scale)}: x / s would be NaN"
    got = solution.fake_quantize(torch.zeros(3), scale, zero_point, 8)
    check("a tensor of zeros, quantized and mapped back", got, torch.zeros(3))


def test_it_equals_pytorch(solution):
    scale, zero_point = 0.1, 85
    step = torch.arange(-100, 200)
    x = (step + 0.3 * torch.sin(step)) * scale  # far from halves, and beyond both ends
    expected = torch.fake_quantize_per_tensor_affine(x, scale, zero_point, 0, 255)
    levels = (x / scale).round() + zero_point
    got = solution.fake_quantize(x.clone(), torch.tensor(scale), torch.tensor(float(zero_point)), 8)
    check("torch.fake_quantize_per_tensor_affine", got, expected, {
        "you forgot to subtract z on the way back: all is s * z too large":
            expected + scale * zero_point,
        "you gave the levels: map them back, s * (integers - z)": levels.clip(0, 255),
        "you forgot to multiply by s on the way back": expected / scale,
        "you did not clip: beyond the grid's ends there are no levels":
            (levels - zero_point) * scale,
        "you divided by s on the way back: multiply": expected / scale ** 2}, tolerance=1e-4)


def test_x_itself_stays_as_it_is(solution):
    x = torch.tensor([0.25, 0.75])
    solution.fake_quantize(x, torch.tensor(0.5), torch.tensor(0.0), 8)
    assert x.tolist() == [0.25, 0.75], "you changed x itself: x /= s and x.round_() write into it"
