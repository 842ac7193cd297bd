"""Put a finished run into the zoo: weights in fp16, its log, and data that is the same everywhere.

    python zoo/make.py runs/bert-outlier zoo/bert-vanilla

The standard library differs between versions of Python, so a run on it is given zoo/stdlib.txt
instead: an excerpt of the text that it was trained on (nine tenths) and of the text that it was
validated on (one tenth).
"""
import sys
from pathlib import Path

import torch

ZOO = Path(__file__).parent
sys.path.insert(0, str(ZOO.parent))

from minq.data import VALIDATION_SHARE, load_text  # noqa: E402
from minq.flags import Parser, UserError, one_line_errors, place, write_atomically  # noqa: E402
from minq.runs import load_checkpoint  # noqa: E402

EXCERPT = 600_000  # bytes
KEPT = ("format", "family", "config", "args", "data_sha256", "step", "seconds")


@one_line_errors
def main(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("run", type=place, help="the run's folder")
    parser.add_argument("place", type=place, help="its folder in the zoo")
    args = parser.parse_args(argv)
    checkpoint, folder = load_checkpoint(args.run), Path(args.place)
    folder.mkdir(exist_ok=True)
    slim = {name: checkpoint[name] for name in KEPT}
    slim["model"] = {name: tensor.half() for name, tensor in checkpoint["model"].items()}
    slim["args"] |= {"out": args.place}
    if slim["args"]["data"] == "stdlib":
        slim["args"]["data"] = "../stdlib.txt"
        slim["data_sha256"] = excerpt(load_text("stdlib"), checkpoint["data_sha256"])
    write_atomically(folder / "checkpoint.pt", lambda file: torch.save(slim, file))
    write_atomically(folder / "metrics.jsonl", Path(args.run, "metrics.jsonl").read_text("utf-8"))
    print(f"{folder}: {(folder / 'checkpoint.pt').stat().st_size / 1e6:.1f} MB")


def excerpt(text, trained_on):
    """Write zoo/stdlib.txt, unless it is there, and return its SHA-256."""
    path, validation = ZOO / "stdlib.txt", int(EXCERPT * VALIDATION_SHARE)
    if not path.exists():
        if text.sha256 != trained_on:
            raise UserError("--data stdlib: the run was trained on another Python's library")
        parts = text.split("train")[:EXCERPT - validation], text.split("validation")[:validation]
        write_atomically(path, lambda file: [file.write(part.tobytes()) for part in parts])
    return load_text(str(path)).sha256


if __name__ == "__main__":
    main()
