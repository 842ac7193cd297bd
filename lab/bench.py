"""Speed, as ratios to a named alternative measured in the same run.

    python -m lab.bench --quick                    every group once, on two layers; minutes
    python -m lab.bench                            in full: an hour on a laptop
    python -m lab.bench bert --precision fp32
    python -m lab.bench data augment watch quant   what ought to cost little

bert opt vit    a training step against Hugging Face's two attentions, ours explicit and --fused
attention       a training step with each of the paper's attentions (Table 8), and --fused
precision       a training step of the laptop presets in bf16, against fp32
fakequant       a training step in eight bits (the blog), and torchao's, against floating point
data augment    making a batch, against a training step
watch quant     measuring outliers, calibrating and quantized passes, against plain ones
integer         int8 inference and torchao's, eager and compiled, against fp32
roofline        a training step against as many operations in one large matrix product

Each ratio is the median over rounds in which the alternatives take turns; machines drift, ratios
less so. The peers, transformers and torchao (pip install -e '.[peers]'), are left out where they
are not installed. Of the paper's models batches are small: 8, 4 and 16.
"""
import argparse
import copy
import functools
import json
from itertools import product

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import train_bert, train_opt, train_vit
from lab import peers, timing
from lab.integer import to_integer
from minq import flags
from minq.augment import PIECES, Draws, augment
from minq.data import CausalText, MaskedText, load_text
from minq.fake_quant import fake_quantize_training
from minq.model import FAMILIES
from minq.outliers import growth, watch
from minq.quant import calibrating, quantize_model
from minq.runs import open_run
from minq.training import (OPTIMIZERS, autocast, compiled, parameter_groups, pick_device,
                           pick_precision, to_device)

# ---- what is timed: family -> (title, recipe) ----

TASKS = {f: (title, script.PRESETS["paper"] | sizes) for f, script, title, sizes in (
    ("bert", train_bert, "BERT-base, batch 8, T 128", dict(batch_size=8, vocab_size=30522)),
    ("opt", train_opt, "OPT-125m, batch 4, T 512", dict(batch_size=4, vocab_size=50272)),
    ("vit", train_vit, "ViT-S/16, batch 16", dict(batch_size=16, classes=1000)))}
LAPTOP = {f: (f"laptop {f}", script.PRESETS["laptop"] | dict(image_size=32, classes=10))
          for f, script in (("bert", train_bert), ("opt", train_opt), ("vit", train_vit))}
text = functools.cache(load_text)


def batch(family, recipe):
    """A batch as our models take it, (inputs, targets), and as Hugging Face's, (inputs, labels)."""
    if family == "vit":
        images = torch.rand(recipe["batch_size"], 3, *2 * [recipe["image_size"]])
        labels = torch.randint(recipe["classes"], images.shape[:1])
        return ((images,), labels), (2 * images - 1, labels)
    loader = {"bert": MaskedText, "opt": CausalText}[family](text("stdlib"), recipe["seq_len"])
    tokens, labels = loader.train_batch(0, 0, recipe["batch_size"])
    theirs = (tokens, labels if family == "bert" else tokens)  # its OPT shifts them by itself
    return loader.to_model(tokens, labels), tuple(map(torch.from_numpy, theirs))


def new_model(family, recipe, args, **settings):
    build = FAMILIES[family]
    settings = {"dropout": 0.0} | settings | ({"layers": 2} if args.quick else {})
    config = build.config_class.of(argparse.Namespace(**recipe), **settings)
    return build(config).to(args.device)


def loss_of(model, inputs, targets):
    """A function that computes the model's loss on one batch."""
    return lambda: F.cross_entropy(model(*inputs).float().flatten(0, -2), targets.flatten())


def training_step(model, loss, device, precision, name="adamw"):
    """A whole step as a function: forward, backward, clipping, optimizer."""
    optimizer = OPTIMIZERS[name](model, parameter_groups(model, 0.01), lr=1e-4, betas=(0.9, 0.999))

    @torch.enable_grad()
    def step():
        with autocast(device, precision):
            value = loss()
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return step


def step(family, recipe, args, precision=None, prepare=lambda model: model, **settings):
    """A training step of a new model."""
    model = prepare(new_model(family, recipe, args, **settings))
    loss = loss_of(model, *to_device(batch(family, recipe)[0], args.device))
    return training_step(model, loss, args.device, precision or args.precision)


# ---- groups: each yields (title, functions that take turns, the reference's name) ----

def against_hugging_face(family, args):
    title, recipe = TASKS[family]
    x, labels = to_device(batch(family, recipe)[1], args.device)
    for dropout in args.dropout:
        steps = {name: step(family, recipe, args, dropout=dropout, fused=fused)
                 for name, fused in (("minq", False), ("minq, --fused", True))}
        for kind in ("sdpa", "eager") if "transformers" in peers.INSTALLED else ():
            model = peers.hugging_face(new_model(family, recipe, args, dropout=dropout), kind)
            loss = lambda model=model: model(x, labels=labels).loss
            steps[f"Hugging Face, {kind}"] = training_step(model, loss, args.device, args.precision)
        yield f"{title}: a training step, dropout {dropout}", steps, "minq"


METHODS = {"vanilla": {}, "clipped softmax": dict(attention="clipped", gamma=-0.03),
           **{f"gated attention, {gate}": dict(attention="gated", gate=gate)
              for gate in ("linear", "mlp", "all-heads")}, "--fused": dict(fused=True)}


def method_steps(family, dropout, args):
    return {name: step(family, TASKS[family][1], args, dropout=dropout, **settings)
            for name, settings in METHODS.items()}


def method_seconds(family, dropout, args):
    """Seconds of each round of a training step, by attention (Table 8)."""
    return timing.in_turns(method_steps(family, dropout, args), args.rounds, args.device)


def attention(args):
    for family, dropout in product(TASKS, args.dropout):
        title = f"{TASKS[family][0]}: a training step, dropout {dropout}"
        yield title, method_steps(family, dropout, args), "vanilla"


def run_seconds(folders, rounds, device):
    """Seconds of each round of a training step of finished runs, {name: folder}: each with its own
    attention, optimizer, precision and batch size, on one batch again and again. One thread."""
    threads, steps = torch.get_num_threads(), {}
    for name, folder in folders.items():
        run = open_run(folder, device)
        saved = run.checkpoint["args"]
        arrays = run.data.train_batch(0, 0, saved["batch_size"])
        loss = loss_of(run.model.train(), *to_device(run.data.to_model(*arrays), device))
        steps[name] = training_step(run.model, loss, device, saved["precision"], saved["optimizer"])
    torch.set_num_threads(1)
    try:
        return timing.in_turns(steps, rounds, device)
    finally:
        torch.set_num_threads(threads)


def precision(args):
    for family, (title, recipe) in LAPTOP.items():
        steps = {kind: step(family, recipe, args, kind) for kind in ("fp32", "bf16")}
        yield f"{title}: a training step", steps, "fp32"


def fake_quant(args):
    kinds = {"floating point": lambda model: model, "minq": fake_quantize_training,
             "minq, int8": functools.partial(fake_quantize_training, linear="integer")}
    for kind in ("QAT", "int8 training") if "torchao" in peers.INSTALLED else ():
        kinds[f"torchao's {kind}"] = functools.partial(peers.torchao, kind)
    title, recipe = TASKS["bert"]
    steps = {name: step("bert", recipe, args, prepare=kind) for name, kind in kinds.items()}
    yield f"{title}: a training step", steps, "floating point"


def data(args):
    for title, recipe in (LAPTOP["bert"], TASKS["bert"]):
        functions = {"step": step("bert", recipe, args), "batch": lambda: batch("bert", recipe)}
        yield f"{title}: a batch of masked text against a training step", functions, "step"


def augmentation(args):
    for title, recipe in (LAPTOP["vit"], TASKS["vit"]):
        (images,), labels = to_device(batch("vit", recipe)[0], args.device)
        settings = recipe["classes"], Draws(0, args.device), recipe["image_size"]
        strengths = {name: recipe[name] for name in PIECES}
        functions = {"step": step("vit", recipe, args),
                     "augment": lambda: augment(images, labels, *settings, **strengths)}
        yield f"{title}: a batch augmented, against a training step", functions, "step"


def run(context, model, x):
    """A pass within a context."""
    with context:
        model(x)


def encoders(args):
    """(title, encoder, its calibrated copy, tokens x): the laptop's BERT, and BERT-base."""
    for title, recipe in (LAPTOP["bert"], TASKS["bert"]):
        model = new_model("bert", recipe, args, masked_head=False).eval()
        x = to_device(batch("bert", recipe)[0], args.device)[0][0]
        w8a8 = quantize_model(model, a_estimator="minmax")
        run(calibrating(w8a8), w8a8, x)
        yield title, model, w8a8, x


def watching(args):
    for title, model, _, x in encoders(args):
        watched = lambda: run(watch(model, ("layer_input", *model.kurtosis_taps), growth), model, x)
        yield f"{title}: a pass", {"plain": lambda: model(x), "watched": watched}, "plain"


def quant(args):
    for title, model, w8a8, x in encoders(args):
        calibration = lambda: run(calibrating(w8a8), w8a8, x)
        passes = {"fp32": lambda: model(x), "calibration": calibration, "W8A8": lambda: w8a8(x)}
        yield f"{title}: a pass", passes, "fp32"


def integer(args):
    for title, model, w8a8, x in encoders(args):
        models = {"fp32": model, "bf16": copy.deepcopy(model).bfloat16(), "int8": to_integer(w8a8)}
        if "torchao" in peers.INSTALLED:
            models["int8 Linears (torchao)"] = peers.torchao("int8", copy.deepcopy(model))
        for how, prepare in (("eager", lambda model: model), ("compiled", compiled)):
            torch.compiler.reset()
            passes = {kind: functools.partial(prepare(m), x) for kind, m in models.items()}
            yield f"{title}: a pass, {how}", passes, "fp32"


def roofline(args):
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[args.precision]
    for family, (title, recipe) in TASKS.items():
        functions = {"step": step(family, recipe, args)}
        with FlopCounterMode(display=False) as counter:
            functions["step"]()
        rows = counter.get_total_flops() // (2 * 2048 ** 2)
        a, b = (torch.randn(n, 2048, device=args.device, dtype=dtype) for n in (rows, 2048))
        functions["product"] = functools.partial(torch.mm, a, b, out=a.clone())
        yield f"{title}: a training step", functions, "product"


GROUPS = {family: functools.partial(against_hugging_face, family) for family in TASKS} | dict(
    attention=attention, precision=precision, fakequant=fake_quant, data=data,
    augment=augmentation, watch=watching, quant=quant, integer=integer, roofline=roofline)


@flags.one_line_errors
@torch.no_grad()  # a training step alone needs gradients
def main(argv=None):
    parser = flags.Parser(__doc__)
    add = parser.add_argument
    add("groups", nargs="*", choices=["all", *GROUPS], default="all", metavar="GROUP",
        help=f"some of {' '.join(GROUPS)}; by default all")
    add("--quick", action="store_true", help="one round, dropout 0, two layers of each model")
    add("--rounds", type=flags.positive, help="turns that each alternative takes; by default 5")
    add("--dropout", type=flags.below_1, nargs="+", help="of training steps; by default 0 and 0.1")
    add("--device", help="cpu, cuda, cuda:N or mps; by default the best there is")
    add("--precision", choices=("fp32", "bf16", "fp16"), help="of training steps")
    add("--json", type=flags.new_file, metavar="FILE", help="write the numbers there, too")
    args = parser.parse_args(argv)
    args.rounds = args.rounds or (1 if args.quick else 5)
    args.dropout = args.dropout or ([0.0] if args.quick else [0.0, 0.1])
    args.device = pick_device(args.device)
    args.precision = pick_precision(args.precision, args.device)
    print(args.device, args.precision, torch.get_num_threads(), "threads", "(quick)" * args.quick)
    rows = []
    for group in GROUPS if "all" in args.groups else dict.fromkeys(args.groups):
        for title, functions, reference in GROUPS[group](args):
            seconds = timing.in_turns(functions, args.rounds, args.device)
            timing.report(title, seconds, reference)
            rows.append({"group": group, "title": title, "precision": args.precision,
                         "reference": reference, "seconds": seconds})
    if args.json:
        flags.write_atomically(args.json, json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
