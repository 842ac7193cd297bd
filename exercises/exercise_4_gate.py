"""Exercise 4: a gate that starts at pi_init (paper, sec. 4.2, eq. 6-7, and sec. 5.3).

A head multiplies its output by pi, a number between 0 and 1 for each token; 0 is "do nothing".
The gate's network is one small Linear per head. Head h sees its own slice of the attention input,
the d_head numbers x_h = x[b, t, h * d_head : (h + 1) * d_head]:

    pi_hat[b, h, t] = x_h . weight[h] + bias[h]    eq. 6
    pi              = sigmoid(pi_hat)              eq. 7

How open a gate starts is its bias: where x or the weight is small, pi is about sigmoid(bias), and
that shall be pi_init. So which bias? (Sec. 5.3; solve it for the bias.)

Try it: python exercises/exercise_4_gate.py             Grade it: pytest exercises/test_4_gate.py
"""
import torch
import torch.nn as nn


class LinearGate(nn.Module):
    """One Linear(d_head -> 1) per head: x (B, T, width) -> pi (B, heads, T); d_head is
    width / heads."""

    def __init__(self, width, heads, gate_init=0.5):
        """weight (heads, d_head): random, uniform in +-1 / sqrt(d_head), as nn.Linear does it.
        bias (heads,): all alike, so that gates start at gate_init."""
        super().__init__()
        raise NotImplementedError("self.weight and self.bias, both nn.Parameter, to be trained")

    def forward(self, x):
        raise NotImplementedError(
            "split x by heads (unflatten or view), eq. 6 (einsum, or * and sum), eq. 7")


if __name__ == "__main__":
    gate = LinearGate(width=128, heads=4, gate_init=0.25)
    pi = gate(0.1 * torch.randn(2, 10, 128))
    print("pi:", tuple(pi.shape), "from", pi.min().item(), "to", pi.max().item())
