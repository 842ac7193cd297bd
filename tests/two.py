"""Run training scripts in two processes each, as torchrun would start them.

    echo '[["train_bert.py", ["--steps", "9", "--out", "runs/two"]]]' | python -m tests.two

Prints each command's exit codes and output, as JSON. Each process is a fork of this one, which
spares it the import of torch. A third entry is a signal that the second process alone gets as soon
as the run has logged something.
"""
import json
import os
import sys
import tempfile
import time
from pathlib import Path

from tests.kill import PATIENCE, alive, exit_codes, forked

with tempfile.TemporaryDirectory() as scratch:
    for i, (script, argv, *signals) in enumerate(json.load(sys.stdin)):
        log = Path(scratch, f"{i}.txt")
        processes = forked(script, 2, argv, log)
        for number in signals:
            metrics = Path(argv[argv.index("--out") + 1], "metrics.jsonl")
            while alive(processes) and not (metrics.exists() and metrics.stat().st_size):
                time.sleep(0.01)
            os.kill(processes[1].pid, number)
        sent = time.monotonic()
        codes = exit_codes(processes, PATIENCE if signals else 600)
        print(json.dumps({"codes": codes, "output": log.read_text(),
                          "seconds": time.monotonic() - sent}), flush=True)
