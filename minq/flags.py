"""The flags that mean the same in all training scripts, and what they must satisfy."""
import argparse
import math
import os
from pathlib import Path

from minq.attention import GATES
from minq.checkpoints import load_checkpoint
from minq.cures import ATTENTIONS
from minq.data import TEXTS
from minq.errors import UserError
from minq.fake_quant import GRANULARITIES
from minq.images import IMAGES
from minq.model import ACTIVATIONS, NORMS, Config
from minq.optimizers import OPTIMIZERS


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that reports a wrong flag in one line, and whose --help shows each flag's value."""

    def __init__(self, description):
        super().__init__(description=description, formatter_class=Help, allow_abbrev=False)

    def error(self, message):
        raise UserError(message)


class Help(argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action):
        return action.help + ("" if action.default in (None, False, argparse.SUPPRESS) else " (default %(default)s)")


def number(kind, low=None, high=None, above=None, below=None):
    """A type for argparse: an int or a float within bounds, never infinite and never NaN."""
    def parse(text):
        value = kind(text)
        if not abs(value) < (math.inf if kind is float else 10 ** 18):
            limit = "a finite number" if kind is float else "at most 18 digits"
            raise argparse.ArgumentTypeError(f"{text[:40]}: expected {limit}")
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


def place(text):
    """A type for argparse: the name of a file or folder, or of what is built in."""
    if not text:  # "$folder" of a shell that knows no such variable; Path takes it for the present folder
        raise argparse.ArgumentTypeError("is empty; expected a name")
    return text


def new_file(text):
    """A type for argparse: a file that could be written. Said before an hour's work rather than after it."""
    path = Path(place(text))
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text}: cannot be written: " + (
            "is a folder" if path.is_dir() else f"there is no folder {path.parent}"))
    return text


class Distinct(argparse.Action):
    """Several values, none of them twice."""

    def __call__(self, parser, namespace, values, option=None):
        places = [os.path.realpath(str(value)) for value in values]
        for i, value in enumerate(values):
            if places[i] in places[:i]:
                raise argparse.ArgumentError(self, f"{value} is named twice; expected each once")
        setattr(namespace, self.dest, values)


# The attentions that read a flag. With any other it would change nothing, and is refused.
READ_BY = {"gamma": ("clipped",), "zeta": ("clipped", "row-clipped"), "alpha": ("clipped", "row-clipped"),
           "gate": ("gated",), "gate_hidden": ("gated",), "gate_init": ("gated",)}


def add_attention_flags(parser):
    group = parser.add_argument_group("attention (paper, sec. 4)")
    group.add_argument("--attention", choices=ATTENTIONS, help="what the heads do")

    def add(flag, help, **options):
        """A field of model.Config, whose default --help shows."""
        name = flag[2:].replace("-", "_")
        group.add_argument(flag, default=getattr(Config, name), help=f"{help}; for {', '.join(READ_BY[name])}", **options)

    add("--gamma", "lower stretch factor, at most 0 (eq. 4)", type=number(float, high=0))
    add("--zeta", "upper stretch factor, at least 1 (eq. 4)", type=number(float, low=1))
    add("--alpha", "sets gamma = -alpha / T (sec. 5.2), or in row t of t entries -alpha / t", type=number(float, low=0))
    add("--gate", "the gate's network (Table 3)", choices=GATES)
    add("--gate-hidden", "hidden units n_hid of the MLP gate", type=positive)
    add("--gate-init", "pi_init, how open gates start (sec. 5.3)", type=number(float, above=0, below=1))


def add_size_flags(parser):
    group = parser.add_argument_group("size")
    group.add_argument("--layers", type=positive, help="number of blocks")
    group.add_argument("--width", type=positive, help="hidden dimensions, d_model")
    group.add_argument("--heads", type=positive, help="attention heads per layer; divides --width")
    group.add_argument("--ffn", type=positive, help="hidden units of the feed-forward network; by default 4 x width")
    group.add_argument("--activation", choices=ACTIVATIONS, help="of the feed-forward network; by default the family's")
    group.add_argument("--norm", choices=NORMS, default=Config.norm, help="of every norm; rmsnorm is x / rms(x), without a gain")
    group.add_argument("--init-std", type=number(float, above=0), help="standard deviation of initial weights")


def add_text_flags(parser):
    group = parser.add_argument_group("text")
    group.add_argument("--seq-len", type=positive, help="T, tokens per sequence")
    group.add_argument("--data", type=place, help=f"{', '.join(TEXTS)}, a file or folder of text, or a .bin of uint16 tokens")
    group.add_argument("--vocab-size", type=number(int, low=1, high=2 ** 16), help="number of tokens in a .bin")
    group.add_argument("--special-ids", type=special_ids, metavar="PAD,CLS,SEP,MASK",
                       help="their ids in a .bin; by default they follow the vocabulary")


def special_ids(text):
    ids = [number(int, low=0, high=2 ** 16 + 3)(word) for word in text.split(",")]
    if len(ids) != 4 or len(set(ids)) != 4:
        raise argparse.ArgumentTypeError(f"{text}: expected four different ids, PAD,CLS,SEP,MASK")
    return ids


def add_training_flags(parser):
    group = parser.add_argument_group("training")
    group.add_argument("--steps", type=positive, help="optimizer steps")
    group.add_argument("--batch-size", type=positive, help="sequences per micro-batch, over all processes")
    group.add_argument("--accumulate", type=positive, help="micro-batches per step")
    group.add_argument("--optimizer", choices=OPTIMIZERS, help="muon: for the blocks' matrices; AdamW keeps the rest")
    group.add_argument("--lr", type=number(float, above=0), help="peak learning rate")
    group.add_argument("--warmup", type=number(int, low=0), help="steps of linear warm-up")
    group.add_argument("--weight-decay", type=number(float, low=0), help="the optimizer's weight decay")
    group.add_argument("--decay-layernorm", action="store_true", default=None, help="decay LayerNorm's gamma too (Table 5)")
    group.add_argument("--clip", type=number(float, above=0), help="largest gradient norm")
    group.add_argument("--dropout", type=number(float, low=0, below=1), help="dropout probability")
    group.add_argument("--seed", type=number(int, low=0, below=2 ** 32), help="of initialization, data order and dropout")


def add_fake_quant_flags(parser):
    group = parser.add_argument_group("fake quantization from the first step (the blog)")
    group.add_argument("--fake-quant", action="store_true", default=None, help="quantize the operands of every matrix product")
    group.add_argument("--w-bits", type=bits, help="bits of weights, 2 to 16; by default 8")
    group.add_argument("--a-bits", type=bits, help="bits of activations, 2 to 16; by default 8")
    group.add_argument("--integer", action="store_true", default=None, help="multiply the Linears' operands in int8 (minq/integer_training.py)")
    group.add_argument("--fake-quant-granularity", choices=GRANULARITIES, help="activations that share a scale: a token's, or the tensor's; by default a token's")


def add_run_flags(parser):
    group = parser.add_argument_group("run")
    group.add_argument("--device", help="cpu, cuda, cuda:N or mps; by default the best there is")
    group.add_argument("--precision", choices=("fp32", "bf16", "fp16"), help="of the forward pass; by default bf16 where the hardware has it")
    group.add_argument("--compile", action="store_true", default=None, help="torch.compile the model")
    group.add_argument("--out", type=place, help="the run's folder; by default runs/ and its settings")
    group.add_argument("--overwrite", action="store_true", default=None, help="replace the run in --out")
    group.add_argument("--resume", action="store_true", default=None, help="continue the run in --out with its own settings")
    group.add_argument("--eval-every", type=positive, help="steps between evaluations")
    group.add_argument("--eval-batches", type=positive, help="validation batches per evaluation")
    group.add_argument("--save-every", type=positive, help="steps between checkpoints")


def add_shared_flags(parser):
    """All that the training scripts have in common."""
    add_attention_flags(parser)
    add_size_flags(parser)
    add_training_flags(parser)
    add_fake_quant_flags(parser)
    add_run_flags(parser)


# Flags that may be given anew when a run is resumed: they change nothing that the run computes.
NOT_OF_THE_RUN = {"device", "compile", "out", "overwrite", "resume", "save_every", "sample"}


def read_flags(family, parser, defaults, presets, argv=None):
    """Parse the command line: `defaults`, overridden by the preset, overridden by what was typed.

    Returns (args, typed, checkpoint): a Namespace of everything, a dict of what was typed, and with
    --resume the checkpoint to go on from; args are then those that the run was started with.
    """
    first = next(iter(presets))
    parser.add_argument("--preset", choices=presets, default=first, help="a recipe; each flag overrides it")
    parser.set_defaults(**defaults | presets[first])  # for --help
    unset = parser.parse_args([])
    untyped = argparse.Namespace(**dict.fromkeys(vars(unset)))  # what is not typed stays None
    typed = {name: value for name, value in vars(parser.parse_args(argv, untyped)).items() if value is not None}
    if "data" in typed and typed["data"] not in {*TEXTS, *IMAGES}:
        typed["data"] = str(Path(typed["data"]).absolute())  # found again from any folder
    preset = typed.get("preset", first)
    chosen = dict.fromkeys(vars(unset)) | defaults | presets[preset] | {"preset": preset}
    args = argparse.Namespace(**chosen | typed)
    check_attention(args, typed)
    settle_fake_quant(args, typed)
    check_memory(args)
    if args.resume and args.overwrite:
        raise UserError("--resume continues the run in --out, --overwrite replaces it; give one of them")
    args.out = args.out or run_name(family, args, typed)
    if not args.resume:
        return args, typed, None
    checkpoint = load_checkpoint(args.out, family)
    if not {"optimizer", "scaler", "train_loss", "seconds"} <= checkpoint.keys():
        raise UserError(f"--resume: {args.out} has weights only, as the runs of zoo/ and of pretrained.py have; there is nothing to go on from")
    missing = [name for name, value in chosen.items() if value is not None and name not in checkpoint["args"]]
    if missing:
        raise UserError(f"--resume: {args.out} does not tell its {missing[0]}; another version of minq, or nothing of minq's, wrote it")
    return resumed(checkpoint, typed, args.out), typed, checkpoint


def steps_of(args, typed, steps_per_epoch):
    """The number of steps that --steps or --epochs ask for."""
    if "steps" in typed and "epochs" in typed:
        raise UserError(f"--steps {args.steps} and --epochs {args.epochs} both set the length; give one of them")
    if "steps" in typed or args.epochs is None:
        return args.steps
    if steps_per_epoch == 0:
        raise UserError(f"--batch-size {args.batch_size} with --accumulate {args.accumulate} is more than all images; "
                        "expected at most an epoch's, or --steps")
    return args.epochs * steps_per_epoch


def check_memory(args):
    """Refuse sizes that this machine cannot hold by far: asked for more and more memory, it would end the process.

    At least the weights, their gradients and AdamW's two moments are needed, an activation a block and
    the tokens of a step. What is a little too much, or too much for a GPU, shows when it is asked for.
    """
    T = getattr(args, "seq_len", None) or 1 + ((args.image_size or 0) // args.patch_size) ** 2
    weights = args.layers * args.width * (4 * args.width + 2 * (args.ffn or 4 * args.width)) + T * args.width
    activations = args.batch_size // int(os.environ.get("WORLD_SIZE", 1)) * T * args.width * args.layers
    needed = 16 * weights + 4 * activations + 8 * args.batch_size * args.accumulate * (T if hasattr(args, "seq_len") else 1)
    if hasattr(os, "sysconf") and needed > (memory := os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")):
        sizes = ("layers", "width", "ffn", "seq_len", "image_size", "batch_size", "accumulate")
        chosen = " ".join(f"--{name.replace('_', '-')} {value}" for name in sizes if (value := getattr(args, name, None)))
        raise UserError(f"{chosen} needs at least {needed / 2 ** 30:.3g} GiB of memory, this machine has "
                        f"{memory / 2 ** 30:.3g}; make one of them smaller")


def check_attention(args, typed):
    """Refuse attention flags that would change nothing; of --alpha and --gamma the one that was typed counts."""
    for name in READ_BY:
        if name in typed and args.attention not in READ_BY[name]:
            raise UserError(f"--{name.replace('_', '-')} {typed[name]} needs --attention {' or '.join(READ_BY[name])}, "
                            f"not {args.attention}")
    if "gate_hidden" in typed and args.gate != "mlp":
        raise UserError(f"--gate-hidden {args.gate_hidden} needs --gate mlp, not {args.gate or Config.gate}")
    if "alpha" in typed and "gamma" in typed:
        raise UserError(f"--alpha {args.alpha:g} and --gamma {args.gamma:g} both set gamma; give one of them")
    if "alpha" in typed:
        args.gamma = None
    if "gamma" in typed:
        args.alpha = None


def attention_settings(config):
    """The settings that a model's attention reads; the others are None."""
    return {name: getattr(config, name) if config.attention in by else None for name, by in READ_BY.items()}


def settle_fake_quant(args, typed):
    """Check the flags of fake quantization and fill them in."""
    for name, default in {"w_bits": 8, "a_bits": 8, "fake_quant_granularity": "token"}.items():
        if name in typed and not args.fake_quant:
            raise UserError(f"--{name.replace('_', '-')} {typed[name]} needs --fake-quant; "
                            "to quantize a run after training, see quantize.py")
        setattr(args, name, typed.get(name, default) if args.fake_quant else None)
    if args.integer and not args.fake_quant:
        raise UserError("--integer needs --fake-quant; to run a trained model on integers, see quantize.py")
    if args.integer and max(args.w_bits, args.a_bits) > 8:
        raise UserError(f"--integer: int8 holds at most 8 bits, not --w-bits {args.w_bits} --a-bits {args.a_bits}")


def settle_quantization(args):
    """Check the flags of quantize.py that need one another; --export asks for --integer, too."""
    args.integer, bits = args.integer or args.export is not None, 8 if args.sweep else max(args.w_bits, args.a_bits)
    if args.bits and not args.remedies:
        raise UserError(f"--bits {' '.join(map(str, args.bits))} needs --remedies; else see --w-bits and --a-bits")
    if args.integer and bits > 8:
        raise UserError(f"--integer: int8 holds at most 8 bits, not --w-bits {args.w_bits} --a-bits {args.a_bits}")
    if args.export and (len(args.runs) > 1 or Path(args.runs[0]).is_file()):
        raise UserError(f"--export {args.export}: expected one run's folder, not {' '.join(args.runs)}")


def run_name(family, args, typed):
    """A folder name from what was typed: runs/bert-clipped-alpha2.0-s0."""
    unnamed = NOT_OF_THE_RUN | {"attention", "seed", "precision", "eval_every", "eval_batches", "special_ids"}
    words = [family, args.attention]
    for name, value in typed.items():
        if name not in unnamed:
            words.append(Path(value).stem if name == "data" else
                         name.replace("_", "") + ("" if value is True else str(value)))
    return "runs/" + "-".join((*words, f"s{args.seed}"))


def resumed(checkpoint, typed, out):
    """The arguments of an interrupted run. What was typed must agree with them, or not matter to them."""
    saved = checkpoint["args"]
    settled = {"norm": Config.norm} | checkpoint["config"] | {name: value for name, value in saved.items() if value is not None}
    for name, value in typed.items():
        if name not in NOT_OF_THE_RUN and value != settled.get(name):
            raise UserError(f"--{name.replace('_', '-')} {value} differs from the run's {settled.get(name)}: "
                            "--resume continues a run as it was started")
    anew = {name: typed.get(name) for name in NOT_OF_THE_RUN if name != "save_every" or name in typed}
    return argparse.Namespace(**saved | anew | {"out": out})
