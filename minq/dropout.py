"""Dropout as in nn.Dropout, with a mask that a CPU draws four elements at a time.

PyTorch draws a number for each element and on one thread, which takes longer than all else that attention does
with its probabilities. Here 64 random bits decide about four elements, 16 bits for each.
"""
import torch
import torch.nn as nn

STEPS = 2 ** 16


class Dropout(nn.Dropout):
    """Zeroes each element with probability p and divides the others by 1 - p, which on a CPU is the nearest
    multiple of 2^-16 (but not 0)."""

    def forward(self, x):
        if not self.training or self.p == 0 or x.device.type != "cpu" or torch.compiler.is_compiling():
            return super().forward(x)
        kept = max(1, round(STEPS * (1 - self.p)))  # of the 2^16 equally likely draws
        draws = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-2 ** 63, None).view(torch.int16)
        mask = (draws[:x.numel()] < kept - STEPS // 2).view(x.shape)
        return x * mask.to(x.dtype).mul_(STEPS / kept)
