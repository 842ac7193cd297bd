"""Rerun the experiments of the paper, of the blog and of this lab, and print their tables.

    python -m lab.reproduce quick                   trains what is missing, resumes, prints a table
    python -m lab.reproduce table2 --jobs 2         two runs at a time, each with a thread and a bar
    python -m lab.reproduce table2 --preset paper   prints the commands at full size, for GPUs

The experiments stand in lab/experiments.toml. Runs go to --runs, results into its folder results/,
with --write into results/ here. In the end it says how many of the runs have, bit for bit, the
weights of those in results/: on the same kind of machine all should.
"""
import hashlib
import json
import os
import platform
import re
import shlex
import subprocess
import sys
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from tqdm import tqdm

from lab import tables
from minq import flags
from minq.runs import load_checkpoint

ROOT = Path(__file__).parent.parent
RECORDED = ROOT / "results"
FILE = tomllib.loads(Path(__file__).with_name("experiments.toml").read_text(encoding="utf-8"))
EXPERIMENTS = {name: FILE["experiment"] | entry for name, entry in FILE["experiments"].items()}
for entry in EXPERIMENTS.values():
    entry["rows"] = [FILE["row"] | row for rows in (entry.get("rows", ()), *(
        FILE["experiments"][other]["rows"] for other in entry["rows_of"])) for row in rows]


@flags.one_line_errors
def main(argv=None):
    # ---- arguments ----
    parser = flags.Parser(__doc__)
    add = parser.add_argument
    add("names", nargs="+", choices=EXPERIMENTS, metavar="NAME", help=" ".join(EXPERIMENTS))
    add("--preset", choices=FILE["recipes"], default="laptop", help="paper: print its commands")
    add("--jobs", type=flags.positive, default=1 if torch.cuda.is_available() else os.cpu_count(),
        help="runs at a time, a thread each")
    add("--steps", type=flags.positive, help="shorten every run")
    add("--seeds", type=flags.positive, help="training seeds per row, if not the experiment's own")
    add("--runs", type=flags.place, default="runs/reproduce", help="folder of the runs")
    add("--write", action="store_true", help="record in results/ here")
    args = parser.parse_args(argv)

    # ---- each experiment ----
    failed = []
    for name in args.names:
        experiment, stem = EXPERIMENTS[name], name + f"-{args.steps}-steps" * bool(args.steps)
        seeds = range(args.seeds or experiment["seeds"])
        jobs = [Job(experiment, row, seed, args) for seed in seeds for row in experiment["rows"]
                if seed == 0 or not row["source"]]
        if args.preset == "paper":
            lines = [f"{job.text()}  # {job.row['label']}" for job in jobs]
            print(f"# {experiment['title']}", *lines, sep="\n")
        else:
            folder = RECORDED if args.write else Path(args.runs, "results")
            failed += reproduce(experiment, jobs, folder / stem, args)
    if failed:
        raise flags.UserError(f"failed, as said above: {'; '.join(failed)}")


def reproduce(experiment, jobs, path, args):
    """Run what is missing; write and print the results. Returns the names of those that failed."""
    lost = run_all(jobs, args.jobs)
    failed = [row for row in experiment["rows"] if row in lost]
    rows = collect([job for job in jobs if job.row not in failed])
    table = {"title": experiment["title"], "columns": experiment["columns"],
             "steps": args.steps, "rows": rows,
             "failed": [f"{row['label']} on {row['family']}" for row in failed],
             "versions": {"python": platform.python_version(), "torch": torch.__version__},
             "machine": machine()}
    hashes = [hash for row in rows for hash in row["weights_sha256"]]
    recorded = RECORDED / f"{path.name}.json"
    if recorded.exists():
        same = sum(hash in recorded.read_text("utf-8") for hash in hashes)
        print(f"{same} of {len(hashes)} runs have the weights of those in {recorded}")
    path.parent.mkdir(parents=True, exist_ok=True)
    tables.write_json(f"{path}.json", table)
    flags.write_atomically(f"{path}.md", tables.rendered(table))
    print(tables.rendered(table) + experiment["then"])
    return table["failed"]


def machine():
    info = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*:\s*(.*)", info.read_text("utf-8")) if info.exists() else None
    return {"processor": model[1] if model else platform.processor(), "cores": os.cpu_count(),
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"}


# ---- runs ----

class Job:
    """A row of an experiment with one training seed: its training, and what looks at the run."""

    def __init__(self, experiment, row, seed, args):
        family, source, more = row["family"], row["source"], experiment["quantize"].split()
        recipe = (FILE["recipes"][args.preset] | experiment[args.preset])[family]
        own = args.preset == "laptop" and row["laptop"] or row["flags"]
        shorter = f" --steps {args.steps} --warmup {args.steps // 10}" if args.steps else ""
        settings = shlex.split(f"{recipe} {own}" + shorter)
        quantize = [*more, *FILE["quantize"][family].split()]
        name = Path(source).name or f"{family}{slug(settings)}-s{seed}"
        self.row, self.seed, place = row, seed, Path(args.runs, name)
        here = source and (ROOT / source / "checkpoint.pt").exists()  # a run of zoo/
        self.looks = {}  # file -> command
        self.folder = Path(os.path.relpath(ROOT / source)) if here else place
        folder = str(self.folder)
        self.training = (["-m", "lab.convert", source] if source else
                         [f"train_{family}.py", *settings, "--seed", str(seed)])
        self.training += ["--out", folder]
        if here or not source:  # a published encoder has no head, so no metric
            name = f"quantized{slug(quantize)}.json"
            self.looks[place / name] = ["quantize.py", folder, *quantize]
        if experiment["columns"] == "remedies":
            self.looks[place / "remedies.json"] = ["-m", "lab.remedies", folder, *more]

    def text(self):
        return " && ".join(flags.command(*x) for x in (self.training, *self.looks.values()))

    def run(self, bar):
        """Train, or go on, unless that is done; then look, unless that is."""
        path = self.folder / "checkpoint.pt"
        checkpoint = load_checkpoint(self.folder) if path.exists() else None
        if self.row["source"] and not checkpoint:
            raise flags.UserError(f"{path}: not there; {flags.command(*self.training)} makes it")
        if not checkpoint or checkpoint["step"] < checkpoint["args"]["steps"]:
            start([*self.training, "--resume" if checkpoint else "--overwrite"], bar)
        for file, command in self.looks.items():
            file.parent.mkdir(parents=True, exist_ok=True)
            if not file.exists() or file.stat().st_mtime < path.stat().st_mtime:
                start([*command, "--json", str(file)], bar)

    def found(self):
        """What is known of the run: what looked at it has written, and what its log ends with."""
        checkpoint = load_checkpoint(self.folder)
        found = {}
        for file in self.looks:
            found |= json.loads(file.read_text("utf-8"))[0]
        if (self.folder / "metrics.jsonl").exists():  # nothing was logged of a published model
            end = tables.read_log(self.folder)[-1]
            found |= {"as_trained": end[found["metric"]], "loss": end["loss"],
                      "layer_input_norm": max(end["layer_input"]["inf_norm"]),
                      "training_seconds": checkpoint["seconds"]}
        return {name: value for name, value in found.items() if name not in ("run", "seed")}


def slug(words):
    """Flags as a piece of a file's name: --gamma -0.03 --fake-quant -> -gamma_-0.03-fake-quant"""
    settings = re.sub(r"--(from|vocab-size|special-ids) \S+|--data \S*[./]\S*", "", " ".join(words))
    return "".join(f"-{word[2:]}" if word[:2] == "--" else f"_{word}" for word in settings.split())


def weights_sha256(folder):
    """One hash of all that a run's model holds, name by name."""
    digest = hashlib.sha256()
    for name, tensor in load_checkpoint(folder)["model"].items():
        digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


# One thread: sums come out the same however many cores there are, and runs side by side use the
# cores better. The C library keeps freed memory for the next tensor (docs/engineering.md).
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_MAX_": "0", "MALLOC_TOP_PAD_": str(2 ** 28),
               "MALLOC_TRIM_THRESHOLD_": str(2 ** 34)}


def start(command, bar):
    """Run one of the scripts. `bar` says where its progress bar stands (tqdm's environment), None
    that it has none. Raises UserError if it fails."""
    script = command if command[0] == "-m" else [ROOT / command[0], *command[1:]]
    done = subprocess.run([sys.executable, *script], env=os.environ | ENVIRONMENT | (bar or {}),
                          text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE if bar is None else None)
    if done.returncode != 0:
        last = ((done.stderr or "").strip().splitlines() or ["see above"])[-1]
        raise flags.UserError(f"{flags.command(*command)}: exit code {done.returncode}: {last}")


def run_all(jobs, workers):
    """Run the jobs, `workers` at a time. Returns the rows of those that failed, unless all did."""
    bars = [{"TQDM_POSITION": str(line), "TQDM_LEAVE": ""} for line in range(workers, 0, -1)]
    if workers == 1 or not sys.stderr.isatty():  # several bars need a terminal
        bars = [{} if workers == 1 else None] * workers

    def lost(job):
        bar = bars.pop()
        try:
            job.run(bar and bar | {"TQDM_DESC": f"{job.row['label']}, seed {job.seed}"})
        except flags.UserError as error:
            tqdm.write(str(error), file=sys.stderr)
            return job.row
        finally:
            bars.append(bar)

    with ThreadPoolExecutor(workers) as pool:
        try:
            failed = [*filter(None, tqdm(pool.map(lost, jobs), total=len(jobs), unit="run"))]
        except KeyboardInterrupt:
            pool.shutdown(cancel_futures=True)
            raise flags.UserError("interrupted; the same command goes on from here") from None
    if len(failed) == len(jobs):
        raise flags.UserError(f"all {len(jobs)} runs failed, as said above")
    return failed


# ---- results ----

def collect(jobs):
    """A row of results for each row of the experiment: means and deviations over its seeds."""
    rows = []
    for first in (job for job in jobs if job.seed == 0):
        of_row = [job for job in jobs if job.row is first.row]
        found = [job.found() for job in of_row]
        rows.append(first.row | tables.over_seeds(found) | {
            "settings": found[0].get("settings"), "seeds": [job.seed for job in of_row],
            "runs": [str(job.folder) for job in of_row],
            "commands": [job.text() for job in of_row],
            "weights_sha256": [weights_sha256(job.folder) for job in of_row]})
    return rows


if __name__ == "__main__":
    main()
