"""A run: a training that can be stopped, continued and opened again.

Its folder holds `checkpoint.pt` (all that is needed to rebuild the model and to go on) and
`metrics.jsonl` (a line per evaluation: loss, metric, norm and kurtosis of every layer).
"""
import json
import os
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict
from itertools import starmap
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from tqdm import tqdm

from minq.flags import NOT_OF_THE_RUN, UserError, command, option, write_atomically, writing
from minq.model import FAMILIES
from minq.outliers import growth, watch
from minq.quant import calibrating
from minq.training import added_up, evaluate, interruptible, seed_step, to_device

PATIENCE = 20  # steps in a row whose loss is not finite, before a run is given up
LOOK_EVERY = 20  # steps between looks at the loss, each of which waits for the device
CALIBRATION_SEED = 1_000_000  # plus 0, 1, 2: other batches than training's, whose seeds are small


class Run:
    """A training in progress. The script does the step; the run counts, evaluates, logs and saves.

        run = Run(args, data, model, trained, optimizer, scaler, checkpoint)
        for step in run.steps():                    # from the checkpoint's on, to --steps or Ctrl-C
            for batch in run.micro_batches(*global_batch):  # the --accumulate ones of this process
                loss = ...                          # they add up to the step's
                run.step_loss += loss.detach()

    `trained` is the model as it is called in training: compiled or distributed, if args say so.
    """

    def __init__(self, args, data, model, trained, optimizer, scaler, checkpoint=None):
        self.args, self.data, self.model, self.trained = args, data, model, trained
        self.optimizer, self.scaler = optimizer, scaler
        self.folder, self.device = Path(args.out), next(model.parameters()).device
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.world = dist.get_world_size() if dist.is_initialized() else 1
        if args.batch_size % self.world:
            raise UserError(f"--batch-size {args.batch_size}: expected a multiple of {self.world}")
        if not checkpoint and args.warmup >= args.steps:
            raise UserError(f"--warmup {args.warmup}: expected fewer than --steps {args.steps}")
        if checkpoint:
            require_same_data(args.data, data, checkpoint)
            for name, part in (("model", model), ("optimizer", optimizer), ("scaler", scaler)):
                part.load_state_dict(checkpoint[name])
        done = checkpoint or {"step": 0, "seconds": 0.0, "train_loss": torch.zeros(())}
        self.step, self.seconds, self.signal = done["step"], done["seconds"], 0
        self.train_loss = done["train_loss"].to(self.device)  # summed since the last evaluation
        self.bad_steps = torch.zeros((), dtype=torch.long, device=self.device)  # loss not finite

    # ---- the loop ----

    def steps(self):
        """Yield the number of each step; between two of them evaluate, log and save in time."""
        args, started = self.args, perf_counter() - self.seconds
        files = [self.folder / name for name in ("checkpoint.pt", "metrics.jsonl")]
        progress = tqdm(total=args.steps, initial=self.step, unit="step", disable=self.rank > 0)
        alone = lock(self.folder) if self.rank == 0 else nullcontext()
        with alone, progress, interruptible() as signals:
            if self.rank == 0 and self.step:
                truncate_log(files[1], self.step)
            elif self.rank == 0 and not args.overwrite and any(path.exists() for path in files):
                raise UserError(f"--out {self.folder}: holds a run; --resume it or --overwrite it")
            while self.step < args.steps and not self.signal:
                seed_step(args.seed, self.step, self.rank)
                self.step_loss = torch.zeros((), device=self.device)
                yield self.step
                if self.rank == 0 and self.step == 0:  # it works: only now an old run is replaced
                    for path in files:
                        path.unlink(missing_ok=True)
                self.step += 1
                self.sync(signals)
                progress.update()
                if self.step % LOOK_EVERY == 0:
                    progress.set_postfix_str(f"loss {self.step_loss.item():.3f}", refresh=False)
                    if self.bad_steps >= PATIENCE or self.scale_sunk():
                        break
                last = self.step == args.steps
                if self.step % args.eval_every == 0 or last:
                    self.evaluate()
                self.seconds = perf_counter() - started
                if self.step % args.save_every == 0 or last or self.signal:
                    self.save()
        self.report()

    def micro_batches(self, *arrays):
        """Slice a global batch (arrays of equal length) into this process's micro-batches."""
        size = len(arrays[0]) // (self.args.accumulate * self.world)
        for i in range(self.args.accumulate):
            # DDP exchanges gradients in the backward pass: once per step is enough
            self.trained.require_backward_grad_sync = i == self.args.accumulate - 1
            start = (i * self.world + self.rank) * size
            yield tuple(array[start:start + size] for array in arrays)

    def sync(self, signals):
        """After a step: what all processes must agree on, its loss and whether to stop."""
        self.signal = max(signals, default=0)
        if self.world > 1:
            dist.all_reduce(self.step_loss)
            self.step_loss /= self.world
            agreed = torch.tensor(self.signal)  # it reaches each process at another step
            dist.all_reduce(agreed, dist.ReduceOp.MAX)
            self.signal = agreed.item()
        self.train_loss += self.step_loss
        self.bad_steps = (self.bad_steps + 1) * ~self.step_loss.isfinite()

    def scale_sunk(self):
        """Whether fp16's gradients have overflowed at every scale: no step is taken any more."""
        return self.scaler.get_scale() < 1

    # ---- what is kept ----

    def evaluate(self):
        """Write a line of metrics.jsonl."""
        model, args, metric = self.model, self.args, self.model.metric
        split = args.batch_size, args.eval_batches, self.rank, self.world
        batches = lambda: starmap(self.data.to_model, self.data.validation_batches(*split))
        taps = ("layer_input", "ffn_output", "layer_output", *model.kurtosis_taps)
        with watch(model, taps, growth) as outliers:
            scores = floating = evaluate(model, batches(), self.device)
        for tap, places in outliers.sums.items() if self.world > 1 else ():
            outliers.counts[tap] = added_up(*outliers.counts[tap])
            for value in (value for sums in places for value in sums.values()):
                dist.all_reduce(value)
        if args.fake_quant:
            from minq.fake_quant import fake_quantization_off  # who quantizes a run needs it not
            with fake_quantization_off(model):
                floating = evaluate(model, batches(), self.device)
        steps = (self.step - 1) % args.eval_every + 1  # since the evaluation before
        record = {"step": self.step, "loss": self.train_loss.item() / steps,
                  "lr": self.optimizer.param_groups[0]["lr"], "val_loss": scores["loss"],
                  metric: scores[metric], f"float_{metric}": floating[metric],
                  "max_inf_norm": max(outliers.mean[model.norm_tap]["inf_norm"]),
                  "avg_kurtosis": outliers.avg_kurtosis(model.kurtosis_taps), **outliers.mean}
        if self.rank == 0:
            append_line(self.folder / "metrics.jsonl", json.dumps(record))
        self.train_loss.zero_()

    def save(self):
        """Write the checkpoint, unless the last step went wrong: the one before is better."""
        if self.rank > 0 or self.bad_steps > 0 or self.scale_sunk():
            return
        model = self.model
        checkpoint = dict(format="minq 1", family=model.family, config=asdict(model.config),
                          args=vars(self.args), data_sha256=self.data.sha256, seconds=self.seconds,
                          model=model.state_dict(), scaler=self.scaler.state_dict(), step=self.step,
                          optimizer=self.optimizer.state_dict(), train_loss=self.train_loss)
        write_atomically(self.folder / "checkpoint.pt", lambda file: torch.save(checkpoint, file))

    def report(self):
        """The last words: what came out, or how to go on. UserError if the numbers were lost."""
        if self.bad_steps > 0 or self.scale_sunk():
            raise UserError(f"{self.folder}: step {self.step}: losses or gradients are not finite; "
                            "the checkpoint, if any, is an earlier one; try a lower --lr")
        if self.step < self.args.steps:
            same = ["--resume", "--out", self.folder] + ["--compile"] * self.args.compile
            same += ["--device", self.args.device] if self.args.device else []
            go_on = command(f"train_{self.model.family}.py", *same)
            if self.rank == 0:
                print(f"interrupted at step {self.step}, saved. Go on with: {go_on}")
            raise SystemExit(128 + self.signal)  # 130 for Ctrl-C, 143 for SIGTERM
        if self.rank == 0:
            last = json.loads((self.folder / "metrics.jsonl").read_text("utf-8").splitlines()[-1])
            metric, norm = self.model.metric, lambda tap: max(last[tap]["inf_norm"])
            off = f" (fake quantization off {last[f'float_{metric}']:.3f})" * self.args.fake_quant
            print(f"{self.folder}: step {self.step}, {metric} {last[metric]:.3f}{off}, max inf norm"
                  f" {norm('ffn_output'):.1f} (ffn_output), {norm('layer_output'):.1f} "
                  f"(layer_output), avg kurtosis {last['avg_kurtosis']:.1f}\n"
                  f"next: {command('quantize.py', self.folder)}")


# ---- a folder's files ----

@contextmanager
def lock(folder):
    """While active no other process trains in `folder`. The system lets go of it with the process,
    however that ends. (Not on Windows, nor where a file system knows no locks.)"""
    with writing(f"--out {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / ".lock", "wb")
    with file:
        try:
            import fcntl
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"--out {folder}: another process is training there") from None
        except (ImportError, OSError):
            pass
        yield


def append_line(path, line):
    """Add a line to a log, on the disk before a checkpoint that knows of it."""
    with writing(path), open(path, "a", encoding="utf-8") as file:
        print(line, file=file, flush=True)
        os.fsync(file.fileno())


def truncate_log(path, step):
    """Drop what was logged after the checkpoint of `step`, half-written lines included."""
    kept = []
    for line in path.read_bytes().splitlines(keepends=True) if path.exists() else ():
        with suppress(ValueError, KeyError, TypeError):
            if line.endswith(b"\n") and json.loads(line)["step"] <= step:
                kept.append(line)
    write_atomically(path, lambda file: file.writelines(kept))


def load_checkpoint(folder, family=None):
    """The dictionary in `folder`/checkpoint.pt. UserError if it is not a run's, or of `family`."""
    path = Path(folder, "checkpoint.pt")
    if not path.is_file():
        raise UserError(f"{folder}: no run here; expected a folder with checkpoint.pt")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        found = checkpoint["family"]
    except Exception:  # bytes that are no checkpoint raise anything
        raise UserError(f"{path}: truncated, or not a checkpoint of minq") from None
    if family and found != family:
        raise UserError(f"{folder}: a run of {found}, expected one of {family}")
    return checkpoint


def resume(args, typed, family):
    """--resume: the checkpoint to go on from. `args` become those that the run was started with;
    what was typed must agree with them, or not matter to what is computed."""
    checkpoint = load_checkpoint(args.out, family)
    if "optimizer" not in checkpoint:
        raise UserError(f"--resume: {args.out} has weights only; there is nothing to go on from")
    saved = checkpoint["args"]
    for name, value in typed.items():
        if name not in NOT_OF_THE_RUN and value != saved.get(name):
            raise UserError(f"{option(name)} {value}: the run to --resume has {saved.get(name)}")
    free = NOT_OF_THE_RUN - {"save_every"} | typed.keys()
    vars(args).update({name: x for name, x in saved.items() if name not in free})
    return checkpoint


def require_same_data(source, data, checkpoint):
    if data.sha256 != checkpoint["data_sha256"]:
        raise UserError(f"--data {source}: has changed since this run was trained on it")


# ---- opened again ----

class OpenedRun(NamedTuple):
    """A run to look at: its model in evaluation mode, and the data that it was trained on."""
    name: str
    checkpoint: dict
    model: torch.nn.Module
    data: Any
    device: torch.device

    def validation(self, batches=None):
        """Batches (inputs, targets) of the validation split, as many as in training unless told."""
        args = self.checkpoint["args"]
        split = args["batch_size"], batches or args["eval_batches"]
        return starmap(self.data.to_model, self.data.validation_batches(*split))

    def calibration_inputs(self, seed, batches):
        """Batches of inputs of the training split, others than those that it was trained with."""
        for i in range(batches):
            size = self.checkpoint["args"]["batch_size"]
            arrays = self.data.train_batch(CALIBRATION_SEED + seed, i, size)
            yield to_device(self.data.to_model(*arrays), self.device)[0]

    def calibrate(self, model, seed, batches):
        """Set the ranges of a quantized copy of the run's model."""
        with calibrating(model):
            for inputs in self.calibration_inputs(seed, batches):
                model(*inputs)

    def score(self, model, batches=None):
        """The metric of a model that stands for the run's, on its validation split."""
        if model.metric == "sqnr":
            raise UserError(f"{self.name}: an encoder predicts nothing; see python -m lab.damage")
        return evaluate(model, self.validation(batches), self.device)[model.metric]


def open_run(folder, device, data_source=None, family=None):
    """An OpenedRun. Raises UserError if it cannot be read, or is not of `family`, if one is named.

    data_source: where its data is now (`--data`). Without it the data must be what the run was
    trained on: a name, a path, or a file in its folder.
    """
    checkpoint = load_checkpoint(folder, family)
    try:
        build = FAMILIES[checkpoint["family"]]
        model = build(build.config_class(**checkpoint["config"]))
        model.load_state_dict(checkpoint["model"])
    except (KeyError, TypeError, RuntimeError, UserError) as error:
        raise UserError(f"{folder}: not of this code: {' '.join(str(error).split())}") from None
    named = checkpoint["args"]["data"]
    source = data_source or str(own if (own := Path(folder, named)).exists() else named)
    checkpoint["args"]["data"] = source
    data = open_data(checkpoint, source)
    if not data_source:
        require_same_data(source, data, checkpoint)
    for size, needed in data.sizes.items():  # other data must fit the model
        if (has := getattr(model.config, size)) < needed:
            raise UserError(f"{folder}: its model has {size} {has}, the data {needed}")
    return OpenedRun(str(folder), checkpoint, model.to(device).eval(), data, device)


def open_data(checkpoint, source):
    """A run's data. Imported here: who trains on text needs no pictures."""
    args, config = checkpoint["args"], checkpoint["config"]
    if checkpoint["family"] == "vit":
        from minq.images import load_images
        return load_images(source, config["image_size"])
    from minq.data import CausalText, MaskedText, load_text
    text = load_text(source, args["vocab_size"], args["special_ids"], args.get("documents"))
    if checkpoint["family"] == "bert":
        return MaskedText(text, config["seq_len"], args["mask_prob"])
    if checkpoint["family"] == "opt":
        return CausalText(text, config["seq_len"])
    raise UserError(f"{checkpoint['family']}: say in minq/runs.py, open_data, what data it takes")
