"""What bench.py times: training steps and passes of the paper's models and of the laptop's, as functions."""
import functools

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from minq.data import CausalText, MaskedText, load_text
from minq.model import Bert, BertConfig, Opt, OptConfig, ViT, ViTConfig
from minq.optimizers import OPTIMIZERS
from minq.training import autocast, parameter_groups, to_device

BERT_BASE = dict(layers=12, width=768, heads=12, ffn=3072, seq_len=128)
OPT_125M = BERT_BASE | dict(seq_len=512, vocab_size=50272)
VIT_S = dict(layers=12, width=384, heads=6, ffn=1536, image_size=224, patch_size=16, classes=1000)
LAPTOP_VIT = dict(layers=4, width=128, heads=4, ffn=512, image_size=32, patch_size=8)
LAPTOP = dict(layers=4, width=128, heads=4, ffn=512, seq_len=64, init_std=0.05, positions="sinusoid")


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

def fewer(name, shape, args):
    """A model's name and shape: with --quick, two of the paper's twelve layers."""
    return (f"two layers of {name}", shape | dict(layers=2)) if args.quick else (name, shape)


MODELS = {"bert": ("BERT-base, batch 8, T 128", BERT_BASE | dict(vocab_size=30522)),
          "opt": ("OPT-125m, batch 4, T 512", OPT_125M), "vit": ("ViT-S/16, batch 16", VIT_S)}


def name_of(family, args):
    return fewer(*MODELS[family], args)[0]


def bert_task(args):
    """BERT-base, batch 8, T 128: build(**settings) -> (model, its loss); inputs and labels for Hugging Face's."""
    loader = MaskedText(load_text("stdlib"), 128)
    tokens, labels = loader.train_batch(0, 0, 8)
    (inputs, positions), targets = to_device(loader.to_model(tokens, labels), args.device)

    def build(**settings):
        model = Bert(BertConfig(**fewer(*MODELS["bert"], args)[1], **settings)).to(args.device)
        return model, lambda: F.cross_entropy(model(inputs, positions).float(), targets)  # at the masked positions only
    return build, inputs, torch.from_numpy(labels).to(args.device)


def opt_task(args):
    """OPT-125m, batch 4, T 512."""
    tokens, labels = CausalText(load_text("stdlib"), MODELS["opt"][1]["seq_len"]).train_batch(0, 0, 4)
    tokens, labels = torch.from_numpy(tokens).to(args.device), torch.from_numpy(labels).to(args.device)

    def build(**settings):
        model = Opt(OptConfig(**fewer(*MODELS["opt"], args)[1], **settings)).to(args.device)
        return model, lambda: F.cross_entropy(model(tokens).float().flatten(0, 1), labels.flatten())
    return build, tokens, tokens  # Hugging Face's OPT shifts the labels by itself


def vit_task(args):
    """ViT-S/16, batch 16 of 224 pixels."""
    images, labels = torch.rand(16, 3, 224, 224, device=args.device), torch.randint(1000, (16,), device=args.device)

    def build(**settings):
        model = ViT(ViTConfig(**fewer(*MODELS["vit"], args)[1], **settings)).to(args.device)
        return model, lambda: F.cross_entropy(model(images).float(), labels)
    return build, images, labels


TASKS = {"bert": bert_task, "opt": opt_task, "vit": vit_task}


def explicit(model, loss):
    """The same without the fused kernel, as in the paper."""
    for layer in model.layers:  # a watched tap keeps the fused kernel away
        layer.attention.probs_tap.register_forward_hook(lambda *_: None)
    return model, loss


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


# ---- how fast it could be ----

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "int8": torch.int8}


def matrix_product(precision, device):
    """A product of two large square matrices as a function, and its operations: as fast as products get."""
    side = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randint(-8, 8, (side, side), device=device).to(DTYPES[precision]) for _ in range(2))
    return functools.partial(torch._int_mm if precision == "int8" else torch.mm, a, b.mT), 2 * side ** 3


def operations(function):
    """Multiplications and additions of a function's matrix products. Fused kernels are not counted on CPUs."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()
