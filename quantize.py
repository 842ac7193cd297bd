"""Quantize trained runs after training and print the paper's table (sec. 5, Tables 1, 2, 4-7).

    python quantize.py runs/bert-*-s0                      W8A8, three calibration seeds each
    python quantize.py runs/bert-*-s0 --bits 8 7 6 5 4
    python quantize.py runs/bert-vanilla-s0 --best         every pair of range estimators, the best
    python -m lab.damage runs/bert-vanilla-s0              which tensor does it; lab/ has more
"""
from itertools import product

from tqdm import tqdm

import lab.backcopy, lab.cures  # noqa: F401, runs with such data or attention open
from lab.tables import (METRICS, markdown, mean_and_std, nan_last, outlier_columns, with_std,
                        write_json)
from minq import flags
from minq.outliers import growth, watch
from minq.quant import A_ESTIMATORS, W_ESTIMATORS, quantize_model
from minq.runs import open_run
from minq.training import pick_device

SETTINGS = ("norm", "optimizer", "decay_layernorm", "patch_layernorm", "fake_quant", "seq_len",
            "steps", "data", "data_sha256")  # in --json, beside those of the attention


@flags.one_line_errors
def main(argv=None):
    # ---- arguments ----
    parser = flags.Parser(__doc__)
    flags.add_run_flags(parser)
    add = parser.add_argument
    add("--bits", type=flags.bits, nargs="+", default=[8], help="of weights and activations")
    add("--w-bits", type=flags.bits, help="of weights, where they differ")
    add("--a-bits", type=flags.bits, help="of activations, where they differ")
    add("--w-estimator", choices=W_ESTIMATORS, default="minmax", help="weights' range (sec. C.4)")
    add("--a-estimator", choices=A_ESTIMATORS, default="running", help="activations' range")
    add("--best", action="store_true", help="try every pair of these, keep the best")
    add("--w-granularity", choices=("tensor", "channel"), default="tensor",
        help="weights that share a scale")
    args = parser.parse_args(argv)
    widths = [(args.w_bits or b, args.a_bits or b) for b in args.bits]
    pairs = [*product(W_ESTIMATORS, A_ESTIMATORS)] if args.best else [
        (args.w_estimator, args.a_estimator)]

    # ---- floating point and quantized ----
    rows, runs = [], [open_run(name, pick_device(args.device), args.data) for name in args.runs]
    with tqdm(total=len(runs) * len(widths) * len(pairs) * args.seeds, unit="model") as progress:
        for run in runs:
            taps = dict.fromkeys((run.model.norm_tap, *run.model.kurtosis_taps))
            with watch(run.model, taps, growth) as outliers:
                fp = run.score(run.model, args.eval_batches)
            found = {f"{w}x{a}": best_of(run, w, a, pairs, args, progress) for w, a in widths}
            rows.append({"run": run.name, "family": run.model.family, **settings(run), "fp": fp,
                         "quantized": found, **outlier_columns(run.model, outliers)})

    # ---- report ----
    write_json(args.json, rows)
    print(markdown([in_words(row) for row in rows], words=2))


def best_of(run, w_bits, a_bits, pairs, args, progress):
    """Of all pairs of range estimators the best: the metric's mean and deviation over seeds."""
    tried = []
    for w, a in pairs:
        values = []
        for seed in range(args.seeds):
            model = quantize_model(run.model, w_bits, a_bits, w, a, args.w_granularity)
            run.calibrate(model, seed, args.batches)
            values.append(run.score(model, args.eval_batches))
            progress.update()
        tried.append(mean_and_std(values) | {"estimators": f"{w} weights, {a} activations"})
    sign = 1 if run.model.metric == "perplexity" else -1  # of "smaller is better"
    best = min(tried, key=lambda x: nan_last(sign * x["mean"]))
    for x in tried if args.best else ():
        progress.write(f"{run.name} W{w_bits}A{a_bits}, {x['estimators']}: {with_std(x)}"
                       + " <- best" * (x is best))
    return best


def settings(run):
    """What --json has of a run's settings; those that its attention does not read are null."""
    config, checkpoint = run.model.config, run.checkpoint
    known = checkpoint["args"] | vars(config) | {"data_sha256": checkpoint["data_sha256"]}
    shown = flags.attention_settings(config) | {key: known.get(key) for key in SETTINGS}
    return {"attention": config.attention, "seed": known["seed"], "metric": run.model.metric,
            "settings": shown}


def in_words(row):
    """The paper's columns."""
    return {"run": row["run"], "metric": METRICS[row["metric"]], "FP32": f"{row['fp']:.4g}",
            "max inf norm": f"{row['max_inf_norm']:.3g}",
            "avg kurtosis (not excess)": f"{row['avg_kurtosis']:.3g}",
            **{f"W{key.replace('x', 'A')}": with_std(x) for key, x in row["quantized"].items()}}


if __name__ == "__main__":
    main()
