"""Speed, as ratios to a named alternative measured in the same run.

    python -m lab.bench --quick                    every group once, on two layers; minutes
    python -m lab.bench                            in full: up to an hour on a laptop
    python -m lab.bench bert --dropout 0.1 --precision fp32

bert opt vit    a training step against --fused and Hugging Face's two attentions
attention       a training step with each of the paper's attentions (Table 8)
laptop          a training step of the laptop presets against Hugging Face's, eager and compiled
fakequant       a training step in eight bits (the blog), against floating point
integer         int8, torchao's int8 and bf16 inference, eager and compiled, against fp32
roofline        a training step against as many operations in one large matrix product

Each ratio is the median over rounds in which the alternatives take turns; machines drift, ratios
less so. The peers, transformers and torchao (pip install -e '.[peers]'), are left out where they
are not installed. Of the paper's models batches are small: 8, 4 and 16.
"""
import argparse
import copy
import statistics
import time
from contextlib import suppress
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import train_bert, train_opt, train_vit
from lab.integer import to_integer
from minq import flags
from minq.data import CausalText, MaskedText, load_text
from minq.fake_quant import fake_quantize_training
from minq.model import FAMILIES
from minq.quant import calibrating, quantize_model
from minq.training import (OPTIMIZERS, autocast, compiled, parameter_groups, pick_device,
                           pick_precision, to_device)

# ---- what is timed: recipes, which have a family and a title too ----

SCRIPTS = {"bert": train_bert, "opt": train_opt, "vit": train_vit}
TASKS = {family: SCRIPTS[family].PRESETS["paper"] | dict(family=family, title=title, **sizes)
         for family, title, sizes in (
             ("bert", "BERT-base, batch 8, T 128", dict(batch_size=8, vocab_size=30522)),
             ("opt", "OPT-125m, batch 4, T 512", dict(batch_size=4, vocab_size=50272)),
             ("vit", "ViT-S/16, batch 16", dict(batch_size=16, classes=1000)))}
LAPTOP = {family: script.PRESETS["laptop"] | dict(
    family=family, title=f"laptop {family}", image_size=32) for family, script in SCRIPTS.items()}


def new_model(recipe):
    build = FAMILIES[recipe["family"]]
    return build(build.config_class.of(argparse.Namespace(**recipe)))


def batch(model, size):
    """A batch as our models take it, (inputs, targets), and as Hugging Face's, (inputs, labels)."""
    config = model.config
    if model.family == "vit":
        images = torch.rand(size, 3, config.image_size, config.image_size)
        labels = torch.randint(config.classes, (size,))
        return ((images,), labels), (2 * images - 1, labels)
    loader = {"bert": MaskedText, "opt": CausalText}[model.family]
    data = loader(load_text("stdlib"), config.seq_len)
    tokens, labels = data.train_batch(0, 0, size)
    theirs = (tokens, labels if loader is MaskedText else tokens)  # its OPT shifts them by itself
    return data.to_model(tokens, labels), tuple(map(torch.from_numpy, theirs))


def training_step(recipe, device):
    """A step of a new model, or of what the recipe's `prepare` makes of it, as a function: forward,
    backward, clipping, optimizer."""
    model = new_model(recipe)
    (inputs, targets), (x, labels) = to_device(batch(model, recipe["batch_size"]), device)
    model = recipe.get("prepare", nn.Identity())(model.to(device)).to(device)
    model = compiled(model) if recipe.get("compile") else model
    groups = parameter_groups(model, 0.01)
    optimizer = OPTIMIZERS["adamw"](model, groups, lr=1e-4, betas=(0.9, 0.999))

    @torch.enable_grad()
    def step():
        with autocast(device, recipe["precision"]):
            loss = (F.cross_entropy(model(*inputs).float().flatten(0, -2), targets.flatten())
                    if hasattr(model, "metric") else model(x, labels=labels).loss)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return step


# ---- the peers ----

def hugging_face(attention, model):
    """Hugging Face's untrained model of the sizes of ours. attention: "sdpa" or "eager"."""
    import transformers as hf
    c = model.config
    build = {"bert": hf.BertForMaskedLM, "opt": hf.OPTForCausalLM,
             "vit": hf.ViTForImageClassification}[model.family]
    return build(build.config_class(  # which reads the names that it knows
        **vars(c), num_hidden_layers=c.layers, hidden_size=c.width, num_attention_heads=c.heads,
        intermediate_size=c.ffn, ffn_dim=c.ffn, word_embed_proj_dim=c.width,
        max_position_embeddings=c.seq_len, num_labels=getattr(c, "classes", 2),
        layer_norm_eps=c.norm_eps, hidden_dropout_prob=c.dropout, attention_dropout=c.dropout,
        attention_probs_dropout_prob=c.dropout, attn_implementation=attention))


def torchao(model):
    """torchao's int8 for inference on all Linears of ours but the last: activations have a scale
    per token, weights one per row; attention stays in floating point."""
    from torchao import quantization
    inner = lambda module, name: isinstance(module, nn.Linear) and name != model.final_linear
    quantization.quantize_(model, quantization.Int8DynamicActivationInt8WeightConfig(), inner)
    return model


# ---- ratios ----

def in_turns(functions, rounds, device):
    """name -> seconds of each round; the functions take turns, after one untimed call each."""
    seconds = {name: [] for name in functions}
    for i in range(rounds + 1):
        for name, function in functions.items():
            started = time.perf_counter()
            function()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if i > 0:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def report(title, seconds):
    """Print each alternative's median time, and the median and the range over rounds of its ratio
    to the first one's in the same round."""
    print(f"\n{title}")
    first = next(iter(seconds.values()))
    for name, values in seconds.items():
        ratios = sorted(value / base for value, base in zip(values, first))
        print(f"  {name:42s} {1e3 * statistics.median(values):9.1f} ms   "
              f"{statistics.median(ratios):5.2f}x  ({ratios[0]:.2f}-{ratios[-1]:.2f})")


# ---- groups: each yields (title, functions that take turns); the first is the reference ----

METHODS = {"vanilla": {}, "clipped softmax": dict(attention="clipped", gamma=-0.03),
           **{f"gated attention, {gate}": dict(attention="gated", gate=gate)
              for gate in ("linear", "mlp", "all-heads")}}
PEERS = {"minq": {}, "minq, --fused": dict(fused=True),
         "Hugging Face, sdpa": dict(prepare=partial(hugging_face, "sdpa")),
         "Hugging Face, eager": dict(prepare=partial(hugging_face, "eager"))}
ON_A_LAPTOP = {f"{name}{how}": PEERS[name] | dict(compile=bool(how))
               for how in ("", ", compiled") for name in ("minq", "Hugging Face, sdpa")}
EIGHT_BITS = {"floating point": {}, "minq": dict(prepare=fake_quantize_training)}


def training_steps(recipes, variants, device, settings):
    """A training step of each variant: name -> what differs in the recipe."""
    for recipe in recipes:
        functions = {}
        for name, what in variants.items():
            with suppress(ModuleNotFoundError):  # a peer that is not installed
                functions[name] = training_step(recipe | settings | what, device)
        yield f"{recipe['title']}: a training step", functions


def integer(device, settings):
    for recipe in (LAPTOP["bert"], TASKS["bert"]):
        model = new_model(recipe | settings | dict(masked_head=False)).to(device).eval()
        x = batch(model, recipe["batch_size"])[1][0].to(device)
        w8a8 = quantize_model(model, a_estimator="minmax")
        with calibrating(w8a8):
            w8a8(x)
        models = {"fp32": model, "bf16": copy.deepcopy(model).bfloat16(), "int8": to_integer(w8a8)}
        with suppress(ModuleNotFoundError):
            models["int8 Linears (torchao)"] = torchao(copy.deepcopy(model))
        for how, prepare in (("eager", nn.Identity()), ("compiled", compiled)):
            torch.compiler.reset()
            passes = {kind: partial(prepare(model), x) for kind, model in models.items()}
            yield f"{recipe['title']}: a pass, {how}", passes


def roofline(device, settings):
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    for recipe in TASKS.values():
        step = training_step(recipe | settings, device)
        with FlopCounterMode(display=False) as counter:
            step()
        rows = counter.get_total_flops() // (2 * 2048 ** 2)
        a, b = (torch.randn(n, 2048, device=device).to(dtypes[settings["precision"]])
                for n in (rows, 2048))
        product = partial(torch.mm, a, b, out=torch.empty_like(a))
        yield f"{recipe['title']}: a training step", {"product": product, "step": step}


GROUPS = {family: partial(training_steps, [recipe], PEERS) for family, recipe in TASKS.items()} | {
    "attention": partial(training_steps, TASKS.values(), METHODS),
    "laptop": partial(training_steps, [LAPTOP["bert"] | dict(seq_len=32, title="laptop bert, T 32"),
                                       *LAPTOP.values()], ON_A_LAPTOP),
    "fakequant": partial(training_steps, [TASKS["bert"]], EIGHT_BITS),
    "integer": integer, "roofline": roofline}


@flags.one_line_errors
@torch.no_grad()  # a training step alone needs gradients
def main(argv=None):
    parser = flags.Parser(__doc__)
    add = parser.add_argument
    add("groups", nargs="*", choices=["all", *GROUPS], default="all", metavar="GROUP",
        help=f"some of {' '.join(GROUPS)}; by default all")
    add("--quick", action="store_true", help="one round, two layers of each model")
    add("--rounds", type=flags.positive, help="turns that each alternative takes; by default 5")
    add("--dropout", type=flags.below_1, default=0.0, help="of training steps")
    add("--compile", action="store_true", help="training steps (laptop: both ways)")
    add("--device", help="cpu, cuda, cuda:N or mps; by default the best there is")
    add("--precision", choices=("fp32", "bf16", "fp16"), help="of training steps")
    args = parser.parse_args(argv)
    device = pick_device(args.device)
    settings = dict(dropout=args.dropout, compile=args.compile,
                    precision=pick_precision(args.precision, device))
    settings |= dict(layers=2) if args.quick else {}
    print(device, settings["precision"], torch.get_num_threads(), "threads", "(quick)" * args.quick)
    for group in GROUPS if "all" in args.groups else args.groups:
        for title, functions in GROUPS[group](device, settings):
            report(title, in_turns(functions, args.rounds or (1 if args.quick else 5), device))
            functions.clear()  # the next ones need the memory


if __name__ == "__main__":
    main()
