"""Attentions published since the paper, and one norm: each is an entry of ATTENTIONS (or NORMS).

    python train_opt.py --attention learned-sink

A row of softmax inputs is s_j over the keys j that its query may see; H heads, d = H * d_head.

    --attention       what is new                                      parameters  source
    row-clipped       gamma_t = -alpha / (t + 1) in causal row t       0           2402.12102
    softmax1          p_j = exp(s_j) / (1 + sum_k exp(s_k))            0           2404.03828
    learned-sink      p_j = exp(s_j) / (exp(b) + sum_k exp(s_k))       H           gpt-oss (2025)
    sigmoid           p_j = sigmoid(s_j - log T)                       0           2409.04431
    relu              p_j = relu(s_j) / (keys in the row)              0           2309.08586
    softpick          p_j = relu(exp(s_j) - 1) / sum_k |exp(s_k) - 1|  0           2504.20966
    headwise-gate     pi = sigmoid(x W), a number per head             d H         2505.06708
    elementwise-gate  pi = sigmoid(x W), a number per dimension        d^2         2505.06708
    value-gate        pi = sigmoid(v W), a number per head             d H         2510.09017
    k-bias            one more key k', whose value is zero             d           2410.10781
    kv-bias           one more key k' and its value v'                 2 d         2402.17762
    qk-norm           q / rms(q) * g, k / rms(k) * g'                  2 d_head    2302.05442

    --norm rmsnorm    x / rms(x) in place of every LayerNorm           2 d less    2506.19697 learns
                                                                                   one scale, too

What their papers report, of models of other sizes, data and measures (kurtosis; outliers):

    row-clipped       a causal model can be clipped
    softmax1          -22%, norm -26%; but outliers are Adam's (2410.17174)
    learned-sink      BERT 2987 to 226, OPT 2177 to 22 (2510.09017); value-gate: to 85 and 35
    softpick          33510 to 340, and no sinks
    relu              smaller sinks and peaks of a toy model (2410.13835)
    headwise-gate     fewer sinks and massive activations; elementwise-gate, too
    k-bias            no sink on tokens, no massive activations, equal loss
    kv-bias           no massive activations in GPT-2; not so in others (2503.22329)
    sigmoid, qk-norm  of outliers nothing
    muon              excess kurtosis 1819 to 1575; to 67 with rmsnorm (2506.19697)

(--optimizer muon, accused beside them, is in muon.py.) All work in BERT, OPT and ViT, row-clipped
in OPT only. Probabilities, keys and values pass their taps as ever, so they are quantized; gates
stay in floating point, as the paper's do.
"""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from minq.attention import ATTENTIONS, Heads, clipped_softmax, uniform_like_linear
from minq.flags import UserError
from minq.model import NORMS


# ---- in place of the softmax: scores (B, H, T, T), masked ones lowest -> probabilities ----

def visible(scores):
    """Which scores are not masked, that is not near half the lowest number of their type."""
    return scores > torch.finfo(scores.dtype).min / 4


class RowClippedSoftmax(nn.Module):
    """Clipped softmax for causal attention, with gamma_t = -alpha / (t + 1) in row t.

    Row t (from 0) has t + 1 entries, so their mean is 1 / (t + 1); one gamma for all rows is mild
    where rows are short and harsh where they are long. Later published as normalized clipped
    softmax (arXiv 2402.12102).
    """

    def __init__(self, alpha, zeta=1.0):
        super().__init__()
        self.alpha, self.zeta = alpha, zeta

    def forward(self, scores):
        entries = torch.arange(1, scores.shape[-2] + 1, device=scores.device)[:, None]  # (T, 1)
        return clipped_softmax(scores, -self.alpha / entries, self.zeta)


def exponentials(scores):
    """exp(s - m) and exp(-m), that is exp(s) and 1 after division by exp(m), where m is the row's
    largest score, or 0: nothing overflows. In float32."""
    scores = scores.float()
    m = scores.detach().amax(dim=-1, keepdim=True).clamp(min=0)
    return (scores - m).exp(), (-m).exp()


class Softmax1(nn.Module):
    """exp(s_j) / (1 + sum_k exp(s_k)): as if there were one more key with score 0 and value 0
    (Miller 2023, "Attention is off by one"; OutEffHop, arXiv 2404.03828). A head that does nothing
    makes all scores negative."""

    def forward(self, scores):
        e, one = exponentials(scores)
        return e / (one + e.sum(dim=-1, keepdim=True))


class LearnedSink(nn.Module):
    """Softmax1 whose added score b is learned, one per head (gpt-oss, where it starts at
    normal(0, 0.02); here at 0).

    b stays in floating point: it is a bias of the softmax, which computes in floating point."""

    def __init__(self, heads):
        super().__init__()
        self.sink = nn.Parameter(torch.zeros(heads))

    def forward(self, scores):
        sink = self.sink.to(scores.dtype).view(-1, 1, 1).expand(*scores.shape[:-1], 1)
        return torch.cat((scores, sink), dim=-1).softmax(dim=-1)[..., :-1]


class SigmoidAttention(nn.Module):
    """sigmoid(s_j - log T), T the sequence length: keys do not compete (arXiv 2409.04431)."""

    def __init__(self, T):
        super().__init__()
        self.T = T

    def forward(self, scores):
        return (scores.float() - math.log(self.T)).sigmoid()


class ReLUAttention(nn.Module):
    """relu(s_j) / n, n the keys that the row may see: T (arXiv 2309.08586), or t + 1 in causal row
    t (2410.13835)."""

    def forward(self, scores):
        n = visible(scores).sum(dim=-1, keepdim=True)  # (B, H, T, 1)
        return scores.relu() / n


class Softpick(nn.Module):
    """relu(exp(s_j) - 1) / sum_k |exp(s_k) - 1| (arXiv 2504.20966): a score below 0 gets nothing,
    but takes its share of the denominator; a masked one does not. The authors' 1e-8 keeps a row of
    zeros from 0 / 0."""

    def forward(self, scores):
        e, one = exponentials(scores)
        x = e - one
        sizes = x.abs().masked_fill(~visible(scores), 0)
        return x.relu() / (sizes.sum(dim=-1, keepdim=True) + 1e-8)


# ---- gates: -> pi (B, H, T, n), n = 1, or d_head for a gate on every dimension ----

class WholeInputGate(nn.Module):
    """sigmoid(x W) of the whole attention input x, without a bias (Qwen, arXiv 2505.06708).

    With n = 1 it is the paper's all-heads-linear gate without its bias, so without gate_init. Qwen
    initializes W as any Linear; here it starts as the paper's gates do."""

    def __init__(self, width, heads, n=1):
        super().__init__()
        self.heads = heads
        self.weight = nn.Parameter(uniform_like_linear((heads * n, width), fan_in=width))

    def forward(self, x, v):
        pi = F.linear(x, self.weight).sigmoid()  # (B, T, H * n)
        return pi.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class ValueGate(WholeInputGate):
    """sigmoid(v W) of all heads' values at the query's own token (VGA, arXiv 2510.09017, B)."""

    def forward(self, x, v):
        return super().forward(v.transpose(1, 2).flatten(2), v)  # (B, H, T, d_head) -> (B, T, d)


# ---- before the taps: (q, k, v), each (B, H, T, d_head) -> (q, k, v) ----

class ExtraKey(nn.Module):
    """One more key, the same in every sequence, seen by every query: with a learned value (arXiv
    2402.17762), or with the value 0 (arXiv 2410.10781), which is a learned sink that depends on the
    query. Both start at normal(0, 0.02), as in the authors' code, and do not decay, as biases here
    never do; in theirs they do.

    They stand behind the last token and pass the taps with the others: a chip holds them in the
    same int8 tensors, so that a large k' or v' coarsens the grid of all keys or values."""

    def __init__(self, width, heads, with_value):
        super().__init__()
        shape = heads, 1, width // heads
        self.k_bias = nn.Parameter(0.02 * torch.randn(shape))
        self.v_bias = nn.Parameter(0.02 * torch.randn(shape)) if with_value else None

    def forward(self, q, k, v):
        key = self.k_bias.to(k.dtype).expand(len(k), -1, -1, -1)  # (B, H, 1, d_head)
        value = (torch.zeros_like(key) if self.v_bias is None else
                 self.v_bias.to(v.dtype).expand_as(key))
        return q, torch.cat((k, key), dim=2), torch.cat((v, value), dim=2)


class QKNorm(nn.Module):
    """Queries and keys divided by their root mean square over d_head, times a gain each that all
    heads share (as Qwen3 does; ViT-22B, arXiv 2302.05442, has LayerNorms there). It bounds |s_j| by
    sqrt(d_head) max |g| max |g'|.

    The gains are weights of norms: they are quantized, and decay with --decay-layernorm."""

    def __init__(self, d_head, eps):
        super().__init__()
        self.queries_norm, self.keys_norm = nn.RMSNorm(d_head, eps), nn.RMSNorm(d_head, eps)

    def forward(self, q, k, v):
        return self.queries_norm(q.float()).to(v.dtype), self.keys_norm(k.float()).to(v.dtype), v


# ---- by name ----

def row_clipped(c):
    if not c.causal or c.alpha is None:
        raise UserError("--attention row-clipped needs a causal model (OPT) and --alpha")
    return Heads(RowClippedSoftmax(c.alpha, c.zeta))


ATTENTIONS |= {
    "row-clipped": row_clipped,
    "softmax1": lambda c: Heads(Softmax1()),
    "learned-sink": lambda c: Heads(LearnedSink(c.heads)),
    "sigmoid": lambda c: Heads(SigmoidAttention(c.seq_len)),
    "relu": lambda c: Heads(ReLUAttention()),
    "softpick": lambda c: Heads(Softpick()),
    "headwise-gate": lambda c: Heads(nn.Softmax(-1), WholeInputGate(c.width, c.heads)),
    "elementwise-gate": lambda c: Heads(nn.Softmax(-1),
                                        WholeInputGate(c.width, c.heads, c.width // c.heads)),
    "value-gate": lambda c: Heads(nn.Softmax(-1), ValueGate(c.width, c.heads)),
    "k-bias": lambda c: Heads(nn.Softmax(-1), None, ExtraKey(c.width, c.heads, False)),
    "kv-bias": lambda c: Heads(nn.Softmax(-1), None, ExtraKey(c.width, c.heads, True)),
    "qk-norm": lambda c: Heads(nn.Softmax(-1), None, QKNorm(c.width // c.heads, c.norm_eps)),
}


NORMS["rmsnorm"] = lambda c: nn.RMSNorm(c.width, eps=c.norm_eps, elementwise_affine=False)
