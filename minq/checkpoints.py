"""What a run leaves in its folder, written so that nothing is lost and read so that nothing is taken for granted.

`checkpoint.pt` (everything needed to rebuild the model and to go on) and `metrics.jsonl` (a line an
evaluation: loss, the family's metric, norm and kurtosis of every layer).
"""
import json
import os
import textwrap
from pathlib import Path

import torch

from minq.attention import ATTENTIONS
from minq.errors import UserError
from minq.model import FAMILIES


# ---- written ----

def claim(folder, overwrite):
    """Take the folder for a new run."""
    checkpoint, metrics = folder / "checkpoint.pt", folder / "metrics.jsonl"
    if (checkpoint.exists() or metrics.exists()) and not overwrite:
        raise UserError(f"--out {folder}: already holds a run; continue it with --resume, "
                        "replace it with --overwrite, or name another --out")
    try:
        checkpoint.unlink(missing_ok=True)
        folder.mkdir(parents=True, exist_ok=True)
        metrics.write_text("")
    except OSError as error:
        raise UserError(f"--out {folder}: cannot be written: {error.strerror}") from None


def forget_after(folder, step):
    """Drop what was logged after the checkpoint of `step`, half-written lines included."""
    metrics = folder / "metrics.jsonl"
    lines = metrics.read_text().splitlines(keepends=True) if metrics.exists() else []
    kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
    write_atomically(metrics, lambda path: path.write_text("".join(kept)))


def write_atomically(path, write):
    """Write a new file beside `path`, then put it in its place: at no moment is `path` half written."""
    new = path.with_name(path.name + ".new")
    write(new)
    os.replace(new, path)


# ---- read again ----

def load_checkpoint(folder, family=None):
    """The dictionary in `folder`/checkpoint.pt. Raises UserError if it is not a run's, or not of `family`."""
    path = Path(folder) / "checkpoint.pt"
    if not path.is_file():
        raise UserError(f"{folder}: no run here; expected a folder with checkpoint.pt")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # bytes that are no checkpoint raise anything
        raise UserError(f"{path}: truncated, or not a checkpoint of minq") from None
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != "minq 1":
        raise UserError(f"{path}: not a checkpoint of minq")
    if family and checkpoint["family"] != family:
        raise UserError(f"{folder}: a run of {checkpoint['family']}, expected one of {family}")
    row_alpha = checkpoint["config"].pop("row_alpha", None)  # until November 2026 a flag beside --attention clipped
    if row_alpha is not None:
        checkpoint["config"] |= {"attention": "row-clipped", "alpha": row_alpha}
        checkpoint["args"]["attention"] = "row-clipped"
    return checkpoint


def from_checkpoint(checkpoint, name):
    """Rebuild the model of a run's checkpoint. Raises UserError, naming the run, where it does not fit this code."""
    family, attention = checkpoint["family"], checkpoint["config"].get("attention")
    for what, found, known in (("family", family, FAMILIES), ("attention", attention, ATTENTIONS)):
        if found not in known:
            raise UserError(f"{name}: its {what} is {found!r}; expected one of {', '.join(known)}")
    build = FAMILIES[family]
    try:
        model = build(build.config_class(**checkpoint["config"]))
    except (TypeError, KeyError, RuntimeError) as error:
        raise UserError(f"{name}: its settings do not fit minq's {build.__name__}: {error}") from None
    return load_weights(model, checkpoint, name)


def load_weights(model, checkpoint, name):
    """Give a model the weights of the run `name`. Raises UserError that says which do not fit."""
    try:
        model.load_state_dict(checkpoint["model"])
    except RuntimeError as error:
        raise UserError(f"{name}: its checkpoint does not fit minq's {type(model).__name__}: "
                        + textwrap.shorten(str(error), 500, placeholder=" ...")) from None
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
