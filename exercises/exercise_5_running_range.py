"""Exercise 5: a running range (paper, sec. C.4).

How far must the grid of an activation reach? Some batches of training data pass through the model
before it is used, and the range follows their minima and maxima. The first batch sets it:

    low = min(x)                                           high = max(x)

and each further batch pulls it a little:

    low = momentum * low + (1 - momentum) * min(x)         high = the same with max(x)

so that one strange batch does not decide. The paper: momentum 0.9, 16 batches.

Try it: python exercises/exercise_5_running_range.py
Grade it: pytest exercises/test_5_running_range.py
"""
import torch


class RunningRange:
    """low and high: None before the first batch, then tensors of one number."""

    def __init__(self, momentum=0.9):
        self.momentum = momentum
        self.low = self.high = None

    def update(self, x):
        """Let a batch, a tensor of any shape, move self.low and self.high. Returns nothing."""
        raise NotImplementedError("the first batch (low is None) sets low and high, others pull")


if __name__ == "__main__":
    torch.manual_seed(0)
    running = RunningRange()
    for batch in range(16):
        running.update(torch.randn(1000) * (100 if batch == 7 else 1))  # one strange batch
        print(f"batch {batch:2d}: {running.low:8.3f} .. {running.high:.3f}")
