"""What a person meets: flags, one line for wrong input, and files that are never half written.

A script's settings come from three places, each overriding the one before: the defaults of its
model's Config, the preset (PRESETS in the script), and what was typed. A field of a Config that is
declared with `flag(default, help)` is a flag of the script: a parameter of one's own is one line.
"""
import argparse
import functools
import os
import shlex
import sys
import tempfile
from contextlib import contextmanager
from dataclasses import field, fields
from pathlib import Path

from torch import OutOfMemoryError


class UserError(ValueError):
    """Wrong input. The message names the flag or file, its value, and what was expected."""


def one_line_errors(main):
    """Decorate a script's main(): wrong input ends it with one line on stderr and exit code 2.

    Wrong input is a UserError, or sizes that memory cannot hold. Any other exception is a mistake
    of the code, and keeps its traceback.
    """
    @functools.wraps(main)
    def guarded(argv=None):
        if os.path.expanduser("~") == "~":  # no home is known, so no ~/.cache for downloads
            os.environ.setdefault("XDG_CACHE_HOME", tempfile.gettempdir())
        if hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(errors="replace")  # an arrow that its encoding has not becomes ?
        try:
            return main(argv)
        except (UserError, MemoryError, RuntimeError) as error:
            line = str(error)
            if isinstance(error, (MemoryError, OutOfMemoryError)) or "allocate memory" in line:
                line = f"out of memory: {line}; make --batch-size, --seq-len or the model smaller"
            elif not isinstance(error, UserError):
                raise
        print(f"error: {line}", file=sys.stderr)
        sys.exit(2)
    return guarded


# ---- a parser ----

class Parser(argparse.ArgumentParser):
    """An ArgumentParser that reports a wrong flag in one line; its --help shows each default."""

    def __init__(self, description):
        super().__init__(description=description, formatter_class=Help, allow_abbrev=False)

    def error(self, message):
        raise UserError(message)


class Help(argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action):
        shown = action.default not in (None, False, argparse.SUPPRESS)
        return action.help + (" (default %(default)s)" if shown else "")


def number(kind, low=None, high=None, above=None, below=None):
    """A type for argparse: an int or a float within bounds, never infinite and never NaN."""
    bounds = [(low, "at least", lambda x: x >= low), (high, "at most", lambda x: x <= high),
              (above, "above", lambda x: x > above), (below, "below", lambda x: x < below)]

    def parse(text):
        value = kind(text)
        given = [bound for bound in bounds if bound[0] is not None]
        if not abs(value) < 1e18 or not all(holds(value) for _, _, holds in given):
            wanted = " and ".join(f"{words} {limit:g}" for limit, words, _ in given)
            raise argparse.ArgumentTypeError(f"{text}: expected {wanted or 'a finite number'}")
        return value
    parse.__name__ = {int: "whole number", float: "number"}[kind]
    return parse


positive, bits, fraction = number(int, 1), number(int, 2, 16), number(float, above=0, below=1)
at_least_0, at_least_1, at_most_0 = number(float, 0), number(float, 1), number(float, high=0)
above_0, below_1 = number(float, above=0), number(float, 0, below=1)


def place(text):
    """A type for argparse: the name of a file or folder, or of what is built in; never empty."""
    if not text:  # "$folder" of a shell that knows no such variable
        raise argparse.ArgumentTypeError("is empty; expected a name")
    return text


def source(builtin):
    """A type for argparse: data that is built in, or a path, which is then found anywhere."""
    return lambda text: text if text in builtin else os.path.abspath(place(text))


def new_file(text):
    """A type for argparse: a file that could be written, said before an hour's work."""
    path = Path(place(text))
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text}: cannot be written; expected a file in a folder")
    return text


# ---- a field of a Config is a flag ----

def flag(default, help, needs=None, **options):
    """A dataclass field that is a flag, too. `options` are argparse's; `needs`: the values of
    --attention that read it. With any other the flag would change nothing, so it is refused."""
    return field(default=default, metadata={"help": help, "needs": needs, "options": options})


def config_flags(config_class):
    return [f for f in fields(config_class) if "help" in f.metadata]


def add_config_flags(parser, config_class):
    """--layers, --width, --attention, --gamma ...: the fields of the model's Config."""
    add = parser.add_argument_group("model").add_argument
    for f in config_flags(config_class):
        needs = f"; for {', '.join(f.metadata['needs'])}" if f.metadata["needs"] else ""
        options = {"action": "store_true"} if f.type is bool else f.metadata["options"]
        add(option(f.name), default=f.default, help=f.metadata["help"] + needs, **options)


def option(name):
    return "--" + name.replace("_", "-")


def attention_settings(config):
    """Of the settings that only some attentions read, those of this config's; others None."""
    return {f.name: getattr(config, f.name) if config.attention in f.metadata["needs"] else None
            for f in config_flags(type(config)) if f.metadata["needs"]}


# ---- what is not of the model ----

TEXTS = {}  # a name for --data -> what makes the text; minq/data.py and lab/ name theirs here


def add_text_flags(parser):
    add = parser.add_argument_group("text").add_argument
    add("--data", type=source(TEXTS), help=f"{', '.join(TEXTS)}, a file or folder, or a .bin")
    add("--vocab-size", type=number(int, low=1, high=2 ** 16), help="vocabulary of a .bin (uint16)")
    add("--special-ids", type=special_ids, help="PAD,CLS,SEP,MASK of a .bin; by default last")
    add("--documents", choices=("files", "lines", "tokens"),
        help="put [CLS] and [SEP] around each, inside the windows; tokens: the .bin has its own")


def special_ids(text):
    ids = [number(int, low=0, high=2 ** 16 + 3)(word) for word in text.split(",")]
    if len(ids) != 4 or len(set(ids)) != 4:
        raise argparse.ArgumentTypeError(f"{text}: expected four different ids, PAD,CLS,SEP,MASK")
    return ids


def add_training_flags(parser, optimizers):
    add = parser.add_argument_group("training").add_argument
    add("--steps", type=positive, help="optimizer steps")
    add("--batch-size", type=positive, help="sequences per micro-batch, over all processes")
    add("--accumulate", type=positive, help="micro-batches per step")
    add("--optimizer", choices=optimizers, default="adamw", help="muon: for the blocks' matrices")
    add("--lr", type=above_0, help="peak learning rate")
    add("--warmup", type=number(int, low=0), help="steps of linear warm-up, from a rate of 0")
    add("--weight-decay", type=at_least_0, help="the optimizer's weight decay")
    add("--decay-layernorm", action="store_true", help="decay LayerNorm's gamma too (Table 5)")
    add("--clip", type=above_0, help="largest gradient norm")
    add("--seed", type=number(int, low=0, below=2 ** 32), help="of weights, data order and dropout")

    add = parser.add_argument_group("eight bits from the first step (the blog)").add_argument
    add("--fake-quant", action="store_true", help="quantize the operands of every matrix product")
    add("--w-bits", type=bits, default=8, help="bits of weights, 2 to 16")
    add("--a-bits", type=bits, default=8, help="bits of activations, 2 to 16")
    add("--fake-quant-granularity", choices=("token", "tensor"), default="token",
        help="activations that share a scale: a token's, or the tensor's")

    add = parser.add_argument_group("run").add_argument
    add("--device", help="cpu, cuda, cuda:N or mps; by default the best there is")
    add("--precision", choices=("fp32", "bf16", "fp16"), help="by default bf16 where it is native")
    add("--compile", action="store_true", help="torch.compile the model")
    add("--out", type=place, help="the run's folder; by default runs/ and its settings")
    add("--from", type=source(()), metavar="RUN", help="begin with the weights and sizes of a run")
    add("--overwrite", action="store_true", help="replace the run in --out")
    add("--resume", action="store_true", help="continue the run in --out with its own settings")
    add("--eval-every", type=positive, help="steps between evaluations")
    add("--eval-batches", type=positive, help="validation batches per evaluation")
    add("--save-every", type=positive, help="steps between checkpoints")


# Flags that may be given anew when a run is resumed: they change nothing that the run computes.
NOT_OF_THE_RUN = {"device", "compile", "out", "overwrite", "resume", "save_every", "sample"}
UNNAMED = NOT_OF_THE_RUN | {"attention", "seed", "precision", "eval_every", "eval_batches",
                            "special_ids"}  # not part of a run's name


def read_flags(family, config_class, parser, presets, argv=None):
    """Parse the command line: (args, typed). `args` is a Namespace of every setting, `typed` a
    dict of those that were typed. Raises UserError where two of them contradict each other."""
    first = next(iter(presets))
    parser.add_argument("--preset", choices=presets, default=first, help="a recipe; flags override")
    defaults = vars(parser.parse_args([]))
    if unknown := set().union(*presets.values()) - defaults.keys():
        raise KeyError(f"a preset sets {min(unknown)}, which is no flag")
    parser.set_defaults(**presets[first])  # for --help
    given = parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(defaults)))  # or else None
    typed = {name: value for name, value in vars(given).items() if value is not None}
    args = argparse.Namespace(**defaults | presets[typed.get("preset", first)] | typed)
    if "warmup" not in typed and args.steps and args.steps <= (args.warmup or 0):
        args.warmup = args.steps // 10  # the preset's is for longer runs
    args.out = args.out or run_name(family, args, typed)
    if args.resume and args.overwrite:
        raise UserError("--resume continues the run in --out, --overwrite replaces it; give one")
    if not args.resume:  # a resumed run has settings of its own
        check(config_class, args, typed)
    return args, typed


def check(config_class, args, typed):
    """Refuse what would change nothing; of --alpha and --gamma the one that was typed counts."""
    for f in config_flags(config_class):
        if (needs := f.metadata["needs"]) and f.name in typed and args.attention not in needs:
            raise UserError(f"{option(f.name)} {typed[f.name]} needs --attention {needs[0]}")
    if "gate_hidden" in typed and args.gate != "mlp":
        raise UserError(f"--gate-hidden {args.gate_hidden} needs --gate mlp, not {args.gate}")
    if "alpha" in typed and "gamma" in typed:
        raise UserError(f"--alpha {args.alpha:g} and --gamma {args.gamma:g}: both set gamma")
    args.gamma = None if "alpha" in typed else args.gamma
    args.alpha = None if "gamma" in typed else args.alpha
    of_training = {"w_bits", "a_bits", "fake_quant_granularity"}
    if not args.fake_quant and (names := sorted(of_training & typed.keys())):
        raise UserError(f"{option(names[0])} needs --fake-quant; after training see quantize.py")


def run_name(family, args, typed):
    """A folder's name from what was typed: runs/bert-clipped-alpha2.0-s0."""
    words = [family, args.attention]
    for name, value in typed.items():
        if name in ("data", "from"):
            words += ["from"] * (name == "from") + [Path(value).stem]
        elif name not in UNNAMED:
            words.append(name.replace("_", "") + ("" if value is True else str(value)))
    return "runs/" + "-".join((*words, f"s{args.seed}"))


# ---- what looks at trained runs: quantize.py and lab/ ----

def add_run_flags(parser, batches=16, seeds=3):
    """RUN..., and how they are calibrated and evaluated."""
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN", help="a run's folder")
    if batches:
        add("--batches", type=positive, default=batches, help="of the training split, to calibrate")
    if seeds:
        add("--seeds", type=positive, default=seeds, help="calibrations, for mean and deviation")
    add("--eval-batches", type=positive, help="validation batches; by default as in training")
    add("--data", type=place, help="where the runs' data is now")
    add("--device", help="cpu, cuda, cuda:N or mps; by default the best there is")
    add("--json", type=new_file, metavar="FILE", help="write the numbers there, too")


def command(script, *words):
    """A command to be copied, quoted for the shell."""
    return shlex.join(("python", script, *map(str, words)))


# ---- files ----

@contextmanager
def writing(what):
    """While active, what goes wrong with a file is a UserError; `what` names it."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # torch.save makes a RuntimeError of a full disk
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        raise UserError(f"{what}: cannot be written: {cause}") from None


def write_atomically(path, content):
    """Write a text, or let `content` fill an opened file: at no moment is `path` half written, and
    a power cut leaves the old or the new one."""
    new = Path(f"{path}.new")
    try:
        with writing(path):
            with open(new, "wb") as file:
                content(file) if callable(content) else file.write(content.encode())
                file.flush()
                os.fsync(file.fileno())
            os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)
