"""What a run leaves in its folder, written so that nothing is lost and read so that nothing is taken for granted.

`checkpoint.pt` (everything needed to rebuild the model and to go on) and `metrics.jsonl` (a line an
evaluation: loss, the family's metric, norm and kurtosis of every layer).
"""
import json
import math
import os
import warnings
from contextlib import contextmanager, suppress
from dataclasses import fields
from pathlib import Path

import torch

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

from minq.cures import ATTENTIONS  # with those since the paper: a run of any opens
from minq.errors import UserError, in_one_line
from minq.model import FAMILIES


# ---- written ----

@contextmanager
def held(folder):
    """While active no other process can hold `folder`: two trainings would mix their runs. It is made if need be, and
    is gone again if nothing has come into it.

    The system lets go of it when the process ends, however it ends. (Not on Windows, nor where a file
    system knows no locks.) Raises UserError.
    """
    try:
        made = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY) if fcntl else None
    except OSError as error:
        raise UserError(f"--out {folder}: cannot be written: {error.strerror}") from None
    try:
        if fcntl:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise UserError(f"--out {folder}: another process is training there; wait for it, or name another --out") from None
    except OSError:
        pass
    try:
        yield
    finally:
        if fcntl:
            os.close(handle)
        with suppress(OSError):  # not empty
            for path in made:
                path.rmdir()


def require_free(folder, overwrite):
    """Raise UserError if `folder` holds a run, unless it is to be overwritten."""
    checkpoint, metrics = folder / "checkpoint.pt", folder / "metrics.jsonl"
    if not overwrite and checkpoint.exists():
        raise UserError(f"--out {folder}: already holds a run; continue it with --resume, "
                        "replace it with --overwrite, or name another --out")
    if not overwrite and metrics.exists() and metrics.stat().st_size:  # an empty one: killed before it had anything to lose
        raise UserError(f"--out {folder}: holds the log of a run that ended before its first checkpoint; "
                        "replace it with --overwrite, or name another --out")


def claim(folder, overwrite):
    """Begin a new run in `folder`, which ends another that may be there. Raises UserError as require_free does."""
    require_free(folder, overwrite)
    try:
        (folder / "checkpoint.pt").unlink(missing_ok=True)
        (folder / "metrics.jsonl").write_text("")
    except OSError as error:
        raise UserError(f"--out {folder}: cannot be written: {error.strerror}") from None


def forget_after(folder, step):
    """Drop what was logged after the checkpoint of `step`, half-written lines included."""
    metrics = folder / "metrics.jsonl"
    lines = metrics.read_bytes().splitlines(keepends=True) if metrics.exists() else []
    kept = []
    for line in lines:
        with suppress(ValueError, TypeError, KeyError):  # a power cut can leave anything after the checkpoint's last line
            if line.endswith(b"\n") and json.loads(line)["step"] <= step:
                kept.append(line)
    write_atomically(metrics, lambda path: path.write_bytes(b"".join(kept)))


def append_line(path, line):
    """Add a line to a log, on the disk before anything else is done: a checkpoint must not know more than its log."""
    try:
        with open(path, "a") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from None


def write_atomically(path, write):
    """Let `write` make a new file beside `path`, then put it in its place: at no moment is `path` half written.

    It is on the disk before it takes the place, so that a power cut leaves the old or the new one. Raises
    UserError where it cannot be written, a full disk for one: `path` then stays as it was.
    """
    new = path.with_name(path.name + ".new")
    try:
        write(new)
        flush_to_disk(new)
        os.replace(new, path)
        if os.name == "posix":  # elsewhere a folder cannot be opened
            flush_to_disk(path.parent)
    except (OSError, RuntimeError) as error:
        cause = error if isinstance(error, OSError) else error.__context__  # torch.save raises RuntimeError over it
        if not isinstance(cause, OSError):
            raise
        with suppress(OSError):
            new.unlink(missing_ok=True)
        kept = "; it stays as it was before" if path.exists() else ""
        raise UserError(f"{path}: cannot be written: {cause.strerror}{kept}") from None


def flush_to_disk(path):
    """Have the system write what it holds back of a file, or of a folder's list of names."""
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def save_checkpoint(folder, checkpoint):
    """Replace the folder's checkpoint."""
    def write(path):
        with open(path, "wb") as file:  # given a name, torch.save would not tell what went wrong
            torch.save(checkpoint, file)
    write_atomically(folder / "checkpoint.pt", write)


# ---- read again ----

def read_log(folder):
    """The evaluations in `folder`/metrics.jsonl, a dict each. Raises UserError if there are none."""
    path = Path(folder, "metrics.jsonl")
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError):
        raise UserError(f"{folder}: no run here; expected a folder with metrics.jsonl") from None
    if not lines:
        raise UserError(f"{folder}: nothing is logged yet")
    return parsed(lines, path)


def parsed(lines, path):
    """A log's lines as dicts. Raises UserError for what is none, or has no step."""
    entries = []
    for number, line in enumerate(lines, start=1):
        try:
            entries.append(json.loads(line))
            if type(entries[-1]["step"]) is not int:
                raise TypeError
        except (ValueError, TypeError, KeyError, RecursionError):
            raise UserError(f"{path}: line {number} is no evaluation; delete that line to go on without it") from None
    return entries


# What a checkpoint must have. To go on training takes more: optimizer, scaler, train_loss and seconds.
CONTENTS = {"family": str, "config": dict, "args": dict, "model": dict, "step": int, "data_sha256": str}

# What building a model and filling it raise where settings or weights are not such a model's.
MISFIT = (TypeError, ValueError, KeyError, AttributeError, ArithmeticError, RuntimeError)


def load_checkpoint(folder, family=None):
    """The dictionary in `folder`/checkpoint.pt. Raises UserError if it is not a run's, or not of `family`."""
    path = Path(folder) / "checkpoint.pt"
    if not path.is_file():
        raise UserError(f"{folder}: no run here; expected a folder with checkpoint.pt")
    try:
        with warnings.catch_warnings(action="ignore"):  # of pickles that torch did not write
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # bytes that are no checkpoint raise anything
        raise UserError(f"{path}: truncated, or not a checkpoint of minq") from None
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != "minq 1":
        raise UserError(f"{path}: not a checkpoint of minq")
    for key, kind in CONTENTS.items():
        if not isinstance(checkpoint.get(key), kind):
            raise UserError(f"{path}: its {key} is no {kind.__name__}; expected a checkpoint of minq")
    if family and checkpoint["family"] != family:
        raise UserError(f"{folder}: a run of {checkpoint['family']}, expected one of {family}")
    row_alpha = checkpoint["config"].pop("row_alpha", None)  # until November 2026 a flag beside --attention clipped
    if row_alpha is not None:
        checkpoint["config"] |= {"attention": "row-clipped", "alpha": row_alpha}
        checkpoint["args"]["attention"] = "row-clipped"
    checkpoint["args"] = {"optimizer": "adamw"} | checkpoint["args"]  # the only one until then
    for name, weight in checkpoint["model"].items():
        if not isinstance(weight, torch.Tensor) or weight.layout != torch.strided or not weight.is_floating_point():
            raise UserError(f"{path}: {name} is no tensor of floating-point numbers; expected a checkpoint of minq")
        if not weight.float().isfinite().all():
            raise UserError(f"{path}: {name} is not finite; this run cannot be used, train it again")
    return checkpoint


def from_checkpoint(checkpoint, name):
    """Rebuild the model of a run's checkpoint. Raises UserError, naming the run, where it does not fit this code."""
    build, config = architecture(checkpoint, name)
    with torch.device("meta"), warnings.catch_warnings(action="ignore"):
        shapes = build(config)
    with warnings.catch_warnings(action="ignore"):
        load_weights(shapes, checkpoint, name)  # whether they fit, before any memory is taken
    return load_weights(build(config), checkpoint, name)


def architecture(checkpoint, name):
    """(class, config) of a checkpoint's model. Raises UserError, naming the run, if this code cannot build it."""
    family, attention = checkpoint["family"], checkpoint["config"].get("attention")
    for what, found, known in (("family", family, FAMILIES), ("attention", attention, ATTENTIONS)):
        if found not in list(known):  # it may be nothing that a dictionary can hold
            raise UserError(f"{name}: its {what} is {found!r}; expected one of {', '.join(known)}")
    build = FAMILIES[family]
    try:
        config = build.config_class(**{key: value for key, value in checkpoint["config"].items() if value is not None})
        check_types(config)
        if config.layers > len(checkpoint["model"]):
            raise ValueError(f"{config.layers} layers, but {len(checkpoint['model'])} weights")
        with torch.device("meta"), warnings.catch_warnings(action="ignore"):
            build(config)
    except MISFIT as error:
        raise UserError(f"{name}: its settings do not fit minq's {build.__name__}: {in_one_line(error)}") from None
    return build, config


def check_types(config):
    """Raise TypeError if a field of a config holds what its declaration does not allow, ValueError for NaN and infinity."""
    for field in fields(config):
        value = getattr(config, field.name)
        if not isinstance(value, field.type) and not (type(value) is int and isinstance(1.0, field.type)):
            raise TypeError(f"{field.name} is {value!r}, expected {getattr(field.type, '__name__', field.type)}")
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{field.name} is {value}, expected a finite number")


# Of the arguments of a run what is read to open it again; all are 1 at least, where they are numbers.
SETTINGS = {"data": str, "batch_size": int, "eval_batches": int, "image_size": int | None, "seq_len": int,
            "vocab_size": int | None, "special_ids": list | None, "mask_prob": float, "seed": int}


def check_settings(checkpoint, name):
    """Raise UserError where an argument of the run is missing, or is nothing that a script would have written."""
    args = checkpoint["args"]
    family = {"image_size"} if "image_size" in args else {"seq_len", "vocab_size", "special_ids"}
    for key in {"data", "batch_size", "eval_batches", "seed"} | family | (SETTINGS.keys() & args.keys()):
        if key not in args:
            raise UserError(f"{name}: its args have no {key}; expected those of a training script of minq")
        value, least = args[key], 0 if key == "seed" else 1
        if not isinstance(value, SETTINGS[key]) or value == "" or type(value) is int and value < least:
            raise UserError(f"{name}: its args have {key} {value!r}; expected what a training script writes")


def load_weights(model, checkpoint, name):
    """Give a model the weights of the run `name`. Raises UserError that says which do not fit."""
    try:
        model.load_state_dict(checkpoint["model"])
    except MISFIT as error:
        raise UserError(f"{name}: its checkpoint does not fit minq's {type(model).__name__}: {in_one_line(error)}") from None
    return model


def require_same_optimizer(optimizer, saved):
    """Raise UserError if the script's optimizer is not the one that the run was trained with."""
    settings = lambda state: {key: value for key, value in state["param_groups"][0].items() if key not in ("params", "lr")}
    here, there = settings(optimizer.state_dict()), settings(saved)
    differ = [key for key in here | there if here.get(key) != there.get(key)]
    if differ:
        raise UserError(f"--resume: the script's {type(optimizer).__name__} is not the run's optimizer; they differ in {', '.join(differ)}")


def require_same_data(source, sha256, checkpoint):
    """Raise UserError if the data that a run was trained on has changed since."""
    if sha256 != checkpoint["data_sha256"]:
        raise UserError(f"--data {source}: has changed since this run was trained on it (its SHA-256 is another)")
