"""How strong a model's outliers are: infinity norm, kurtosis, and 6-sigma counts (paper, sec. 3 and 5).

    with watch(model, ("ffn_output", *model.kurtosis_taps)) as outliers:
        for inputs, _ in validation_batches:
            model(*inputs)
    outliers.max_inf_norm("ffn_output"), outliers.avg_kurtosis(*model.kurtosis_taps)

Here x is one activation of a batch, (B, T, d); a "tensor" in the paper's sense is one sample's (T, d).
"""
from contextlib import ExitStack, contextmanager

import torch

from minq.model import Block

# ---- metrics: one value per sample ----

def inf_norm(x):
    """max |x| over each sample's (T, d): (B, T, d) -> (B,)"""
    x = x.flatten(1)
    return torch.maximum(-x.amin(dim=1), x.amax(dim=1))


def kurtosis(x):
    """mean((x - mu)^4) / std^4 over each sample's (T, d): (B, T, d) -> (B,).

    Not excess (a Gaussian has 3), population standard deviation, no epsilon: a constant sample gives
    NaN, or 1 where its mean is rounded.
    """
    x = x.float().flatten(1)
    squares = (x - x.mean(dim=1, keepdim=True)).square_()
    return squares.square().mean(dim=1) / squares.mean(dim=1).square()


def is_outlier(x):
    """Which values lie more than 6 standard deviations from their sample's mean (footnote 1), bool (B, T, d)."""
    flat = x.float().flatten(1)
    std, mean = torch.std_mean(flat, dim=1, correction=0, keepdim=True)
    return ((flat - mean).abs() > 6 * std).view_as(x)


def norms_and_kurtosis(x):
    """The paper's two metrics."""
    return {"inf_norm": inf_norm(x), "kurtosis": kurtosis(x)}


# ---- listening to a model ----

@contextmanager
def listening(model, taps, hear):
    """While active, call hear(tap, place, x) with what passes the named taps.

    taps: names without the _tap suffix; or "layer_input", what a block gets; or "gate_output", pi.
    place: how many of that name come before it in the model; the layer, from 0, for a tap of a block.
    Yields a dict: tap -> its number of places.
    """
    places = dict.fromkeys(taps, 0)
    with ExitStack() as hooks:
        for name, module in model.named_modules():
            last = name.rpartition(".")[2]
            tap = "gate_output" if last == "gate" else last.removesuffix("_tap")
            if tap in places and tap != last:
                hook = lambda m, args, x, tap=tap, place=places[tap]: hear(tap, place, x.detach())
                hooks.callback(module.register_forward_hook(hook).remove)
                places[tap] += 1
            if isinstance(module, Block) and "layer_input" in places:
                hook = lambda m, args, place=places["layer_input"]: hear("layer_input", place, args[0].detach())
                hooks.callback(module.register_forward_pre_hook(hook).remove)
                places["layer_input"] += 1
        yield places


@contextmanager
def watch(model, taps=("ffn_output", "layer_output"), measure=norms_and_kurtosis):
    """While active, average `measure` over every sample that passes the named taps; yields Averages.

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
        self.sums = {tap: [{} for _ in range(n)] for tap, n in places.items()}  # metric -> sum over samples
        self.counts = {tap: [0] * n for tap, n in places.items()}

    def add(self, tap, place, measured, samples):
        sums = self.sums[tap][place]
        for metric, value in measured.items():
            sums[metric] = sums.get(metric, 0) + value.float().sum(dim=0)
        self.counts[tap][place] += samples

    @property
    def mean(self):
        """tap -> metric -> list over places of the mean over samples (a float, or a list for counts)."""
        return {tap: {metric: [(sums[metric] / count).tolist() for sums, count in zip(places, self.counts[tap])]
                      for metric in places[0]} for tap, places in self.sums.items()}

    def max_inf_norm(self, tap):
        """Mean over samples, then the largest layer's (Table 2's "Max inf. norm")."""
        return max(self.mean[tap]["inf_norm"])

    def avg_kurtosis(self, *taps):
        """Mean over samples, then over all places of the taps (Table 2's "Avg. kurtosis"); not excess."""
        kurtoses = [value for tap in taps for value in self.mean[tap]["kurtosis"]]
        return sum(kurtoses) / len(kurtoses)
