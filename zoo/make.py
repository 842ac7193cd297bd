"""Put a finished run into the zoo: its weights in fp16, its log, and data that is the same on every machine.

    python zoo/make.py runs/bert-outlier zoo/bert-vanilla

The standard library differs between versions of Python, so a run on it is given zoo/stdlib.txt instead: an
excerpt of the text that it was trained on (nine tenths) and of the text that it was validated on (one tenth).
"""
import sys
from pathlib import Path

import torch

ZOO = Path(__file__).parent
sys.path.insert(0, str(ZOO.parent))

from minq.data import VALIDATION_SHARE, load_text  # noqa: E402
from minq.errors import UserError, one_line_errors  # noqa: E402
from minq.checkpoints import load_checkpoint, write_atomically  # noqa: E402

EXCERPT = 600_000  # bytes


@one_line_errors
def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if len(argv) != 2:
        raise UserError("expected two folders: the run, and its place in the zoo")
    run, place = map(Path, argv)
    checkpoint = load_checkpoint(run)
    place.mkdir(exist_ok=True)
    kept = ("format", "family", "config", "args", "data_sha256", "step", "seconds")
    slim = {name: checkpoint[name] for name in kept}
    slim["model"] = {name: tensor.half() for name, tensor in checkpoint["model"].items()}
    slim["args"] |= {"out": str(place)}
    if slim["args"]["data"] == "stdlib":
        slim["args"]["data"] = "../stdlib.txt"
        slim["data_sha256"] = excerpt(load_text("stdlib"), checkpoint["data_sha256"])
    write_atomically(place / "checkpoint.pt", lambda path: torch.save(slim, path))
    (place / "metrics.jsonl").write_bytes((run / "metrics.jsonl").read_bytes())
    print(f"{place}: {(place / 'checkpoint.pt').stat().st_size / 1e6:.1f} MB")


def excerpt(text, trained_on):
    """Write zoo/stdlib.txt, unless it is there, and return its SHA-256."""
    path = ZOO / "stdlib.txt"
    if not path.exists():
        if text.sha256 != trained_on:
            raise UserError("--data stdlib: this Python's standard library is not the one that the run was trained on")
        validation = int(EXCERPT * VALIDATION_SHARE)
        train = text.split("train")[:EXCERPT - validation]
        path.write_bytes(train.tobytes() + text.split("validation")[:validation].tobytes())
    return load_text(str(path)).sha256


if __name__ == "__main__":
    main()
