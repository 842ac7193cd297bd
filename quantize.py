"""Quantize trained runs after training and print the paper's table (sec. 5, Tables 1, 2, 4-7).

    python quantize.py runs/bert-*                         W8A8, three calibration seeds each
    python quantize.py runs/bert-* --sweep                 8 down to 4 bits
    python quantize.py runs/bert-vanilla-s0 --best         every pair of range estimators, the best kept
"""
import copy
import json
import statistics
from itertools import product, starmap
from pathlib import Path

from torch.nn.utils import parametrize
from tqdm import tqdm

from minq import flags
from minq.errors import UserError, one_line_errors
from minq.outliers import watch
from minq.quant import A_ESTIMATORS, W_ESTIMATORS, calibrating, quantize_model
from minq.runs import open_run
from minq.tables import mean_and_std, with_std
from minq.training import evaluate, pick_device, to_device

CALIBRATION_SEED = 1_000_000  # plus 0, 1, 2: other batches of the training split than training's own order


@one_line_errors
def main(argv=None):
    # ---- arguments ----
    parser = flags.Parser(__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run's folder")
    parser.add_argument("--w-bits", type=flags.bits, default=8, help="bits of weights, 2 to 16")
    parser.add_argument("--a-bits", type=flags.bits, default=8, help="bits of activations, 2 to 16")
    parser.add_argument("--sweep", action="store_true", help="weights and activations at 8, 7, 6, 5 and 4 bits")
    parser.add_argument("--w-estimator", choices=W_ESTIMATORS, default="minmax", help="range of weights (sec. C.4)")
    parser.add_argument("--a-estimator", choices=A_ESTIMATORS, default="running", help="range of activations (sec. C.4)")
    parser.add_argument("--best", action="store_true", help="try every pair of estimators and keep the best, as the paper does")
    parser.add_argument("--w-granularity", choices=("tensor", "channel"), default="tensor", help="weights sharing a scale")
    parser.add_argument("--batches", type=flags.positive, default=16, help="calibration batches, from the training split")
    parser.add_argument("--seeds", type=flags.positive, default=3, help="calibrations per run; the table shows mean and deviation")
    parser.add_argument("--eval-batches", type=flags.positive, help="validation batches; by default as in training")
    parser.add_argument("--data", help="where the runs' data is now")
    parser.add_argument("--device", help="cpu, cuda, cuda:N or mps; by default the best there is")
    parser.add_argument("--json", metavar="FILE", help="write the table there, too")
    args = parser.parse_args(argv)
    device = pick_device(args.device)
    widths = [(bits, bits) for bits in (8, 7, 6, 5, 4)] if args.sweep else [(args.w_bits, args.a_bits)]
    estimators = list(product(W_ESTIMATORS, A_ESTIMATORS)) if args.best else [(args.w_estimator, args.a_estimator)]

    # ---- every run, and all that could be wrong with it ----
    opened = {name: open_run(name, device, args.data) for name in args.runs}

    rows = []
    progress = tqdm(total=len(opened) * len(widths) * len(estimators) * args.seeds, unit="model")
    for name, (checkpoint, model, data) in opened.items():
        batch_size = checkpoint["args"]["batch_size"]
        eval_batches = args.eval_batches or checkpoint["args"]["eval_batches"]
        validation = lambda: starmap(data.to_model, data.validation_batches(batch_size, eval_batches))

        # ---- floating point ----
        with watch(model, dict.fromkeys(("ffn_output", "layer_output", *model.kurtosis_taps))) as outliers:
            fp = evaluate(model, validation(), device)[model.metric]

        # ---- quantized ----
        def quantized_score(seed, *settings):
            """The metric after quantization; the batches that set the ranges come from the training split."""
            quantized = quantize_model(copy.deepcopy(model), *settings, args.w_granularity)
            with calibrating(quantized):
                for i in range(args.batches):
                    batch = data.train_batch(CALIBRATION_SEED + seed, i, batch_size)
                    inputs, _ = to_device(data.to_model(*batch), device)
                    quantized(*inputs)
            with parametrize.cached():
                return evaluate(quantized, validation(), device)[model.metric]

        quantized = {}
        for w_bits, a_bits in widths:
            tried = {}
            for w_estimator, a_estimator in estimators:
                scores = tried[f"{w_estimator} weights, {a_estimator} activations"] = []
                for seed in range(args.seeds):
                    try:
                        scores.append(quantized_score(seed, w_bits, a_bits, w_estimator, a_estimator))
                    except UserError as error:
                        raise UserError(f"{name}: {error}") from None
                    progress.update()
            best = (max if model.metric == "accuracy" else min)(tried, key=lambda pair: statistics.mean(tried[pair]))
            quantized[f"{w_bits}x{a_bits}"] = mean_and_std(tried[best]) | {"estimators": best}
            if args.best:
                for pair, scores in tried.items():
                    progress.write(f"{name} W{w_bits}A{a_bits}, {pair}: {with_std(mean_and_std(scores))}"
                                   + (" <- best" if pair == best else ""))
        rows.append(row(name, checkpoint, model, fp, quantized, outliers))
    progress.close()

    # ---- report ----
    print(table(rows))
    if args.json:
        try:
            Path(args.json).write_text(json.dumps(rows, indent=1) + "\n")
        except OSError as error:
            raise UserError(f"--json {args.json}: cannot be written: {error.strerror}") from None


def row(name, checkpoint, model, fp, quantized, outliers):
    """A line of --json: settings that the run's attention does not read are null."""
    known = checkpoint["args"] | vars(model.config) | {"data_sha256": checkpoint["data_sha256"]}
    shown = ("decay_layernorm", "patch_layernorm", "fake_quant", "seq_len", "steps", "data", "data_sha256")
    settings = flags.attention_settings(model.config) | {key: known.get(key) for key in shown}
    by_tap = {tap: {"max_inf_norm": outliers.max_inf_norm(tap), "avg_kurtosis": outliers.avg_kurtosis(tap)}
              for tap in outliers.mean}
    return {"run": name, "family": model.family, "attention": known["attention"], "seed": known["seed"],
            "settings": settings, "metric": model.metric, "fp": fp, "quantized": quantized,
            "max_inf_norm": outliers.max_inf_norm(model.norm_tap),
            "avg_kurtosis": outliers.avg_kurtosis(*model.kurtosis_taps), **by_tap}


def table(rows):
    """The paper's columns in Markdown, a row per run."""
    widths = [f"W{key.replace('x', 'A')}" for key in rows[0]["quantized"]]
    lines = ["| run | metric | FP32 | max inf norm | avg kurtosis (not excess) | " + " | ".join(widths) + " |",
             "|---|---|" + "---:|" * (3 + len(widths))]
    for r in rows:
        cells = [r["run"], {"perplexity": "ppl ↓", "accuracy": "acc % ↑"}[r["metric"]], f"{r['fp']:.4g}",
                 f"{r['max_inf_norm']:.3g}", f"{r['avg_kurtosis']:.3g}", *map(with_std, r["quantized"].values())]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
