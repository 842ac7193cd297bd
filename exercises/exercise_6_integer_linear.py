"""Exercise 6: a quantized Linear on integers (paper, sec. 2: why quantize at all).

Chips multiply 8-bit integers faster than floats. After quantization x and W are integers with a
scale (eq. 1; weights are symmetric, so their zero point is 0):

    x ~ s_x * (q_x - z)        q_x (N, d_in)     uint8, 0 .. 255
    W ~ s_w * q_w              q_w (d_out, d_in) int8, -128 .. 127

    y = x W^T + b ~ s_x * s_w * sum_j (q_x[n, j] - z) * q_w[o, j]  +  b[o]

The sum needs integers only. It can be split, and then what is multiplied has 8 bits:

    sum_j q_x[n, j] * q_w[o, j]  -  z * sum_j q_w[o, j]

The second term does not depend on x. A product of two 8-bit numbers has 16 bits, and thousands
are added up: the sum must be kept in 32 (tensor.int()).

Try it: python exercises/exercise_6_integer_linear.py
Grade it: pytest exercises/test_6_integer_linear.py
"""
import torch


def accumulate(q_x, z, q_w):
    """q_x (N, d_in) uint8, z a whole number, q_w (d_out, d_in) int8 -> sums (N, d_out), int32."""
    raise NotImplementedError("the matrix product in int32, minus z times the sums of q_w's rows")


def integer_linear(q_x, s_x, z, q_w, s_w, bias):
    """-> y (N, d_out), float. s_x is a number; s_w a number, or one per row of q_w, (d_out,), as
    bias is."""
    raise NotImplementedError("accumulate, then the scales, then the bias")


if __name__ == "__main__":
    q_x = torch.randint(0, 256, (2, 768), dtype=torch.uint8)
    q_w = torch.randint(-128, 128, (3, 768), dtype=torch.int8)
    print("sums:", accumulate(q_x, 100, q_w))
    print("y:   ", integer_linear(q_x, 0.02, 100, q_w, 0.001, torch.zeros(3)))
