"""The plumbing of training that has one right answer: schedules, parameter groups, precision,
processes, evaluation. It knows no model and no disk; the training step stands in each script.
"""
import atexit
import contextlib
import math
import os
import time
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.nn.functional as F

from minq.errors import UserError

SILENCE = 60  # seconds without a word from another process, before it counts as dead
CROWD = 1.25  # threads that want to run, for each core of the machine

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


def set_lr(optimizer, lr):
    for group in optimizer.param_groups:
        group["lr"] = lr


# ---- optimizer ----

def parameter_groups(model, weight_decay, decay_layernorm=False):
    """AdamW groups: weight decay on matrices only; with `decay_layernorm` also on norms' gamma (B.3), the
    weights that are vectors. Biases never decay. Raises UserError where no norm has a gamma to decay."""
    decayed, undecayed, gammas = [], [], 0
    for name, p in model.named_parameters():
        last = name.rpartition(".")[2]
        is_gamma = p.dim() == 1 and last == "weight"
        is_matrix = p.dim() > 1 and "bias" not in last
        gammas += is_gamma
        (decayed if is_matrix or is_gamma and decay_layernorm else undecayed).append(p)
    if decay_layernorm and not gammas:
        raise UserError("--decay-layernorm would change nothing: no norm of this model has a gamma (--norm rmsnorm)")
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": undecayed, "weight_decay": 0.0}]


# name -> (model, parameter groups, lr, betas) to optimizer; optimizers.py has another
OPTIMIZERS = {"adamw": lambda model, groups, **settings: torch.optim.AdamW(groups, fused=True, **settings)}


# ---- device and precision ----

def pick_device(name=None):
    """`--device`: the name given, or the best there is of cuda, mps, cpu."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"--device {name}: this machine has no CUDA device")
    try:
        device = torch.device(name)
        known = device.type in ("cpu", "cuda", "mps")
    except RuntimeError:
        known = False
    if not known:
        raise UserError(f"--device {name}: expected cpu, cuda, cuda:N or mps")
    try:
        torch.empty(0, device=device)
    except RuntimeError:  # its own words are about builds of PyTorch
        raise UserError(f"--device {name}: this machine has none; expected cpu, cuda, cuda:N or mps") from None
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

def step_seed(seed, step):
    """A seed for what is random in a training step, the same in all processes."""
    return (seed * 1_000_003 + step) * 1_009


def seed_step(seed, step, rank=0):
    """Make what is random in a training step of one process (dropout) a function of (seed, step, rank) alone."""
    torch.manual_seed(step_seed(seed, step) + rank)


# ---- processes ----

def start_processes():
    """(rank, world size): (0, 1) alone, or this process's place under torchrun.

    On GPUs, too, gloo carries the few numbers that are on the CPU: it tells at once when a process has died.
    """
    if "RANK" not in os.environ:
        return 0, 1
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=SILENCE))
    atexit.register(dist.destroy_process_group)
    # Before that (the last registered is called first): gloo's threads drop their last tensors when they get to it, and
    # need Python to do so. Where it has ended, they abort the process (pull request 179291 of PyTorch).
    atexit.register(time.sleep, 0.1)
    return dist.get_rank(), dist.get_world_size()


def added_up(*numbers):
    """The sums over all processes of numbers that each has its own of."""
    if not dist.is_initialized():
        return numbers
    sums = torch.tensor(numbers, dtype=torch.float64)
    dist.all_reduce(sums)
    return sums.tolist()


def crowded(device):
    """What to say when more threads want to run than there are cores, else None. (Windows does not tell.)

    Threads of a run wait for each other in every product: two trainings with two threads each, on two
    cores, are ten times slower than with one thread each.
    """
    threads, cores = torch.get_num_threads(), os.cpu_count() or 1
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0  # of the last minute
    if device.type == "cpu" and threads > 1 and load > CROWD * cores:
        return (f"note: {load:.0f} threads want the {cores} cores of this machine, {threads} of them this run's, which wait "
                "for each other; if other trainings run, give each fewer threads: OMP_NUM_THREADS=1 python ...")


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
    loss, correct, count = added_up(loss, correct, count)  # each process has batches of its own
    model.train(was_training)
    return {"loss": loss / count, "perplexity": exp(loss / count), "accuracy": 100 * correct / count}


def exp(x):
    """e^x, infinite instead of an error when x is too large; NaN stays NaN."""
    try:
        return math.exp(x)
    except OverflowError:
        return math.inf
