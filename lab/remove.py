"""Does a model use its outliers, or does it only have them? They are removed, and nothing else is.

    python -m lab.remove zoo/bert-long-vanilla
    python -m lab.remove RUN --tokens start others --tap layer_output --layers 1 2 --sigma 4

Sun et al., Massive Activations (2402.17762, sec. 3) set the few largest values of an LLM's residual
stream, in the layer where they appear, to zero, and it breaks; to their mean over inputs, and
nothing changes: the model needs a constant there. (Their code does so to two dimensions of the
start token and of one other token, in one layer of LLaMA-2.)

Here the values of a tap beyond mean -+ 6 sigma are replaced in every layer. Mean and sigma are
those of the layer in the untouched model, over calibration inputs, without the start token. In
place of these values stands

    zero      0
    mean      the mean over inputs of that dimension, at tokens of that kind: the start token (of
              BERT and ViT: [CLS]), delimiters (lab.survey), or others
    limit     mean -+ 6 sigma: they are clamped
    control   themselves; as many others of the same tokens, in dimensions drawn once at random,
              are set to zero

A row has the metric; sqnr, of the last hidden states against the untouched model's; how many heads
park (as lab.analyze has it, on 16 batches); attention to the sink and update, means over these
heads and the one with most attention on one token; and the metric in 8 and 6 bits after removal.
"""
import copy

import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

from lab.damage import last_states, scores
from lab.opened import open_runs
from lab.survey import is_delimiter, survey, token_names
from lab.tables import markdown, write_json
from minq import flags
from minq.outliers import watch
from minq.quant import quantize_model

KINDS = ("start", "delimiters", "others")
REPLACEMENTS = ("zero", "mean", "limit", "control")


# ---- the two modules that a model gets ----

class Marked(nn.Module):
    """A token embedding; it keeps which tokens of its last batch are delimiters, (B, T)."""

    def __init__(self, embedding, is_delimiter):
        super().__init__()
        self.embedding, self.is_delimiter, self.delimiters = embedding, is_delimiter, 0

    def forward(self, tokens):
        self.delimiters = self.is_delimiter[tokens]  # 0 or 1
        return self.embedding(tokens)


class Replaced(nn.Module):
    """A tap; what is beyond [low, high] in x (B, T, d), at tokens of one of KINDS or at all, is
    replaced before it passes. mean (3, d): of each kind. embedding: the model's, for `kinds`."""

    def __init__(self, tap, embedding, low, high, mean, tokens="all", how="limit"):
        super().__init__()
        self.embedding, self.low, self.high, self.mean = embedding, low, high, mean
        self.tokens, self.how, self.after_tap = tokens, how, tap

    def forward(self, x):
        kind = kinds(x, self.embedding)
        chosen = self.tokens == "all" or (kind == KINDS.index(self.tokens))[..., None]
        beyond = ((x < self.low) | (x > self.high)) & chosen
        # the control: of the same tokens as many values, in other dimensions
        order = torch.randperm(x.shape[-1], generator=torch.Generator().manual_seed(0))
        place = {"control": beyond[..., order.to(x.device)] & ~beyond}
        new = {"mean": self.mean[kind], "limit": x.clamp(self.low, self.high)}
        return self.after_tap(torch.where(place.get(self.how, beyond), new.get(self.how, 0.0), x))


def kinds(x, embedding):
    """The kind of each token of x (B, T, d), by its place in KINDS: (B, T). Which are delimiters is
    known where the model's token embedding is Marked."""
    kind = x.new_full(x.shape[:2], 2, dtype=torch.long) - getattr(embedding, "delimiters", 0)
    kind[:, 0] = 0
    return kind


# ---- a model without its outliers ----

def limits(model, inputs, tap, sigma):
    """What `Replaced` must know of a block's tap, from batches of inputs: layer (from 1) -> low and
    high, mean -+ sigma deviations of all values but the start token's; each kind's mean (3, d)."""
    embedding, device = getattr(model, "token_embedding", None), next(model.parameters()).device

    def measure(x):
        kind = F.one_hot(kinds(x, embedding), len(KINDS)).to(x.dtype)  # (B, T, 3)
        return {"mean": x[:, 1:].mean(dim=(1, 2)), "square": x[:, 1:].square().mean(dim=(1, 2)),
                "sums": kind.mT @ x, "counts": kind.sum(dim=1)}

    with torch.no_grad(), watch(model, (tap,), measure) as seen:
        for batch in inputs:
            model(*batch)
    # of L layers: (L,), (L,), (L, 3, d), (L, 3); a kind that never came has the mean 0
    mean, square, sums, n = (torch.tensor(x, device=device) for x in seen.mean[tap].values())
    reach = sigma * (square - mean ** 2).sqrt()
    return dict(enumerate(zip(mean - reach, mean + reach, sums / n[..., None].clamp(min=1e-9)), 1))


def removed(model, tap, known, layers=None, *replaced):
    """A copy of `model` whose tap is Replaced in `layers`, by default in all; known: its `limits`.
    replaced: at which tokens, and how, as Replaced takes them."""
    model, name = copy.deepcopy(model), f"{tap}_tap"
    for layer in layers or known:
        block, embedding = model.layers[layer - 1], getattr(model, "token_embedding", None)
        setattr(block, name, Replaced(getattr(block, name), embedding, *known[layer], *replaced))
    return model


# ---- the test ----

def removal(run, args):
    """A row for the model as it is, and one per replacement, the lowest SQNR first: {run, tap,
    layers, tokens, replacement, metric, sqnr, parked, attention, update, quantized: {"8x8":
    {metric, sqnr}, "6x6": ...}}. An encoder's metric is its SQNR."""
    model, tap, n = copy.deepcopy(run.model), args.tap or run.model.norm_tap, args.eval_batches
    if text := getattr(run.data, "text", None):
        ends = torch.tensor([*map(is_delimiter, token_names(text))], device=run.device).int()
        model.token_embedding = Marked(model.token_embedding, ends)
    known = limits(model, run.calibration_inputs(0, args.batches), tap, args.sigma)
    states, rows = list(last_states(run, model, n)), []
    score = lambda model: scores(run, model, states, n)
    cases = [("none", "none"), *((kind, how) for kind in args.tokens for how in REPLACEMENTS)]
    for tokens, how in tqdm(cases, unit="case", leave=False):
        edited = model if how == "none" else removed(model, tap, known, args.layers, tokens, how)
        heads = survey(edited, run.validation(n or 16), run.device, model.norm_tap)["heads"]
        those = heads["parks"] | (heads["attention"] == heads["attention"].max())
        means = {key: float(heads[key][those].mean()) for key in ("attention", "update")}
        rows.append({"run": run.name, "tap": tap, "layers": args.layers or [*known],
                     "tokens": tokens, "replacement": how, **score(edited),
                     "parked": int(heads["parks"].sum()), **means, "quantized": {}})
        for bits in (8, 6):
            quantized = quantize_model(edited, bits, bits)
            run.calibrate(quantized, 0, args.batches)
            rows[-1]["quantized"][f"{bits}x{bits}"] = score(quantized)
    return rows[:1] + sorted(rows[1:], key=lambda row: row["sqnr"])


@flags.one_line_errors
def main(argv=None):
    parser = flags.Parser(__doc__)
    flags.add_run_flags(parser, seeds=None)
    add = parser.add_argument
    add("--tap", type=flags.place, help="a block's; by default that whose norm the paper reports")
    add("--layers", type=flags.positive, nargs="+", help="from 1; by default all")
    add("--tokens", choices=("all", *KINDS), nargs="+", default=["all"], help="whose values")
    add("--sigma", type=flags.above_0, default=6.0, help="deviations from mean to limit")
    args = parser.parse_args(argv)
    runs = open_runs(args)
    for run in runs:
        blocks, tap = run.model.layers, args.tap or run.model.norm_tap
        if getattr(blocks[0], f"{tap}_tap", None) is None:
            raise flags.UserError(f"--tap {tap}: {run.name}'s blocks have none; try layer_output")
        if max(args.layers or [1]) > len(blocks):
            raise flags.UserError(f"--layers {max(args.layers)}: {run.name} has {len(blocks)}")
    found = [removal(run, args) for run in runs]
    write_json(args.json, sum(found, []))
    for rows in found:
        print("\n{run}, {tap}\n\n".format(**rows[0]) + markdown([
            {key: row[key] for key in ("tokens", "replacement")}
            | {key: f"{x:.4g}" for key, x in row.items() if isinstance(x, (int, float))}
            | {f"{key} bits": f"{x['metric']:.4g}" for key, x in row["quantized"].items()}
            for row in rows], words=2))


if __name__ == "__main__":
    main()
