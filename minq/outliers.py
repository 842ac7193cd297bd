"""How strong a model's outliers are: infinity norm, kurtosis, and 6-sigma counts (paper, sec. 3 and 5).

    with watch(model) as outliers:
        for inputs, _ in validation_batches:
            model(*inputs)
    outliers.max_inf_norm("ffn_output"), outliers.avg_kurtosis("layer_output")

Here x is one activation of a batch, (B, T, d); a "tensor" in the paper's sense is one sample's (T, d).
"""
import torch

from minq.model import Block

# The tensor whose norm Table 2 shows, by family; the kurtosis is always that of layer_output.
NORM_COLUMN = {"bert": "ffn_output", "opt": "layer_output", "vit": "layer_output"}


# ---- metrics: one value per sample ----

def inf_norm(x):
    """max |x| over each sample's (T, d): (B, T, d) -> (B,)"""
    x = x.flatten(1)
    return torch.maximum(-x.amin(dim=1), x.amax(dim=1))


def kurtosis(x):
    """mean((x - mu)^4) / std^4 over each sample's (T, d): (B, T, d) -> (B,).

    Not excess (a Gaussian has 3), population standard deviation, no epsilon: a constant sample gives NaN.
    """
    x = x.float().flatten(1)
    squares = (x - x.mean(dim=1, keepdim=True)).square_()
    return squares.square().mean(dim=1) / squares.mean(dim=1).square()


def is_outlier(x):
    """Which values lie more than 6 standard deviations from their sample's mean (footnote 1), bool (B, T, d)."""
    flat = x.float().flatten(1)
    std, mean = torch.std_mean(flat, dim=1, correction=0, keepdim=True)
    return ((flat - mean).abs() > 6 * std).view_as(x)


def norms(x):
    """The paper's two metrics."""
    return {"inf_norm": inf_norm(x), "kurtosis": kurtosis(x)}


def outlier_counts(x):
    """Outliers of each sample by token position (B, T) and by hidden dimension (B, d)."""
    outliers = is_outlier(x)
    return {"by_position": outliers.sum(dim=2), "by_dimension": outliers.sum(dim=1)}


# ---- measuring a model ----

class watch:
    """Context manager: average `measure` over every sample that passes the named taps of each layer.

    taps: names without the _tap suffix, or "layer_input", what each block gets (the blog's norms).
    measure: a function from an activation to a dict of per-sample tensors, (B, ...). After use,
    `mean[tap][metric]` is a list with an entry per layer.
    """

    def __init__(self, model, taps=("ffn_output", "layer_output"), measure=norms):
        self.model, self.taps, self.measure = model, taps, measure

    def __enter__(self):
        self.sums = {tap: [] for tap in self.taps}  # tap -> per layer: metric -> sum over samples
        self.counts = {tap: [] for tap in self.taps}
        self.handles = []
        for name, module in self.model.named_modules():
            tap = name.rpartition(".")[2].removesuffix("_tap")
            if name.endswith("_tap") and tap in self.taps:
                add = self.new_layer(tap)
                self.handles.append(module.register_forward_hook(lambda module, args, x, add=add: add(x)))
            if isinstance(module, Block) and "layer_input" in self.taps:
                add = self.new_layer("layer_input")
                self.handles.append(module.register_forward_pre_hook(lambda module, args, add=add: add(args[0])))
        missing = [tap for tap in self.taps if not self.sums[tap]]
        if missing:
            raise KeyError(f"the model has no tap named {missing[0]}")
        return self

    def new_layer(self, tap):
        """A function that adds up what it is given, as the next layer's `tap`."""
        layer = len(self.sums[tap])
        self.sums[tap].append({})
        self.counts[tap].append(0)

        def add(x):
            sums = self.sums[tap][layer]
            for metric, value in self.measure(x.detach()).items():
                sums[metric] = sums.get(metric, 0) + value.float().sum(dim=0)
            self.counts[tap][layer] += x.shape[0]
        return add

    def __exit__(self, *exception):
        for handle in self.handles:
            handle.remove()

    @property
    def mean(self):
        """tap -> metric -> list over layers of the mean over samples (a float, or a list for counts)."""
        return {tap: {metric: [(sums[metric] / count).tolist() for sums, count in zip(layers, self.counts[tap])]
                      for metric in layers[0]} for tap, layers in self.sums.items()}

    def max_inf_norm(self, tap):
        """Mean over samples, then the largest layer's (Table 2's "Max inf. norm")."""
        return max(self.mean[tap]["inf_norm"])

    def avg_kurtosis(self, tap):
        """Mean over samples, then over layers (Table 2's "Avg. kurtosis"); not excess."""
        kurtoses = self.mean[tap]["kurtosis"]
        return sum(kurtoses) / len(kurtoses)
