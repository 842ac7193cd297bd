"""Kill runs with SIGKILL at random moments, resume them, and see whether anything was lost.

    python -m tests.kill --times 100                 prints a score; exit code 1 if a run differs
    python -m tests.kill --times 20 --only fp16      one kind of run

A run is killed up to six times on its way. In the end its log must equal an uninterrupted run's
byte for byte, and its checkpoint bit for bit: weights, optimizer, scaler, losses not logged yet.
Runs save at every second or third step, so that many kills fall into the writing. Each run is a
fork of this process, which spares it the import of torch.
"""
import argparse
import importlib
import multiprocessing
import os
import random
import signal
import socket
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch starts

import torch._dynamo  # noqa: F401, which every optimizer imports, a second in each fork

from tests.running import differences, make_cifar, make_corpus

SIZE = ("--layers 2 --width 32 --heads 4 --batch-size 8 --steps 21 --warmup 5 --eval-every 7 "
        "--eval-batches 2 --dropout 0.1 --device cpu --precision fp32").split()
KINDS = {  # name -> (processes, script and flags)
    "bert, accumulation": (1, "train_bert.py --seq-len 16 --accumulate 2 --save-every 2"),
    "bert, fp16": (1, "train_bert.py --seq-len 16 --precision fp16 --save-every 3"),
    "opt, fake quantization": (1, "train_opt.py --seq-len 16 --fake-quant --save-every 2"),
    "vit, whole recipe": (1, "train_vit.py --patch-size 8 --rand-augment 2 --jitter 0.4 "
                             "--mixup 0.8 --cutmix 1 --save-every 3"),
    "opt, two processes": (2, "train_opt.py --seq-len 16 --accumulate 2 --save-every 2"),
}
COLUMNS = ("kills", "in writing", "no checkpoint", "runs", "identical")
FORK = multiprocessing.get_context("fork")
PATIENCE = 60  # seconds until a process whose partner was killed must have ended


class Training:
    """A script in processes of its own, as torchrun would start them, which can be killed."""

    def __init__(self, script, processes, argv, log):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        self.processes = []
        for rank in map(str, range(processes)):
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": str(processes)} | address
            given = script, [str(word) for word in argv], log, place if processes > 1 else {}
            self.processes.append(FORK.Process(target=self.become, args=given, daemon=True))
            self.processes[-1].start()
        self.pids = [process.pid for process in self.processes]

    @staticmethod
    def become(script, argv, log, place):
        """What a child does."""
        os.environ |= place
        os.dup2(os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT), 1)
        os.dup2(1, 2)
        importlib.import_module(script.removesuffix(".py")).main(argv)

    def running(self):
        return all(process.is_alive() for process in self.processes)

    def wait(self, seconds=600):
        """Exit codes of all processes, which must have ended by then."""
        end = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0, end - time.monotonic()))
            if process.is_alive():
                process.kill()
                raise TimeoutError(f"process {process.pid} went on for {seconds} seconds")
        return [process.exitcode for process in self.processes]


class Kind:
    """Runs of one kind, to be killed and compared with one that was not."""

    def __init__(self, name, folder, dice):
        self.processes, command = KINDS[name]
        self.script, *flags = command.split()
        self.folder, self.dice, self.found = folder, dice, Counter()
        data = (make_cifar if self.script == "train_vit.py" else make_corpus)(folder)
        self.command = [*SIZE, *flags, "--data", data, "--overwrite"]
        self.log = folder / "log.txt"
        training, began = self.start("whole"), time.monotonic()
        self.check_ended(training.wait())
        self.seconds = time.monotonic() - began

    def start(self, name):
        """Start a run or go on with it; one killed before its first checkpoint begins anew."""
        self.log.unlink(missing_ok=True)
        argv = ["--resume"] if self.checkpoint(name) else self.command
        return Training(self.script, self.processes, [*argv, "--out", self.folder / name], self.log)

    def checkpoint(self, name):
        """Which checkpoint is there, if any."""
        path = self.folder / name / "checkpoint.pt"
        return (path.stat().st_ino, path.stat().st_mtime_ns) if path.exists() else None

    def check_ended(self, codes):
        assert set(codes) == {0}, f"exit codes {codes}: {self.log.read_text()[-2000:]}"

    def torment(self, name, kills):
        """Start a run, kill it up to `kills` times, let it end, and compare it."""
        for _ in range(kills):
            before, early = self.checkpoint(name), self.dice.random() < 0.15
            training = self.start(name)
            while not early and training.running() and self.checkpoint(name) == before:
                time.sleep(0.001)  # until it has saved something
            time.sleep(self.dice.uniform(0, self.seconds / 8))
            if not training.running():
                self.check_ended(training.wait(PATIENCE))
                break
            for pid in self.dice.sample(training.pids, self.dice.randint(1, self.processes)):
                os.kill(pid, signal.SIGKILL)
            training.wait(PATIENCE)
            self.found.update({"kills": 1, "no checkpoint": not self.checkpoint(name),
                               "in writing": any((self.folder / name).glob("*.new"))})
        self.check_ended(self.start(name).wait())
        lost = differences(self.folder / "whole", self.folder / name)
        self.found.update({"runs": 1, "identical": not lost})
        if lost:
            print(f"{name}: {', '.join(lost)} differ", flush=True)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--times", type=int, default=100, help="kills in all, at least")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--only", default="", help="kinds whose name has this in it")
    args = parser.parse_args(argv)
    dice, kinds, total = random.Random(args.seed), {}, Counter()
    with tempfile.TemporaryDirectory() as scratch:
        for i in range(10 * args.times):
            names = [name for name in KINDS if args.only in name]
            name = names[i % len(names)]
            if total["kills"] < args.times:
                if name not in kinds:
                    os.mkdir(f"{scratch}/{name}")
                    kinds[name] = Kind(name, Path(scratch, name), dice)
                kinds[name].torment(f"run{i}", dice.randint(1, 6))
                total = sum((kind.found for kind in kinds.values()), Counter())
    for name, found in [*((name, kind.found) for name, kind in kinds.items()), ("all", total)]:
        print(f"{name:24}", ", ".join(f"{found[column]:3} {column}" for column in COLUMNS))
    return total["identical"] != total["runs"]


if __name__ == "__main__":
    sys.exit(main())
