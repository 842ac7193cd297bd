"""Speed, as ratios against a named alternative measured in the same run.

    python bench.py                       every group below; minutes to half an hour on a laptop
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
from minq.data import CausalText, MaskedText, load_text
from minq.errors import UserError, one_line_errors
from minq.fake_quant import fake_quantize_training
from minq.integer import to_integer
from minq.integer_training import IntegerLinear
from minq.model import Bert, BertConfig, Opt, OptConfig, ViT, ViTConfig
from minq.optimizers import OPTIMIZERS
from minq.outliers import watch
from minq.quant import calibrating, quantize_model
from minq.runs import open_run
from minq.timing import in_turns, report
from minq.training import autocast, parameter_groups, pick_device, pick_precision, to_device

BERT_BASE = dict(layers=12, width=768, heads=12, ffn=3072, seq_len=128)
OPT_125M = BERT_BASE | dict(seq_len=512, vocab_size=50272)
VIT_S = dict(layers=12, width=384, heads=6, ffn=1536, image_size=224, patch_size=16, classes=1000)
LAPTOP_VIT = dict(layers=4, width=128, heads=4, ffn=512, image_size=32, patch_size=8)
LAPTOP = dict(layers=4, width=128, heads=4, ffn=512, seq_len=64, init_std=0.05, positions="sinusoid")


@one_line_errors
def main(argv=None):
    parser = flags.Parser(__doc__)
    parser.add_argument("groups", nargs="*", action=flags.Distinct, help=f"of: {' '.join(GROUPS)} (default: all)")
    parser.add_argument("--rounds", type=flags.positive, default=5, help="turns that each alternative takes")
    parser.add_argument("--dropout", type=flags.number(float, low=0, below=1), nargs="+", default=[0.0, 0.1],
                        help="of training steps, one after another")
    parser.add_argument("--device", help="by default the best there is")
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp16"), help="of training steps; by default the device's best")
    args = parser.parse_args(argv)
    unknown = set(args.groups) - set(GROUPS)
    if unknown:
        parser.error(f"{min(unknown)}: no such group; expected some of {' '.join(GROUPS)}")
    args.device = pick_device(args.device)
    args.precision = pick_precision(args.precision, args.device)
    print(f"{args.device}, {args.precision}, {torch.get_num_threads()} threads, torch {torch.__version__}, {args.rounds} rounds")
    for group in args.groups or GROUPS:
        GROUPS[group](args)


# ---- a training step ----

def training_step(model, loss, args, optimizer="adamw"):
    """A whole step as a function: forward, backward, clipping, fused AdamW (or another optimizer)."""
    optimizer = OPTIMIZERS[optimizer](model, parameter_groups(model, 0.01), lr=1e-4, betas=(0.9, 0.999))

    def step():
        with autocast(args.device, args.precision):
            value = loss()
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return step


# ---- what is trained: the paper's models, on one batch ----

def bert_task(args):
    """BERT-base, batch 8, T 128: build(**settings) -> (model, its loss); Hugging Face's inputs and labels."""
    loader = MaskedText(load_text("stdlib"), 128)
    tokens, labels = loader.train_batch(0, 0, 8)
    (inputs, positions), targets = to_device(loader.to_model(tokens, labels), args.device)

    def build(**settings):
        model = Bert(BertConfig(**BERT_BASE, vocab_size=30522, **settings)).to(args.device)
        return model, lambda: F.cross_entropy(model(inputs, positions).float(), targets)  # at the masked positions only
    return build, inputs, torch.from_numpy(labels).to(args.device)


def opt_task(args):
    """OPT-125m, batch 4, T 512."""
    tokens, labels = CausalText(load_text("stdlib"), OPT_125M["seq_len"]).train_batch(0, 0, 4)
    tokens, labels = torch.from_numpy(tokens).to(args.device), torch.from_numpy(labels).to(args.device)

    def build(**settings):
        model = Opt(OptConfig(**OPT_125M, **settings)).to(args.device)
        return model, lambda: F.cross_entropy(model(tokens).float().flatten(0, 1), labels.flatten())
    return build, tokens, tokens  # Hugging Face's OPT shifts the labels by itself


def vit_task(args):
    """ViT-S/16, batch 16 of 224 pixels."""
    images, labels = torch.rand(16, 3, 224, 224, device=args.device), torch.randint(1000, (16,), device=args.device)

    def build(**settings):
        model = ViT(ViTConfig(**VIT_S, **settings)).to(args.device)
        return model, lambda: F.cross_entropy(model(images).float(), labels)
    return build, images, labels


TASKS = {"bert": bert_task, "opt": opt_task, "vit": vit_task}
TITLES = {"bert": "BERT-base, batch 8, T 128", "opt": "OPT-125m, batch 4, T 512", "vit": "ViT-S/16, batch 16"}


# ---- groups: a training step against Hugging Face's ----

def bert(args):
    ours, inputs, labels = bert_task(args)

    def theirs(dropout, attention):
        model = transformers().BertForMaskedLM(transformers().BertConfig(
            hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout,
            attn_implementation=attention)).to(args.device).train()
        return model, lambda: model(inputs, labels=labels).loss

    against(TITLES["bert"], ours, theirs, args)


def opt(args):
    ours, inputs, labels = opt_task(args)

    def theirs(dropout, attention):
        model = transformers().OPTForCausalLM(transformers().OPTConfig(
            dropout=dropout, attention_dropout=dropout, attn_implementation=attention)).to(args.device).train()
        return model, lambda: model(inputs, labels=labels).loss

    against(TITLES["opt"], ours, theirs, args)


def vit(args):
    ours, inputs, labels = vit_task(args)

    def theirs(dropout, attention):
        model = transformers().ViTForImageClassification(transformers().ViTConfig(
            hidden_size=384, num_attention_heads=6, intermediate_size=1536, layer_norm_eps=1e-6, num_labels=1000,
            hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout, attn_implementation=attention)).to(args.device).train()
        return model, lambda: model(inputs, labels=labels).loss

    against(TITLES["vit"], ours, theirs, args)


def transformers():
    try:
        import transformers
    except ImportError:
        raise UserError("this group compares with Hugging Face: pip install -e '.[peers]'") from None
    return transformers


def against(title, ours, theirs, args):
    """Hugging Face's model with either of its attentions, and ours."""
    for dropout in args.dropout:
        pairs = {f"Hugging Face, {attention}": theirs(dropout, attention) for attention in ("sdpa", "eager")}
        pairs["minq"] = ours(dropout=dropout)
        seconds = in_turns({name: training_step(*pair, args) for name, pair in pairs.items()}, args.rounds, args.device)
        best = min(("Hugging Face, sdpa", "Hugging Face, eager"), key=lambda name: statistics.median(seconds[name]))
        report(f"{title}: a training step, {args.precision}, dropout {dropout}", seconds, best)


# ---- group: what each attention costs (Table 8) ----

METHODS = {"vanilla": {}, "clipped softmax": dict(attention="clipped", gamma=-0.03),
           **{f"gated attention, {gate}": dict(attention="gated", gate=gate) for gate in ("linear", "mlp", "all-heads")}}


def method_seconds(family, dropout, args):
    """Seconds of each round of a training step, by attention; "vanilla" is without the fused kernel, as in the paper."""
    build = TASKS[family](args)[0]
    models = {name: explicit(*build(dropout=dropout, **settings)) for name, settings in METHODS.items()}
    models["vanilla, as chosen"] = build(dropout=dropout)  # attention.SelfAttention.can_fuse decides
    return in_turns({name: training_step(*pair, args) for name, pair in models.items()}, args.rounds, args.device)


def explicit(model, loss):
    for layer in model.layers:  # a watched tap keeps the fused kernel away
        layer.attention.probs_tap.register_forward_hook(lambda *_: None)
    return model, loss


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
            report(f"{TITLES[family]}, by attention: a training step, {args.precision}, dropout {dropout}",
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


def laptop_task(family, width, device):
    """(model, its loss) on one batch of the laptop preset."""
    shape = dict(layers=4, width=width, heads=4, init_std=0.05)
    if family == "vit":
        model = ViT(ViTConfig(**shape, image_size=32, patch_size=8))
        inputs, targets = (torch.rand(64, 3, 32, 32),), torch.randint(10, (64,))
    else:
        loader = (MaskedText if family == "bert" else CausalText)(load_text("stdlib"), 64)
        model = Bert(BertConfig(**shape, positions="sinusoid")) if family == "bert" else Opt(OptConfig(**shape))
        inputs, targets = loader.to_model(*loader.train_batch(0, 0, 16 if family == "bert" else 32))
    model, (inputs, targets) = model.to(device), to_device((inputs, targets), device)
    return model, lambda: F.cross_entropy(model(*inputs).float().flatten(0, -2), targets.flatten())


# ---- group: training in eight bits ----

def fake_quant(args):
    """A fake-quantized training step of BERT-base against floating point, and its memory."""
    seconds = in_turns({kind: fake_quantized_step(kind, args) for kind in FAKE_QUANTIZED}, args.rounds, args.device)
    report(f"{TITLES['bert']}: a training step, {args.precision}", seconds, "floating point")

    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:  # a process each, for its peak
        peaks = {kind: pool.apply(peak_memory, (kind, args)) for kind in FAKE_QUANTIZED}
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
    for title, shape, size in (("laptop preset, batch 16", LAPTOP, 16), ("BERT-base, batch 8", BERT_BASE, 8)):
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
                                       ("ViT-S/16, batch 16, the whole recipe", VIT_S, 16, {})):
        model = ViT(ViTConfig(**shape)).to(args.device)
        side, classes = model.config.image_size, model.config.classes
        images = torch.rand(size, 3, side, side, device=args.device)
        labels = torch.randint(classes, (size,), device=args.device)
        draws = Draws(0, args.device)
        step = training_step(model, lambda: F.cross_entropy(model(images).float(), labels), args)
        build = lambda: augment(images, labels, classes, draws, size=side, **recipe)
        seconds = in_turns({"training step": step, "augmentation": build}, 2 * args.rounds, args.device)
        report(f"augmenting a batch, {title}", seconds, "training step")


def evaluation_shapes(device):
    for title, shape, size in (("laptop preset, batch 32", LAPTOP, 32), ("BERT-base, batch 8", BERT_BASE, 8)):
        model = Bert(BertConfig(**shape)).to(device).eval()
        yield title, model, torch.randint(256, (size, shape["seq_len"]), device=device)


@torch.no_grad()
def outliers(args):
    """Watching the taps that training logs against a plain validation pass, fp32."""
    for title, model, tokens in evaluation_shapes(args.device):
        def watched():
            with watch(model, ("layer_input", "ffn_output", "layer_output")):
                model(tokens)
        seconds = in_turns({"plain pass": lambda: model(tokens), "watched": watched}, 4 * args.rounds, args.device)
        report(f"watching outliers, {title}", seconds, "plain pass")


@torch.no_grad()
def quant(args):
    """A calibration and a quantized evaluation pass (min-max, W8A8) against floating point, fp32."""
    for title, model, tokens in evaluation_shapes(args.device):
        quantized = quantize_model(copy.deepcopy(model), a_estimator="minmax")

        def calibrate():
            with calibrating(quantized):
                quantized(tokens)

        with parametrize.cached():  # as in quantize.py: weights are quantized once for all batches
            seconds = in_turns({"floating point": lambda: model(tokens), "calibration": calibrate,
                                "quantized evaluation": lambda: quantized(tokens)}, 4 * args.rounds, args.device)
        report(f"quantized passes, {title}", seconds, "floating point")


@torch.no_grad()
def integers(args):
    """A pass of an encoder, eager and compiled: int8 (W8A8, min-max) against floating point and torchao's int8."""
    for title, shape in (("laptop preset, batch 16", LAPTOP), ("BERT-base, batch 16, T 128", BERT_BASE)):
        tokens = torch.randint(256, (16, shape["seq_len"]), device=args.device)
        model = Bert(BertConfig(**shape, masked_head=False)).to(args.device).eval()
        quantized = quantize_model(copy.deepcopy(model), a_estimator="minmax")
        with calibrating(quantized):
            quantized(tokens)
        models = {"fp32": model, "bf16": copy.deepcopy(model).bfloat16(), "int8 (minq)": to_integer(quantized)}
        try:
            models["int8 Linears (torchao)"] = peers.dynamic_int8(copy.deepcopy(model))
        except UserError:
            print("torchao: not installed")
        for how, prepare in (("eager", lambda model: model), ("compiled", torch.compile)):
            passes = {name: functools.partial(prepare(each), tokens) for name, each in models.items()}
            report(f"inference, {title}, {how}", in_turns(passes, args.rounds, args.device), "fp32")


GROUPS = {"bert": bert, "opt": opt, "vit": vit, "attention": attention, "precision": precisions, "fakequant": fake_quant,
          "data": data, "augment": augmentation, "watch": outliers, "quant": quant, "integer": integers}

if __name__ == "__main__":
    main()
