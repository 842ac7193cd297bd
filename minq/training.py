"""The plumbing of training that has one right answer: schedules, parameter groups, precision,
processes, evaluation. It knows no model and no disk; the training step stands in each script.
"""
import atexit
import math
import os
import signal
import time
from contextlib import contextmanager, nullcontext
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.nn.functional as F

from minq.flags import UserError


# ---- schedules: a multiplier of the peak learning rate ----

def linear_schedule(step, warmup, steps):
    """From 0 to 1 over `warmup` steps, then linearly to 0 at `steps` (C.1, C.2)."""
    return step / warmup if step < warmup else max(0.0, (steps - step) / max(1, steps - warmup))


def cosine_schedule(step, warmup, steps, first=1e-3, last=1e-2):
    """From `first` to 1 over `warmup` steps, then along a cosine to `last` (C.3)."""
    if step < warmup:
        return first + (1 - first) * step / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return last + (1 - last) * (1 + math.cos(math.pi * progress)) / 2


def set_lr(optimizer, lr):
    for group in optimizer.param_groups:
        group["lr"] = lr


# ---- optimizer ----

def parameter_groups(model, weight_decay, decay_layernorm=False):
    """AdamW groups: weight decay on matrices; with `decay_layernorm` also on norms' gamma (B.3).

    A matrix has more than one number per row: (H, 1, 1), a number per head, is none. A gamma is the
    `weight` of a module whose name says norm. What a softmax holds never decays, nor do biases.
    Raises UserError where no norm has a gamma to decay.
    """
    decayed, others, gammas = [], [], 0
    for name, p in model.named_parameters():
        module, _, last = name.rpartition(".")
        is_matrix = p.numel() > len(p) and p.dim() > 1 and "bias" not in last
        is_gamma = last == "weight" and "norm" in module.rpartition(".")[2]
        gammas += is_gamma
        decays = (is_matrix or is_gamma and decay_layernorm) and ".softmax." not in name
        (decayed if decays else others).append(p)
    if decay_layernorm and not gammas:
        raise UserError("--decay-layernorm would change nothing: no norm of this model has a gamma")
    return [dict(params=decayed, weight_decay=weight_decay), dict(params=others, weight_decay=0.0)]


# name -> (model, parameter groups, lr, betas) to optimizer; lab/muon.py has another
OPTIMIZERS = {"adamw": lambda model, groups, **lr: torch.optim.AdamW(groups, fused=True, **lr)}


# ---- device and precision ----

def pick_device(name=None):
    """`--device`: the name given, or the best there is of cuda, mps, cpu."""
    if name is None:
        mps = torch.backends.mps.is_available()
        name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    try:
        device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if name == "cuda" else name)
        torch.zeros(1, device=device).item()  # "meta" holds no numbers
        return device
    except (RuntimeError, AssertionError):  # its own words are about builds of PyTorch
        raise UserError(f"--device {name}: none here; expected cpu, cuda, cuda:N or mps") from None


def pick_precision(name, device):
    """`--precision`: the name given, or bf16 where the hardware multiplies it, else fp32."""
    if name is not None:
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported() else "fp16"
    avx512 = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bf16" if device.type == "cpu" and avx512 and bf16 else "fp32"


def autocast(device, precision):
    """Mixed precision for the forward pass; fp32 leaves it alone."""
    dtype = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    return torch.autocast(device.type, dtype) if dtype else nullcontext()


def compiled(model):
    """torch.compile; without a C++ compiler, which CPUs need, a UserError."""
    from torch._inductor import cpp_builder, exc  # which take a second to import
    try:
        cpp_builder.get_cpp_compiler()
    except exc.InvalidCxxCompiler:
        raise UserError("--compile: no C++ compiler; expected g++, clang++ or $CXX") from None
    return torch.compile(model)


def to_device(batch, device):
    """Move a batch (nested tuples of tensors); to a GPU through pinned memory, without waiting."""
    if isinstance(batch, tuple):
        return tuple(to_device(part, device) for part in batch)
    if device.type == "cuda":
        return batch.pin_memory().to(device, non_blocking=True)
    return batch.to(device)


# ---- randomness ----

def step_seed(seed, step):
    """A seed for what is random in a training step, the same in all processes."""
    return (seed * 1_000_003 + step) * 1_009


def seed_step(seed, step, rank=0):
    """Make what is random in a step of one process (dropout) a function of (seed, step, rank)."""
    torch.manual_seed(step_seed(seed, step) + rank)


# ---- processes ----

def start_processes():
    """Join the other processes under torchrun. Returns how many there are, 1 alone.

    On GPUs, too, gloo carries the few numbers that are on the CPU: it tells at once when a process
    has died.
    """
    if "RANK" not in os.environ:
        return 1
    kind = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(kind, timeout=timedelta(minutes=1))  # of silence: a process is dead
    atexit.register(dist.destroy_process_group)
    # Before that: gloo's threads drop their last tensors when they get to it, and need Python to do
    # so. Where it has ended, they abort the process (pull request 179291 of PyTorch).
    atexit.register(time.sleep, 0.1)
    return dist.get_world_size()


def added_up(*numbers):
    """The sums over all processes of numbers that each has its own of."""
    if not dist.is_initialized():
        return numbers
    sums = torch.tensor(numbers, dtype=torch.float64)
    dist.all_reduce(sums)
    return sums.tolist()


@contextmanager
def interruptible():
    """Collects Ctrl-C and SIGTERM in a list, so that a step ends and the run is saved first; a
    second Ctrl-C ends at once."""
    got = []

    def catch(number, frame):
        got.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    previous = {s: signal.signal(s, catch) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield got
    finally:
        for s, handler in previous.items():
            signal.signal(s, handler)


# ---- evaluation ----

@torch.no_grad()
def evaluate(model, batches, device):
    """Perplexity and top-1 accuracy in percent over `batches` of (inputs, targets), in fp32.

    Perplexity is exp(total loss / total predictions), not a mean over batches. NaN where nothing is
    to be predicted.
    """
    was_training = model.training
    model.eval()
    loss = correct = count = 0
    for batch in batches:
        inputs, targets = to_device(batch, device)
        logits, targets = model(*inputs).float().flatten(0, -2), targets.flatten()
        loss += F.cross_entropy(logits, targets, reduction="sum").item()
        correct += (logits.argmax(dim=-1) == targets).sum().item()
        count += (targets >= 0).sum().item()  # below 0: not to be predicted
    loss, correct, count = added_up(loss, correct, count)  # each process has batches of its own
    model.train(was_training)
    loss, accuracy = (x / count if count else math.nan for x in (loss, 100 * correct))
    perplexity = math.inf if loss > 709 else math.exp(loss)  # beyond, exp is an error
    return {"loss": loss, "perplexity": perplexity, "accuracy": accuracy}
