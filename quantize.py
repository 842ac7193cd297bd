"""Quantize trained runs after training and print the paper's table (sec. 5, Tables 1, 2, 4-7).

    python quantize.py runs/bert-*-s0                      W8A8, three calibration seeds each
    python quantize.py runs/bert-*-s0 --sweep              8 down to 4 bits
    python quantize.py runs/bert-vanilla-s0 --best         every pair of range estimators, the best kept
    python quantize.py runs/bert-vanilla-s0 --taps         which tensor does the damage
    python quantize.py runs/bert-vanilla-s0 --integer      the same on int8, and its speed
"""
import copy
import math
from itertools import product
from pathlib import Path

from torch.nn.utils import parametrize
from tqdm import tqdm

from minq import flags
from minq.damage import by_kind, scores
from minq.errors import one_line_errors
from minq.export import execute, export_row
from minq.growth import growth
from minq.outliers import watch
from minq.quant import A_ESTIMATORS, W_ESTIMATORS, quantize_model
from minq.remedies import compare
from minq.runs import open_run
from minq.tables import EXTRA_TABLES, json_row, mean_and_std, runs_table, with_std, write_rows
from minq.training import pick_device


@one_line_errors
def main(argv=None):
    # ---- arguments ----
    parser = flags.Parser(__doc__)
    add = parser.add_argument
    add("runs", nargs="+", action=flags.Distinct, metavar="RUN", help="a run's folder, or what --export wrote")
    add("--w-bits", type=flags.bits, default=8, help="bits of weights, 2 to 16")
    add("--a-bits", type=flags.bits, default=8, help="bits of activations, 2 to 16")
    add("--sweep", action="store_true", help="both at 8, 7, 6, 5 and 4 bits")
    add("--w-estimator", choices=W_ESTIMATORS, default="minmax", help="range of weights (sec. C.4)")
    add("--a-estimator", choices=A_ESTIMATORS, default="running", help="of activations (sec. C.4)")
    add("--best", action="store_true", help="try every pair of these, keep the best")
    add("--w-granularity", choices=("tensor", "channel"), default="tensor", help="weights sharing a scale")
    add("--batches", type=flags.positive, default=16, help="calibration batches, from the training split")
    add("--seeds", type=flags.positive, default=3, help="calibrations per run, for mean and deviation")
    add("--eval-batches", type=flags.positive, help="validation batches; by default as in training")
    add("--data", type=flags.place, help="where the runs' data is now")
    add("--device", help="cpu, cuda, cuda:N or mps; by default the best there is")
    add("--sqnr", action="store_true", help="also the last hidden states' signal to noise")
    add("--taps", action="store_true", help="also quantize one kind of tensor at a time")
    add("--remedies", action="store_true", help="also every remedy of minq/remedies.py, at --bits")
    add("--bits", type=flags.bits, nargs="+", action=flags.Distinct, help="widths for --remedies; by default 8 6 4")
    add("--integer", action="store_true", help="also run on real integers (minq/integer.py)")
    add("--export", type=flags.new_file, metavar="FILE", help="write the integer model there, a RUN like others")
    add("--json", type=flags.new_file, metavar="FILE", help="write the table there, too")
    args = parser.parse_args(argv)
    flags.settle_quantization(args)
    device = pick_device(args.device)
    widths = [(bits, bits) for bits in (8, 7, 6, 5, 4)] if args.sweep else [(args.w_bits, args.a_bits)]
    pairs = [*product(W_ESTIMATORS, A_ESTIMATORS)] if args.best else [(args.w_estimator, args.a_estimator)]

    # ---- every run, and all that could be wrong with it ----
    files = [name for name in args.runs if Path(name).is_file()]
    runs = [open_run(name, device, args.data) for name in args.runs if name not in files]

    # ---- floating point and quantized ----
    rows = [export_row(name, device, args) for name in files]
    with tqdm(total=len(runs) * len(widths) * len(pairs) * args.seeds, unit="model") as progress:
        for run in runs:
            with watch(run.model, {run.model.norm_tap, *run.model.kurtosis_taps}, growth) as outliers:
                fp = scores(run, run.model, args.sqnr, args.eval_batches)[run.model.metric]
            quantized = {f"{w}x{a}": best_of(run, w, a, pairs, args, progress) for w, a in widths}
            rows.append(json_row(run, fp, quantized, outliers))
            if args.taps:
                build = lambda: quantize_model(copy.deepcopy(run.model), *widths[0], *pairs[0], args.w_granularity)
                rows[-1]["taps"] = by_kind(run, build, args.batches, args.eval_batches)
            if args.integer:
                rows[-1]["integer"] = execute(run, *next(iter(quantized.items())), args)
            if args.remedies:
                rows[-1]["remedies"] = compare(run, args.bits or (8, 6, 4), args.seeds, args.batches, args.eval_batches)

    # ---- report ----
    print(runs_table(rows))
    for each in rows:
        for extra in [name for name in EXTRA_TABLES if name in each]:
            print(f"\n{EXTRA_TABLES[extra](each)}")
    if args.json:
        write_rows(rows, args.json)


def best_of(run, w_bits, a_bits, pairs, args, progress):
    """Of all pairs of range estimators the best: the metric's mean, deviation and values over calibrations."""
    metric, tried = run.model.metric, {}
    for pair in pairs:
        found = []
        for seed in range(args.seeds):
            model = quantize_model(copy.deepcopy(run.model), w_bits, a_bits, *pair, args.w_granularity)
            run.calibrate(model, seed, args.batches)
            with parametrize.cached():
                found.append(scores(run, model, args.sqnr, args.eval_batches))
            progress.update()
        over_seeds = {name: mean_and_std([each[name] for each in found]) for name in found[0]}
        name = "{} weights, {} activations".format(*pair)
        tried[name] = over_seeds.pop(metric) | over_seeds | {"estimators": name}
    sign = 1 if metric == "perplexity" else -1  # of "smaller is better"; NaN is the worst
    best = min(tried.values(), key=lambda x: math.inf if math.isnan(x["mean"]) else sign * x["mean"])
    for name, result in tried.items() if args.best else ():
        progress.write(f"{run.name} W{w_bits}A{a_bits}, {name}: {with_std(result)}{' <- best' * (result is best)}")
    return best


if __name__ == "__main__":
    main()
