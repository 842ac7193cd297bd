"""Kill runs with SIGKILL at random moments, resume them, and see whether anything was lost.

    python -m tests.kill --times 100                 prints a score; exit code 1 if a run differs
    python -m tests.kill --times 20 --only fp16      one kind of run

A run is killed up to six times on its way. In the end its log must equal an uninterrupted run's byte for byte, and its
checkpoint bit for bit: weights, optimizer, scaler, losses not logged yet. Runs save at every second or third step, so
that many kills fall into the writing. Each run is a fork of this process, which spares it the import of torch.
"""
import argparse
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
sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import torch

import train_bert
import train_opt
import train_vit

SIZE = ("--layers 2 --width 32 --heads 4 --batch-size 8 --steps 30 --warmup 5 --eval-every 7 --eval-batches 2 "
        "--dropout 0.1 --device cpu --precision fp32")
TEXT = f"{SIZE} --seq-len 16"
# name -> (script, processes, flags)
KINDS = {
    "bert, accumulation": (train_bert, 1, f"{TEXT} --accumulate 2 --save-every 2"),
    "bert, fp16": (train_bert, 1, f"{TEXT} --precision fp16 --save-every 3"),
    "opt, fake quantization": (train_opt, 1, f"{TEXT} --fake-quant --attention gated --save-every 2"),
    "vit, whole recipe": (train_vit, 1, f"{SIZE} --patch-size 8 --rand-augment 2 --jitter 0.4 --mixup 0.8 --cutmix 1 --save-every 3"),
    "opt, two processes": (train_opt, 2, f"{TEXT} --accumulate 2 --save-every 2"),
}
PATIENCE = 60  # seconds until a process whose partner was killed must have ended


class Training:
    """A training in processes of its own, which can be killed."""

    def __init__(self, script, processes, argv, log):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.started, self.pids = time.monotonic(), []
        for rank in range(processes):
            pid = os.fork()
            if pid == 0:
                self.become(script, argv, log, rank, processes, port)
            self.pids.append(pid)

    @staticmethod
    def become(script, argv, log, rank, processes, port):
        """What a child does: as torchrun would start it, where there are several. Does not return."""
        code = 1
        try:
            os.dup2(os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT), 1)
            os.dup2(1, 2)
            if processes > 1:
                os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes),
                               "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            script.main(argv)
            code = 0
        except SystemExit as exit:
            code = exit.code
        except BaseException as error:
            os.write(2, f"{type(error).__name__}: {error}\n".encode())
        finally:
            os._exit(code)

    def running(self):
        return all(os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None for pid in self.pids)

    def wait(self, seconds=600):
        """Exit codes, of each process. A process that takes longer is killed, and counts as None."""
        codes, end = [], time.monotonic() + seconds
        for pid in self.pids:
            while not (found := os.waitpid(pid, os.WNOHANG))[0] and time.monotonic() < end:
                time.sleep(0.005)
            if not found[0]:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
            codes.append(os.waitstatus_to_exitcode(found[1]) if found[0] else None)
        return codes

    def kill(self, pids):
        for pid in pids:
            os.kill(pid, signal.SIGKILL)


class Kind:
    """Runs of one kind, to be killed and compared."""

    def __init__(self, name, folder, dice):
        self.script, self.processes, flags = KINDS[name]
        self.folder, self.dice, self.found, self.slowest = Path(folder), dice, Counter(), 0.0
        data = corpus(self.folder) if self.script is not train_vit else cifar(self.folder)
        self.command = [*flags.split(), "--data", str(data)]
        self.log = self.folder / "log.txt"
        training = self.start("whole", self.command)
        self.await_checkpoint(training, "whole", None)
        began = time.monotonic()
        self.check_ended(training.wait())
        self.seconds = time.monotonic() - began  # from the first checkpoint to the end

    def start(self, name, argv):
        self.log.unlink(missing_ok=True)
        return Training(self.script, self.processes, [*argv, "--out", str(self.folder / name)], self.log)

    def go_on(self, name):
        """Resume a run. One that was killed before its first checkpoint begins anew."""
        out = self.folder / name
        if (out / "checkpoint.pt").exists():
            return self.start(name, ["--resume"])
        logged = (out / "metrics.jsonl").exists() and (out / "metrics.jsonl").stat().st_size
        return self.start(name, [*self.command, "--overwrite"] if logged else self.command)

    def torment(self, name, kills):
        """Start a run, kill it up to `kills` times, let it end, compare it. Returns how often it was killed."""
        killed = 0
        while killed < kills:
            before = stamp(self.folder / name)
            training = self.go_on(name)
            early = self.dice.random() < 0.15  # it may die before it has saved anything
            if not early:
                self.await_checkpoint(training, name, before)
            time.sleep(self.dice.uniform(0, self.seconds / 3))
            if not training.running():
                self.check_ended(training.wait(PATIENCE))
                break
            victims = self.dice.sample(training.pids, self.dice.randint(1, self.processes))
            training.kill(victims)
            struck = time.monotonic()
            codes = training.wait(PATIENCE)
            self.slowest = max(self.slowest, time.monotonic() - struck)
            assert None not in codes, f"{name}: a process went on for {PATIENCE} seconds after its partner was killed"
            killed += 1
            self.look(name)
        self.check_ended(self.go_on(name).wait())
        self.found["runs"] += 1
        self.found["kills"] += killed
        same = not (lost := self.differences(name))
        self.found["identical"] += same
        if not same:
            print(f"{name}: {', '.join(lost)} differ", flush=True)
        return killed

    def await_checkpoint(self, training, name, before):
        """Wait until a training has saved for the first time."""
        while training.running() and stamp(self.folder / name) == before:
            time.sleep(0.001)

    def check_ended(self, codes):
        assert codes == [0] * self.processes, f"exit codes {codes}: {self.log.read_text()[-2000:]}"

    def look(self, name):
        """Count into what a kill fell."""
        out = self.folder / name
        lines = (out / "metrics.jsonl").read_text().splitlines() if (out / "metrics.jsonl").exists() else []
        if not (out / "checkpoint.pt").exists():
            self.found["no checkpoint"] += 1
        elif len(lines) > saved(out)["step"] // 7:
            self.found["log ahead"] += 1
        self.found["in writing"] += any(out.glob("*.new"))

    def differences(self, name):
        a, b = self.folder / "whole", self.folder / name
        lost = ["metrics.jsonl"] * ((a / "metrics.jsonl").read_bytes() != (b / "metrics.jsonl").read_bytes())
        a, b = saved(a), saved(b)
        return lost + [key for key in a | b if key not in ("args", "seconds") and not same(a.get(key), b.get(key))]


def stamp(folder):
    """Which checkpoint is there, if any."""
    path = folder / "checkpoint.pt"
    try:
        return path.stat().st_ino, path.stat().st_mtime_ns
    except FileNotFoundError:
        return None


def saved(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def same(a, b):
    """Whether two nested values are equal, bit for bit."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def corpus(folder):
    path = folder / "corpus.txt"
    path.write_text("the quick brown fox jumps over the lazy dog. " * 500)
    return path


def cifar(folder):
    """Sixty random images in CIFAR-10's layout."""
    records = np.random.default_rng(0).integers(0, 256, (60, 3073), dtype=np.uint8)
    records[:, 0] %= 10
    records[:40].tofile(folder / "data_batch_1.bin")
    records[40:].tofile(folder / "test_batch.bin")
    return folder


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=100, help="kills in all, at least")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--only", default="", help="kinds whose name has this in it")
    args = parser.parse_args(argv)
    names = [name for name in KINDS if args.only in name]
    dice, began = random.Random(args.seed), time.monotonic()
    kinds, killed = {}, 0
    with tempfile.TemporaryDirectory() as scratch:
        for name in names:
            folder = Path(scratch, name.replace(", ", "-").replace(" ", "-"))
            folder.mkdir()
            kinds[name] = Kind(name, folder, dice)
        for i in range(10 * args.times):
            if killed >= args.times:
                break
            killed += kinds[names[i % len(names)]].torment(f"run{i}", dice.randint(1, 6))
    columns = ("kills", "in writing", "log ahead", "no checkpoint", "runs", "identical")
    print(f"{'':24}" + "".join(f"{column:>15}" for column in columns))
    total = Counter()
    for name, kind in kinds.items():
        total.update(kind.found)
        print(f"{name:24}" + "".join(f"{kind.found[column]:15}" for column in columns))
    print(f"{'all':24}" + "".join(f"{total[column]:15}" for column in columns))
    slowest = max(kind.slowest for kind in kinds.values())
    print(f"{time.monotonic() - began:.0f} seconds; all processes had ended {slowest:.1f} seconds after a kill")
    return total["identical"] != total["runs"]


if __name__ == "__main__":
    sys.exit(main())
