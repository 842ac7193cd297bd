"""The plumbing of training that has one right answer: schedules, parameter groups, precision,
processes, runs on disk, evaluation. It knows no model; the training loop stands in each script.
"""
import atexit
import contextlib
import json
import math
import os
import signal
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

from minq.errors import UserError


# ---- schedules: a multiplier of the peak learning rate ----

def linear_schedule(step, warmup, steps):
    """From 0 to 1 over `warmup` steps, then linearly to 0 at `steps` (C.1, C.2)."""
    if step < warmup:
        return step / warmup
    return max(0.0, (steps - step) / max(1, steps - warmup))


def cosine_schedule(step, warmup, steps, first=1e-3, last=1e-2):
    """From `first` to 1 over `warmup` steps, then along a cosine to `last` at `steps` (C.3: 1e-6, 1e-3, 1e-5)."""
    if step < warmup:
        return first + (1 - first) * step / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return last + (1 - last) * (1 + math.cos(math.pi * progress)) / 2


# ---- optimizer ----

def parameter_groups(model, weight_decay, decay_layernorm=False):
    """AdamW groups: no weight decay on biases and LayerNorm, or with `decay_layernorm` on its gamma (B.3)."""
    norms = {id(p) for module in model.modules() if isinstance(module, nn.LayerNorm) for p in module.parameters()}
    decayed, kept = [], []
    for name, p in model.named_parameters():
        is_bias = "bias" in name.rpartition(".")[2]
        decays = not is_bias and (decay_layernorm or id(p) not in norms)
        (decayed if decays else kept).append(p)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": kept, "weight_decay": 0.0}]


# ---- device and precision ----

def pick_device(name=None):
    """`--device`: the name given, or the best there is of cuda, mps, cpu."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"--device {name}: this machine has no CUDA device")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name}: expected cpu, cuda, cuda:N or mps") from None
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if name == "cuda" else device


def pick_precision(name, device):
    """`--precision`: the name given, or bf16 where the hardware multiplies it, else fp32."""
    if name is not None:
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported() else "fp16"
    capable = device.type == "cpu" and torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    capable = capable and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return "bf16" if capable else "fp32"


def autocast(device, precision):
    """Mixed precision for the forward pass; fp32 leaves it alone."""
    dtype = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    return torch.autocast(device.type, dtype) if dtype else contextlib.nullcontext()


# ---- randomness ----

def seed_step(seed, step, rank=0):
    """Make what is random in a training step (dropout) a function of (seed, step, rank) alone."""
    torch.manual_seed((seed * 1_000_003 + step) * 1_009 + rank)


# ---- processes ----

def start_processes():
    """(rank, world size): (0, 1) alone, or this process's place under torchrun."""
    if "RANK" not in os.environ:
        return 0, 1
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    atexit.register(dist.destroy_process_group)
    return dist.get_rank(), dist.get_world_size()


def check_slices(batch_size, world):
    if batch_size % world:
        raise UserError(f"--batch-size {batch_size} does not divide among {world} processes")


def micro_batches(arrays, accumulate, rank, world):
    """Slice a global batch (arrays with equal first dimensions) into this rank's `accumulate` micro-batches."""
    size = len(arrays[0]) // (accumulate * world)
    for i in range(accumulate):
        start = (i * world + rank) * size
        yield tuple(array[start:start + size] for array in arrays)


def mean_over_processes(x):
    if dist.is_initialized():
        dist.all_reduce(x)
        x /= dist.get_world_size()
    return x


def to_device(batch, device):
    """Move a batch (nested tuples of tensors); to a GPU through pinned memory, without waiting."""
    if isinstance(batch, tuple):
        return tuple(to_device(part, device) for part in batch)
    if device.type == "cuda":
        return batch.pin_memory().to(device, non_blocking=True)
    return batch.to(device)


# ---- evaluation ----

@torch.no_grad()
def evaluate(model, batches, device):
    """Perplexity and top-1 accuracy in percent over `batches` of (inputs, targets), in fp32.

    Perplexity is exp(total loss / total predictions), not a mean over batches.
    """
    was_training = model.training
    model.eval()
    loss = correct = count = 0
    for batch in batches:
        inputs, targets = to_device(batch, device)
        logits, targets = model(*inputs).float().flatten(0, -2), targets.flatten()
        loss += F.cross_entropy(logits, targets, reduction="sum").item()
        correct += (logits.argmax(dim=-1) == targets).sum().item()
        count += targets.numel()
    model.train(was_training)
    return {"loss": loss / count, "perplexity": exp(loss / count), "accuracy": 100 * correct / count}


def exp(x):
    """e^x, infinite instead of an error when x is too large."""
    return math.exp(x) if x < 700 else math.inf


# ---- runs on disk ----

class Run:
    """A folder with `checkpoint.pt` (everything needed to rebuild and to go on) and `metrics.jsonl`."""

    def __init__(self, folder):
        self.folder = Path(folder)
        self.checkpoint, self.metrics = self.folder / "checkpoint.pt", self.folder / "metrics.jsonl"

    def start(self, overwrite):
        """Claim the folder for a new run."""
        if self.checkpoint.exists() or self.metrics.exists():
            if not overwrite:
                raise UserError(f"--out {self.folder}: already holds a run; continue it with --resume, "
                                "replace it with --overwrite, or name another --out")
            self.checkpoint.unlink(missing_ok=True)
            self.metrics.unlink(missing_ok=True)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.metrics.touch()
        except OSError as error:
            raise UserError(f"--out {self.folder}: cannot be written: {error.strerror}") from None

    def forget_after(self, step):
        """Drop what was logged after the checkpoint of `step`, half-written lines included."""
        lines = self.metrics.read_text().splitlines(keepends=True) if self.metrics.exists() else []
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
        write_atomically(self.metrics, lambda path: path.write_text("".join(kept)))

    def log(self, **record):
        with open(self.metrics, "a") as file:
            file.write(json.dumps(record) + "\n")

    def save(self, **checkpoint):
        write_atomically(self.checkpoint, lambda path: torch.save({"format": "minq 1", **checkpoint}, path))


def write_atomically(path, write):
    """Write a new file beside `path`, then put it in its place: at no moment is `path` half written."""
    new = path.with_name(path.name + ".new")
    write(new)
    os.replace(new, path)


PATIENCE = 20  # steps in a row whose loss is not finite, before a run is given up


def require_finite(run, step, bad_steps):
    """Raise UserError if the run came to `step` with its loss not finite in the last `bad_steps` steps."""
    if bad_steps > 0:
        kept = f"{run.checkpoint} is still that of the last good step saved" if run.checkpoint.exists() else "nothing was saved yet"
        raise UserError(f"{run.folder}: stopped at step {step}, the loss of the last {int(bad_steps)} steps is not finite; "
                        f"{kept}; try a lower --lr, or --precision fp32")


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
    return checkpoint


def require_same_data(source, sha256, checkpoint):
    """Raise UserError if the data that a run was trained on has changed since."""
    if sha256 != checkpoint["data_sha256"]:
        raise UserError(f"--data {source}: has changed since this run was trained on it (its SHA-256 is another)")


# ---- what a person sees ----

def show(progress, loss, count, unit):
    """Put the loss and the throughput, `count` of `unit` a step, on the progress bar."""
    rate = progress.format_dict["rate"] or 0.0
    progress.set_postfix_str(f"loss {loss.item():.3f}, {rate * count:,.0f} {unit}/s", refresh=False)


def summary(run):
    """The last evaluation of a run, in words."""
    last = json.loads(run.metrics.read_text().splitlines()[-1])
    metric = "accuracy" if "accuracy" in last else "perplexity"
    norms = {tap: max(last[tap]["inf_norm"]) for tap in ("ffn_output", "layer_output")}
    kurtosis = last["layer_output"]["kurtosis"]
    switched_off = f" (fake quantization off {last['float_' + metric]:.3f})" if last["float_" + metric] != last[metric] else ""
    return (f"{metric} {last[metric]:.3f}{switched_off}, max inf norm {norms['ffn_output']:.1f} (ffn_output) "
            f"{norms['layer_output']:.1f} (layer_output), avg kurtosis {sum(kurtosis) / len(kurtosis):.1f}")


class Interrupt:
    """Turns Ctrl-C and SIGTERM into a flag, so that a step ends and the run is saved first."""

    def __enter__(self):
        self.raised = False
        self.previous = {s: signal.signal(s, self.catch) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def catch(self, *_):
        self.raised = True

    def __exit__(self, *exception):
        for s, handler in self.previous.items():
            signal.signal(s, handler)
