"""The experiments of the paper, of the blog and of this lab as data: what lab/reproduce.py runs.

A row is a training run and its quantization. Its flags are the same at every scale unless `laptop`
says otherwise; they are added to its family's recipe, at the scale of a laptop or of the paper.
"""
import json
import shlex
from dataclasses import dataclass, field, replace
from pathlib import Path

# docs/laptop-recipe.md says how the laptop's were found
RECIPES = {"laptop": {"bert": "--seq-len 32 --steps 25000 --warmup 500 --eval-every 2500",
                      "opt": "--width 64 --seq-len 32 --batch-size 16 --steps 10000 --lr 5e-3 "
                             "--warmup 500 --eval-every 1000",
                      "vit": "--width 64 --batch-size 32 --steps 4000 --lr 2e-3 --eval-every 1000"},
           "paper": {"bert": "--preset paper --data tokens.bin --vocab-size 30522 "
                             "--special-ids 0,101,102,103",
                     "opt": "--preset paper --data tokens.bin --vocab-size 50272",
                     "vit": "--preset paper --data imagenet/"}}

# Flags of quantize.py: OPT's ranges are those that the paper found best for it (sec. C.4).
QUANTIZE = {"bert": "", "opt": "--w-estimator mse --a-estimator p99.999", "vit": ""}
BITS = "--bits 8 7 6 5 4"


@dataclass(frozen=True)
class Row:
    label: str
    family: str
    flags: str = ""      # of its training script
    published: str = ""  # FP | max inf norm | avg kurtosis | W8A8; or what its table shows
    laptop: str = ""     # flags at the scale of a laptop, where they differ
    line: str = ""       # in a figure: the row's line,
    x: str = ""          # and its place on the x-axis
    source: str = ""     # a published checkpoint (lab/convert.py) instead of a training run


@dataclass(frozen=True)
class Experiment:
    title: str
    rows: tuple
    columns: str = "quantized"  # a key of tables.COLUMNS, or remedies
    seeds: int = 1              # training seeds
    quantize: str = ""          # flags of quantize.py, beside QUANTIZE's
    laptop: dict = field(default_factory=dict)  # family -> flags, instead of RECIPES'
    paper: dict = field(default_factory=dict)
    xlabel: str = ""            # of the figure, if it has one
    then: str = ""              # what is said below the table

    def settings(self, row, scale):
        """The flags of a row's training script, a list."""
        recipe = (RECIPES[scale] | getattr(self, scale))[row.family]
        return shlex.split(f"{recipe} {scale == 'laptop' and row.laptop or row.flags}")


CS, GA, ROWS = "--attention clipped", "--attention gated", "--attention row-clipped --alpha 1"
LINEAR, MLP, ALL_HEADS = (f"{GA} --gate {gate}" for gate in ("linear", "mlp", "all-heads"))
GA_16, FQ = f"{MLP} --gate-hidden 16", "--fake-quant"
DECAY, PATCH = "--decay-layernorm", "--patch-layernorm"
MUON, NO_GAIN = "--optimizer muon", "--norm rmsnorm"

# What the paper calls a setting, and how many numbers follow: its label and flags
SETTINGS = {("Vanilla", 0): ("Vanilla", ""), ("all-heads", 0): ("GA, all-heads-linear", ALL_HEADS),
            ("CS", 1): ("CS (gamma = {})", CS + " --gamma {}"),
            ("CS", 2): ("CS (gamma = {}, zeta = {})", CS + " --gamma {} --zeta {}"),
            ("CS/T", 1): ("CS (gamma = -{}/T)", CS + " --alpha {}"),
            ("linear", 1): ("GA, linear (pi_init = {})", LINEAR + " --gate-init {}"),
            ("mlp", 1): ("GA, MLP (n_hid = {})", MLP + " --gate-hidden {}")}


def rows(family, table, more=""):
    """Rows of one of the paper's tables, published.json: setting -> Row."""
    note = {"": "", DECAY: ", LN decay", PATCH: ", patch LN"}[more]
    return {name: Row(label.format(*numbers) + note, family, f"{flags.format(*numbers)} {more}", x)
            for name, x in PUBLISHED[table + note].items() for kind, *numbers in [name.split()]
            for label, flags in [SETTINGS[kind, len(numbers)]]}


# What papers report: tables (FP | max inf norm | avg kurtosis | W8A8), and what cures do
PUBLISHED = json.loads(Path(__file__).with_name("published.json").read_text())

# ---- Tables 1 and 4: BERT. 5: OPT, without and with weight decay on LayerNorm's gamma.
# 6 and 7: ViT, without and with a LayerNorm after the patch embedding ----

BERT, BERT_MORE = rows("bert", "Table 1, BERT"), rows("bert", "Table 4, BERT")
OPT, OPT_LN = rows("opt", "Table 5, OPT"), rows("opt", "Table 5, OPT", DECAY)
VIT, VIT_LN = rows("vit", "Table 6, ViT"), rows("vit", "Table 6, ViT", PATCH)
VIT_150 = rows("vit", "Table 7, ViT")
PER_ROW = Row("CS (gamma_t = -1/(t+1)), LN decay", "opt", f"{ROWS} {DECAY}")

# ---- Table 2: the best of each family. The paper pairs cures that have LN decay or a patch
# LayerNorm with a vanilla model that has neither; the vanilla row that has it stands beside it.
# BERT's gate is the linear one, not the MLP that the paper found best for it: docs/laptop-recipe.md
# has its search with the linear one. A laptop's OPT is clipped at alpha = 1: docs/results.md. ----

TABLE2 = (BERT["Vanilla"], BERT_MORE["CS -0.025"], BERT_MORE["linear 0.5"], OPT["Vanilla"],
          OPT_LN["Vanilla"], replace(OPT_LN["CS/T 12"], laptop=f"{CS} --alpha 1 {DECAY}",
                                     label="CS (gamma = -12/T; laptop -1/T), LN decay"),
          PER_ROW, OPT_LN["linear 0.25"], VIT["Vanilla"], VIT_LN["Vanilla"],
          VIT_LN["CS -0.0001"], VIT_LN["linear 0.5"])

# Table 2's BERTs and OPTs with LN decay, and a published BERT
REMEDIES = (*TABLE2[:3], OPT_LN["Vanilla"], PER_ROW, OPT_LN["linear 0.25"], Row(
    "all-MiniLM-L6-v2, published", "bert", source="sentence-transformers/all-MiniLM-L6-v2"))

# ---- Table 8: run time; labels are those of lab/bench.py ----

TABLE8 = tuple(Row(method, family, published=hours)
               for family, of_family in PUBLISHED["Table 8, hours on A100 GPUs"].items()
               for method, hours in of_family.items())

# ---- Figures 6 and 7: alpha against T; how open gates start ----

FIG6 = tuple(
    Row(f"T = {T}, {words}", "bert", f"--seq-len {T} {clipped}", "",
        f"--seq-len {T} --batch-size {1024 // T} {clipped}", line=f"T = {T}", x=x)
    for T in (32, 64, 128, 256) for x, words, clipped in (("0", "vanilla", ""), *(
        (f"{alpha}", f"alpha = {alpha}", f"{CS} --alpha {alpha}") for alpha in (0.5, 1, 2, 4))))

FIG7 = tuple(
    Row(f"pi_init = {pi}", family, f"{LINEAR} --gate-init {pi}", line="linear gate", x=f"{pi}")
    for family in ("bert", "vit") for pi in (0.1, 0.25, 0.5, 0.75, 0.9, 0.97))

# ---- the blog: training in eight bits ----

BLOG = tuple(
    Row(label + note, "bert", f"{flags} {gamma} {bits}", found[i], laptop=f"{flags} {bits}")
    for i, note, bits in ((0, "", ""), (1, "-FQ", FQ), *(
        (2, f"-FQ, {n} bits", f"{FQ} --w-bits {n} --a-bits {n}") for n in (6, 4)))
    for label, flags, gamma, found in (("Vanilla", "", "", ("5.055", "542.705", "")),
                                       ("CS", CS, "--gamma -0.025", ("4.975", "4.994", "")),
                                       ("GA", GA_16, "", ("5.004", "5.301", ""))))

# ---- the cures since the paper beside the paper's own. OPT's attentions are trained at their
# recipe's learning rate and at 0.6 of it (Muon, which wants a higher one, at 4 times it), and the
# table shows the one that is better in floating point, so that none is crippled by a rate that
# suits another. BERT's are trained at the recipe's only: at 0.6 of it not even vanilla attention
# has outliers that a cure could prevent (`rates`). What a paper says of its own cure stands beside
# it; sizes, data and measures differ from paper to paper: compare directions, not numbers. ----

CURES = {"bert": {"vanilla": "", "clipped": f"{CS} --gamma -0.025",
                  "gated": f"{LINEAR} --gate-init 0.5"},
         "opt": {"vanilla": "", "clipped": f"{CS} --alpha 1", "row-clipped": ROWS,
                 "gated": f"{LINEAR} --gate-init 0.25"}}
NO_ATTENTIONS = {"RMSNorm, no gain": NO_GAIN, "Muon": MUON,
                 "Muon, RMSNorm, no gain": f"{MUON} {NO_GAIN}"}

# The recipe's learning rate, 0.6 and 4 times it: at the scale of a laptop and of the paper
RATES = {"bert": {"0.0015": "1e-4", "0.0009": "6e-5", "0.006": "4e-4"},
         "opt": {"0.005": "4e-4", "0.003": "2.4e-4", "0.02": "1.6e-3"}}


def two_rates(family):
    """OPT's rows have weight decay on all gammas, which gives it the strongest outliers."""
    own, lower, higher = RATES[family]
    since = PUBLISHED["Claims of cures since"]
    claims = PUBLISHED["Claims of its cures"][family] | since
    names = {label: f"--attention {label.lower().replace(' ', '-')}" for label in since}
    for label, flags in (CURES[family] | names | NO_ATTENTIONS).items():
        other = higher if MUON in flags else lower
        flags += f" {DECAY}" * (family == "opt" and NO_GAIN not in flags)
        yield Row(label, family, flags, claims[label], line=label, x=own)
        yield Row(f"{label}, lr {other}", family, f"{flags} --lr {RATES[family][other]}",
                  claims[label], f"{flags} --lr {other}", label, other)


ON_OPT, ON_BERT = tuple(two_rates("opt")), tuple(two_rates("bert"))[::2]

# For a GPU (the paper's models have a width of 768). The lower rate is better for all three.
WIDE = tuple(Row(f"{label}, lr {x}", "bert", f"{flags} --lr {papers}", "",
                 f"{flags} --width 512 --init-std 0.025 --warmup 4000 --lr {x}", label, x)
             for label, flags in CURES["bert"].items()
             for x, papers in (("0.0005", "1e-4"), ("0.0003", "6e-5")))

# ---- the law: how far outliers grow with the width (docs/law.md). The learning rate falls with the
# width, as 1 / sqrt(d) at least, and a post-LN BERT of width 256 learns only from smaller weights
# and a longer warm-up. ----

LAW = tuple(Row(f"{label}, d = {d}", family, f"{CURES[family][label]} {size}",
                line=f"{family.upper()}, {label}", x=f"{d}") for family, d, size in (
    ("bert", 32, "--width 32 --lr 3e-3"), ("bert", 64, "--width 64 --lr 2e-3"), ("bert", 128, ""),
    ("bert", 256, "--width 256 --lr 7e-4 --init-std 0.035 --warmup 2000"),
    ("opt", 32, f"{DECAY} --width 32 --lr 7e-3"), ("opt", 64, DECAY),
    ("opt", 128, f"{DECAY} --width 128 --lr 3.5e-3 --steps 20000"),
    ("opt", 256, f"{DECAY} --width 256 --lr 2.5e-3 --steps 20000 --compile"))
            for label in ("vanilla", "gated"))

# ---- by name ----

MANY = {"bert": RECIPES["laptop"]["bert"] + " --compile"}  # eleven minutes each
LONG = {"bert": MANY["bert"].replace("25000", "75000")}
SIX_LAYERS, OF_BLOG = ({"bert": RECIPES["paper"]["bert"].replace("paper", preset)}
                       for preset in ("bert-6l", "blog"))
HALF = {"vit": RECIPES["paper"]["vit"] + " --epochs 150"}

EXPERIMENTS = {
    "quick": Experiment("Three attentions, trained for a minute each", (
        Row("vanilla", "bert"), Row("clipped softmax", "bert", CS),
        Row("gated attention", "bert", GA)), laptop={"bert": "--steps 400"}, then="""\
A minute grows no outliers, so eight bits cost nobody anything yet. Look at one, or go below eight:
    python -m lab.analyze runs/reproduce/bert-steps_400-s0
    python quantize.py runs/reproduce/bert-steps_400* --bits 8 7 6 5 4"""),
    "table1": Experiment(
        "Clipped softmax's gamma and zeta on BERT (Table 1)", BERT.values(), laptop={"bert":
            "--width 64 --seq-len 32 --steps 4000 --lr 3e-3 --warmup 500 --eval-every 1000"}),
    "table2": Experiment("The best of each family (Table 2)", TABLE2, seeds=2, laptop=LONG),
    "table4": Experiment("BERT, all settings (Table 4)", (BERT["Vanilla"], *BERT_MORE.values()),
                         quantize=BITS, laptop=MANY),
    "table5": Experiment("OPT, all settings (Table 5)", (*OPT.values(), *OPT_LN.values(), PER_ROW)),
    "table6": Experiment("ViT, all settings (Table 6)", (*VIT.values(), *VIT_LN.values())),
    "table7": Experiment("Clipped softmax's gamma and zeta on ViT (Table 7)", VIT_150.values(),
                         paper=HALF),
    "table8": Experiment("Run time of a training step of the paper's models, dropout 0 (Table 8)",
                         TABLE8, "runtime"),
    "fig6": Experiment("gamma = -alpha/T for several lengths T (Figure 6)", FIG6, paper=SIX_LAYERS,
                       laptop={"bert": "--width 64 --steps 1000 --lr 3e-3 --eval-every 1000"},
                       xlabel="alpha (0 is vanilla)"),
    "fig7": Experiment("How open gates start (Figure 7)", FIG7, quantize=BITS, laptop=MANY,
                       paper=SIX_LAYERS | HALF, xlabel="pi_init"),
    "law": Experiment("How far outliers grow with the width", LAW, "law", quantize=BITS,
                      laptop=MANY, xlabel="width d"),
    "bits": Experiment("From eight bits down to four", TABLE2, "bits", 2, BITS, LONG),
    "short": Experiment("BERT, trained a third as long", TABLE2[:3], "bits", 2, BITS),
    "remedies": Experiment("What can be done after training", REMEDIES, "remedies", seeds=2),
    "blog": Experiment("Training in eight bits and fewer (the blog's Table 2, Figures 5 and 6)",
                       BLOG, "blog", laptop={"bert": ""}, paper=OF_BLOG),
    "cures": Experiment("The cures since the paper", ON_OPT + ON_BERT, "cures", 2, BITS, MANY),
    "cures-opt": Experiment("The cures since the paper, on OPT", ON_OPT, "cures", 2, BITS),
    "cures-bert": Experiment("The cures since the paper, on BERT", ON_BERT, "cures", 2, BITS, MANY),
    "rates": Experiment("BERT, trained long, at two learning rates", tuple(two_rates("bert"))[:6],
                        "bits", 2, BITS, LONG),
    "wide": Experiment("BERT of width 512, trained long, at two learning rates: for a GPU", WIDE,
                       "bits", quantize=BITS, laptop=LONG),
    "row-clipped": Experiment(
        "Does one gamma fail because it serves rows of all lengths? OPT, LN decay",
        (Row("vanilla", "opt", DECAY), Row("gamma = -1/T", "opt", f"{CS} --alpha 1 {DECAY}"),
         PER_ROW), "cures", 4, BITS)}
