"""The experiments of the paper and of the blog as data: what reproduce.py runs, and what they found.

A row is a training run and its quantization. Its flags are the same at every scale unless `laptop` says otherwise;
what they are added to is the recipe of its family, at the scale of a laptop or of the paper.
"""
import shlex
from dataclasses import dataclass, field, replace

RECIPES = {  # docs/laptop-recipe.md says how the laptop's were found
    "laptop": {
        "bert": "--seq-len 32 --steps 25000 --warmup 500 --eval-every 2500",
        "opt": "--width 64 --seq-len 32 --batch-size 16 --steps 10000 --lr 5e-3 --warmup 500 --eval-every 1000",
        "vit": "--width 64 --batch-size 32 --steps 4000 --lr 2e-3 --eval-every 1000"},
    "paper": {
        "bert": "--preset paper --data tokens.bin --vocab-size 30522 --special-ids 0,101,102,103",
        "opt": "--preset paper --data tokens.bin --vocab-size 50272",
        "vit": "--preset paper --data imagenet/"},
}


# Flags of quantize.py: OPT's ranges are those that the paper found best for it (sec. C.4).
QUANTIZE = {"bert": "", "opt": "--w-estimator mse --a-estimator p99.999", "vit": ""}


@dataclass(frozen=True)
class Row:
    label: str
    family: str
    flags: str = ""             # of its training script
    published: str = ""         # FP | max inf norm | avg kurtosis | W8A8; of the blog, the perplexity
    laptop: str | None = None   # flags at the scale of a laptop, where they differ
    line: str = ""              # in a figure: the row's line,
    x: str = ""                 # and its place on the x-axis
    source: str = ""            # a published checkpoint (pretrained.py) instead of a training run

    def flags_at(self, scale):
        return self.laptop if scale == "laptop" and self.laptop is not None else self.flags


@dataclass(frozen=True)
class Experiment:
    title: str
    rows: tuple
    columns: str = "quantized"  # a key of tables.COLUMNS
    seeds: int = 1              # training seeds
    xlabel: str = ""            # of the figure, if it has one
    quantize: str = ""          # flags of quantize.py, beside QUANTIZE's
    then: str = ""              # what reproduce.py says below the table
    may_fail: bool = False      # a run that fails is named below the table, instead of there being none
    recipes: dict = field(default_factory=dict)  # {scale: {family: flags}} instead of RECIPES'

    def settings(self, row, scale):
        """The flags of a row's training script, a list."""
        recipe = {**RECIPES[scale], **self.recipes.get(scale, {})}[row.family]
        return shlex.split(f"{recipe} {row.flags_at(scale)}")

    def quantization(self, row):
        """The flags of quantize.py, a list."""
        return shlex.split(f"{self.quantize} {QUANTIZE[row.family]}")


CS, GA = "--attention clipped", "--attention gated"
DECAY, PATCH = "--decay-layernorm", "--patch-layernorm"


def clipped(family, gamma, published, zeta=1.0, more="", note=""):
    settings = f"--gamma {gamma}" + (f" --zeta {zeta}" if zeta != 1.0 else "")
    label = f"CS (gamma = {gamma}" + (f", zeta = {zeta})" if zeta != 1.0 else ")")
    return Row(label + note, family, f"{CS} {settings} {more}".strip(), published)


def gated(family, gate, published, more="", note=""):
    """gate: "linear 0.25" (pi_init), "mlp 4" (n_hid) or "all-heads"."""
    kind, _, number = gate.partition(" ")
    setting = {"linear": f" --gate-init {number}", "mlp": f" --gate-hidden {number}", "all-heads": ""}[kind]
    label = {"linear": f"GA, linear (pi_init = {number})", "mlp": f"GA, MLP (n_hid = {number})", "all-heads": "GA, all-heads-linear"}[kind]
    return Row(label + note, family, f"{GA} --gate {kind}{setting} {more}".strip(), published)


# ---- Tables 1 and 4: BERT ----

BERT_VANILLA = Row("Vanilla", "bert", "", "4.49 ±0.01 | 735 ±55 | 3076 ±262 | 1294 ±1046")

TABLE1 = (
    BERT_VANILLA,
    clipped("bert", 0, "4.48 ±0.01 | 715 ±335 | 2159 ±238 | 451 ±57", zeta=1.003),
    clipped("bert", 0, "4.49 ±0.00 | 741 ±66 | 1707 ±1249 | 1469 ±646", zeta=1.03),
    clipped("bert", -0.003, "4.46 ±0.00 | 688 ±64 | 2149 ±110 | 636 ±566"),
    clipped("bert", -0.03, "4.41 ±0.01 | 20 ±1 | 80 ±6 | 4.55 ±0.01"),
    clipped("bert", -0.003, "4.47 ±0.00 | 683 ±23 | 2494 ±1205 | 268 ±120", zeta=1.003),
    clipped("bert", -0.03, "4.43 ±0.03 | 22 ±3 | 73 ±8 | 4.56 ±0.05", zeta=1.03),
)

TABLE4 = (
    BERT_VANILLA,
    clipped("bert", -0.005, "4.44 ±0.02 | 406.6 ±35.2 | 1963 ±753 | 75.27 ±39.57"),
    clipped("bert", -0.01, "4.35 ±0.01 | 198.3 ±78.7 | 1581 ±839 | 7.06 ±2.37"),
    clipped("bert", -0.015, "4.37 ±0.01 | 38.9 ±7.9 | 165 ±34 | 4.54 ±0.01"),
    clipped("bert", -0.02, "4.39 ±0.02 | 31.7 ±6.3 | 90 ±20 | 4.56 ±0.02"),
    clipped("bert", -0.025, "4.39 ±0.00 | 21.5 ±1.5 | 80 ±6 | 4.52 ±0.01"),
    clipped("bert", -0.03, "4.41 ±0.01 | 20.4 ±0.2 | 79 ±6 | 4.55 ±0.01"),
    clipped("bert", -0.04, "4.51 ±0.05 | 19.8 ±9.0 | 85 ±7 | 4.65 ±0.06"),
    gated("bert", "linear 0.25", "4.49 ±0.00 | 139.8 ±62.3 | 739 ±412 | 5.05 ±0.27"),
    gated("bert", "linear 0.5", "4.48 ±0.00 | 177.3 ±33.2 | 652 ±81 | 5.13 ±0.15"),
    gated("bert", "linear 0.75", "4.49 ±0.00 | 71.4 ±49.9 | 262 ±147 | 4.88 ±0.22"),
    gated("bert", "linear 0.9", "4.49 ±0.00 | 171.5 ±8.8 | 559 ±141 | 5.15 ±0.03"),
    gated("bert", "mlp 4", "4.45 ±0.03 | 39.2 ±26.0 | 201 ±181 | 4.65 ±0.04"),
    gated("bert", "mlp 64", "4.49 ±0.01 | 117.0 ±48.3 | 507 ±167 | 4.77 ±0.01"),
    gated("bert", "all-heads", "4.49 ±0.01 | 58.3 ±41.2 | 334 ±321 | 4.67 ±0.03"),
)

# ---- Table 5: OPT, without and with weight decay on LayerNorm's gamma ----


def opt_clipped(alpha, published):
    """gamma = -alpha / 512 at the paper's T of 512, so -alpha / T at any."""
    return Row(f"CS (gamma = -{alpha}/T), LN decay", "opt", f"{CS} --alpha {alpha} {DECAY}", published)


PER_ROW = Row("CS (gamma_t = -1/(t+1)), LN decay", "opt", f"--attention row-clipped --alpha 1 {DECAY}")


TABLE5 = (
    Row("Vanilla", "opt", "", "15.84 ±0.05 | 339.6 ±47.2 | 1777 ±444 | 21.18 ±1.89"),
    gated("opt", "linear 0.1", "15.61 ±0.05 | 35.6 ±4.5 | 42.4 ±22.9 | 16.41 ±0.18"),
    gated("opt", "linear 0.25", "15.50 ±0.04 | 35.8 ±0.5 | 59.0 ±48.3 | 16.25 ±0.08"),
    gated("opt", "linear 0.5", "15.54 ±0.01 | 46.5 ±5.0 | 40.6 ±8.9 | 16.30 ±0.01"),
    gated("opt", "all-heads", "15.43 ±0.01 | 32.8 ±1.7 | 24.2 ±3 | 16.30 ±0.12"),
    Row("Vanilla, LN decay", "opt", DECAY, "15.96 ±0.03 | 87.7 ±31.9 | 2080 ±1460 | 39.46 ±16.59"),
    opt_clipped(1, "15.99 ±0.02 | 106.4 ±7.0 | 5764 ±2150 | 185.23 ±220.00"),
    opt_clipped(2, "15.90 ±0.02 | 102.0 ±27.0 | 11290 ±4372 | 60.90 ±52.70"),
    opt_clipped(4, "15.86 ±0.01 | 83.1 ±20.6 | 17174 ±7791 | 84.64 ±10.55"),
    opt_clipped(8, "16.13 ±0.09 | 61.5 ±9.9 | 19204 ±4284 | 42.62 ±3.64"),
    opt_clipped(12, "16.29 ±0.07 | 63.2 ±8.8 | 19727 ±7479 | 37.22 ±2.39"),
    gated("opt", "linear 0.1", "15.69 ±0.05 | 7.3 ±0.4 | 25.4 ±10 | 16.23 ±0.08", DECAY, ", LN decay"),
    gated("opt", "linear 0.25", "15.55 ±0.05 | 8.7 ±0.6 | 18.9 ±1 | 16.02 ±0.07", DECAY, ", LN decay"),
    gated("opt", "linear 0.5", "15.63 ±0.00 | 10.8 ±0.7 | 42.0 ±19 | 16.20 ±0.01", DECAY, ", LN decay"),
    gated("opt", "all-heads", "15.53 ±0.01 | 7.9 ±0.3 | 13.8 ±1 | 16.09 ±0.08", DECAY, ", LN decay"),
    PER_ROW,
)

# ---- Tables 6 and 7: ViT, without and with a LayerNorm after the patch embedding ----

TABLE6 = (
    Row("Vanilla", "vit", "", "80.75 ±0.10 | 358.5 ±81.2 | 1018.3 ±471.5 | 69.24 ±6.93"),
    clipped("vit", -0.003, "80.24 ±0.05 | 69.3 ±20.7 | 25.6 ±8.6 | 78.71 ±0.33"),
    clipped("vit", -0.004, "80.38 ±0.01 | 74.9 ±10.6 | 30.6 ±4.9 | 78.66 ±0.49"),
    gated("vit", "linear 0.25", "80.62 ±0.01 | 86.0 ±8.0 | 23.4 ±2.7 | 79.16 ±0.05"),
    gated("vit", "linear 0.5", "80.32 ±0.02 | 88.4 ±17.9 | 27.9 ±14.0 | 78.90 ±0.25"),
    gated("vit", "mlp 4", "80.62 ±0.05 | 118.2 ±40.5 | 47.8 ±29.8 | 78.79 ±0.29"),
    Row("Vanilla, patch LN", "vit", PATCH, "80.98 ±0.08 | 81.1 ±2.5 | 24.5 ±1.8 | 79.62 ±0.06"),
    clipped("vit", -0.0001, "80.89 ±0.13 | 73.7 ±14.9 | 22.9 ±1.6 | 79.77 ±0.25", 1.0, PATCH, ", patch LN"),
    clipped("vit", -0.0003, "80.92 ±0.07 | 78.9 ±5.5 | 23.8 ±0.5 | 79.63 ±0.05", 1.0, PATCH, ", patch LN"),
    clipped("vit", -0.0005, "80.95 ±0.08 | 72.9 ±11.8 | 24.4 ±0.7 | 79.73 ±0.08", 1.0, PATCH, ", patch LN"),
    clipped("vit", -0.001, "80.95 ±0.16 | 80.8 ±2.1 | 24.1 ±0.7 | 79.69 ±0.03", 1.0, PATCH, ", patch LN"),
    clipped("vit", -0.002, "80.80 ±0.07 | 78.0 ±0.5 | 25.8 ±0.7 | 79.32 ±0.07", 1.0, PATCH, ", patch LN"),
    clipped("vit", -0.003, "80.79 ±0.02 | 75.6 ±7.9 | 28.1 ±4.0 | 79.00 ±0.10", 1.0, PATCH, ", patch LN"),
    gated("vit", "linear 0.5", "81.01 ±0.06 | 79.8 ±0.5 | 19.9 ±0.3 | 79.82 ±0.11", PATCH, ", patch LN"),
    gated("vit", "linear 0.75", "81.01 ±0.05 | 77.8 ±0.3 | 21.8 ±1.9 | 79.80 ±0.08", PATCH, ", patch LN"),
    gated("vit", "linear 0.9", "80.92 ±0.11 | 70.6 ±8.0 | 23.2 ±3.7 | 79.64 ±0.09", PATCH, ", patch LN"),
)

TABLE7 = (
    Row("Vanilla", "vit", "", "78.80 ±0.42 | 426 ±69 | | 71.27 ±0.88"),
    clipped("vit", 0, "78.78 ±0.29 | 411 ±88 | | 71.24 ±0.59", zeta=1.001),
    clipped("vit", 0, "78.90 ±0.17 | 420 ±47 | | 70.74 ±0.34", zeta=1.002),
    clipped("vit", 0, "78.80 ±0.45 | 377 ±67 | | 72.31 ±0.06", zeta=1.004),
    clipped("vit", 0, "78.81 ±0.30 | 419 ±77 | | 71.35 ±0.26", zeta=1.01),
    clipped("vit", "-0.00001", "78.81 ±0.21 | 432 ±76 | | 69.02 ±0.19"),
    clipped("vit", -0.0001, "78.81 ±0.36 | 380 ±64 | | 64.04 ±10.8"),
    clipped("vit", -0.001, "78.42 ±0.63 | 282 ±105 | | 68.43 ±6.50"),
    clipped("vit", -0.003, "78.26 ±0.06 | 99 ±36 | | 76.49 ±0.48"),
    clipped("vit", -0.01, "78.10 ±0.14 | 391 ±21 | | 75.83 ±1.12"),
    clipped("vit", -0.03, "70.26 ±1.46 | 197 ±2 | | 65.80 ±1.41"),
    clipped("vit", -0.001, "78.45 ±0.53 | 283 ±82 | | 65.03 ±8.54", zeta=1.001),
    clipped("vit", -0.003, "78.25 ±0.14 | 119 ±17 | | 76.37 ±0.45", zeta=1.003),
)

# ---- Table 2: the best of each family. The paper pairs cures that have LN decay or a patch LayerNorm with a
# vanilla model that has neither; the vanilla row that has it stands beside it. BERT's gate is the linear one, not the
# MLP that the paper found best for it: docs/laptop-recipe.md has its search with the linear one. ----


def pick(table, *labels):
    return tuple(row for label in labels for row in table if row.label == label)


TABLE2 = (
    *pick(TABLE4, "Vanilla", "CS (gamma = -0.025)", "GA, linear (pi_init = 0.5)"),
    *pick(TABLE5, "Vanilla", "Vanilla, LN decay"),
    replace(*pick(TABLE5, "CS (gamma = -12/T), LN decay"), label="CS (gamma = -12/T; laptop -1/T), LN decay",
            laptop=f"{CS} --alpha 1 {DECAY}"),  # as in the laptop presets: docs/results.md
    PER_ROW,
    *pick(TABLE5, "GA, linear (pi_init = 0.25), LN decay"),
    *pick(TABLE6, "Vanilla", "Vanilla, patch LN", "CS (gamma = -0.0001), patch LN", "GA, linear (pi_init = 0.5), patch LN"),
)

# ---- what can be done after training: Table 2's BERTs and OPTs with LN decay, and a published BERT ----

REMEDIES = (
    *(row for row in TABLE2 if row.family == "bert"),
    *pick(TABLE2, "Vanilla, LN decay", PER_ROW.label, "GA, linear (pi_init = 0.25), LN decay"),
    Row("all-MiniLM-L6-v2, published", "bert", source="sentence-transformers/all-MiniLM-L6-v2"),
)

# ---- Table 8: run time, published in hours on A100 GPUs; labels are those of bench.METHODS ----

TABLE8 = tuple(
    Row(method, family, flags, hours)
    for family, published in {"bert": ("92.8 ±1.2", "93.6 ±0.8", "97.7", "119.1"),
                              "opt": ("53.6 ±0.4", "54.4 ±0.4", "55.7", "64.7"),
                              "vit": ("101.8 ±0.3", "104.0 ±0.7", "110.8", "122.9")}.items()
    for method, flags, hours in zip(("vanilla", "clipped softmax", "gated attention, linear", "gated attention, mlp"),
                                    ("", CS, f"{GA} --gate linear", f"{GA} --gate mlp"), published))

# ---- the README's first command ----

QUICK = (Row("vanilla", "bert", ""), Row("clipped softmax", "bert", CS), Row("gated attention", "bert", GA))

# ---- Figures 6 and 7: alpha against T; pi_init ----

FIG6 = tuple(
    Row(f"T = {T}, " + (f"alpha = {alpha:g}" if alpha else "vanilla"), "bert",
        f"--seq-len {T}" + (f" {CS} --alpha {alpha:g}" if alpha else ""),
        laptop=f"--seq-len {T} --batch-size {1024 // T}" + (f" {CS} --alpha {alpha:g}" if alpha else ""),
        line=f"T = {T}", x=f"{alpha:g}")
    for T in (32, 64, 128, 256) for alpha in (0, 0.5, 1, 2, 4))

FIG7 = tuple(
    Row(f"pi_init = {gate_init}", family, f"{GA} --gate linear --gate-init {gate_init}", line="linear gate", x=f"{gate_init}")
    for family in ("bert", "vit") for gate_init in (0.1, 0.25, 0.5, 0.75, 0.9, 0.97))

# ---- the law: how far outliers grow with the width (docs/law.md). The learning rate falls with the width, as
# 1 / sqrt(d) at least, and a post-LN BERT of width 256 learns only from smaller weights and a longer warm-up. ----

WIDTHS = {
    "bert": {32: "--width 32 --lr 3e-3", 64: "--width 64 --lr 2e-3", 128: "",  # the laptop's own
             256: "--width 256 --lr 7e-4 --init-std 0.035 --warmup 2000"},
    "opt": {32: "--width 32 --lr 7e-3", 64: "", 128: "--width 128 --lr 3.5e-3 --steps 20000",
            256: "--width 256 --lr 2.5e-3 --steps 20000 --compile"},
}
LAW_ATTENTIONS = {
    "bert": {"vanilla": "", "gated": f"{GA} --gate linear --gate-init 0.5"},
    "opt": {"vanilla": DECAY, "gated": f"{GA} --gate linear --gate-init 0.25 {DECAY}"},
}
LAW = tuple(
    Row(f"{name}, d = {d}", family, f"{flags} {size}".strip(), line=f"{family.upper()}, {name}", x=str(d))
    for family, widths in WIDTHS.items() for d, size in widths.items()
    for name, flags in LAW_ATTENTIONS[family].items())

# ---- the blog: training in eight bits ----

BLOG = (
    Row("Vanilla", "bert", "", "5.055"),
    Row("CS", "bert", f"{CS} --gamma -0.025", "4.975", laptop=CS),
    Row("GA", "bert", f"{GA} --gate mlp --gate-hidden 16", "5.004"),
    Row("Vanilla-FQ", "bert", "--fake-quant", "542.705"),
    Row("CS-FQ", "bert", f"{CS} --gamma -0.025 --fake-quant", "4.994", laptop=f"{CS} --fake-quant"),
    Row("GA-FQ", "bert", f"{GA} --gate mlp --gate-hidden 16 --fake-quant", "5.301"),
)


def at_bits(row, bits):
    more = f" --w-bits {bits} --a-bits {bits}"
    laptop = None if row.laptop is None else row.laptop + more
    return Row(f"{row.label}, {bits} bits", row.family, row.flags + more, "", laptop)


BERT_6L, BLOG_BERT = ({"bert": RECIPES["paper"]["bert"].replace("--preset paper", f"--preset {preset}")} for preset in ("bert-6l", "blog"))

BERT_LONG = RECIPES["laptop"]["bert"].replace("25000", "75000") + " --compile"
BERT_MANY = RECIPES["laptop"]["bert"] + " --compile"  # where rows are many: eleven minutes each
BERT_SHORT = "--width 64 --seq-len 32 --steps 4000 --lr 3e-3 --warmup 500 --eval-every 1000"

EXPERIMENTS = {
    "quick": Experiment("Three attentions, trained for a minute each", QUICK, recipes={"laptop": {"bert": "--steps 400"}}, then="""\
A minute grows no outliers, so eight bits cost nobody anything yet. Look at one of these runs, go below eight bits,
or grow an outlier (README.md, "Grow one yourself"):

    python analyze.py runs/reproduce/bert-steps_400-s0
    python quantize.py runs/reproduce/bert-steps_400* --sweep"""),
    "table1": Experiment("Clipped softmax's gamma and zeta on BERT (Table 1)", TABLE1, recipes={"laptop": {"bert": BERT_SHORT}}),
    "table2": Experiment("The best of each family (Table 2)", TABLE2, seeds=2, recipes={"laptop": {"bert": BERT_LONG}}),
    "table4": Experiment("BERT, all settings (Table 4)", TABLE4, quantize="--sweep", recipes={"laptop": {"bert": BERT_MANY}}),
    "table5": Experiment("OPT, all settings (Table 5)", TABLE5),
    "table6": Experiment("ViT, all settings (Table 6)", TABLE6),
    "table7": Experiment("Clipped softmax's gamma and zeta on ViT (Table 7)", TABLE7,
                         recipes={"paper": {"vit": RECIPES["paper"]["vit"] + " --epochs 150"}}),
    "table8": Experiment("Run time of a training step of the paper's models, dropout 0 (Table 8)", TABLE8, columns="runtime"),
    "fig6": Experiment("gamma = -alpha/T for several lengths T (Figure 6)", FIG6, xlabel="alpha (0 is vanilla)", recipes={
        "laptop": {"bert": "--width 64 --steps 1000 --lr 3e-3 --eval-every 1000"}, "paper": BERT_6L}),
    "fig7": Experiment("How open gates start (Figure 7)", FIG7, xlabel="pi_init", quantize="--sweep", recipes={
        "laptop": {"bert": BERT_MANY}, "paper": BERT_6L | {"vit": RECIPES["paper"]["vit"] + " --epochs 150"}}),
    "law": Experiment("How far outliers grow with the width", LAW, columns="law", xlabel="width d", quantize="--sweep",
                      recipes={"laptop": {"bert": BERT_MANY}}),
    "bits": Experiment("From eight bits down to four", TABLE2, columns="bits", seeds=2, quantize="--sweep",
                       recipes={"laptop": {"bert": BERT_LONG}}),
    "short": Experiment("BERT, trained a third as long", TABLE2[:3], columns="bits", seeds=2, quantize="--sweep"),
    "remedies": Experiment("What can be done after training", REMEDIES, columns="remedies", seeds=2, quantize="--remedies"),
    "blog": Experiment(
        "Training in eight bits and fewer (the blog's Table 2, Figures 5 and 6)", columns="blog",
        rows=BLOG + tuple(at_bits(row, bits) for bits in (6, 4) for row in BLOG[3:]),
        recipes={"laptop": {"bert": ""}, "paper": BLOG_BERT}),
}
