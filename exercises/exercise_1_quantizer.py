"""Exercise 1: the affine quantizer (paper, sec. 2, eq. 1).

Eight bits are 256 whole numbers, and s and z say which values they stand for:

    integers = clip(round(x / s) + z; 0, 2^b - 1)
    x_hat    = s * (integers - z)

The grid spans the values from low to high, and 0 lies on it exactly: first stretch the range
until it contains 0 (low <= 0 <= high). Then

    s = (high - low) / (2^b - 1)         z = round(-low / s)

Try it: python exercises/exercise_1_quantizer.py
Grade it: pytest exercises/test_1_quantizer.py
"""
import torch


def affine_parameters(low, high, n_bits):
    """(scale s, zero point z) of the grid from low to high; all are tensors of one number.

    A tensor of zeros has low = high = 0. Its s may be tiny, but not 0: x / s would be NaN.
    """
    raise NotImplementedError("stretch [low, high] to contain 0 (clamp), then s and z as above")


def quantize(x, scale, zero_point, n_bits):
    """x, of any shape -> whole numbers from 0 to 2^b - 1 (in a float tensor) of that shape."""
    raise NotImplementedError("divide by s, round (torch: halves to even), add z, clip to the grid")


def fake_quantize(x, scale, zero_point, n_bits):
    """x -> the value of its grid point, x_hat: what is left of x after rounding."""
    raise NotImplementedError("quantize, then back: s * (integers - z)")


if __name__ == "__main__":
    x = torch.tensor([-1.0, 0.0, 0.4, 0.5, 3.0])
    s, z = affine_parameters(x.min(), x.max(), n_bits=4)
    print("s and z: ", s, z)
    print("integers:", quantize(x, s, z, n_bits=4))
    print("x_hat:   ", fake_quantize(x, s, z, n_bits=4))
