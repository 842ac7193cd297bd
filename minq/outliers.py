"""How strong a model's outliers are: infinity norm and kurtosis (paper, sec. 5).

    with watch(model, ("ffn_output", *model.kurtosis_taps)) as outliers:
        for inputs, _ in validation_batches:
            model(*inputs)
    max(outliers.mean["ffn_output"]["inf_norm"]), outliers.avg_kurtosis(model.kurtosis_taps)

Here x is one activation of a batch, (B, T, d); a "tensor" in the paper's sense is one sample's
(T, d). (In two places of an OPT it is one token's (d,): see `kurtosis_taps` in model.py.)
"""
from contextlib import ExitStack, contextmanager

import torch


# ---- metrics: one value per sample ----

def inf_norm(x):
    """max |x| over each sample's (T, d): (B, T, d) -> (B,)"""
    return x.flatten(1).abs().amax(dim=1)


def kurtosis(x):
    """mean((x - mu)^4) / std^4 over each sample's (T, d): (B, T, d) -> (B,).

    Not excess (a Gaussian has 3), population standard deviation, no epsilon: a constant sample
    gives NaN, or 1 where its mean is rounded.
    """
    x = x.float().flatten(1)
    squares = (x - x.mean(dim=1, keepdim=True)).square_()
    return squares.square().mean(dim=1) / squares.mean(dim=1).square()


def norms_and_kurtosis(x):
    """For `watch`: the paper's two metrics, and the mean kurtosis of a sample's tokens, (d,)."""
    of_tokens = kurtosis(x.flatten(0, -2)).view(len(x), -1).mean(dim=1)
    return {"inf_norm": inf_norm(x), "kurtosis": kurtosis(x), "token_kurtosis": of_tokens}


def growth(x):
    """For `watch`: the paper's metrics, and of each sample's largest |value|, M, in (B, ..., d):

    sigma           standard deviation of all values but those in M's dimension, (B,)
    max_over_sigma  M / sigma, (B,)
    share           M^2 / sum of squares of M's token: its share of its token's energy, (B,)

    A LayerNorm divides a token by its own deviation: once the share is nearly 1 the normalized
    token hardly changes any more, and there is nothing left to gain from growing.
    What lies between B and d counts as tokens: (B, T, d), or (B, H, T, d_head) of queries.
    """
    metrics = norms_and_kurtosis(x)
    x = x.float().flatten(1, -2)  # (B, tokens, d)
    samples, d = torch.arange(len(x), device=x.device), x.shape[-1]
    top, place = x.abs().flatten(1).max(dim=1)  # (B,)
    token, dimension = place // d, place % d
    share = top.square() / x[samples, token].square().sum(dim=1)

    others, n = x.clone(), x.shape[1] * (d - 1)
    others[samples, :, dimension] = 0.0
    mean = others.sum(dim=(1, 2), keepdim=True) / n
    squares = (others - mean).square()
    squares[samples, :, dimension] = 0.0
    sigma = (squares.sum(dim=(1, 2)) / n).sqrt()
    return metrics | {"sigma": sigma, "max_over_sigma": top / sigma, "share": share}


# ---- listening to a model ----

@contextmanager
def listening(model, taps, hear):
    """While active, call hear(tap, place, x) with what passes the named taps.

    taps: names without the _tap suffix; or "layer_input", what a block gets; or "gate_output", pi.
    place: how many of that name come before it in the model; of a block's tap the layer, from 0.
    Yields a dict: tap -> its number of places.
    """
    places = dict.fromkeys(taps, 0)

    def listen(register, tap, seen):
        place = places[tap]
        places[tap] += 1
        hooks.callback(register(lambda *passed: hear(tap, place, seen(*passed).detach())).remove)

    with ExitStack() as hooks:
        for name, module in model.named_modules():
            last = name.rpartition(".")[2]
            tap = "gate_output" if last == "gate" else last.removesuffix("_tap")
            if tap in places and tap != last:
                listen(module.register_forward_hook, tap, lambda module, args, x: x)
        for block in model.layers if "layer_input" in places else ():
            listen(block.register_forward_pre_hook, "layer_input", lambda module, args: args[0])
        yield places


@contextmanager
def watch(model, taps=("ffn_output", "layer_output"), measure=norms_and_kurtosis):
    """While active, average `measure` over all samples that pass the named taps; yields Averages.

    measure: a function from an activation to a dict of per-sample tensors, (B, ...).
    Raises KeyError for a tap that the model does not have, or has not called.
    """
    hear = lambda tap, place, x: averages.add(tap, place, measure(x), len(x))
    with listening(model, taps, hear) as places:
        averages = Averages(places)
        yield averages
    for tap, counts in averages.counts.items():
        if 0 in counts:
            raise KeyError(f"nothing has passed the model's tap {tap} in place {counts.index(0)}")


class Averages:
    """What `watch` has measured: `mean[tap][metric]` is a list with an entry per place."""

    def __init__(self, places):
        for tap, n in places.items():
            if n == 0:
                raise KeyError(f"the model has no tap named {tap}")
        self.sums = {tap: [{} for _ in range(n)] for tap, n in places.items()}  # over samples
        self.counts = {tap: [0] * n for tap, n in places.items()}

    def add(self, tap, place, measured, samples):
        sums = self.sums[tap][place]
        for metric, value in measured.items():
            sums[metric] = sums.get(metric, 0) + value.float().sum(dim=0)
        self.counts[tap][place] += samples

    @property
    def mean(self):
        """tap -> metric -> list over places of the mean over samples (a float, or a list)."""
        found = {tap: [*zip(self.sums[tap], self.counts[tap])] for tap in self.sums}
        return {tap: {metric: [(sums[metric] / n).tolist() for sums, n in places]
                      for metric in places[0][0]} for tap, places in found.items()}

    def avg_kurtosis(self, taps):
        """Mean over samples, then over all places of the taps (Table 2's "Avg. kurtosis").

        taps: tap -> "kurtosis", of samples, or "token_kurtosis".
        """
        kurtoses = [value for tap, kind in taps.items() for value in self.mean[tap][kind]]
        return sum(kurtoses) / len(kurtoses)
