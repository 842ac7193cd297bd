"""Quantize trained runs after training and print the paper's table (sec. 5, Tables 1, 2, 4-7).

    python quantize.py runs/bert-*                         W8A8, three calibration seeds each
    python quantize.py runs/bert-* --sweep                 8 down to 4 bits
    python quantize.py runs/bert-vanilla-s0 --best         every pair of range estimators, the best kept
"""
import copy
import json
from itertools import product
from pathlib import Path

from torch.nn.utils import parametrize
from tqdm import tqdm

from minq import flags
from minq.errors import UserError, one_line_errors
from minq.outliers import watch
from minq.quant import A_ESTIMATORS, W_ESTIMATORS, calibrating, quantize_model
from minq.runs import open_run
from minq.tables import mean_and_std, runs_table, with_std
from minq.training import evaluate, pick_device

# settings in --json, beside those of the attention
SHOWN = ("decay_layernorm", "patch_layernorm", "fake_quant", "seq_len", "steps", "data", "data_sha256")


@one_line_errors
def main(argv=None):
    # ---- arguments ----
    parser = flags.Parser(__doc__)
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN", help="a run's folder")
    add("--w-bits", type=flags.bits, default=8, help="bits of weights, 2 to 16")
    add("--a-bits", type=flags.bits, default=8, help="bits of activations, 2 to 16")
    add("--sweep", action="store_true", help="both at 8, 7, 6, 5 and 4 bits")
    add("--w-estimator", choices=W_ESTIMATORS, default="minmax", help="range of weights (sec. C.4)")
    add("--a-estimator", choices=A_ESTIMATORS, default="running", help="of activations (sec. C.4)")
    add("--best", action="store_true", help="try every pair of these, keep the best, as the paper does")
    add("--w-granularity", choices=("tensor", "channel"), default="tensor", help="weights sharing a scale")
    add("--batches", type=flags.positive, default=16, help="calibration batches, from the training split")
    add("--seeds", type=flags.positive, default=3, help="calibrations per run, for mean and deviation")
    add("--eval-batches", type=flags.positive, help="validation batches; by default as in training")
    add("--data", help="where the runs' data is now")
    add("--device", help="cpu, cuda, cuda:N or mps; by default the best there is")
    add("--json", metavar="FILE", help="write the table there, too")
    args = parser.parse_args(argv)
    device = pick_device(args.device)
    widths = [(bits, bits) for bits in (8, 7, 6, 5, 4)] if args.sweep else [(args.w_bits, args.a_bits)]
    all_pairs = list(product(W_ESTIMATORS, A_ESTIMATORS))
    estimators = all_pairs if args.best else [(args.w_estimator, args.a_estimator)]

    # ---- every run, and all that could be wrong with it ----
    runs = [open_run(name, device, args.data) for name in args.runs]

    rows = []
    models = len(runs) * len(widths) * len(estimators) * args.seeds
    with tqdm(total=models, unit="model") as progress:
        for run in runs:
            metric = run.model.metric
            better = max if metric == "accuracy" else min
            score = lambda model: evaluate(model, run.validation(args.eval_batches), device)[metric]

            # ---- floating point ----
            with watch(run.model, ("ffn_output", "layer_output", *run.model.kurtosis_taps)) as outliers:
                fp = score(run.model)

            # ---- quantized ----
            quantized = {}
            for w_bits, a_bits in widths:
                tried = {}
                for pair in estimators:
                    scores = []
                    for seed in range(args.seeds):
                        model = calibrated(run, seed, args, w_bits, a_bits, *pair)
                        with parametrize.cached():
                            scores.append(score(model))
                        progress.update()
                    tried["{} weights, {} activations".format(*pair)] = mean_and_std(scores)
                best = better(tried, key=lambda pair: tried[pair]["mean"])
                quantized[f"{w_bits}x{a_bits}"] = tried[best] | {"estimators": best}
                for pair in tried if args.best else ():
                    mark = " <- best" if pair == best else ""
                    progress.write(f"{run.name} W{w_bits}A{a_bits}, {pair}: {with_std(tried[pair])}{mark}")
            rows.append(row(run, fp, quantized, outliers))

    # ---- report ----
    print(runs_table(rows))
    if args.json:
        try:
            Path(args.json).write_text(json.dumps(rows, indent=1) + "\n")
        except OSError as error:
            raise UserError(f"--json {args.json}: cannot be written: {error.strerror}") from None


def calibrated(run, seed, args, *settings):
    """A quantized copy of the run's model; what sets its ranges comes from the training split."""
    model = quantize_model(copy.deepcopy(run.model), *settings, args.w_granularity)
    try:
        with calibrating(model):
            for inputs in run.calibration(seed, args.batches):
                model(*inputs)
    except UserError as error:
        raise UserError(f"{run.name}: {error}") from None
    return model


def row(run, fp, quantized, outliers):
    """A line of --json: settings that the run's attention does not read are null."""
    model, config = run.model, vars(run.model.config)
    known = run.checkpoint["args"] | config | {"data_sha256": run.checkpoint["data_sha256"]}
    settings = flags.attention_settings(model.config) | {key: known.get(key) for key in SHOWN}
    by_tap = {tap: {"max_inf_norm": outliers.max_inf_norm(tap), "avg_kurtosis": outliers.avg_kurtosis(tap)}
              for tap in outliers.mean}
    return {"run": run.name, "family": model.family, "attention": known["attention"],
            "seed": known["seed"], "settings": settings,
            "metric": model.metric, "fp": fp, "quantized": quantized,
            "max_inf_norm": outliers.max_inf_norm(model.norm_tap),
            "avg_kurtosis": outliers.avg_kurtosis(*model.kurtosis_taps), **by_tap}


if __name__ == "__main__":
    main()
