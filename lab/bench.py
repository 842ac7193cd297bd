"""Speed, as ratios against a named alternative measured in the same run.

    python bench.py --quick               every group below once, on fewer layers; minutes
    python bench.py                       in full: an hour on a laptop
    python bench.py bert --precision fp32
    python bench.py data augment watch quant      what costs little

Each ratio is the median over rounds in which the two take turns; machines drift, ratios less so.
The groups bert, opt and vit compare with Hugging Face, fakequant and integer with torchao: pip install -e '.[peers]'.
"""
import argparse
import copy
import functools
import multiprocessing
import re
import statistics
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.utils import parametrize

from minq import flags, peers
from minq.augment import Draws, augment
from minq.data import MaskedText, load_text
from minq.errors import one_line_errors
from minq.fake_quant import fake_quantize_training
from minq.integer import to_integer
from minq.integer_training import IntegerLinear
from minq.model import Bert, BertConfig, ViT, ViTConfig
from minq.outliers import watch
from minq.quant import calibrating, quantize_model
from minq.runs import open_run
from minq.timing import in_turns, report
from minq.training import pick_device, pick_precision, to_device
from minq.workloads import (BERT_BASE, LAPTOP, LAPTOP_VIT, TASKS, VIT_S, bert_task, explicit, fewer, laptop_task, matrix_product,
                            name_of, operations, training_step)


@one_line_errors
def main(argv=None):
    parser = flags.Parser(__doc__)
    parser.add_argument("groups", nargs="*", action=flags.Distinct, help=f"of: {' '.join(GROUPS)} (default: all)")
    parser.add_argument("--rounds", type=flags.positive, help="turns that each alternative takes (default: 5)")
    parser.add_argument("--dropout", type=flags.number(float, low=0, below=1), nargs="+",
                        help="of training steps, one after another (default: 0 0.1)")
    parser.add_argument("--quick", action="store_true", help="one round, dropout 0, and two of the paper's twelve layers")
    parser.add_argument("--device", help="by default the best there is")
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp16"), help="of training steps; by default the device's best")
    args = parser.parse_args(argv)
    unknown = set(args.groups) - set(GROUPS)
    if unknown:
        parser.error(f"{min(unknown)}: no such group; expected some of {' '.join(GROUPS)}")
    args.rounds = args.rounds or (1 if args.quick else 5)
    args.dropout = args.dropout or ([0.0] if args.quick else [0.0, 0.1])
    args.device = pick_device(args.device)
    args.precision = pick_precision(args.precision, args.device)
    print(f"{args.device}, {args.precision}, {torch.get_num_threads()} threads, torch {torch.__version__}, {args.rounds} rounds")
    for group in args.groups or GROUPS:
        GROUPS[group](args)


# ---- groups: a training step against Hugging Face's ----

def against_hugging_face(family, args):
    """Hugging Face's model with either of its attentions, and ours."""
    ours, inputs, labels = TASKS[family](args)
    if not peers.installed("transformers"):
        print("Hugging Face: not installed")
    for dropout in args.dropout:
        models = {"minq": ours(dropout=dropout)}
        for attention in ("sdpa", "eager") if peers.installed("transformers") else ():
            model = peers.hugging_face(family, attention, dropout, len(models["minq"][0].layers)).to(args.device).train()
            models[f"Hugging Face, {attention}"] = model, lambda model=model: model(inputs, labels=labels).loss
        seconds = in_turns({name: training_step(*pair, args) for name, pair in models.items()}, args.rounds, args.device)
        best = min(models, key=lambda name: (name == "minq", statistics.median(seconds[name])))
        report(f"{name_of(family, args)}: a training step, {args.precision}, dropout {dropout}", seconds, best)


# ---- group: what each attention costs (Table 8) ----

METHODS = {"vanilla": {}, "clipped softmax": dict(attention="clipped", gamma=-0.03),
           **{f"gated attention, {gate}": dict(attention="gated", gate=gate) for gate in ("linear", "mlp", "all-heads")}}


def method_seconds(family, dropout, args):
    """Seconds of each round of a training step, by attention; "vanilla" is without the fused kernel, as in the paper."""
    build = TASKS[family](args)[0]
    models = {name: explicit(*build(dropout=dropout, **settings)) for name, settings in METHODS.items()}
    models["vanilla, as chosen"] = build(dropout=dropout)  # attention.SelfAttention.can_fuse decides
    return in_turns({name: training_step(*pair, args) for name, pair in models.items()}, args.rounds, args.device)


def run_seconds(folders, rounds, device):
    """Seconds of each round of a training step of finished runs, {name: folder}, as each was trained but one batch again
    and again, and without the fused kernel; with one thread."""
    threads, steps = torch.get_num_threads(), {}
    for name, folder in folders.items():
        run = open_run(folder, device)
        saved = argparse.Namespace(**{"optimizer": "adamw"} | run.checkpoint["args"])
        inputs, targets = to_device(run.data.to_model(*run.data.train_batch(0, 0, saved.batch_size)), device)
        loss = lambda model=run.model.train(), x=inputs, y=targets: F.cross_entropy(model(*x).float().flatten(0, -2), y.flatten())
        steps[name] = training_step(*explicit(run.model, loss), argparse.Namespace(device=device, precision=saved.precision), saved.optimizer)
    torch.set_num_threads(1)
    try:
        return in_turns(steps, rounds, device)
    finally:
        torch.set_num_threads(threads)


def attention(args):
    for family in TASKS:
        for dropout in args.dropout:
            report(f"{name_of(family, args)}, by attention: a training step, {args.precision}, dropout {dropout}",
                   method_seconds(family, dropout, args), "vanilla")


# ---- group: which precision is the right default for small models ----

def precisions(args):
    """A training step of the laptop presets' models in bf16 against fp32, at two widths."""
    for family in TASKS:
        for width in (64, 128):
            steps = {precision: training_step(*laptop_task(family, width, args.device), argparse.Namespace(
                device=args.device, precision=precision)) for precision in ("fp32", "bf16")}
            seconds = in_turns(steps, 4 * args.rounds, args.device)
            report(f"{family}'s laptop preset at width {width}: a training step", seconds, "fp32")


# ---- group: training in eight bits ----

def fake_quant(args):
    """A fake-quantized training step of BERT-base against floating point, and its memory."""
    kinds = list(FAKE_QUANTIZED)
    if not peers.installed("torchao"):
        kinds = [kind for kind in kinds if "torchao" not in kind]
        print("torchao: not installed")
    seconds = in_turns({kind: fake_quantized_step(kind, args) for kind in kinds}, args.rounds, args.device)
    report(f"{name_of('bert', args)}: a training step, {args.precision}", seconds, "floating point")

    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:  # a process each, for its peak
        peaks = {kind: pool.apply(peak_memory, (kind, args)) for kind in kinds}
    print("\nthe same, peak memory of three steps")
    for kind, peak in peaks.items():
        print(f"  {kind:42s} {peak / 2 ** 20:9.0f} MiB  {peak / peaks['floating point']:5.2f}x")


def fake_quantized_step(kind, args):
    model, loss = bert_task(args)[0]()
    FAKE_QUANTIZED[kind](model)
    return training_step(model, loss, args)


def peak_memory(kind, args):
    """Bytes that three training steps need at most: on a GPU, or of this process."""
    step = fake_quantized_step(kind, args)
    for _ in range(3):
        step()
    if args.device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return 1024 * int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text()).group(1))  # Linux


FAKE_QUANTIZED = {"floating point": lambda model: model, "minq": fake_quantize_training, "torchao's QAT": peers.qat,
                  "minq, --integer": lambda model: fake_quantize_training(model, linear=IntegerLinear),
                  "torchao's int8 forward": lambda model: peers.int8_training(model, grad_input=False, grad_weight=False),
                  "torchao's int8 forward and backward": peers.int8_training}


# ---- groups: what ought to cost little ----

def data(args):
    """Building a batch against a training step, at the laptop preset and at BERT-base."""
    for title, shape, size in (("laptop preset, batch 16", LAPTOP, 16), (*fewer("BERT-base, batch 8", BERT_BASE, args), 8)):
        loader = MaskedText(load_text("stdlib"), shape["seq_len"])
        model = Bert(BertConfig(**shape)).to(args.device)
        (inputs, positions), targets = to_device(loader.to_model(*loader.train_batch(0, 0, size)), args.device)
        step = training_step(model, lambda: F.cross_entropy(model(inputs, positions).float(), targets), args)
        build = lambda: loader.to_model(*loader.train_batch(0, 0, size))
        seconds = in_turns({"training step": step, "batch": build}, 4 * args.rounds, args.device)
        report(f"a batch of masked text, {title}", seconds, "training step")


def augmentation(args):
    """Augmenting a batch against a training step: at the laptop preset, and the whole of C.3 at ViT-S/16."""
    cropped = dict(crop_scale=(0.6, 1.0), rand_layers=0, jitter=0.0, mixup=0.0, cutmix=0.0)
    for title, shape, size, recipe in (("laptop preset, batch 64", LAPTOP_VIT, 64, cropped),
                                       (*fewer("ViT-S/16, batch 16, the whole recipe", VIT_S, args), 16, {})):
        model = ViT(ViTConfig(**shape)).to(args.device)
        side, classes = model.config.image_size, model.config.classes
        images = torch.rand(size, 3, side, side, device=args.device)
        labels = torch.randint(classes, (size,), device=args.device)
        draws = Draws(0, args.device)
        step = training_step(model, lambda: F.cross_entropy(model(images).float(), labels), args)
        build = lambda: augment(images, labels, classes, draws, size=side, **recipe)
        seconds = in_turns({"training step": step, "augmentation": build}, 2 * args.rounds, args.device)
        report(f"augmenting a batch, {title}", seconds, "training step")


def evaluation_shapes(args):
    for title, shape, size in (("laptop preset, batch 32", LAPTOP, 32), (*fewer("BERT-base, batch 8", BERT_BASE, args), 8)):
        model = Bert(BertConfig(**shape)).to(args.device).eval()
        yield title, model, torch.randint(256, (size, shape["seq_len"]), device=args.device)


@torch.no_grad()
def outliers(args):
    """Watching the taps that training logs against a plain validation pass, fp32."""
    for title, model, tokens in evaluation_shapes(args):
        def watched():
            with watch(model, ("layer_input", "ffn_output", "layer_output")):
                model(tokens)
        seconds = in_turns({"plain pass": lambda: model(tokens), "watched": watched}, 4 * args.rounds, args.device)
        report(f"watching outliers, {title}", seconds, "plain pass")


@torch.no_grad()
def quant(args):
    """A calibration and a quantized evaluation pass (min-max, W8A8) against floating point, fp32."""
    for title, model, tokens in evaluation_shapes(args):
        quantized = quantize_model(copy.deepcopy(model), a_estimator="minmax")

        def calibrate():
            with calibrating(quantized):
                quantized(tokens)

        with parametrize.cached():  # as in quantize.py: weights are quantized once for all batches
            seconds = in_turns({"floating point": lambda: model(tokens), "calibration": calibrate,
                                "quantized evaluation": lambda: quantized(tokens)}, 4 * args.rounds, args.device)
        report(f"quantized passes, {title}", seconds, "floating point")


# ---- groups: real integers, and how far all is from as fast as products get ----

ENCODER = "BERT-base, batch 16, T 128", BERT_BASE


def encoders(shape, args):
    """An encoder in fp32, bf16 and int8 (W8A8, min-max): {name: model}, and tokens for it."""
    tokens = torch.randint(256, (16, shape["seq_len"]), device=args.device)
    model = Bert(BertConfig(**shape, masked_head=False)).to(args.device).eval()
    quantized = quantize_model(copy.deepcopy(model), a_estimator="minmax")
    with calibrating(quantized):
        quantized(tokens)
    return {"fp32": model, "bf16": copy.deepcopy(model).bfloat16(), "int8": to_integer(quantized)}, tokens


@torch.no_grad()
def integers(args):
    """A pass, eager and compiled: int8 against floating point and torchao's int8."""
    if not peers.installed("torchao"):
        print("torchao: not installed")
    for title, shape in (("laptop preset, batch 16", LAPTOP), fewer(*ENCODER, args)):
        torch.compiler.reset()
        models, tokens = encoders(shape, args)
        if peers.installed("torchao"):
            models["int8 Linears (torchao)"] = peers.dynamic_int8(copy.deepcopy(models["fp32"]))
        for how, prepare in (("eager", lambda model: model), ("compiled", torch.compile)):
            passes = {name: functools.partial(prepare(model), tokens) for name, model in models.items()}
            report(f"inference, {title}, {how}", in_turns(passes, args.rounds, args.device), "fp32")


def roofline(args):
    """Operations a second of steps and passes, and of a large product of the same type in the same rounds."""
    for family in TASKS:
        build = TASKS[family](args)[0]
        counted, counted_loss = explicit(*build())
        against_a_product(f"{name_of(family, args)}: a training step", training_step(*build(), args),
                          operations(lambda: counted_loss().backward()), args.precision, args)
    with torch.no_grad():
        torch.compiler.reset()
        name, shape = fewer(*ENCODER, args)
        models, tokens = encoders(shape, args)
        needed = operations(lambda: explicit(copy.deepcopy(models["fp32"]), None)[0](tokens))
        for how, prepare in (("eager", lambda model: model), ("compiled", torch.compile)):
            for precision, model in models.items():
                against_a_product(f"{name}: inference, {how}", functools.partial(prepare(model), tokens),
                                  needed, precision, args)


def against_a_product(title, function, needed, precision, args):
    product, of_product = matrix_product(precision, args.device)
    seconds = in_turns({"product": product, "function": function}, args.rounds, args.device)
    rates = {name: statistics.median(number / each for each in seconds[name]) / 1e9
             for name, number in (("product", of_product), ("function", needed))}
    print(f"{title}, {precision}: {rates['function']:.0f} of {rates['product']:.0f} GFLOP/s, {rates['function'] / rates['product']:.0%}")


GROUPS = {**{family: functools.partial(against_hugging_face, family) for family in TASKS},
          "attention": attention, "precision": precisions, "fakequant": fake_quant, "data": data, "augment": augmentation,
          "watch": outliers, "quant": quant, "integer": integers, "roofline": roofline}

if __name__ == "__main__":
    main()
