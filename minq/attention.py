"""Self-attention whose heads can do nothing (paper, sec. 4).

An attention head that wants to leave a token alone must, with a plain softmax, put all its
probability on some token whose value is nearly zero; only a huge softmax input does that, and
the huge input is the outlier that ruins quantization. So the paper says, and offers two cures:

    clipped softmax    probabilities may be exactly 0 (eq. 4)
    gated attention    a tiny network per head decides how much of its output to keep (eq. 5-7)

Shapes: B batch, T tokens, H heads, d_head = width / H.
"""
import math
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F


class Tap(nn.Identity):
    """A named place in the forward pass: quant.py swaps it for a quantizer, outliers.py hooks it.

    Its attribute ends in `_tap`. Where a variant never calls one, the attribute is None: a tap
    that nothing passes can be neither measured nor given a range.
    """


# ---- clipped softmax (eq. 4) ----

def clipped_softmax(scores, gamma=0.0, zeta=1.0):
    """Softmax over the last dimension, stretched to (gamma, zeta), clipped to [0, 1] (eq. 4).

    Probabilities below -gamma / (zeta - gamma) become exactly 0, those above
    (1 - gamma) / (zeta - gamma) exactly 1, and neither passes a gradient on. gamma = 0, zeta = 1
    is the plain softmax. gamma: a number, or a tensor that broadcasts to scores.
    """
    p = scores.softmax(dim=-1)
    return ((zeta - gamma) * p + gamma).clamp(0.0, 1.0)  # eq. 4


class ClippedSoftmax(nn.Module):
    """`clipped_softmax` with its two stretch factors fixed."""

    def __init__(self, gamma=0.0, zeta=1.0):
        super().__init__()
        self.gamma, self.zeta = gamma, zeta

    def forward(self, scores):
        return clipped_softmax(scores, self.gamma, self.zeta)


# ---- gates (eq. 6-7, Table 3): the attention input x (B, T, width) and the values v
# (B, H, T, d_head) -> pi (B, H, T), the share of its output that a head keeps ----

class LinearGate(nn.Module):
    """One Linear(d_head -> 1) per head, which sees its own slice of the attention input."""

    def __init__(self, width, heads, gate_init=0.5):
        super().__init__()
        d_head = width // heads
        self.heads = heads
        self.weight = nn.Parameter(uniform_like_linear((heads, d_head), fan_in=d_head))
        self.bias = nn.Parameter(torch.full((heads,), logit(gate_init)))

    def forward(self, x, v):
        x = x.unflatten(-1, (self.heads, -1))  # (B, T, H, d_head)
        pi_hat = torch.einsum("bthd,hd->bht", x, self.weight) + self.bias[:, None]  # eq. 6
        return pi_hat.sigmoid()  # eq. 7


class MLPGate(nn.Module):
    """One MLP(d_head -> n_hid -> 1) with a ReLU per head, which sees its own slice of the input."""

    def __init__(self, width, heads, n_hid=4, gate_init=0.5):
        super().__init__()
        d_head = width // heads
        self.heads = heads
        self.weight1 = nn.Parameter(uniform_like_linear((heads, d_head, n_hid), fan_in=d_head))
        self.bias1 = nn.Parameter(uniform_like_linear((heads, n_hid), fan_in=d_head))
        self.weight2 = nn.Parameter(uniform_like_linear((heads, n_hid), fan_in=n_hid))
        self.bias2 = nn.Parameter(torch.full((heads,), logit(gate_init)))

    def forward(self, x, v):
        x = x.unflatten(-1, (self.heads, -1))  # (B, T, H, d_head)
        hidden = (torch.einsum("bthd,hdn->bthn", x, self.weight1) + self.bias1).relu()
        pi_hat = torch.einsum("bthn,hn->bht", hidden, self.weight2) + self.bias2[:, None]  # eq. 6
        return pi_hat.sigmoid()  # eq. 7


class AllHeadsLinearGate(nn.Module):
    """One Linear(width -> H): every head's gate sees all of the attention input."""

    def __init__(self, width, heads, gate_init=0.5):
        super().__init__()
        self.weight = nn.Parameter(uniform_like_linear((heads, width), fan_in=width))
        self.bias = nn.Parameter(torch.full((heads,), logit(gate_init)))

    def forward(self, x, v):
        pi_hat = F.linear(x, self.weight, self.bias).mT  # eq. 6, (B, H, T)
        return pi_hat.sigmoid()  # eq. 7


def uniform_like_linear(shape, fan_in):
    """He's uniform initialisation with nn.Linear's bounds, +-1 / sqrt(fan_in)."""
    bound = 1 / math.sqrt(fan_in)
    return torch.empty(shape).uniform_(-bound, bound)


def logit(p):
    """The bias b_init that opens a gate to pi_init = sigmoid(b_init) = p (sec. 5.3)."""
    return math.log(p / (1 - p))


GATES = {
    "linear": lambda c: LinearGate(c.width, c.heads, c.gate_init),
    "mlp": lambda c: MLPGate(c.width, c.heads, c.gate_hidden, c.gate_init),
    "all-heads": lambda c: AllHeadsLinearGate(c.width, c.heads, c.gate_init),
}


# ---- by name: a model's Config -> what its heads have ----

class Heads(NamedTuple):
    softmax: nn.Module                # scores (B, H, T, T) -> probabilities
    gate: nn.Module | None = None     # attention input and values -> pi
    prepare: nn.Module | None = None  # queries, keys, values -> the same, before their taps


# To add a variant of your own, write its softmax or its gate, and name it here (as lab/cures.py).
ATTENTIONS = {
    "vanilla": lambda c: Heads(nn.Softmax(dim=-1)),  # clipped with gamma = 0, zeta = 1
    "clipped": lambda c: Heads(ClippedSoftmax(c.gamma, c.zeta)),
    "gated": lambda c: Heads(nn.Softmax(dim=-1), GATES[c.gate](c)),
}


# ---- multi-head self-attention (eq. 3) ----

class QKV(nn.Linear):
    """W_q, W_k and W_v stacked, so that they multiply at once; each keeps a scale of its own."""
    parts = 3


class SelfAttention(nn.Module):
    """Multi-head self-attention (eq. 3) with the softmax and the gate that `config` names."""

    float_modules = ("softmax", "gate")  # not quantized: what they hold computes in floating point

    def __init__(self, config):
        super().__init__()
        self.heads, self.d_head = config.heads, config.width // config.heads
        self.causal, self.fused = config.causal, config.fused
        self.qkv = QKV(config.width, 3 * config.width)
        self.softmax, self.gate, self.prepare = ATTENTIONS[config.attention](config)
        self.dropout = Dropout(config.dropout)
        self.proj = nn.Linear(config.width, config.width)

        self.queries_tap, self.keys_tap, self.values_tap = Tap(), Tap(), Tap()
        self.scores_tap, self.probs_tap = Tap(), Tap()
        self.context_tap, self.attention_output_tap = Tap(), Tap()

    def forward(self, x):
        """x (B, T, width) -> (B, T, width)"""
        B, T, width = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, self.heads, self.d_head).permute(2, 0, 3, 1, 4)
        if self.prepare is not None:
            q, k, v = self.prepare(q, k, v)
        q, k, v = self.queries_tap(q), self.keys_tap(k), self.values_tap(v)  # (B, H, T, d_head)

        if self.fused and self.training:  # --fused: PyTorch's own kernel, without taps inside
            context = F.scaled_dot_product_attention(q, k, v, None, self.dropout.p, self.causal)
        else:
            scores = self.scores_tap(q * self.d_head ** -0.5 @ k.mT)  # (B, H, T, T)
            if self.causal:
                scores = mask_future(scores)
            probs = self.probs_tap(self.softmax(scores))
            context = self.dropout(probs) @ v  # (B, H, T, d_head)

        if self.gate is not None:
            context = context * self.gate(x, v).view(B, self.heads, T, -1)  # eq. 5
        context = self.context_tap(context.transpose(1, 2).reshape(B, T, width))
        return self.attention_output_tap(self.proj(context))


def mask_future(scores):
    """(B, H, T, T or more): to what comes after a row's own token half the lowest finite number is
    added. The sum stays finite, so that a learned factor on it has no NaN for a gradient (and is
    added four times as fast as it is filled in). A key beyond T is no token: all may see it."""
    T, keys = scores.shape[-2:]
    future = scores.new_full((T, T), torch.finfo(scores.dtype).min / 2).triu(1)
    return scores + F.pad(future, (0, keys - T))


# ---- dropout ----

class Dropout(nn.Dropout):
    """nn.Dropout whose mask a CPU draws four elements at a time, 16 of 64 random bits for each.

    PyTorch draws a number per element on one thread, which takes longer than all else that
    attention does with its probabilities. Here 1 - p is rounded to a multiple of 2^-16, not to 0.
    """

    def forward(self, x):
        off = not self.training or self.p == 0
        if off or x.device.type != "cpu" or torch.compiler.is_compiling():
            return super().forward(x)
        kept = max(1, round(2 ** 16 * (1 - self.p)))  # of the 2^16 equally likely draws
        draws = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-2 ** 63, None)
        mask = (draws.view(torch.int16)[:x.numel()] < kept - 2 ** 15).view(x.shape)
        return x * mask.to(x.dtype).mul_(2 ** 16 / kept)
