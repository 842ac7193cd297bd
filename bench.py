"""Speed, as ratios against a named alternative measured in the same run.

    python bench.py                       every group below; minutes to half an hour on a laptop
    python bench.py bert --precision fp32
    python bench.py data watch quant      what costs little

Each ratio is the median over rounds in which the two take turns; machines drift, ratios less so.
The group bert compares with Hugging Face: pip install -e '.[peers]'.
"""
import argparse
import copy
import statistics
import time

import torch
import torch.nn.functional as F
from torch.nn.utils import parametrize

from minq.data import MaskedText, load_text
from minq.model import Bert, BertConfig
from minq.outliers import watch
from minq.quant import calibrating, quantize_model
from minq.training import autocast, parameter_groups, pick_device, pick_precision, to_device

BERT_BASE = dict(layers=12, width=768, heads=12, ffn=3072, seq_len=128)
LAPTOP = dict(layers=4, width=128, heads=4, ffn=512, seq_len=64, init_std=0.05, positions="sinusoid")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("groups", nargs="*", help=f"of: {' '.join(GROUPS)} (default: all)")
    parser.add_argument("--rounds", type=int, default=5, help="turns that each alternative takes")
    parser.add_argument("--device", help="by default the best there is")
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp16"), help="of training steps; by default the device's best")
    args = parser.parse_args()
    unknown = set(args.groups) - set(GROUPS)
    if unknown:
        parser.error(f"groups: {' '.join(unknown)}: expected some of {' '.join(GROUPS)}")
    device = pick_device(args.device)
    precision = pick_precision(args.precision, device)
    print(f"{device}, {precision}, {torch.get_num_threads()} threads, torch {torch.__version__}, {args.rounds} rounds")
    for group in args.groups or GROUPS:
        GROUPS[group](device, precision, args.rounds)


# ---- timing ----

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


def report(title, seconds, reference):
    """Print each alternative's median time, and its ratio to the reference, round by round."""
    print(f"\n{title}")
    for name, values in seconds.items():
        ratios = [value / base for value, base in zip(values, seconds[reference])]
        spread = f"{min(ratios):.2f}-{max(ratios):.2f}"
        print(f"  {name:42s} {1e3 * statistics.median(values):9.1f} ms   {statistics.median(ratios):5.2f}x  ({spread})")


def training_step(model, loss, device, precision):
    """A whole step as a function: forward, backward, clipping, fused AdamW."""
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.01), lr=1e-4, fused=True)

    def step():
        with autocast(device, precision):
            value = loss()
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return step


# ---- groups ----

def bert(device, precision, rounds):
    """A training step of BERT-base, batch 8, T 128, against Hugging Face's, and what each attention costs."""
    from transformers import BertConfig as HuggingConfig, BertForMaskedLM

    data = MaskedText(load_text("stdlib"), 128)
    tokens, labels = data.train_batch(0, 0, 8)
    (inputs, positions), targets = to_device(data.to_model(tokens, labels), device)
    labels = torch.from_numpy(labels).to(device)

    def ours(dropout, explicit=False, **settings):
        model = Bert(BertConfig(**BERT_BASE, vocab_size=30522, dropout=dropout, **settings)).to(device)
        if explicit:  # a watched tap keeps the fused kernel away
            for layer in model.layers:
                layer.attention.probs_tap.register_forward_hook(lambda *_: None)
        return training_step(model, lambda: F.cross_entropy(model(inputs, positions).float(), targets), device, precision)

    def hugging(dropout, attention):
        config = HuggingConfig(hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout, attn_implementation=attention)
        model = BertForMaskedLM(config).to(device).train()
        return training_step(model, lambda: model(inputs, labels=labels).loss, device, precision)

    for dropout in (0.0, 0.1):
        functions = {f"Hugging Face, {attention}": hugging(dropout, attention) for attention in ("sdpa", "eager")}
        functions["minq, vanilla"] = ours(dropout)
        seconds = in_turns(functions, rounds, device)
        best = min(list(functions)[:2], key=lambda name: statistics.median(seconds[name]))
        report(f"BERT-base step, {precision}, dropout {dropout} (ratio to Hugging Face's best)", seconds, best)

        functions = {"vanilla, explicit": ours(dropout, explicit=True), "vanilla, as chosen": ours(dropout),
                     "clipped": ours(dropout, attention="clipped", gamma=-0.03),
                     **{f"gated, {gate}": ours(dropout, attention="gated", gate=gate) for gate in ("linear", "mlp", "all-heads")}}
        report(f"BERT-base step by attention, {precision}, dropout {dropout}",
               in_turns(functions, rounds, device), "vanilla, explicit")


def data(device, precision, rounds):
    """Building a batch against a training step, at the laptop preset and at BERT-base."""
    for title, shape, size in (("laptop preset, batch 16", LAPTOP, 16), ("BERT-base, batch 8", BERT_BASE, 8)):
        loader = MaskedText(load_text("stdlib"), shape["seq_len"])
        model = Bert(BertConfig(**shape)).to(device)
        (inputs, positions), targets = to_device(loader.to_model(*loader.train_batch(0, 0, size)), device)
        step = training_step(model, lambda: F.cross_entropy(model(inputs, positions).float(), targets), device, precision)
        build = lambda: loader.to_model(*loader.train_batch(0, 0, size))
        report(f"a batch of masked text, {title}", in_turns({"training step": step, "batch": build}, 4 * rounds, device), "training step")


def evaluation_shapes(device):
    for title, shape, size in (("laptop preset, batch 32", LAPTOP, 32), ("BERT-base, batch 8", BERT_BASE, 8)):
        model = Bert(BertConfig(**shape)).to(device).eval()
        yield title, model, torch.randint(256, (size, shape["seq_len"]), device=device)


@torch.no_grad()
def outliers(device, precision, rounds):
    """Watching the default taps against a plain validation pass, fp32."""
    for title, model, tokens in evaluation_shapes(device):
        def watched():
            with watch(model):
                model(tokens)
        seconds = in_turns({"plain pass": lambda: model(tokens), "watched": watched}, 4 * rounds, device)
        report(f"watching outliers, {title}", seconds, "plain pass")


@torch.no_grad()
def quant(device, precision, rounds):
    """A calibration and a quantized evaluation pass (min-max, W8A8) against floating point, fp32."""
    for title, model, tokens in evaluation_shapes(device):
        quantized = quantize_model(copy.deepcopy(model), a_estimator="minmax")

        def calibrate():
            for module in calibrating_modules:
                module.estimating = True
            quantized(tokens)
        with calibrating(quantized):
            quantized(tokens)
        calibrating_modules = [m for m in quantized.modules() if hasattr(m, "estimating")]

        def evaluate():
            for module in calibrating_modules:
                module.estimating = False
            quantized(tokens)
        with parametrize.cached():
            seconds = in_turns({"floating point": lambda: model(tokens), "calibration": calibrate,
                                "quantized evaluation": evaluate}, 4 * rounds, device)
        report(f"quantized passes, {title}", seconds, "floating point")


GROUPS = {"bert": bert, "data": data, "watch": outliers, "quant": quant}

if __name__ == "__main__":
    main()
