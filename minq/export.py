"""The integer model as a file, and what it is worth: metric, bytes, speed.

    save_export(path, run, model, settings)         # model: to_integer's; about a quarter of the fp32 weights
    run = open_export(path, device)                 # its model computes on int8 again

A file holds the integers with their scales, and what is needed to rebuild the model around them: family,
config, bits. An output layer that is tied to the token table stays in floating point, as when the model was
quantized; with a large vocabulary that table is most of the file.
"""
import copy
import hashlib
import io
import statistics
import textwrap
from dataclasses import asdict
from pathlib import Path

import torch

from minq.checkpoints import architecture, require_same_data, write_atomically
from minq.damage import floating_states, scores
from minq.data import open_data
from minq.errors import UserError
from minq.growth import growth
from minq.integer import to_integer
from minq.outliers import watch
from minq.quant import ActivationQuantizer, quantize_model
from minq.runs import OpenedRun
from minq.tables import json_row
from minq.timing import in_turns
from minq.training import to_device

FORMAT = b"minq int8 1, sha256 "
ROUNDS = 5  # turns that each model takes when timed


# ---- a run on integers: the columns of --integer ----

def execute(run, width, simulated, args):
    """Put the run's model on integers, write them where --export says, and measure them.

    width, simulated: "8x8" and what quantize.py found there. -> {metric, bytes, speedup_fp32, speedup_bf16}
    """
    w_bits, a_bits = map(int, width.split("x"))
    w_estimator, _, a_estimator, _ = simulated["estimators"].replace(",", "").split()
    settings = dict(w_bits=w_bits, a_bits=a_bits, w_estimator=w_estimator, a_estimator=a_estimator,
                    w_granularity=args.w_granularity)
    model = quantize_model(copy.deepcopy(run.model), **settings)
    run.calibrate(model, seed=0, batches=args.batches)
    contents = exported(run, to_integer(model), settings)
    if args.export:
        save_export(args.export, contents)
    metric = scores(run, model, False, args.eval_batches)[run.model.metric]
    return {"metric": metric, "bytes": len(contents), **speedups(run, model)}


def speedups(run, model):
    """How many times as fast as the same model in fp32 and in bf16, on a validation batch, in turns."""
    inputs = to_device(next(iter(run.validation(1))), run.device)[0]
    to_bf16 = lambda x: x.bfloat16() if x.is_floating_point() else x
    bf16 = copy.deepcopy(run.model).bfloat16()  # no weight is cast anew in each pass

    def in_bf16():
        with torch.autocast(run.device.type, torch.bfloat16):  # for what a softmax of one's own computes in fp32
            bf16(*map(to_bf16, inputs))

    passes = {"integer": lambda: model(*inputs), "fp32": lambda: run.model(*inputs), "bf16": in_bf16}
    with torch.no_grad():
        seconds = in_turns(passes, ROUNDS, run.device)
    return {f"speedup_{name}": statistics.median(a / b for a, b in zip(seconds[name], seconds["integer"]))
            for name in ("fp32", "bf16")}


# ---- the file: a line with the SHA-256 of what follows, then what torch.save writes ----

def exported(run, model, settings):
    """The bytes of a file that `open_export` reads."""
    state = {name: tensor.cpu() for name, tensor in model.state_dict().items()}
    args = run.checkpoint["args"]
    inside = Path(run.name, args["data"])  # data that lies in the run's folder
    reference = None
    if model.metric == "sqnr":  # nothing to predict: a batch of floating-point states, to compare with
        reference = [to_device((inputs, h), torch.device("cpu")) for inputs, h in floating_states(run, 1)]
    contents = {"family": model.family, "config": asdict(model.config), "settings": settings, "model": state,
                "args": args | ({"data": str(inside.absolute())} if inside.exists() else {}),
                "data_sha256": run.checkpoint["data_sha256"], "reference": reference}
    file = io.BytesIO()
    torch.save(contents, file)
    return FORMAT + hashlib.sha256(file.getvalue()).hexdigest().encode() + b"\n" + file.getvalue()


def save_export(path, contents):
    try:
        write_atomically(Path(path), lambda new: new.write_bytes(contents))
    except OSError as error:
        raise UserError(f"--export {path}: cannot be written: {error.strerror}") from None


def load_export(path):
    """The dictionary in an exported file. Raises UserError, in one line, if it is damaged or another's."""
    try:
        header, _, contents = Path(path).read_bytes().partition(b"\n")
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    if not header.startswith(FORMAT):
        raise UserError(f"{path}: not a model that --export wrote; a run is named by its folder")
    if header != FORMAT + hashlib.sha256(contents).hexdigest().encode():
        raise UserError(f"{path}: damaged or truncated: its SHA-256 is not what its first line says")
    return torch.load(io.BytesIO(contents), map_location="cpu", weights_only=True)


def open_export(path, device, data_source=None):
    """(an OpenedRun whose model is in floating point with random weights, the integer model, reference states)"""
    contents = load_export(path)
    build, config = architecture(contents, path)
    floating, skeleton = build(config), build(config)
    quantize_model(skeleton, **contents["settings"])
    for tap in skeleton.modules():
        if isinstance(tap, ActivationQuantizer):
            tap.scale, tap.zero_point = torch.ones(()), torch.zeros(())  # until the file's are there
    try:
        model = to_integer(skeleton)
        model.load_state_dict(contents["model"], assign=True)
    except RuntimeError as error:
        reason = textwrap.shorten(str(error), 500, placeholder=" ...")
        raise UserError(f"{path}: does not fit minq's {type(skeleton).__name__}: {reason}") from None
    source = data_source or contents["args"]["data"]
    data = open_data(contents["args"] | {"data": source})
    if not data_source:
        require_same_data(source, data.sha256, contents)
    run = OpenedRun(str(path), contents, floating.to(device).eval(), data, device)
    return run, model.to(device), [to_device(batch, device) for batch in contents["reference"] or ()]


def export_row(path, device, args):
    """A row of quantize.py's table for an exported file."""
    run, model, reference = open_export(path, device, args.data)
    with watch(model, {model.norm_tap, *model.kurtosis_taps}, growth) as outliers:
        metric = scores(run, model, False, args.eval_batches, reference)[model.metric]
    integer = {"metric": metric, "bytes": Path(path).stat().st_size, **speedups(run, model)}
    return json_row(run, None, {}, outliers) | {"integer": integer}
