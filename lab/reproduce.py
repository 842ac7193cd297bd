"""Rerun the experiments of the paper, of the blog and of this lab, and print their tables.

    python -m lab.reproduce quick                   trains what is missing, resumes, prints a table
    python -m lab.reproduce table2 --jobs 1         one run at a time, with its progress bar
    python -m lab.reproduce table2 --verify         retrains its first row, compares it bit by bit
    python -m lab.reproduce table2 --preset paper   prints the commands at full size, for GPUs

The experiments stand in lab/experiments.toml. Runs go to --runs, results into its folder results/.
With --write they are recorded instead: in results/ here, and in the pages that show them.
"""
import hashlib
import json
import os
import platform
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from tqdm import tqdm

from lab import tables
from lab.experiments import EXPERIMENTS, QUANTIZE, RECIPES
from minq import flags
from minq.runs import load_checkpoint
from minq.training import pick_device, pick_precision

ROOT = Path(__file__).parent.parent
RECORDED = ROOT / "results"
TIMING = "python -m lab.bench attention --dropout 0 --rounds 10"  # what Table 8 times


@flags.one_line_errors
def main(argv=None):
    # ---- arguments ----
    parser = flags.Parser(__doc__)
    add = parser.add_argument
    add("names", nargs="*", metavar="NAME", help=f"some of {' '.join(EXPERIMENTS)}")
    add("--preset", choices=RECIPES, default="laptop", help="paper: print the commands for GPUs")
    add("--jobs", type=flags.positive, default=1 if torch.cuda.is_available() else os.cpu_count(),
        help="runs at a time, a thread each")
    add("--steps", type=flags.positive, help="shorten every run (table8: its rounds)")
    add("--seeds", type=flags.positive, help="training seeds per row, if not the experiment's own")
    add("--runs", type=flags.place, default="runs/reproduce", help="folder of the runs")
    add("--verify", action="store_true", help="retrain each first row, compare with results/")
    add("--write", action="store_true", help="record in results/, in README.md and in docs/")
    args = parser.parse_args(argv)
    if (wrong := set(args.names) - EXPERIMENTS.keys()) or not (args.names or args.write):
        parser.error(f"{min(wrong, default='no NAME')}: expected some of {' '.join(EXPERIMENTS)}")

    # ---- each experiment ----
    failed = []
    for name in args.names:
        experiment, stem = EXPERIMENTS[name], name + f"-{args.steps}-steps" * bool(args.steps)
        jobs = [Job(experiment, row, seed, args) for seed in range(args.seeds or experiment.seeds)
                for row in experiment.rows if seed == 0 or not row.source]
        if args.verify:
            verify(jobs, RECORDED / f"{stem}.json", args.runs)
        elif args.preset == "paper":
            lines = [f"{job.text()}  # {job.row.label}" for job in jobs]
            lines = [TIMING] if experiment.columns == "runtime" else lines
            print(f"# {experiment.title}", *lines, sep="\n")
        else:
            folder = RECORDED if args.write else Path(args.runs, "results")
            failed += reproduce(experiment, jobs, folder / stem, args)

    # ---- the pages that show tables ----
    if args.write:
        pages = [ROOT / "README.md", *ROOT.glob("docs/*.md")]
        filled = {page: tables.with_tables(page.read_text(), RECORDED) for page in pages}
        for page, text in filled.items():  # all or none
            flags.write_atomically(page, text)
    if failed:
        raise flags.UserError(f"failed, as said above: {'; '.join(failed)}")


def reproduce(experiment, jobs, path, args):
    """Run what is missing; write, print and draw the results. Returns the rows that failed."""
    if experiment.columns == "runtime":
        rows, failed = time_rows(experiment, args), []
    else:
        failed = run_all(jobs, args.jobs)
        rows = collect([job for job in jobs if job.row not in failed])
    if experiment.columns == "cures":
        rows = time_steps(tables.better_rates(rows), jobs)
    table = {"title": experiment.title, "columns": experiment.columns, "steps": args.steps,
             "rows": rows, "failed": [f"{row.label} on {row.family}" for row in failed],
             "versions": {"python": platform.python_version(), "torch": torch.__version__},
             "machine": machine()}
    path.parent.mkdir(parents=True, exist_ok=True)
    flags.write_atomically(f"{path}.json", json.dumps(table, indent=1) + "\n")
    flags.write_atomically(f"{path}.md", tables.rendered(table))
    print(tables.rendered(table) + experiment.then)
    if experiment.xlabel:
        tables.draw(table, path, experiment.xlabel)
    return table["failed"]


def machine():
    info = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*:\s*(.*)", info.read_text()) if info.exists() else None
    return {"processor": model[1] if model else platform.processor(), "cores": os.cpu_count(),
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"}


# ---- runs ----

class Job:
    """A row of an experiment with one training seed: its training, and what looks at the run."""

    def __init__(self, experiment, row, seed, args):
        settings, more = experiment.settings(row, args.preset), experiment.quantize.split()
        settings += ["--steps", str(args.steps)] * bool(args.steps)
        quantize = [*more, *QUANTIZE[row.family].split()]
        name = Path(row.source).name or f"{row.family}{slug(settings)}-s{seed}"
        self.row, self.seed, self.folder = row, seed, Path(args.runs, name)
        folder, self.looks = str(self.folder), {}  # file -> command
        self.training = (["-m", "lab.convert", row.source] if row.source else
                         [f"train_{row.family}.py", *settings, "--seed", str(seed)])
        self.training += ["--out", folder]
        if not row.source:  # which has no head, so no metric
            self.looks[f"quantized{slug(quantize)}.json"] = ["quantize.py", folder, *quantize]
        if experiment.columns == "remedies":
            self.looks["remedies.json"] = ["-m", "lab.remedies", folder, *more]

    def text(self):
        return " && ".join(flags.command(*x) for x in (self.training, *self.looks.values()))

    def run(self, quiet):
        """Train, or go on, unless that is done; then look, unless that is."""
        path = self.folder / "checkpoint.pt"
        checkpoint = load_checkpoint(self.folder) if path.exists() else None
        if self.row.source and not checkpoint:
            raise flags.UserError(f"{path}: not there; {flags.command(*self.training)} makes it")
        if not checkpoint or checkpoint["step"] < checkpoint["args"]["steps"]:
            start([*self.training, "--resume" if checkpoint else "--overwrite"], quiet)
        for name, command in self.looks.items():
            file = self.folder / name
            if not file.exists() or file.stat().st_mtime < path.stat().st_mtime:
                start([*command, "--json", str(file)], quiet)

    def found(self):
        """What is known of the run: what looked at it has written, and what its log ends with."""
        checkpoint = load_checkpoint(self.folder)
        found = {"parameters": sum(x.numel() for x in checkpoint["model"].values())}
        for name in self.looks:
            found |= json.loads((self.folder / name).read_text())[0]
        if not self.row.source:
            end = tables.read_log(self.folder)[-1]
            found |= {"as_trained": end[found["metric"]], "loss": end["loss"],
                      "layer_input_norm": max(end["layer_input"]["inf_norm"]),
                      "training_seconds": checkpoint["seconds"]}
        return {name: value for name, value in found.items() if name not in ("run", "seed")}


def slug(words):
    """Flags as a piece of a file's name: --gamma -0.03 --fake-quant -> -gamma_-0.03-fake-quant"""
    settings = re.sub(r"--(vocab-size|special-ids) \S+|--data \S*[./]\S*", "", " ".join(words))
    return "".join(f"-{word[2:]}" if word[:2] == "--" else f"_{word}" for word in settings.split())


def weights_sha256(folder):
    """One hash of all that a run's model holds, name by name."""
    digest = hashlib.sha256()
    for name, tensor in load_checkpoint(folder)["model"].items():
        digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


# One thread: sums come out the same however many cores there are, and runs side by side use the
# cores better. The C library keeps freed memory for the next tensor (docs/speed.md).
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_MAX_": "0", "MALLOC_TOP_PAD_": str(2 ** 28),
               "MALLOC_TRIM_THRESHOLD_": str(2 ** 34)}


def start(command, quiet):
    """Run one of the scripts. Raises UserError with its last line if it fails."""
    script = command if command[0] == "-m" else [ROOT / command[0], *command[1:]]
    done = subprocess.run([sys.executable, *script], env=os.environ | ENVIRONMENT, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE if quiet else None)
    if done.returncode != 0:
        last = ((done.stderr or "").strip().splitlines() or ["see above"])[-1]
        raise flags.UserError(f"{flags.command(*command)}: exit code {done.returncode}: {last}")


def run_all(jobs, workers):
    """Run the jobs, `workers` at a time. Returns the rows of which one has failed; UserError if
    all have."""
    failures = {}

    def run(job):
        try:
            job.run(quiet=workers > 1)
        except flags.UserError as error:
            failures[job] = error
            progress.write(str(error), file=sys.stderr)
        progress.update()

    with tqdm(total=len(jobs), unit="run") as progress, ThreadPoolExecutor(workers) as pool:
        try:
            list(pool.map(run, jobs))
        except KeyboardInterrupt:
            pool.shutdown(cancel_futures=True)
            raise flags.UserError("interrupted; the same command goes on from here") from None
    if len(failures) == len(jobs):
        raise flags.UserError(f"all {len(jobs)} runs failed: {failures[jobs[0]]}")
    return list(dict.fromkeys(job.row for job in failures))


def verify(jobs, path, runs):
    """Retrain the first row of recorded results and compare its weights with their hash."""
    try:
        table = json.loads(path.read_text())
        row, expected = table["rows"][0], table["rows"][0]["weights_sha256"][0]
    except (OSError, ValueError, LookupError):
        raise flags.UserError(f"{path}: has no hash of weights to compare with") from None
    job = next(job for job in jobs if (job.row.line, job.row.x) == (row["line"], row["x"]))
    start([*job.training[:-1], f"{runs}/verify", "--overwrite"], quiet=False)
    found = weights_sha256(f"{runs}/verify")
    if found != expected:
        raise flags.UserError(f"{path}: {row['label']} has the weights {expected[:12]}, not "
                              f"{found[:12]} (SHA-256); it was made on {table['machine']}, "
                              "which must be the same")
    print(f"{path}: {row['label']} retrained, and all weights are the same ({found[:12]})")


# ---- results ----

def collect(jobs):
    """A row of results for each row of the experiment: means and deviations over its seeds."""
    rows = []
    for row in dict.fromkeys(job.row for job in jobs):
        of_row = [job for job in jobs if job.row == row]
        found = [job.found() for job in of_row]
        as_they_are = {name: found[0].get(name) for name in ("settings", "parameters")}
        rows.append(vars(row) | tables.over_seeds(found) | as_they_are | {
            "seeds": [job.seed for job in of_row], "commands": [job.text() for job in of_row],
            "weights_sha256": [weights_sha256(job.folder) for job in of_row]})
    return rows


def ratios(seconds, name):
    return [a / b for a, b in zip(seconds[name], seconds["vanilla"])]


def time_rows(experiment, args):
    """Time the attentions of each family's model in turns (lab/bench.py), ten rounds or --steps."""
    from lab import bench
    args.device, args.rounds, args.quick = pick_device(None), args.steps or 10, False
    args.precision = pick_precision(None, args.device)
    seconds = {family: bench.method_seconds(family, 0.0, args) for family in bench.TASKS}
    return [vars(row) | {
        "seconds": tables.mean_and_std(seconds[row.family][row.label]), "precision": args.precision,
        "ratio": tables.mean_and_std(ratios(seconds[row.family], row.label)), "commands": [TIMING],
    } for row in experiment.rows]


def time_steps(rows, jobs):
    """The rows with the time of a training step, of each round in units of vanilla's."""
    from lab import bench
    key = lambda row: (row.family, row.line or row.label, row.x)
    folders = {key(job.row): job.folder for job in jobs}
    for family in dict.fromkeys(row["family"] for row in rows):
        of_family = [row for row in rows if row["family"] == family]
        names = {row["label"]: folders[family, row["label"], row["x"]] for row in of_family}
        seconds = bench.run_seconds(names, 40, pick_device(None))
        for row in of_family:
            row["step_time"] = ratios(seconds, row["label"])
    return rows


if __name__ == "__main__":
    main()
