"""The numbers behind the paper's figures: where outliers sit, what each head does (sec. 3).

    found = survey(model, batches, device, tap="ffn_output", vocab_size=260)
    found["heads"]["attention"]                      # (layers, heads), a mean over samples
    found["outliers"]["ffn_output"]["by_dimension"]  # (layers, d), outliers per sample

Layers, heads, positions and dimensions count from 0 here; lab/analyze.py adds 1 to layers and
heads.
"""
from contextlib import contextmanager
from string import punctuation

import numpy as np
import torch

from lab.backcopy import TRIGGERS
from minq.outliers import Averages, listening, norms_and_kurtosis
from minq.training import to_device

OUTLIER_TAPS = ("ffn_output", "layer_output")
HEAD_TAPS = ("probs", "scores", "values", "gate_output")  # as head_measures takes them


# ---- tensors of one forward pass ----

@contextmanager
def record(model, taps):
    """Keep what passed the named taps last: `kept[tap][layer]`. "gate_output" is pi (B, H, T) or
    (B, H, T, n), None without a gate. A key that is no token (cures.ExtraKey) stands last in
    scores, probs and values."""
    kept = {tap: [None] * len(model.layers) for tap in taps}

    def keep(tap, layer, x):
        kept[tap][layer] = x

    with listening(model, taps, keep):
        yield kept


# ---- measures: one value per sample ----

def is_outlier(x):
    """Which values lie more than 6 standard deviations from their sample's mean (footnote 1)."""
    flat = x.float().flatten(1)
    std, mean = torch.std_mean(flat, dim=1, correction=0, keepdim=True)
    return ((flat - mean).abs() > 6 * std).view_as(x)


def outlier_measures(x):
    """The paper's metrics of x (B, T, d), (B,) each; the number of outliers and the largest |x| of
    each token position, (B, T), and of each hidden dimension, (B, d)."""
    outliers, sizes = is_outlier(x), x.abs()
    return norms_and_kurtosis(x) | {
        "by_position": outliers.sum(dim=2), "by_dimension": outliers.sum(dim=1),
        "peak_by_position": sizes.amax(dim=2), "peak_by_dimension": sizes.amax(dim=1)}


def parking(probs, values, causal=False):
    """How much of a head's attention lies on one token, and what the head does with it.

    probs (B, H, T, T or more): rows are queries; values (B, H, T or more, d_head); what stands
    behind the T tokens is no token. Returns measures, (B, H) each, and each sample's sink (B, H):
    the position whose probability, averaged over all T queries, is the largest. Whether it holds
    the start token or a delimiter does not matter.

    attention    that average. A causal query gives 0 to later tokens.
    even         the same average where each query gives 1 / n to each of its n tokens: 1 / T, or
                 causally the mean of 1 / t over the rows t (from 1) that see the sink, and 0 in
                 the others. At T = 32 it is 0.127 for the first token.
    sink_value   the norm of the sink's value, divided by the mean norm of all tokens' values
    update       the mean norm of probabilities times values, before the gate, divided by that mean
                 norm
    even_update  the same where each query averages its n values evenly and these are independent:
                 the mean of 1 / sqrt(n) over queries
    """
    T = probs.shape[2]
    allowed = probs.new_ones(T, T).tril(0 if causal else T)
    n = allowed.sum(dim=1, keepdim=True)  # (T, 1), tokens that a query sees
    attention, sink = probs[..., :T].mean(dim=2).max(dim=-1)
    norms = values[:, :, :T].norm(dim=-1)  # (B, H, T)
    mean_norm = norms.mean(dim=-1).clamp(min=torch.finfo(norms.dtype).tiny)  # a head may hold zeros
    return {"attention": attention, "even": (allowed / n).mean(dim=0)[sink],
            "sink_value": norms.gather(-1, sink[..., None])[..., 0] / mean_norm,
            "update": (probs @ values).norm(dim=-1).mean(dim=-1) / mean_norm,
            "even_update": n.rsqrt().mean().expand_as(mean_norm)}, sink


def parks(attention, even):
    """Whether a head parks, by means over samples of `parking`'s measures: its sink has more than
    0.3 of its attention, and more than twice what even attention would give it. Whether it then
    hands on nothing, or one token's value to all, `sink_value` and `update` tell."""
    return (attention > 0.3) & (attention > 2 * even)


def head_measures(probs, scores, values, gate=None, causal=False):
    """What each head of a layer does, (B, H) each, and the position of each sample's sink, (B, H):
    `parking`'s measures, and

    zeros, ones  the fraction of probabilities that are exactly 0 and exactly 1. Those that a causal
                 mask forbids do not count, nor does the first causal query, which has no choice
    score_range  a query's largest minus its smallest softmax input, unmasked ones only; mean over
                 queries
    pi           the mean of gate (B, H, T) or (B, H, T, n), where there is one
    """
    measures, sink = parking(probs, values, causal)
    T = probs.shape[2]  # what stands behind them is no token
    probs, scores = probs[..., :T], scores[..., :T]
    allowed = torch.ones(T, T, dtype=torch.bool, device=probs.device).tril(0 if causal else T)
    possible = probs[..., allowed & (allowed.sum(dim=1, keepdim=True) > 1)]  # (B, H, n)
    highest = scores.masked_fill(~allowed, -torch.inf).amax(dim=-1)  # (B, H, T)
    lowest = scores.masked_fill(~allowed, torch.inf).amin(dim=-1)
    zeros, ones = ((possible == end).float().mean(dim=-1) for end in (0, 1))
    measures |= {"zeros": zeros, "ones": ones, "score_range": (highest - lowest).mean(dim=-1)}
    return measures | ({} if gate is None else {"pi": gate.flatten(2).mean(dim=-1)}), sink


# ---- one pass over the validation data ----

@torch.no_grad()
def survey(model, batches, device, tap, vocab_size=None):
    """Measure outliers and heads over `batches` of (inputs, targets). Returns a dict of arrays:

    samples                 how many
    outliers[tap][measure]  outlier_measures, (L, ...), means over samples
    heads[measure]          head_measures, (L, H), means over samples; "parks": bool
    sinks                   (L, H), the token id that is most often the sink
    tokens                  (n,), how often each token id occurred
    tokens_of_outliers      (n,), outliers at each token id, in all layers' `tap`

    tap: ffn_output or layer_output. Token ids are those of the text, or, without `vocab_size`
    (images), positions.
    """
    L, H, n = len(model.layers), model.config.heads, vocab_size or model.config.seq_len
    tokens, of_outliers, sinks = np.zeros(n), np.zeros(n), np.zeros((L, H, n))
    averages = Averages(dict.fromkeys((*OUTLIER_TAPS, "heads"), L))
    with record(model, (*OUTLIER_TAPS, *HEAD_TAPS)) as kept:
        for batch in batches:
            inputs, _ = to_device(batch, device)
            model(*inputs)
            B = len(inputs[0])
            ids = inputs[0] if vocab_size else torch.arange(n, device=device).expand(B, n)  # (B, T)
            tokens += count(ids[:, None], n)[0]
            for layer in range(L):
                for name in OUTLIER_TAPS:
                    averages.add(name, layer, outlier_measures(kept[name][layer]), B)
                sample, position, _ = is_outlier(kept[tap][layer]).nonzero(as_tuple=True)
                of_outliers += count(ids[sample, position, None], n)[0]
                tensors = [kept[name][layer] for name in HEAD_TAPS]
                measures, sink = head_measures(*tensors, model.config.causal)
                averages.add("heads", layer, measures, B)
                sinks[layer] += count(ids.gather(1, sink), n)
    means = {name: {measure: np.array(x, np.float32) for measure, x in measures.items()}
             for name, measures in averages.mean.items()}
    heads = means.pop("heads")
    heads = {"parks": parks(heads["attention"], heads["even"])} | heads
    return {"samples": averages.counts["heads"][0], "heads": heads, "outliers": means,
            "sinks": sinks.argmax(axis=-1), "tokens": tokens, "tokens_of_outliers": of_outliers}


@torch.no_grad()
def at_triggers(model, batches, device):
    """What heads of an OPT attend to in the backcopy task: {"at triggers" or "elsewhere": {measure:
    [layer][head]}}, means over the queries of `batches`.

    A query at a trigger has work to do: the next token is a copy of the one before it (but for two
    in 256, where a chain begins or ends). All others follow from the query's own token. The first
    two queries are left out, for which the token before is the start token, or none.

    start, before    probability of the start token, and of the token before the query
    pi               the gate, where there is one
    """
    averages = Averages(dict.fromkeys(("at triggers", "elsewhere"), len(model.layers)))
    with record(model, ("probs", "gate_output")) as kept:
        for batch in batches:
            (tokens,), _ = to_device(batch, device)
            model(tokens)
            triggers = tokens[:, 2:] < TRIGGERS  # (B, T - 2)
            for layer, (probs, pi) in enumerate(zip(*kept.values())):
                seen = {"start": probs[..., 2:, 0], "before": probs.diagonal(-1, 2, 3)[..., 1:]}
                if pi is not None:
                    seen["pi"] = pi.reshape(*probs.shape[:3], -1).mean(dim=-1)[..., 2:]
                for name, places in ("at triggers", triggers), ("elsewhere", ~triggers):
                    measures = {key: x.transpose(1, 2)[places] for key, x in seen.items()}  # (n, H)
                    averages.add(name, layer, measures, places.sum().item())
    return averages.mean


def count(ids, n):
    """How often each of n ids occurs in each column: ids (B, H, ...) -> (H, n)."""
    return np.stack([np.bincount(x.flatten().cpu(), minlength=n) for x in ids.unbind(1)])


def worst_dimension(outliers):
    """(layer, dimension) with the most outliers; among equals, the largest mean peak.

    The last layer is left out if there are others: what stands in its output reaches no head
    (Figure 4).
    """
    counts, peaks = outliers["by_dimension"], outliers["peak_by_dimension"]  # (L, d)
    places = np.ndindex(max(1, len(counts) - 1), counts.shape[1])
    return max(places, key=lambda at: (counts[at], peaks[at]))


# ---- tokens by name ----

def token_names(text):
    """What to write on an axis for each token id of a Text: characters, words, or numbers."""
    marks = {" ": "␣", "\n": "↵", "\t": "⇥", "\r": "␍"}
    byte = lambda i: marks.get(chr(i), chr(i) if 32 < i < 127 else f"{i:02x}")
    known = text.words or [byte(i) for i in range(256 if text.is_bytes else 0)]
    names = known + [str(i) for i in range(len(known), text.vocab_size)]
    for name in ("[PAD]", "[CLS]", "[SEP]", "[MASK]"):
        names[getattr(text, name.strip("[]").lower())] = name
    return names


def is_delimiter(name):
    """Whether a token is [CLS] or [SEP], a space, a line's end, or punctuation (the paper's: [SEP],
    "." and ",")."""
    return name in ("[CLS]", "[SEP]", "␣", "↵") or not name.strip(punctuation)
