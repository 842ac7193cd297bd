"""The cures since the paper beside the paper's own, on one bench: python reproduce.py cures

OPT's attentions are trained at their recipe's learning rate and at 0.6 of it (Muon, which wants a higher one, at 4
times it), and the table shows the one that is better in floating point, so that none is crippled by a rate that suits
another. BERT's are trained at the recipe's only: at 0.6 of it not even vanilla attention has outliers that a cure could
prevent (`rates`). What a paper says of its own cure stands beside it; sizes, data and measures differ from paper to
paper, so compare directions, not numbers.
"""
import math
import statistics

from minq.experiments import BERT_LONG, BERT_MANY, CS, DECAY, EXPERIMENTS, GA, PER_ROW, Experiment, Row
from minq.tables import COLUMNS, bits_at_loss, with_std

# (label, flags, claim): the paper's own, by family; its claims are those of its Tables 2 and 5
PAPERS = {
    "bert": (("vanilla", "", ""),
             ("clipped", f"{CS} --gamma -0.025", "kurtosis 3076 to 80, W8A8 1294 to 4.52"),
             ("gated", f"{GA} --gate linear --gate-init 0.5", "kurtosis 3076 to 652, W8A8 1294 to 5.13")),
    "opt": (("vanilla", "", ""),
            ("clipped", f"{CS} --alpha 1", "kurtosis 2080 to 5764, W8A8 39.5 to 185"),
            ("row-clipped", "--attention row-clipped --alpha 1", "a causal model can be clipped (2402.12102)"),
            ("gated", f"{GA} --gate linear --gate-init 0.25", "kurtosis 2080 to 18.9, W8A8 39.5 to 16.0")),
}
SINCE = (
    ("softmax1", "--attention softmax1", "kurtosis -22%, norm -26% (2404.03828); outliers are Adam's (2410.17174)"),
    ("learned sink", "--attention learned-sink", "BERT: kurtosis 2987 to 226, OPT: 2177 to 22 (2510.09017)"),
    ("sigmoid", "--attention sigmoid", "no sinks, loss 3.73 to 3.70 (2410.10781)"),
    ("ReLU", "--attention relu", "mitigates sinks and peaks of a toy model (2410.13835)"),
    ("softpick", "--attention softpick", "kurtosis 33510 to 340, no sinks (2504.20966)"),
    ("headwise gate", "--attention headwise-gate", "fewer sinks and massive activations (2505.06708)"),
    ("elementwise gate", "--attention elementwise-gate", "fewer sinks and massive activations (2505.06708)"),
    ("value gate", "--attention value-gate", "BERT: kurtosis 2987 to 85, OPT: 2177 to 35 (2510.09017)"),
    ("K bias", "--attention k-bias", "no sink on tokens, no massive activations, equal loss (2410.10781)"),
    ("KV bias", "--attention kv-bias", "no massive activations in GPT-2 (2402.17762); not so in others (2503.22329)"),
    ("QK norm", "--attention qk-norm", "stable training (2302.05442); of outliers nothing"),
    ("RMSNorm, no gain", "--norm rmsnorm", ""),
    ("Muon", "--optimizer muon", "excess kurtosis 1819 to 1575 (2506.19697)"),
    ("Muon, RMSNorm, no gain", "--optimizer muon --norm rmsnorm", "excess kurtosis 1819 to 67 (2506.19697)"),
)

RATES = {"bert": ("0.0015", "0.0009", "0.006"), "opt": ("0.005", "0.003", "0.02")}  # the laptop recipe's, 0.6 and 4 times it
PAPERS_RATES = {"bert": ("1e-4", "6e-5", "4e-4"), "opt": ("4e-4", "2.4e-4", "1.6e-3")}  # of the paper's recipe


def two_rates(family):
    """The rows of one family. OPT's have weight decay on all gammas, which gives it the strongest outliers."""
    own = RATES[family][0]
    for label, flags, claim in (*PAPERS[family], *SINCE):
        other, papers = (rates[family][2 if "muon" in flags else 1] for rates in (RATES, PAPERS_RATES))
        if family == "opt" and "rmsnorm" not in flags:
            flags = f"{flags} {DECAY}".strip()
        yield Row(label, family, flags, claim, line=label, x=own)
        yield Row(f"{label}, lr {other}", family, f"{flags} --lr {papers}".strip(), claim,
                  f"{flags} --lr {other}".strip(), line=label, x=other)


# For a GPU (the paper's models have a width of 768). Of the two rates the lower is better for all three attentions.
WIDTH_512 = "--width 512 --init-std 0.025 --warmup 4000"


def wide():
    """The rows of the paper's attentions at width 512, each at two rates."""
    for label, flags, _ in PAPERS["bert"]:
        for x, papers in (("0.0005", "1e-4"), ("0.0003", "6e-5")):
            yield Row(f"{label}, lr {x}", "bert", f"{flags} --lr {papers}".strip(), "", f"{flags} {WIDTH_512} --lr {x}".strip(), label, x)


# ---- results ----

def better_rates(rows):
    """Of the rows that differ in the learning rate the one that is better in floating point; the other stays in
    it as `other_rate`. Each gets `extra_parameters`, how many more than vanilla."""
    groups, chosen = {}, []
    for row in rows:
        groups.setdefault((row["family"], row["line"] or row["label"]), []).append(row)
    for (_, label), group in groups.items():
        best, *others = sorted(group, key=badness)
        chosen.append(best | {"label": label, "other_rate": others[0] if others else None})
    vanilla = {row["family"]: row["parameters"] for row in chosen if row["attention"] == "vanilla"
               and row["settings"]["norm"] == "layernorm"}
    return [row | {"extra_parameters": row["parameters"] - vanilla[row["family"]]} for row in chosen]


def badness(row):
    """Small is good; not a number is the worst."""
    fp = row["fp"]["mean"]
    return math.inf if math.isnan(fp) else -fp if row["metric"] == "accuracy" else fp


def cures_columns(row):
    other = row["other_rate"]
    rate = row["x"] + (f" ({other['x']}: {other['fp']['mean']:.4g})" if other else "")
    return {"FP": with_std(row["fp"]), "at lr (FP at the other)": rate, "max inf norm": with_std(row["max_inf_norm"], 3),
            "avg kurtosis": with_std(row["avg_kurtosis"], 3), "W8A8": with_std(row["quantized"]["8x8"]),
            "bits at which 20% are lost": bits_at_loss(row),
            "step time": f"{statistics.median(row['step_time']):.2f}" if "step_time" in row else "",
            "extra parameters": f"{row['extra_parameters']:+,}", "its paper's claim": row["published"]}


COLUMNS["cures"] = cures_columns


# ---- by name ----

def experiment(title, *families):
    rows = tuple(row for family in families for row in two_rates(family) if family == "opt" or row.x == RATES["bert"][0])
    return Experiment(title, rows, columns="cures", seeds=2, quantize="--sweep", may_fail=True,
                      recipes={"laptop": {"bert": BERT_MANY}})


EXPERIMENTS |= {
    "cures": experiment("The cures since the paper", "opt", "bert"),
    "cures-opt": experiment("The cures since the paper, on OPT", "opt"),
    "cures-bert": experiment("The cures since the paper, on BERT", "bert"),
    "rates": Experiment("BERT, trained long, at two learning rates", columns="bits", seeds=2, quantize="--sweep",
                        rows=tuple(row for row in two_rates("bert") if row.line in ("vanilla", "clipped", "gated")),
                        recipes={"laptop": {"bert": BERT_LONG}}),
    "wide": Experiment("BERT of width 512, trained long, at two learning rates: for a GPU", columns="bits", quantize="--sweep",
                       rows=tuple(wide()), recipes={"laptop": {"bert": BERT_LONG}}),
    "row-clipped": Experiment(
        "Does one gamma fail because it serves rows of all lengths? OPT, LN decay", columns="cures", seeds=4, quantize="--sweep",
        rows=(Row("vanilla", "opt", DECAY), Row("gamma = -1/T", "opt", f"{CS} --alpha 1 {DECAY}"), PER_ROW)),
}
