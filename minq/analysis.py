"""The numbers behind the paper's figures: where outliers sit, and what each attention head does (sec. 3).

    found = survey(model, batches, device, tap="ffn_output", vocab_size=260)
    found["heads"]["sink_rate"]          # (layers, heads), a mean over samples
    found["outliers"]["ffn_output"]["by_dimension"]  # (layers, d), a count

Layers, heads, positions and dimensions count from 0 here; analyze.py adds 1 to layers and heads.
"""
import math
import string
from contextlib import contextmanager

import numpy as np
import torch

from minq.outliers import is_outlier, listening, norms_and_kurtosis, watch
from minq.training import to_device

HEAD_TAPS = ("values", "scores", "probs", "context", "gate_output")
GATE_BINS = 20
DELIMITERS = ("[CLS]", "[SEP]", "newline", "space", "punctuation")  # the paper's are [SEP], "." and ","


# ---- tensors of one forward pass ----

@contextmanager
def record(model, taps):
    """Keep what passed the named taps last: `kept[tap][layer]`. "gate_output" is pi (B, H, T) or, of a gate on every
    dimension, (B, H, T, d_head); None without a gate. A key that is no token (cures.ExtraKey) is left out."""
    kept = {tap: [None] * len(model.layers) for tap in taps}

    def keep(tap, layer, x):
        if tap in ("scores", "probs"):
            x = x[..., :x.shape[-2]]
        kept[tap][layer] = x[:, :, :model.config.seq_len] if tap == "values" else x

    with listening(model, taps, keep):
        yield kept


# ---- measures: one value per sample ----

def outlier_counts(x):
    """Outliers of each sample by token position (B, T) and by hidden dimension (B, d)."""
    outliers = is_outlier(x)
    return {"by_position": outliers.sum(dim=2), "by_dimension": outliers.sum(dim=1)}


def outlier_measures(x):
    """For `watch`: the paper's metrics, counts of outliers, and the largest |x| by position and dimension."""
    peaks = {"peak_by_position": x.abs().amax(dim=2), "peak_by_dimension": x.abs().amax(dim=1)}
    return norms_and_kurtosis(x) | outlier_counts(x) | peaks


def head_measures(probs, scores, values, context, gate=None, causal=False):
    """What each head of a layer does, (B, H) each, and the position of each sample's sink, (B, H).

    probs, scores (B, H, T, T): rows are queries; values (B, H, T, d_head); context (B, T, width), after the gate.

    sink_rate    A token's share of a head's attention is its probability, averaged over all T queries;
                 the sink is the token with the largest share, and the sink rate is that share. Even
                 attention gives 1 / T. A clipped softmax hands out less than 1 a query, and a causal
                 query gives 0 to later tokens, so shares need not sum to 1, and early tokens get more.
    sink_value   the norm of the sink's value vector, divided by the mean norm over all tokens
    zeros, ones  the fraction of probabilities that are exactly 0 and exactly 1. Those that a causal mask
                 forbids do not count, nor does the first causal query, which has no choice
    score_range  a query's largest minus its smallest softmax input, unmasked ones only; mean over queries
    update       the mean norm of what the head hands on, probabilities times values times gate, divided
                 by the mean norm of its values. 0 is a head that does nothing, by whatever means.
    gate         the mean of pi over tokens (and dimensions, if each has its own), only where there is a gate
    """
    heads, T = probs.shape[1:3]
    allowed = torch.ones(T, T, dtype=torch.bool, device=probs.device)
    if causal:
        allowed = allowed.tril()
    counted = allowed & (allowed.sum(dim=1, keepdim=True) > 1)  # (T, T)
    share, sink = probs.mean(dim=2).max(dim=-1)  # (B, H)
    lengths = values.norm(dim=-1)  # (B, H, T)
    mean_length = lengths.mean(dim=-1).clamp(min=torch.finfo(torch.float32).tiny)  # a dead head has none
    possible = probs[..., counted]  # (B, H, T^2) or, causal, (B, H, T (T + 1) / 2 - 1)
    highest = scores.masked_fill(~allowed, -torch.inf).amax(dim=-1)  # (B, H, T)
    lowest = scores.masked_fill(~allowed, torch.inf).amin(dim=-1)
    handed_on = context.unflatten(-1, (heads, -1)).norm(dim=-1).mean(dim=1)  # (B, H)
    measures = {"update": handed_on / mean_length, "sink_rate": share,
                "sink_value": lengths.gather(-1, sink[..., None])[..., 0] / mean_length,
                "zeros": (possible == 0).float().mean(dim=-1), "ones": (possible == 1).float().mean(dim=-1),
                "score_range": (highest - lowest).mean(dim=-1)}
    return measures | ({} if gate is None else {"gate": gate.flatten(2).mean(dim=-1)}), sink


# ---- one pass over the validation data ----

@torch.no_grad()
def survey(model, batches, device, tap, vocab_size=None):
    """Measure outliers and heads over `batches` of (inputs, targets). Returns a dictionary of arrays:

    samples                 how many
    outliers[tap][measure]  outlier_measures, (L, ...): counts (by_...) are sums, all else means over samples
    heads[measure]          head_measures, (L, H), means over samples
    gate_counts             (L, H, GATE_BINS), a histogram of pi from 0 to 1; None without gates
    sinks                   (L, H), the token id that is most often the sink
    tokens                  (n,), how often each token id occurred
    tokens_of_outliers      (L, n), outliers at each token id, in `tap`
    tokens_of_peaks         (L, n), how often each token id held the largest |x| of its sample, in `tap`

    Token ids are those of the text, or, without `vocab_size` (images), positions.
    """
    config = model.config
    L, H, n = config.layers, config.heads, vocab_size or config.seq_len
    tokens, of_outliers, of_peaks, sinks = np.zeros(n), np.zeros((L, n)), np.zeros((L, n)), np.zeros((L, H, n))
    gate_counts = np.zeros((L, H, GATE_BINS))
    sums, samples = [{} for _ in range(L)], 0  # sums of head measures over samples, (H,) each
    taps = ("ffn_output", "layer_output")
    with watch(model, taps, outlier_measures) as watched, record(model, HEAD_TAPS + (tap,)) as kept:
        for batch in batches:
            inputs, _ = to_device(batch, device)
            model(*inputs)
            B = len(inputs[0])
            ids = inputs[0] if vocab_size else torch.arange(n, device=device).expand(B, n)  # (B, T)
            samples += B
            tokens += bincount(ids, n)
            for layer in range(L):
                x = kept[tap][layer]  # (B, T, d)
                of_outliers[layer] += bincount(ids, n, weights=is_outlier(x).sum(dim=2))
                peak = x.abs().amax(dim=2).argmax(dim=1, keepdim=True)  # (B, 1), a position
                of_peaks[layer] += bincount(ids.gather(1, peak), n)

                values, scores, probs, context, gate = (kept[name][layer] for name in HEAD_TAPS)
                measures, sink = head_measures(probs, scores, values, context, gate, config.causal)
                for name, value in measures.items():
                    sums[layer][name] = sums[layer].get(name, 0) + value.sum(dim=0)
                for head in range(H):
                    sinks[layer, head] += bincount(ids.gather(1, sink[:, head, None]), n)
                if gate is not None:
                    bins = (gate * GATE_BINS).long().clamp(max=GATE_BINS - 1)  # as pi
                    gate_counts[layer] += np.stack([bincount(bins[:, head], GATE_BINS) for head in range(H)])

    def over_samples(layers):
        """Per layer sums -> {measure: (L, ...)}"""
        return {name: np.stack([array(layer[name]) for layer in layers]) / (1 if name.startswith("by_") else samples)
                for name in layers[0]}

    return {"samples": samples, "tokens": tokens, "tokens_of_outliers": of_outliers, "tokens_of_peaks": of_peaks,
            "sinks": sinks.argmax(axis=-1), "gate_counts": gate_counts if "gate" in sums[0] else None,
            "heads": over_samples(sums), "outliers": {name: over_samples(watched.sums[name]) for name in taps}}


def array(x):
    """A tensor as a numpy array of float32."""
    return x.detach().float().cpu().numpy()


def bincount(ids, n, weights=None):
    return np.bincount(ids.flatten().cpu(), None if weights is None else weights.flatten().cpu(), minlength=n)


def worst_dimension(outliers):
    """(layer, dimension) with the most outliers; among equals, the largest mean peak.

    The last layer is left out if there are others: what stands in its output reaches no head (Figure 4).
    """
    counts, peaks = outliers["by_dimension"], outliers["peak_by_dimension"]  # (L, d)
    layers = max(1, len(counts) - 1)
    return max(np.ndindex(layers, counts.shape[1]), key=lambda at: (counts[at], peaks[at]))


# ---- tokens by name ----

def token_names(text):
    """What to write on an axis for each token id of a Text: characters, or numbers where they are not bytes."""
    marks = {" ": "␣", "\n": "↵", "\t": "⇥", "\r": "␍"}
    byte = lambda i: marks.get(chr(i), chr(i) if 32 < i < 127 else f"{i:02x}")
    names = text.words or [byte(i) if text.is_bytes else str(i) for i in range(text.vocab_size)]
    names = names + [str(i) for i in range(len(names), text.vocab_size)]
    for name in ("pad", "cls", "sep", "mask"):
        names[getattr(text, name)] = f"[{name.upper()}]"
    return names


def token_groups(names, is_bytes):
    """The group of each token: specials by their own names, bytes by their kind, others "punctuation" or "token"."""
    kinds = {"␣": "space", "↵": "newline"} | dict.fromkeys(string.punctuation, "punctuation")
    kinds |= dict.fromkeys(string.ascii_letters, "letter") | dict.fromkeys(string.digits, "digit")
    signs = lambda name: "punctuation" if name and not set(name) - set(string.punctuation) else "token"
    ordinary = lambda name: kinds.get(name, "other byte") if is_bytes else signs(name)
    return [name if name in ("[PAD]", "[CLS]", "[SEP]", "[MASK]") else ordinary(name) for name in names]


def group_shares(groups, counts):
    """{group: its share of `counts`, which has one a token id}; all zeros if nothing was counted."""
    totals = dict.fromkeys(groups, 0.0)
    for group, count in zip(groups, counts):
        totals[group] += float(count)
    return {group: total / max(counts.sum(), 1) for group, total in totals.items()}


def delimiter_share(shares):
    return sum(shares.get(group, 0.0) for group in DELIMITERS)


# ---- tokens that are patches ----

def on_patches(positions):
    """(N, T) -> (N, rows, columns): tokens back in their places in the image, without the first, [CLS]."""
    side = math.isqrt(positions.shape[1] - 1)
    return positions[:, 1:].reshape(-1, side, side)


def outlier_patches(x, values):
    """What Figure 3 shows of N images: x (N, T, d) has the outliers, values (N, T, d_head) are a head's.

    (map (N, rows, columns), its name, mean |value| of outlier and of other patches (N, 2), their names). Where
    no image has an outlier, the map is the largest |x|, and its largest patch stands in. NaN is a mean of nothing.
    """
    outliers = is_outlier(torch.from_numpy(x)).sum(dim=2).numpy()  # (N, T)
    peaks, sizes = np.abs(x).max(axis=2), np.abs(values).mean(axis=2)[:, 1:]
    found = outliers[:, 1:].any()
    marked = outliers[:, 1:] > 0 if found else peaks[:, 1:] == peaks[:, 1:].max(axis=1, keepdims=True)
    means = np.array([[size[part].mean() if part.any() else np.nan for part in (mark, ~mark)]
                      for size, mark in zip(sizes, marked)])
    if found:
        return on_patches(outliers), "outliers", means, ("outlier", "others")
    return on_patches(peaks), "largest |x|", means, ("largest", "others")
