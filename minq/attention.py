"""Self-attention whose heads can do nothing (paper, sec. 4).

An attention head that wants to leave a token alone must, with a plain softmax, put all its
probability on some token whose value is nearly zero; only a huge softmax input does that, and
the huge input is the outlier that ruins quantization. Two cures:

    clipped softmax    probabilities may be exactly 0 (eq. 4)
    gated attention    a tiny network per head decides how much of its output to keep (eq. 5-7)

Shapes: B batch, T tokens, H heads, d_head = width / H.
"""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from minq.dropout import Dropout


class Tap(nn.Identity):
    """A named place in the forward pass: quant.py swaps it for a quantizer, outliers.py hooks it.

    Its attribute ends in `_tap`. Where a variant never calls one, the attribute is None: a tap that
    nothing passes can be neither measured nor given a range.
    """


# ---- clipped softmax (eq. 4) ----

def clipped_softmax(scores, gamma=0.0, zeta=1.0):
    """Softmax over the last dimension, stretched to (gamma, zeta), clipped to [0, 1] (eq. 4).

    Probabilities below -gamma / (zeta - gamma) become exactly 0, those above
    (1 - gamma) / (zeta - gamma) exactly 1, and neither passes a gradient on.
    gamma = 0, zeta = 1 is the plain softmax. gamma: a number, or a tensor that broadcasts to scores.
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

    def extra_repr(self):
        return f"gamma={self.gamma:g}, zeta={self.zeta:g}"


class RowClippedSoftmax(nn.Module):
    """Clipped softmax for causal attention whose threshold follows the row: gamma_t = -alpha / (t + 1).

    Row t (from 0) has t + 1 entries, so their mean is 1 / (t + 1); one gamma for all rows is mild where
    rows are short and harsh where they are long. Later published as normalized clipped softmax (arXiv 2402.12102).
    """

    def __init__(self, alpha, zeta=1.0):
        super().__init__()
        self.alpha, self.zeta = alpha, zeta

    def forward(self, scores):
        entries = torch.arange(1, scores.shape[-2] + 1, device=scores.device)[:, None]  # (T, 1)
        return clipped_softmax(scores, -self.alpha / entries, self.zeta)


# ---- gates (eq. 6-7, Table 3): x (B, T, width) -> pi (B, H, T), the share of its output a head keeps ----

class LinearGate(nn.Module):
    """One Linear(d_head -> 1) per head, which sees its own slice of the attention input."""

    def __init__(self, width, heads, gate_init=0.5):
        super().__init__()
        self.heads = heads
        self.weight = nn.Parameter(uniform_like_linear((heads, width // heads), fan_in=width // heads))
        self.bias = nn.Parameter(torch.full((heads,), logit(gate_init)))

    def forward(self, x):
        x = x.unflatten(-1, (self.heads, -1))  # (B, T, H, d_head)
        pi_hat = torch.einsum("bthd,hd->bht", x, self.weight) + self.bias[:, None]  # eq. 6
        return pi_hat.sigmoid()  # eq. 7


class MLPGate(nn.Module):
    """One MLP(d_head -> n_hid -> 1) with a ReLU per head, which sees its own slice of the input."""

    def __init__(self, width, heads, n_hid=4, gate_init=0.5):
        super().__init__()
        self.heads = heads
        d_head = width // heads
        self.weight1 = nn.Parameter(uniform_like_linear((heads, d_head, n_hid), fan_in=d_head))
        self.bias1 = nn.Parameter(uniform_like_linear((heads, n_hid), fan_in=d_head))
        self.weight2 = nn.Parameter(uniform_like_linear((heads, n_hid), fan_in=n_hid))
        self.bias2 = nn.Parameter(torch.full((heads,), logit(gate_init)))

    def forward(self, x):
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

    def forward(self, x):
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

# A config in, (softmax, gate or None) out. To add a variant of your own, write its softmax (any
# function or module from scores to probabilities) or its gate, and name it here. A third thing may
# follow, a module that changes (queries, keys, values) before their taps; cures.py has such ones.
ATTENTIONS = {
    "vanilla": lambda c: (nn.Softmax(dim=-1), None),  # clipped with gamma = 0, zeta = 1
    "clipped": lambda c: (ClippedSoftmax(c.gamma, c.zeta), None),
    "row-clipped": lambda c: (RowClippedSoftmax(c.alpha, c.zeta), None),
    "gated": lambda c: (nn.Softmax(dim=-1), GATES[c.gate](c)),
}
CAUSAL_ONLY = ("row-clipped",)  # needs rows of different lengths


# ---- multi-head self-attention (eq. 3) ----

class QKV(nn.Linear):
    """W_q, W_k and W_v stacked, so that they multiply at once; each keeps its own quantization scale."""
    parts = 3


# The taps that are called whether the kernel is fused or not; all others lie inside it.
OUTSIDE = ("queries_tap", "keys_tap", "values_tap", "context_tap", "attention_output_tap")


class SelfAttention(nn.Module):
    """Multi-head self-attention (eq. 3) with the softmax and the gate that `config` names."""

    def __init__(self, config):
        super().__init__()
        self.heads, self.d_head = config.heads, config.width // config.heads
        self.causal = config.causal
        self.qkv = QKV(config.width, 3 * config.width)
        self.softmax, self.gate, self.prepare = (*ATTENTIONS[config.attention](config), nn.Identity())[:3]
        self.dropout = Dropout(config.dropout)
        self.proj = nn.Linear(config.width, config.width)

        self.queries_tap, self.keys_tap, self.values_tap = Tap(), Tap(), Tap()
        self.scores_tap, self.probs_tap = Tap(), Tap()
        self.context_tap, self.attention_output_tap = Tap(), Tap()

    def forward(self, x):
        """x (B, T, width) -> (B, T, width)"""
        B, T, width = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, self.heads, self.d_head).permute(2, 0, 3, 1, 4)
        q, k, v = self.prepare((q, k, v))
        q, k, v = self.queries_tap(q), self.keys_tap(k), self.values_tap(v)  # (B, H, T, d_head)

        if self.can_fuse(q) and k.shape == q.shape:
            context = F.scaled_dot_product_attention(q, k, v, None, self.training * self.dropout.p, self.causal)
        else:
            scores = self.scores_tap(q * self.d_head ** -0.5 @ k.mT)  # (B, H, T, T)
            if self.causal:
                future = scores.new_full((T, T), -torch.inf).triu(1)  # 0 where a query may look
                scores = scores + F.pad(future, (0, k.shape[2] - T))
            probs = self.probs_tap(self.softmax(scores))
            context = self.dropout(probs) @ v  # (B, H, T, d_head)

        if self.gate is not None:
            pi = self.gate(v if getattr(self.gate, "of_values", False) else x)
            context = context * pi.view(B, self.heads, T, -1)  # eq. 5
        context = self.context_tap(context.transpose(1, 2).reshape(B, T, width))
        return self.attention_output_tap(self.proj(context))

    def can_fuse(self, q):
        """PyTorch's fused kernel never forms scores and probabilities, so it serves a plain softmax while
        nothing quantizes or watches what lies inside it. On CPUs it is the slower one in low precision
        and with dropout."""
        inside = [tap for name, tap in self.named_children() if name.endswith("_tap") and name not in OUTSIDE]
        unseen = all(type(tap) is Tap and not tap._forward_hooks for tap in inside)
        plain = type(self.softmax) is nn.Softmax and self.softmax.dim == -1
        fast = q.device.type != "cpu" or q.dtype == torch.float32 and not (self.training and self.dropout.p)
        return unseen and plain and fast
