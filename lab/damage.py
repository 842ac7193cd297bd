"""What quantization does to a model inside, and which tensor does it (paper, sec. 3).

    python -m lab.damage runs/bert-vanilla-s0             one kind of tensor quantized at a time
    python -m lab.damage runs/bert-vanilla-s0 --layers    one tensor of one layer at a time

Perplexity forgives: much can move inside a model before the right token loses its place. The ratio
of signal to quantization noise in the last hidden states does not:

    SQNR = 10 log10 (sum of h^2 / sum of (h_quantized - h)^2)     in dB

h is the output of the last layer (BERT) or of the final norm (OPT, ViT) for the same inputs, in
floating point and quantized. At 0 dB the error is as large as the signal; a bit is worth 6 dB.

A tensor that is quantized alone gets the range that it has in the floating-point model. All
activations, all weights and everything are calibrated as they are evaluated. With --layers it also
says how far each tensor's largest value M stands out in floating point (outliers.growth).
"""
from contextlib import contextmanager
from pathlib import Path

import torch
from tqdm import tqdm

from lab.opened import open_runs
from lab.tables import METRICS, markdown, save_pictures, write_json
from minq import flags
from minq.outliers import growth, listening, watch
from minq.quant import ActivationQuantizer, quantize_model
from minq.training import to_device

TOGETHER = {"nothing": "", "all activations": "*_tap", "all weights": "*.weight", "everything": "*"}


# ---- how far the last hidden states have moved ----

@contextmanager
def hidden(model):
    """While active, the last hidden states of each pass (BERT: the last layer's output; OPT, ViT:
    the final norm's) are kept; yields the list of them, in float32: (B, T, width), or (B, width)
    where only [CLS] is left."""
    passes = []

    def hear(tap, place, x):
        if place == 0:  # another pass begins; its last place stays
            passes.append(x)
        passes[-1] = x.float()

    with listening(model, (model.hidden_tap,), hear):
        yield passes


@torch.no_grad()
def last_hidden(model, inputs):
    with hidden(model) as passes:
        model(*inputs)
    return passes[-1]


def last_states(run, model, batches=None):
    """The `last_hidden` of each batch of the run's validation split, of a model in its place."""
    for inputs, _ in run.validation(batches):
        yield last_hidden(model, to_device(inputs, run.device))


def signal_to_noise(pairs):
    """How far states have moved, over batches of (states, what they should be): SQNR in dB."""
    signal = error = 0
    for moved, h in pairs:
        signal += h.square().sum(dtype=torch.float64)
        error += (moved - h).square().sum(dtype=torch.float64)
    return 10 * (signal / error).log10().item()


def scores(run, model, states, batches=None):
    """{metric, sqnr in dB} of a model in the run's place. states: those of the run's own model, a
    list of as many batches. An encoder has no head to predict with: its metric is its SQNR."""
    if model.metric == "sqnr":
        metric, moved = None, last_states(run, model, batches)
    else:
        with hidden(model) as moved:
            metric = run.score(model, batches)
    sqnr = signal_to_noise(zip(moved, states, strict=True))
    return {"metric": sqnr if metric is None else metric, "sqnr": sqnr}


# ---- one tensor at a time ----

class Observer(ActivationQuantizer):
    """An ActivationQuantizer that learns its range, keeps x with its gradient, and hands it on."""

    def on_grid(self, x):
        if x.requires_grad:
            x.retain_grad()
        self.x = x
        return x


def damage(run, bits=8, batches=16, eval_batches=None, layers=False):
    """{run, metric, bits, kinds: [{tap, metric, sqnr}]}: one kind of tensor quantized in all
    layers, the lowest SQNR first; then nothing, all activations, all weights and everything. With
    `layers` also {layers: {tap: [{metric, sqnr} of each layer]}}, one tensor of one layer
    quantized, and its outliers before, {growth: {tap: {max_over_sigma: [of each layer], ...}}}.
    """
    states = list(last_states(run, run.model, eval_batches))
    observed = quantize_model(run.model, bits, bits, only="*_tap", quantizer=Observer)
    run.calibrate(observed, 0, batches)
    ranges = {name: x for name, x in observed.state_dict().items() if "_tap." in name}

    def quantized(only, calibrate=False):
        model = quantize_model(run.model, bits, bits, only=only)
        model.load_state_dict(ranges, strict=False)
        if calibrate:  # anew, on what its own quantizers hand on
            run.calibrate(model, 0, batches)
        return scores(run, model, states, eval_batches)

    names = [name for name, module in observed.named_modules() if isinstance(module, Observer)]
    kind = lambda name: name.rpartition(".")[2].removesuffix("_tap")
    patterns = {kind(x): f"layers.*.{kind(x)}_tap" if "layers." in x else x for x in names}
    kinds = [{"tap": tap} | quantized(only) for tap, only in tqdm(patterns.items(), leave=False)]
    kinds.sort(key=lambda row: row["sqnr"])
    kinds += [{"tap": title} | quantized(only, True) for title, only in TOGETHER.items()]
    found = {"run": run.name, "metric": run.model.metric, "bits": bits, "kinds": kinds}
    if layers:
        found["layers"] = {tap: [quantized(name) for name in names if kind(name) == tap]
                           for tap, only in tqdm(patterns.items(), leave=False) if "*" in only}
        with watch(run.model, found["layers"], growth) as outliers:
            list(last_states(run, run.model, eval_batches))
        found["growth"] = outliers.mean
    return found


# ---- in words ----

def print_tables(row):
    """Kinds of tensors; if layers were measured, a row for each tap and a column for each layer."""
    metric, sqnr = METRICS[row["metric"]], METRICS["sqnr"]  # an encoder has one column for both
    print(f"\n{row['run']}\n\n" + markdown([
        {f"only this in {row['bits']} bits": x["tap"], metric: f"{x['metric']:.4g}",
         sqnr: f"{x['sqnr']:.1f}"} for x in row["kinds"]]))
    tables = {"max / sigma (share of its token's energy)": "{M:.1f} ({share:.2f})",
              metric: "{metric:.4g}", sqnr: "{sqnr:.1f}"}
    for title, cell in tables.items() if "layers" in row else ():
        lines = []
        for tap, layers in row["layers"].items():
            grown = zip(row["growth"][tap]["max_over_sigma"], row["growth"][tap]["share"], layers)
            lines.append({"tap": tap} | {f"layer {i}": cell.format(M=M, share=share, **x)
                                         for i, (M, share, x) in enumerate(grown, 1)})
        print(f"\n{title}, tensor by tensor\n\n{markdown(lines)}")


@flags.one_line_errors
def main(argv=None):
    parser = flags.Parser(__doc__)
    flags.add_run_flags(parser, seeds=None)
    parser.add_argument("--bits", type=flags.bits, default=8, help="of what is quantized")
    parser.add_argument("--layers", action="store_true", help="also every tensor of every layer")
    parser.add_argument("--out", type=flags.place, metavar="FOLDER", help="draw --layers there")
    args = parser.parse_args(argv)
    layers, rows = args.layers or args.out, []
    for run in open_runs(args):
        rows.append(damage(run, args.bits, args.batches, args.eval_batches, layers))
        write_json(args.json, rows)
        print_tables(rows[-1])
    if args.out:
        save_pictures(args.out, {f"damage-{Path(row['run']).name}": ("damage", row)
                                 for row in rows})


if __name__ == "__main__":
    main()
