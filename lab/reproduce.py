"""Rerun the experiments of the paper and of the blog, and print their tables.

    python reproduce.py blog                 trains what is missing, resumes what was interrupted, prints the table
    python reproduce.py blog --jobs 1        one run at a time, with its progress bar
    python reproduce.py blog --verify        retrains its first row and compares it bit by bit
    python reproduce.py blog --preset paper  prints the commands at full size, for GPUs
    python reproduce.py --write-docs         puts the tables of results/ into README.md and docs/

The experiments stand in minq/experiments.py. Results land in results/NAME.json and results/NAME.md.
"""
import argparse
import hashlib
import json
import os
import platform
import re
import shlex
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from tqdm import tqdm

import bench
from minq import flags
from minq.checkpoints import load_checkpoint, read_log, write_atomically
from minq.errors import UserError, one_line_errors
from minq.comparison import better_rates
from minq.experiments import EXPERIMENTS, RECIPES
from minq.tables import draw, markdown, mean_and_std, over_seeds, remedies_over_seeds, with_tables
from minq.training import pick_device, pick_precision
from minq.weights import read_json
from minq.workloads import TASKS

ROOT = Path(__file__).parent
TIMING = "python bench.py attention --dropout 0 --rounds 10"  # what an experiment of run times runs
ROUNDS = 40  # of training steps, where they are timed beside their results


@one_line_errors
def main(argv=None):
    # ---- arguments ----
    parser = flags.Parser(__doc__)
    parser.add_argument("names", nargs="*", action=flags.Distinct, metavar="NAME", help=f"of: {' '.join(EXPERIMENTS)}")
    parser.add_argument("--preset", choices=RECIPES, default="laptop", help="laptop runs; paper prints the commands for GPUs")
    parser.add_argument("--jobs", type=flags.positive, default=1 if torch.cuda.is_available() else os.cpu_count(),
                        help="runs at a time, a thread each (default: one on a GPU, else as many as there are cores)")
    parser.add_argument("--steps", type=flags.positive, help="shorten every run (table8: its rounds); the results are NAME-N-steps")
    parser.add_argument("--seeds", type=flags.positive, help="training seeds a row; by default as many as the experiment has")
    parser.add_argument("--verify", action="store_true", help="retrain the first row of each and compare with results/")
    parser.add_argument("--runs", type=flags.place, default="runs/reproduce", help="folder of the runs")
    parser.add_argument("--results", type=flags.place, default="results", help="folder of the tables")
    parser.add_argument("--write-docs", action="store_true", help="put the tables of results/ into README.md and docs/*.md")
    args = parser.parse_args(argv)
    for name in args.names:
        if name not in EXPERIMENTS:
            raise UserError(f"{name}: no such experiment; expected some of {' '.join(EXPERIMENTS)}")
    if not args.names and not args.write_docs:
        raise UserError(f"nothing to do; name some of {' '.join(EXPERIMENTS)}, or give --write-docs")

    for name in args.names:
        experiment = EXPERIMENTS[name]
        jobs = [Job(name, row, seed, args) for seed in range(args.seeds or experiment.seeds) for row in experiment.rows
                if seed == 0 or not row.source]
        if args.verify:
            verify(name, args)
        elif args.preset == "paper":
            print(f"# {experiment.title}: on one GPU; on several, torchrun --nproc-per-node N instead of the first python")
            for line in [TIMING] if experiment.columns == "runtime" else [f"{job.text()}  # {job.row.label}" for job in jobs]:
                print(line)
        else:
            if experiment.columns == "runtime":
                rows, failed = time_rows(experiment, args), []
            else:
                jobs = without_downloads(jobs)
                failed = run_all(jobs, args.jobs, experiment.may_fail)
                rows = run_rows([job for job in jobs if job.row not in failed])
            if experiment.columns == "cures":
                rows = time_steps(better_rates(rows), jobs)
            table = {"title": experiment.title, "columns": experiment.columns, "steps": args.steps, "rows": rows,
                     "failed": [f"{row.label} on {row.family}" for row in failed], "versions": versions(), "machine": machine()}
            path = results_of(name, args)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, lambda new: new.write_text(json.dumps(table, indent=1) + "\n"))
            write_atomically(path.with_suffix(".md"), lambda new: new.write_text(markdown(table)))
            print(markdown(table))
            if experiment.xlabel:
                draw(table, path, experiment.xlabel)
            if experiment.then:
                print(experiment.then)
    if args.write_docs:
        filled = {page: with_tables(page.read_text(), Path(args.results)) for page in pages()}
        for page, text in filled.items():
            write_atomically(page, lambda path: path.write_text(text))


def pages():
    """The files that show tables of results."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def results_of(name, args):
    """The file of an experiment's results; a shortened one has its own."""
    return Path(args.results) / (f"{name}-{args.steps}-steps.json" if args.steps else f"{name}.json")


# ---- one run ----

class Job:
    """A row of an experiment with one training seed: a training run and its quantization."""

    def __init__(self, name, row, seed, args):
        experiment = EXPERIMENTS[name]
        self.row, self.seed = row, seed
        if row.source:
            self.folder = Path("runs", Path(row.source).name)  # pretrained.py's own choice
            self.training = ["pretrained.py", row.source]
        else:
            settings = experiment.settings(row, args.preset) + (["--steps", str(args.steps)] if args.steps else [])
            self.folder = Path(args.runs) / f"{row.family}{slug(settings)}-s{seed}"
            self.training = [f"train_{row.family}.py", *settings, "--seed", str(seed), "--out", str(self.folder)]
        quantization = experiment.quantization(row)
        self.quantizing = ["quantize.py", str(self.folder), *quantization]
        self.quantized = self.folder / f"quantized{slug(quantization)}.json"

    def text(self):
        return f"python {shlex.join(self.training)} && python {shlex.join(self.quantizing)}"

    def finished(self):
        """Whether the run has come to its last step."""
        if not (self.folder / "checkpoint.pt").exists():
            return False
        checkpoint = load_checkpoint(self.folder)
        return checkpoint["step"] == checkpoint["args"]["steps"]

    def run(self, quiet):
        if not self.finished():
            resumable = (self.folder / "checkpoint.pt").exists()
            resume = [self.training[0], "--resume", "--out", str(self.folder), *(["--compile"] if "--compile" in self.training else [])]
            start(resume if resumable else [*self.training, "--overwrite"], quiet)
        if not self.quantized.exists() or self.quantized.stat().st_mtime < (self.folder / "checkpoint.pt").stat().st_mtime:
            start([*self.quantizing, "--json", str(self.quantized)], quiet)


def slug(words):
    """Flags as a piece of a file's name: --gamma -0.03 --fake-quant -> -gamma_-0.03-fake-quant"""
    settings = re.sub(r"--(vocab-size|special-ids) \S+|--data \S*[./]\S*", "", " ".join(words))  # not where data is
    return "".join(f"-{word[2:]}" if word.startswith("--") else f"_{word}" for word in settings.split())


# One thread: sums come out the same however many cores there are, and runs side by side use the cores better.
# The C library keeps freed memory for the next tensor instead of handing it back (docs/speed.md); others ignore this.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2 ** 34), "MALLOC_TOP_PAD_": str(2 ** 28)}


def start(command, quiet):
    """Run one of the scripts. Raises UserError with its last line if it fails."""
    done = subprocess.run([sys.executable, str(ROOT / command[0]), *command[1:]], env=os.environ | ENVIRONMENT, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE if quiet else None)
    if done.returncode == 130:
        raise KeyboardInterrupt
    if done.returncode != 0:
        last = ((done.stderr or "").strip().splitlines() or ["see above"])[-1]
        raise UserError(f"{shlex.join(command)}: exit code {done.returncode}: {last}")


def run_all(jobs, workers, may_fail):
    """Run all jobs, `workers` at a time, skipping what is done. Returns the rows of which a run has failed, which is
    an error unless they may: it is raised after the others have ended."""
    unique = list({job.folder: job for job in jobs}.values())
    progress = tqdm(total=len(unique), unit="run", disable=workers == 1)
    failures = {}  # folder -> why

    def run(job):
        if workers == 1:
            print(job.text(), file=sys.stderr)
        try:
            job.run(quiet=workers > 1)
        except UserError as error:
            failures[job.folder] = error
        progress.set_postfix_str(job.folder.name)
        progress.update()

    with ThreadPoolExecutor(workers) as pool:
        try:
            list(pool.map(run, unique))
        except KeyboardInterrupt:
            pool.shutdown(cancel_futures=True)
            raise UserError("interrupted; the same command goes on from here") from None
    progress.close()
    summary = f"{len(failures)} of {len(unique)} runs failed: {next(iter(failures.values()), None)}"
    if failures and (not may_fail or len(failures) == len(unique)):
        raise UserError(summary)
    if failures:
        print(summary, file=sys.stderr)
    return list(dict.fromkeys(job.row for job in jobs if job.folder in failures))


# ---- results ----

def run_rows(jobs):
    """A row of results for each row of the experiment: means and sample deviations over its seeds."""
    rows = []
    for row in dict.fromkeys(job.row for job in jobs):
        of_row = [job for job in jobs if job.row == row]
        tables = [json.loads(job.quantized.read_text())[0] for job in of_row]
        rows.append({
            "label": row.label, "family": row.family, "attention": tables[0]["attention"], "metric": tables[0]["metric"],
            "line": row.line, "x": row.x,
            "settings": tables[0]["settings"], "published": row.published,
            "fp": None if tables[0]["fp"] is None else mean_and_std([table["fp"] for table in tables]),
            **({} if row.source else of_training(of_row, tables[0]["metric"])),
            "quantized": {key: over_seeds([table["quantized"][key]["all"] for table in tables])
                          for key in tables[0]["quantized"]},
            **measured(tables), "by_tap": {tap: measured([table[tap] for table in tables])
                                           for tap, value in tables[0].items()
                                           if isinstance(value, dict) and "avg_kurtosis" in value},
            "parameters": sum(weight.numel() for weight in load_checkpoint(of_row[0].folder)["model"].values()),
            **({"remedies": remedies_over_seeds(tables)} if "remedies" in tables[0] else {}),
            "seeds": [job.seed for job in of_row], "commands": [job.text() for job in of_row],
            "weights_sha256": [weights_sha256(job.folder) for job in of_row]})
    return rows


def without_downloads(jobs):
    """The jobs but those whose published checkpoint is not there: nothing is downloaded unasked."""
    missing = [job for job in jobs if job.row.source and not job.finished()]
    for job in missing:
        print(f"{job.folder} is not there, so its row is left out; make it: python {shlex.join(job.training)}", file=sys.stderr)
    return [job for job in jobs if job not in missing]


def of_training(jobs, metric):
    """What the logs of a row's runs say at their end, and how long they took."""
    ends = [read_log(job.folder)[-1] for job in jobs]
    return {"as_trained": mean_and_std([end[metric] for end in ends]),
            "loss": mean_and_std([end["loss"] for end in ends]),
            "layer_input_norm": mean_and_std([max(end["layer_input"]["inf_norm"]) for end in ends]),
            "training_seconds": mean_and_std([load_checkpoint(job.folder)["seconds"] for job in jobs])}


def measured(tables):
    """The outlier metrics over training seeds."""
    return {metric: mean_and_std([table[metric] for table in tables])
            for metric in ("max_inf_norm", "avg_kurtosis", "max_over_sigma", "share")}


def time_rows(experiment, args):
    """Time the attentions of each family's model, in turns (bench.py): --steps rounds, or ten."""
    device = pick_device(None)
    settings = argparse.Namespace(device=device, precision=pick_precision(None, device), rounds=args.steps or 10, quick=False)
    seconds = {family: bench.method_seconds(family, 0.0, settings) for family in TASKS}
    return [{"label": row.label, "family": row.family, "published": row.published,
             "seconds": mean_and_std(seconds[row.family][row.label]),
             "ratio": mean_and_std([a / b for a, b in zip(seconds[row.family][row.label], seconds[row.family]["vanilla"])]),
             "precision": settings.precision, "commands": [TIMING]} for row in experiment.rows]


def time_steps(rows, jobs):
    """The rows with the time of a training step, of each round in units of vanilla's, families apart (bench.py)."""
    folders = {(job.row.family, job.row.line or job.row.label): job.folder for job in jobs if job.finished()}
    for family in dict.fromkeys(row["family"] for row in rows):
        names = [row["label"] for row in rows if row["family"] == family]
        seconds = bench.run_seconds({name: folders[family, name] for name in names}, ROUNDS, pick_device(None))
        for row in rows:
            if row["family"] == family:
                row["step_time"] = [a / b for a, b in zip(seconds[row["label"]], seconds["vanilla"])]
    return rows


def weights_sha256(folder):
    """One hash of all that a run's model holds, name by name."""
    digest = hashlib.sha256()
    for name, tensor in load_checkpoint(folder)["model"].items():
        digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


def versions():
    return {"python": platform.python_version(), "torch": torch.__version__}


def machine():
    cpuinfo = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*:\s*(.*)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return {"processor": model.group(1) if model else platform.processor(), "cores": os.cpu_count(),
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"}


def verify(name, args):
    """Retrain one row and compare its weights with the hash in results/."""
    path = results_of(name, args)
    if EXPERIMENTS[name].columns == "runtime":
        raise UserError(f"{name}: times are never the same twice; --verify is for the others")
    if not path.exists():
        raise UserError(f"{path}: no results yet; run: python reproduce.py {name}")
    table = read_json(path)
    try:
        row = table["rows"][0]
        known = "weights_sha256" in row
    except (KeyError, IndexError, TypeError):
        raise UserError(f"{path}: holds no rows of results; run: python reproduce.py {name}") from None
    if not known:
        raise UserError(f"{path}: an older version wrote it, without a hash of the weights; run: python reproduce.py {name}")
    of_row = [each for each in EXPERIMENTS[name].rows if (each.line, each.x) == (row["line"], row["x"])]  # of two rates one
    job, expected = Job(name, of_row[0], 0, args), row["weights_sha256"][0]
    with tempfile.TemporaryDirectory() as folder:
        out = str(Path(folder) / "run")
        start([*job.training[:-1], out], quiet=False)
        found = weights_sha256(out)
    if found != expected:
        raise UserError(f"{name}, {row['label']}: the weights differ from those of {path}: SHA-256 {found[:12]}, expected "
                        f"{expected[:12]} (made with {table['versions']} on {table['machine']}, which must be the same)")
    print(f"{name}, {row['label']}: retrained, and all weights are the same, bit by bit ({found[:12]})")


if __name__ == "__main__":
    main()
