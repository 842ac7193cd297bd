"""Kill runs with SIGKILL at random moments, resume them, and see whether anything was lost.

    python -m tests.kill 100                         kills in all; exit code 1 if a run differs

A run is killed up to six times on its way. In the end its log must equal an uninterrupted run's
byte for byte, and its checkpoint bit for bit: weights, optimizer, scaler, losses not logged yet.
Runs save at every second or third step, so that many kills fall into the writing. Each run is a
fork of this process, which spares it the import of torch.
"""
import importlib
import multiprocessing
import os
import random
import signal
import socket
import sys
import tempfile
import time
from itertools import cycle
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
FORK = multiprocessing.get_context("fork")
PATIENCE = 60  # seconds until a process whose partner was killed must have ended


def become(script, argv, log, place):
    """What a child does."""
    os.environ |= place
    os.dup2(os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT), 1)
    os.dup2(1, 2)
    importlib.import_module(script.removesuffix(".py")).main([*map(str, argv)])


def forked(script, n, argv, log):
    """A script in n processes of its own, as torchrun would start them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    processes = []
    for rank in map(str, range(n)):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": str(n)} | address
        given = script, argv, log, place if n > 1 else {}
        processes.append(FORK.Process(target=become, args=given, daemon=True))
        processes[-1].start()
    return processes


def alive(processes):
    return all(process.is_alive() for process in processes)


def exit_codes(processes, seconds):
    """None for one that has not ended by then."""
    for process in processes:
        process.join(seconds)
    return [process.exitcode for process in processes]


class Kind:
    """Runs of one kind, to be killed and compared with one that was not."""

    def __init__(self, name, folder, dice):
        self.n, command = KINDS[name]
        self.script, *flags = command.split()
        self.folder, self.dice, self.log = folder, dice, folder / "log.txt"
        folder.mkdir()
        data = (make_cifar if self.script == "train_vit.py" else make_corpus)(folder)
        self.command, began = [*SIZE, *flags, "--data", data, "--overwrite"], time.monotonic()
        self.end(self.start("whole"), 600)
        self.seconds = time.monotonic() - began

    def start(self, name):
        """Start a run or go on with it; one killed before its first checkpoint begins anew."""
        self.log.unlink(missing_ok=True)
        argv = ["--resume"] if self.saved(name) else self.command
        return forked(self.script, self.n, [*argv, "--out", self.folder / name], self.log)

    def saved(self, name):
        """When the checkpoint was written, if there is one."""
        path = self.folder / name / "checkpoint.pt"
        return path.exists() and path.stat().st_mtime_ns

    def end(self, processes, seconds=PATIENCE, codes=(0,)):
        """All processes must end within these seconds, and unless killed with code 0."""
        ended = exit_codes(processes, seconds)
        assert {*ended} <= {*codes}, f"exit codes {ended}: {self.log.read_text()[-2000:]}"

    def torment(self, name, kills):
        """Start a run, kill it up to `kills` times, let it end, and compare it. Returns the number
        of kills, how many of them fell into the writing of a file, and what differs."""
        killed = writing = 0
        for _ in range(kills):
            before, early = self.saved(name), self.dice.random() < 0.15
            processes = self.start(name)
            while not early and alive(processes) and self.saved(name) == before:
                time.sleep(0.001)  # until it has saved something
            time.sleep(self.dice.uniform(0, self.seconds / 8))
            if not alive(processes):
                self.end(processes)
                break
            for process in self.dice.sample(processes, self.dice.randint(1, self.n)):
                process.kill()
            self.end(processes, codes=(-signal.SIGKILL, *range(256)))
            killed, writing = killed + 1, writing + any((self.folder / name).glob("*.new"))
        self.end(self.start(name), 600)
        return killed, writing, differences(self.folder / "whole", self.folder / name)


def main():
    dice, kinds, kills, writing, lost = random.Random(0), {}, 0, 0, []
    with tempfile.TemporaryDirectory() as scratch:
        for i, name in enumerate(cycle(KINDS)):
            kind = kinds.get(name) or kinds.setdefault(name, Kind(name, Path(scratch, name), dice))
            killed, in_writing, differ = kind.torment(f"run{i}", dice.randint(1, 6))
            kills, writing, lost = kills + killed, writing + in_writing, lost + differ
            if kills >= int(sys.argv[1]):
                break
    print(f"{kills} kills, {writing} of them in writing, {i + 1} runs, differences: {lost}")
    return bool(lost)


if __name__ == "__main__":
    sys.exit(main())
