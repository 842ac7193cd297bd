"""Attentions published since the paper, and one norm: each is an entry of ATTENTIONS (or NORMS).

    python train_opt.py --attention learned-sink

A row of softmax inputs is s_j over the keys j that its query may see; H heads, d = H * d_head dimensions.

    --attention       what is new                                           parameters a layer   source
    softmax1          p_j = exp(s_j) / (1 + sum_k exp(s_k))                 0                    Miller 2023; 2404.03828
    learned-sink      p_j = exp(s_j) / (exp(b) + sum_k exp(s_k))            H                    gpt-oss (OpenAI 2025)
    sigmoid           p_j = sigmoid(s_j - log T)                            0                    2409.04431
    relu              p_j = relu(s_j) / (keys in the row)                   0                    2309.08586, 2410.13835
    softpick          p_j = relu(exp(s_j) - 1) / sum_k |exp(s_k) - 1|       0                    2504.20966
    headwise-gate     pi = sigmoid(x W), a number a head                    d H                  2505.06708
    elementwise-gate  pi = sigmoid(x W), a number a dimension               d^2                  2505.06708
    value-gate        pi = sigmoid(v W), a number a head                    d H                  2510.09017
    k-bias            one more key k', whose value is zero                  d                    2410.10781
    kv-bias           one more key k' and its value v'                      2 d                  2402.17762
    qk-norm           q / rms(q) * g, k / rms(k) * g'                       2 d_head             2302.05442, Qwen3

    --norm rmsnorm    x / rms(x) in place of every LayerNorm                2 d less a norm      2506.19697

(--optimizer muon, accused beside them, is in optimizers.py.) All work in BERT, OPT and ViT. Probabilities, keys
and values pass their taps as ever, so they are quantized; gates stay in floating point, as the paper's do.
"""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from minq.attention import ATTENTIONS, uniform_like_linear
from minq.model import NORMS


# ---- in place of the softmax: scores (B, H, T, T), -inf where masked -> probabilities ----

def exponentials(scores):
    """exp(s - m) and exp(-m), that is exp(s) and 1 after division by exp(m), where m is the row's largest
    score, or 0: nothing overflows, and a row that is masked throughout gives zeros. In float32."""
    scores = scores.float()
    m = scores.detach().amax(dim=-1, keepdim=True).clamp(min=0)
    return (scores - m).exp(), (-m).exp()


class Softmax1(nn.Module):
    """exp(s_j) / (1 + sum_k exp(s_k)): as if there were one more key with score 0 and value 0 (Miller,
    "Attention is off by one"; OutEffHop, arXiv 2404.03828). A head that does nothing makes all scores negative."""

    def forward(self, scores):
        e, one = exponentials(scores)
        return e / (one + e.sum(dim=-1, keepdim=True))


class LearnedSink(nn.Module):
    """Softmax1 whose added score b is learned, one a head (gpt-oss). It starts at 0; gpt-oss: normal(0, 0.02).

    b stays in floating point: it is a bias of the softmax, which computes in floating point."""

    def __init__(self, heads):
        super().__init__()
        self.sink = nn.Parameter(torch.zeros(heads))

    def forward(self, scores):
        sink = self.sink.to(scores.dtype).view(-1, 1, 1).expand(*scores.shape[:-1], 1)  # (B, H, T, 1)
        return torch.cat((scores, sink), dim=-1).softmax(dim=-1)[..., :-1]


class SigmoidAttention(nn.Module):
    """sigmoid(s_j - log T), T the sequence length: no key competes with another (arXiv 2409.04431)."""

    def __init__(self, T):
        super().__init__()
        self.T = T

    def forward(self, scores):
        return (scores.float() - math.log(self.T)).sigmoid()


class ReLUAttention(nn.Module):
    """relu(s_j) / n, n the keys that the row may see: T (arXiv 2309.08586), or t + 1 in causal row t (2410.13835)."""

    def forward(self, scores):
        n = (scores > -torch.inf).sum(dim=-1, keepdim=True).clamp(min=1)  # (B, H, T, 1)
        return scores.relu() / n


class Softpick(nn.Module):
    """relu(exp(s_j) - 1) / sum_k |exp(s_k) - 1| (arXiv 2504.20966): a score below 0 gets nothing, but takes its
    share of the denominator; a masked one does not. The authors' 1e-8 keeps a row of zeros from 0 / 0."""

    def forward(self, scores):
        e, one = exponentials(scores)
        x = e - one
        sizes = x.abs().masked_fill(scores == -torch.inf, 0)
        return x.relu() / (sizes.sum(dim=-1, keepdim=True) + 1e-8)


# ---- gates: -> pi (B, H, T, n), n = 1, or d_head for a gate on every dimension ----

class WholeInputGate(nn.Module):
    """sigmoid(x W) of the whole attention input x, without a bias (Qwen, arXiv 2505.06708).

    With n = 1 it is the paper's all-heads-linear gate without its bias, so without gate_init; the paper's own
    gates see a slice of x each. Qwen initializes W as any Linear; here it starts as the paper's gates do."""

    def __init__(self, width, heads, n=1):
        super().__init__()
        self.heads = heads
        self.weight = nn.Parameter(uniform_like_linear((heads * n, width), fan_in=width))

    def forward(self, x):
        pi = F.linear(x, self.weight).sigmoid()  # (B, T, H * n)
        return pi.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class ValueGate(WholeInputGate):
    """sigmoid(v W) of all heads' values at the query's own token (VGA, arXiv 2510.09017, appendix B)."""
    of_values = True

    def forward(self, v):
        return super().forward(v.transpose(1, 2).flatten(2))  # (B, H, T, d_head) -> (B, T, width)


# ---- before the taps: (q, k, v), each (B, H, T, d_head) -> (q, k, v) ----

class ExtraKey(nn.Module):
    """One more key, the same in every sequence, seen by every query: with a learned value (arXiv 2402.17762), or
    with the value 0 (arXiv 2410.10781), which is a learned sink that depends on the query. Both start at
    normal(0, 0.02), as in the authors' code, and do not decay, as biases here never do; in theirs they do.

    They stand behind the last token and pass the taps with the others: a chip holds them in the same int8
    tensors, so that a large k' or v' coarsens the grid of all keys or values, as it would there."""

    def __init__(self, heads, d_head, with_value):
        super().__init__()
        self.k_bias = nn.Parameter(0.02 * torch.randn(heads, 1, d_head))
        self.v_bias = nn.Parameter(0.02 * torch.randn(heads, 1, d_head)) if with_value else None

    def forward(self, qkv):
        q, k, v = qkv
        key = self.k_bias.to(k.dtype).expand(len(k), -1, -1, -1)  # (B, H, 1, d_head)
        value = torch.zeros_like(key) if self.v_bias is None else self.v_bias.to(v.dtype).expand_as(key)
        return q, torch.cat((k, key), dim=2), torch.cat((v, value), dim=2)


class QKNorm(nn.Module):
    """Queries and keys divided by their root mean square over d_head, times a gain each that all heads share (as
    Qwen3 does; ViT-22B, arXiv 2302.05442, has LayerNorms there). It bounds |s_j| by sqrt(d_head) max |g| max |g'|.

    The gains are weights of norms: they are quantized, and decay with --decay-layernorm."""

    def __init__(self, d_head, eps):
        super().__init__()
        self.of_queries, self.of_keys = nn.RMSNorm(d_head, eps), nn.RMSNorm(d_head, eps)

    def forward(self, qkv):
        q, k, v = qkv
        return self.of_queries(q.float()).to(v.dtype), self.of_keys(k.float()).to(v.dtype), v


# ---- by name ----

softmax = lambda: nn.Softmax(dim=-1)
d_head = lambda c: c.width // c.heads

ATTENTIONS |= {
    "softmax1": lambda c: (Softmax1(), None),
    "learned-sink": lambda c: (LearnedSink(c.heads), None),
    "sigmoid": lambda c: (SigmoidAttention(c.seq_len), None),
    "relu": lambda c: (ReLUAttention(), None),
    "softpick": lambda c: (Softpick(), None),
    "headwise-gate": lambda c: (softmax(), WholeInputGate(c.width, c.heads)),
    "elementwise-gate": lambda c: (softmax(), WholeInputGate(c.width, c.heads, d_head(c))),
    "value-gate": lambda c: (softmax(), ValueGate(c.width, c.heads)),
    "k-bias": lambda c: (softmax(), None, ExtraKey(c.heads, d_head(c), with_value=False)),
    "kv-bias": lambda c: (softmax(), None, ExtraKey(c.heads, d_head(c), with_value=True)),
    "qk-norm": lambda c: (softmax(), None, QKNorm(d_head(c), c.norm_eps)),
}

NORMS["rmsnorm"] = lambda c: nn.RMSNorm(c.width, eps=c.norm_eps, elementwise_affine=False)
