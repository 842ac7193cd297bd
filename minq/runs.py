"""A run: a training that can be stopped, continued and opened again. (Its folder: checkpoints.py.)"""
import json
import signal
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from itertools import starmap
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from minq.checkpoints import (append_line, check_settings, claim, forget_after, from_checkpoint, held, load_checkpoint,
                              load_weights, read_log, require_free, require_same_data, require_same_optimizer,
                              save_checkpoint)
from minq.data import open_data, require_unchanged, stamps
from minq.errors import UserError
from minq.fake_quant import FakeQuantLinear, fake_quantization_off, fake_quantize_training
from minq.integer_training import IntegerLinear
from minq.growth import growth
from minq.model import FAMILIES
from minq.outliers import watch
from minq.quant import calibrating
from minq.training import added_up, crowded, evaluate, seed_step, to_device

PATIENCE = 20  # steps in a row whose loss is not finite, before a run is given up
CALIBRATION_SEED = 1_000_000  # plus 0, 1, 2: other batches than training's own, whose seeds are small
LOOK_EVERY = 20  # steps between looks at the loss, each of which waits for the device


class Run:
    """A training in progress. The script does the step; the run counts, evaluates, logs, saves, stops and reports.

        run = Run(args, data, model, optimizer, scaler, checkpoint)
        for step in run.steps():                    # from the checkpoint's on, until --steps or Ctrl-C
            for batch in run.slices(*global_batch): # the --accumulate micro-batches of this process
                loss = ...                          # of run.trained; the slices' losses add up to the step's
                run.step_loss += loss.detach()

    `trained` is the model as it is to be called in training: fake-quantized, compiled, distributed as args say.
    """

    def __init__(self, args, data, model, optimizer, scaler, checkpoint=None):
        require_family(model)
        self.args, self.data, self.model = args, data, model
        self.optimizer, self.scaler = optimizer, scaler
        self.folder, self.device = Path(args.out), next(model.parameters()).device
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        if args.batch_size % self.world:
            raise UserError(f"--batch-size {args.batch_size} does not divide among {self.world} processes")

        if args.fake_quant:
            linear = IntegerLinear if getattr(args, "integer", None) else FakeQuantLinear  # older runs know no --integer
            fake_quantize_training(model, args.w_bits, args.a_bits, args.fake_quant_granularity, linear)
        self.trained = torch.compile(model) if args.compile else model
        if self.world > 1:
            self.trained = DistributedDataParallel(self.trained)

        self.step, self.seconds, self.train_loss = 0, 0.0, torch.zeros(())
        if checkpoint:
            require_same_data(args.data, data.sha256, checkpoint)
            require_same_optimizer(optimizer, checkpoint["optimizer"])
            load_weights(model, checkpoint, self.folder)
            optimizer.load_state_dict(checkpoint["optimizer"])
            scaler.load_state_dict(checkpoint["scaler"])
            self.step, self.seconds, self.train_loss = (checkpoint[name] for name in ("step", "seconds", "train_loss"))
        self.train_loss = self.train_loss.to(self.device)  # summed since the last evaluation
        self.bad_steps = torch.zeros((), dtype=torch.long, device=self.device)  # in a row, with a loss not finite
        self.resumed, self.files = checkpoint is not None, stamps(data.files)
        self.signal, self.crowded = 0, None

    # ---- the loop ----

    def steps(self):
        """Yield the number of each step; between two of them log, evaluate and save when it is time."""
        args, started = self.args, time.perf_counter() - self.seconds
        with held(self.folder) if self.rank == 0 else nullcontext(), Interrupt() as interrupt:
            if self.rank == 0:
                forget_after(self.folder, self.step) if self.resumed else require_free(self.folder, args.overwrite)
            with tqdm(total=args.steps, initial=self.step, unit="step", disable=self.rank > 0) as progress:
                while self.step < args.steps and not self.signal:
                    seed_step(args.seed, self.step, self.rank)
                    self.step_loss = torch.zeros((), device=self.device)
                    yield self.step
                    if self.step == 0 and self.rank == 0:  # now it is known to work: only now a run in the way is replaced
                        claim(self.folder, args.overwrite)
                    self.step += 1
                    require_unchanged(self.files)
                    self.share(interrupt.signal)
                    progress.update()
                    if self.step % LOOK_EVERY == 0:
                        self.look(progress)
                        if self.bad_steps >= PATIENCE or self.scale_sunk():
                            break
                    last = self.step == args.steps
                    if self.step % args.eval_every == 0 or last:
                        self.evaluate()
                    self.seconds = time.perf_counter() - started
                    if self.step % args.save_every == 0 or last or self.signal:
                        self.save()
        self.report()

    def slices(self, *arrays):
        """Slice a global batch (arrays with equal first dimensions) into this process's micro-batches."""
        self.items = arrays[0].size
        size = len(arrays[0]) // (self.args.accumulate * self.world)
        for i in range(self.args.accumulate):
            # DDP exchanges gradients in the backward pass: once a step is enough
            self.trained.require_backward_grad_sync = i == self.args.accumulate - 1
            start = (i * self.world + self.rank) * size
            yield tuple(array[start:start + size] for array in arrays)

    def share(self, signal):
        """After a step: what all processes must agree on, its loss and whether to stop."""
        if self.world > 1:
            dist.all_reduce(self.step_loss)
            self.step_loss /= self.world
            signals = torch.tensor(signal)  # it reaches each process at another step
            dist.all_reduce(signals, dist.ReduceOp.MAX)
            signal = signals.item()
        self.signal = signal
        self.train_loss += self.step_loss
        self.bad_steps = (self.bad_steps + 1) * ~self.step_loss.isfinite()

    def look(self, progress):
        """Show the loss, and say once if the machine is crowded."""
        rate = (progress.format_dict["rate"] or 0.0) * self.items
        progress.set_postfix_str(f"loss {self.step_loss.item():.3f}, {rate:,.0f} {self.data.unit}/s", refresh=False)
        if self.crowded is None and self.rank == 0:
            self.crowded = crowded(self.device)
            if self.crowded:
                progress.write(self.crowded, file=sys.stderr)

    def scale_sunk(self):
        """Whether fp16's gradients have overflowed at every scale there is: not a step is taken any more."""
        return self.scaler.get_scale() < 1

    # ---- what is kept ----

    def evaluate(self):
        """Write a line of metrics.jsonl."""
        model, args = self.model, self.args
        split = args.batch_size, args.eval_batches, self.rank, self.world
        batches = lambda: starmap(self.data.to_model, self.data.validation_batches(*split))
        taps = ("layer_input", "ffn_output", "layer_output", *model.kurtosis_taps)
        with watch(model, taps, growth) as outliers:
            scores = floating = evaluate(model, batches(), self.device)
        if self.world > 1:
            add_up(outliers)
        if args.fake_quant:
            with fake_quantization_off(model):
                floating = evaluate(model, batches(), self.device)
        if self.rank == 0:
            steps, metric = (self.step - 1) % args.eval_every + 1, model.metric
            record = {"step": self.step, "loss": self.train_loss.item() / steps,
                      "lr": self.optimizer.param_groups[0]["lr"], "val_loss": scores["loss"],
                      metric: scores[metric], f"float_{metric}": floating[metric],
                      "max_inf_norm": outliers.max_inf_norm(model.norm_tap),
                      "avg_kurtosis": outliers.avg_kurtosis(*model.kurtosis_taps), **outliers.mean}
            append_line(self.folder / "metrics.jsonl", json.dumps(record))
        self.train_loss.zero_()

    def save(self):
        """Write the checkpoint, unless the last step went wrong: the one before it is the better one."""
        if self.rank > 0 or self.bad_steps > 0 or self.scale_sunk():
            return
        model, args = self.model, self.args
        checkpoint = dict(format="minq 1", family=model.family, config=asdict(model.config), args=vars(args),
                          data_sha256=self.data.sha256, step=self.step, model=model.state_dict(),
                          optimizer=self.optimizer.state_dict(), scaler=self.scaler.state_dict(),
                          train_loss=self.train_loss, seconds=self.seconds)
        save_checkpoint(self.folder, checkpoint)

    def report(self):
        """The last words: what came out, or how to go on. Raises UserError if the numbers were lost."""
        script, path = f"train_{self.model.family}.py", self.folder / "checkpoint.pt"
        kept = f"{path} is still that of the last good step saved" if path.exists() else "nothing was saved yet"
        if self.bad_steps > 0:
            raise UserError(f"{self.folder}: stopped at step {self.step}, the loss of the last {int(self.bad_steps)} "
                            f"steps is not finite; {kept}; try a lower --lr, or --precision fp32")
        if self.scale_sunk():
            raise UserError(f"{self.folder}: stopped at step {self.step}, fp16's gradients overflow at every loss scale "
                            f"(it is {self.scaler.get_scale():g}); {kept}; try a lower --lr, or --precision bf16 or fp32")
        if self.step < self.args.steps:
            if self.rank == 0:
                same = " --compile" * bool(self.args.compile) + (f" --device {self.args.device}" if self.args.device else "")
                print(f"interrupted at step {self.step}, saved. Go on with: python {script} --resume --out {self.folder}{same}")
            raise SystemExit(128 + self.signal)  # 130 for Ctrl-C, 143 for SIGTERM
        if self.rank == 0:
            print(f"{self.folder}: step {self.step}, {summary(self.folder)}")
            print(f"next: python quantize.py {self.folder}")


def require_family(model):
    """What a new family must have so that its runs can be opened: a name in FAMILIES, and a config of its own kind."""
    build, config = type(model), type(model.config)
    if FAMILIES.get(model.family) is not build:
        raise TypeError(f"FAMILIES knows no {build.__name__} by the name {model.family!r}: quantize.py could not open its runs")
    if config is not model.config_class or "__dataclass_fields__" not in vars(config):
        raise TypeError(f"{build.__name__} has a {config.__name__}; expected {model.config_class.__name__}, a @dataclass")


class Interrupt:
    """Notes Ctrl-C and SIGTERM as the number of the signal, so that a step ends and the run is saved first."""

    def __enter__(self):
        self.signal = 0
        self.previous = {s: signal.signal(s, self.catch) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def catch(self, number, frame):
        self.signal = number

    def __exit__(self, *exception):
        for s, handler in self.previous.items():
            signal.signal(s, handler)


def add_up(outliers):
    """Sum over all processes what each has measured on its own batches."""
    for tap, places in outliers.sums.items():
        outliers.counts[tap] = added_up(*outliers.counts[tap])
        for sums in places:
            for value in sums.values():
                dist.all_reduce(value)


def summary(folder):
    """The last evaluation of a run, in words."""
    last = read_log(folder)[-1]
    metric = "accuracy" if "accuracy" in last else "perplexity"
    switched_off = f" (fake quantization off {last['float_' + metric]:.3f})" if last["float_" + metric] != last[metric] else ""
    norms = ", ".join(f"{max(last[tap]['inf_norm']):.1f} ({tap})" for tap in ("ffn_output", "layer_output"))
    return f"{metric} {last[metric]:.3f}{switched_off}, max inf norm {norms}, avg kurtosis {last['avg_kurtosis']:.1f}"


# ---- opened again ----

@dataclass
class OpenedRun:
    """A run to look at: its model in evaluation mode, and the data that it was trained on."""
    name: str
    checkpoint: dict
    model: torch.nn.Module
    data: Any
    device: torch.device

    def validation(self, batches=None):
        """Batches (inputs, targets) of the validation split, as many as in training unless told."""
        args = self.checkpoint["args"]
        arrays = self.data.validation_batches(args["batch_size"], batches or args["eval_batches"])
        return starmap(self.data.to_model, arrays)

    def calibrate(self, model, seed, batches):
        """Set the ranges of a quantized copy of the run's model, with batches of the training split."""
        try:
            with calibrating(model):
                for inputs in self.calibration_inputs(seed, batches):
                    model(*inputs)
        except UserError as error:
            raise UserError(f"{self.name}: {error}") from None

    def calibration_inputs(self, seed, batches):
        for i in range(batches):
            arrays = self.data.train_batch(CALIBRATION_SEED + seed, i, self.checkpoint["args"]["batch_size"])
            yield to_device(self.data.to_model(*arrays), self.device)[0]


def open_run(folder, device, data_source=None, family=None):
    """An OpenedRun. Raises UserError if it cannot be read, or is not of `family`, where one is named.

    `data_source`: where its data is now (`--data`). Without it the data must be what the run was
    trained on, a name, a path, or a file in its folder; UserError if it has changed.
    """
    checkpoint = load_checkpoint(folder, family)
    check_settings(checkpoint, folder)
    model = from_checkpoint(checkpoint, folder).to(device).eval()
    source = data_source or checkpoint["args"]["data"]
    inside = Path(folder, source)
    if not data_source and inside.exists():
        source = str(inside)
    data = open_data(checkpoint["args"] | {"data": source})
    if not data_source:
        require_same_data(source, data.sha256, checkpoint)
    require_fit(model.config, data, folder)
    return OpenedRun(str(folder), checkpoint, model, data, device)


def require_fit(config, data, name):
    """Raise UserError if a model cannot take this data: other lengths, or ids and labels that it does not know."""
    for size, needed in data.sizes.items():
        has = getattr(config, size, None)
        if has is None or needed > has or needed < has and size in ("seq_len", "image_size"):
            raise UserError(f"{name}: its model has {size} {has}, its data {needed}; expected the data it was trained on, or its like")
