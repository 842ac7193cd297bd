"""The flags that mean the same in all training scripts, and what they must satisfy.

A flag that is not given takes its value from the preset; that is why none has a default here.
"""
import argparse
from pathlib import Path

from minq.attention import ATTENTIONS, GATES
from minq.errors import UserError
from minq.quant import GRANULARITIES


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that reports a wrong flag in one line."""

    def __init__(self, description):
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter,
                         allow_abbrev=False)

    def error(self, message):
        raise UserError(message)


def number(kind, low=None, high=None, above=None, below=None):
    """A type for argparse: an int or a float within bounds."""
    def parse(text):
        value = kind(text)
        bounds = [(low, "at least", lambda b: value >= b), (high, "at most", lambda b: value <= b),
                  (above, "above", lambda b: value > b), (below, "below", lambda b: value < b)]
        if any(bound is not None and not holds(bound) for bound, _, holds in bounds):
            wanted = " and ".join(f"{words} {bound:g}" for bound, words, _ in bounds if bound is not None)
            raise argparse.ArgumentTypeError(f"{text}: expected {wanted}")
        return value
    parse.__name__ = {int: "whole number", float: "number"}[kind]
    return parse


positive = number(int, low=1)
bits = number(int, low=2, high=16)


def add_attention_flags(parser):
    group = parser.add_argument_group("attention (paper, sec. 4)")
    group.add_argument("--attention", choices=ATTENTIONS, help="what the heads do")
    group.add_argument("--gamma", type=number(float, high=0), help="lower stretch factor, at most 0 (eq. 4)")
    group.add_argument("--zeta", type=number(float, low=1), help="upper stretch factor, at least 1 (eq. 4)")
    group.add_argument("--alpha", type=number(float, low=0), help="sets gamma = -alpha / T (sec. 5.2)")
    group.add_argument("--gate", choices=GATES, help="the gate's network (Table 3)")
    group.add_argument("--gate-hidden", type=positive, help="hidden units n_hid of the MLP gate")
    group.add_argument("--gate-init", type=number(float, above=0, below=1), help="pi_init, how open gates start (sec. 5.3)")


def add_size_flags(parser, seq_len=True):
    group = parser.add_argument_group("size")
    group.add_argument("--layers", type=positive, help="number of blocks")
    group.add_argument("--width", type=positive, help="hidden dimensions, d_model")
    group.add_argument("--heads", type=positive, help="attention heads per layer; divides --width")
    if seq_len:
        group.add_argument("--seq-len", type=positive, help="T, tokens per sequence")


def add_text_flags(parser):
    group = parser.add_argument_group("text")
    group.add_argument("--data", help="'stdlib' (this Python's own source), 'backcopy' (synthetic), a file or folder of text, or a .bin of uint16 tokens")
    group.add_argument("--vocab-size", type=positive, help="number of tokens in a .bin")
    group.add_argument("--special-ids", type=special_ids, metavar="PAD,CLS,SEP,MASK",
                       help="their ids in a .bin; by default they follow the vocabulary")


def special_ids(text):
    ids = [number(int, low=0)(word) for word in text.split(",")]
    if len(set(ids)) != 4:
        raise argparse.ArgumentTypeError(f"{text}: expected four different ids, PAD,CLS,SEP,MASK")
    return ids


def add_training_flags(parser):
    group = parser.add_argument_group("training")
    group.add_argument("--steps", type=positive, help="optimizer steps")
    group.add_argument("--batch-size", type=positive, help="sequences per micro-batch, over all processes")
    group.add_argument("--accumulate", type=positive, help="micro-batches per step")
    group.add_argument("--lr", type=number(float, above=0), help="peak learning rate")
    group.add_argument("--warmup", type=number(int, low=0), help="steps of linear warm-up")
    group.add_argument("--weight-decay", type=number(float, low=0), help="AdamW's weight decay")
    group.add_argument("--decay-layernorm", action="store_true", default=None, help="decay LayerNorm's gamma too (Table 5)")
    group.add_argument("--clip", type=number(float, above=0), help="largest gradient norm")
    group.add_argument("--dropout", type=number(float, low=0, below=1), help="dropout probability")
    group.add_argument("--seed", type=number(int, low=0), help="of initialization, data order and dropout")


def add_fake_quant_flags(parser):
    group = parser.add_argument_group("fake quantization from the first step (the blog)")
    group.add_argument("--fake-quant", action="store_true", default=None, help="quantize the operands of every matrix product")
    group.add_argument("--w-bits", type=bits, help="bits of weights, 2 to 16 (default 8)")
    group.add_argument("--a-bits", type=bits, help="bits of activations, 2 to 16 (default 8)")
    group.add_argument("--fake-quant-granularity", choices=GRANULARITIES, help="activations that share a scale: a token's, or the tensor's (default token)")


def add_run_flags(parser):
    group = parser.add_argument_group("run")
    group.add_argument("--device", help="cpu, cuda, cuda:N or mps; by default the best there is")
    group.add_argument("--precision", choices=("fp32", "bf16", "fp16"), help="of the forward pass; by default bf16 where the hardware has it")
    group.add_argument("--compile", action="store_true", default=None, help="torch.compile the model")
    group.add_argument("--out", help="the run's folder; by default runs/ and its settings")
    group.add_argument("--overwrite", action="store_true", default=None, help="replace the run in --out")
    group.add_argument("--resume", action="store_true", default=None, help="continue the run in --out with its own settings")
    group.add_argument("--eval-every", type=positive, help="steps between evaluations")
    group.add_argument("--eval-batches", type=positive, help="validation batches per evaluation")
    group.add_argument("--save-every", type=positive, help="steps between checkpoints")


BUILT_IN_DATA = ("stdlib", "backcopy", "shapes", "cifar10")

# Flags that may be given anew when a run is resumed: they change nothing that the run computes.
NOT_OF_THE_RUN = {"device", "compile", "out", "overwrite", "resume", "save_every", "sample"}


def read_flags(parser, defaults, presets, argv=None):
    """Parse the command line: `defaults`, overridden by the preset, overridden by what was typed.

    Returns (args, typed): a Namespace of everything, and a dict of what was typed.
    """
    parser.add_argument("--preset", choices=presets, help=f"a recipe; each flag overrides it (default {next(iter(presets))})")
    typed = {name: value for name, value in vars(parser.parse_args(argv)).items() if value is not None}
    if "data" in typed and typed["data"] not in BUILT_IN_DATA:
        typed["data"] = str(Path(typed["data"]).absolute())  # found again from any folder
    preset = presets[typed.get("preset", next(iter(presets)))]
    unset = dict.fromkeys(vars(parser.parse_args([])), None)
    args = argparse.Namespace(**unset | {"preset": next(iter(presets))} | defaults | preset | typed)
    return args, typed


def steps_of(args, typed, steps_per_epoch):
    """The number of steps that --steps or --epochs ask for."""
    if "steps" in typed and "epochs" in typed:
        raise UserError(f"--steps {args.steps} and --epochs {args.epochs} both set the length; give one of them")
    return args.steps if "steps" in typed or args.epochs is None else args.epochs * steps_per_epoch


def settle_attention(args, typed, seq_len):
    """Check the attention flags against each other and fill in gamma; `seq_len` is T."""
    for flag, needs in {"gamma": "clipped", "zeta": "clipped", "alpha": "clipped",
                        "gate": "gated", "gate_hidden": "gated", "gate_init": "gated"}.items():
        if flag in typed and args.attention in ("vanilla", "clipped", "gated") and args.attention != needs:
            raise UserError(f"--{flag.replace('_', '-')} {typed[flag]} needs --attention {needs}, not {args.attention}")
    if "gate_hidden" in typed and args.gate != "mlp":
        raise UserError(f"--gate-hidden {args.gate_hidden} needs --gate mlp, not {args.gate}")
    if "alpha" in typed and "gamma" in typed:
        raise UserError(f"--alpha {args.alpha:g} and --gamma {args.gamma:g} both set gamma; give one of them")
    if "gamma" in typed or args.attention != "clipped":
        args.alpha = None
    if vars(args).get("gamma_per_row"):
        if args.attention != "clipped" or args.alpha is None:
            raise UserError("--gamma-per-row needs --attention clipped, and --alpha rather than --gamma")
        args.gamma = None  # a row's own, -alpha / (t + 1)
    elif args.alpha is not None:
        args.gamma = -args.alpha / seq_len  # sec. 5.2
    if args.attention in ("vanilla", "gated"):
        args.gamma, args.zeta = 0.0, 1.0
    elif args.gamma is None and args.alpha is None:
        args.gamma = 0.0
    if args.attention != "gated":
        args.gate = args.gate_hidden = args.gate_init = None
    elif args.gate != "mlp":
        args.gate_hidden = None


def settle_fake_quant(args, typed):
    """Check the flags of fake quantization and fill them in."""
    for name, default in {"w_bits": 8, "a_bits": 8, "fake_quant_granularity": "token"}.items():
        if name in typed and not args.fake_quant:
            raise UserError(f"--{name.replace('_', '-')} {typed[name]} needs --fake-quant; "
                            "to quantize a run after training, see quantize.py")
        setattr(args, name, typed.get(name, default) if args.fake_quant else None)


def run_name(family, args, typed):
    """A folder name from what was typed: runs/bert-clipped-alpha2.0-s0."""
    unnamed = NOT_OF_THE_RUN | {"attention", "seed", "precision", "eval_every", "eval_batches", "special_ids"}
    words = [family, args.attention]
    for name, value in typed.items():
        if name not in unnamed:
            words.append(Path(value).stem if name == "data" else
                         name.replace("_", "") + ("" if value is True else str(value)))
    return "runs/" + "-".join((*words, f"s{args.seed}"))


def resumed(saved, typed):
    """The arguments of an interrupted run. What was typed must agree with them, or not matter to them."""
    for name, value in typed.items():
        if name not in NOT_OF_THE_RUN and value != saved[name]:
            raise UserError(f"--{name.replace('_', '-')} {value} differs from the run's {saved[name]}: "
                            "--resume continues a run as it was started")
    return argparse.Namespace(**saved | {name: typed.get(name) for name in NOT_OF_THE_RUN if name != "save_every" or name in typed})
