"""Put a finished run into the zoo: weights in fp16, its log, and data that is the same everywhere.

    python zoo/make.py runs/bert-outlier zoo/bert-vanilla

The standard library differs between versions of Python, so a run on it is given zoo/stdlib.txt
instead: the first 540,000 bytes of the text that it was trained on (Python 3.11.7's) and the first
60,000 of the text that it was validated on.
"""
import sys
from pathlib import Path

import torch

ZOO = Path(__file__).parent
sys.path.insert(0, str(ZOO.parent))

from minq.data import load_text  # noqa: E402
from minq.flags import Parser, one_line_errors, place, write_atomically  # noqa: E402
from minq.runs import load_checkpoint  # noqa: E402

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
        slim["data_sha256"] = load_text(str(ZOO / "stdlib.txt")).sha256
    write_atomically(folder / "checkpoint.pt", lambda file: torch.save(slim, file))
    write_atomically(folder / "metrics.jsonl", Path(args.run, "metrics.jsonl").read_text("utf-8"))
    print(f"{folder}: {(folder / 'checkpoint.pt').stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
