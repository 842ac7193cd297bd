"""Experiments: their commands are ones that the scripts take; runs are made once, resumed, compared
and tabulated; what is recorded is what its pages show."""
import argparse
import importlib
import json
import math
import re
import shlex
import shutil
import statistics

import pytest
import torch

from lab import reproduce, tables
from lab.cures import ATTENTIONS
from lab.reproduce import EXPERIMENTS, FILE
from minq import flags
from running import ROOT, SMALL, run

ARGS = dict(steps=None, runs="runs/reproduce")
RESULTS = [path for path in sorted((ROOT / "results").glob("*.json"))
           if "columns" in json.loads(path.read_text())]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def jobs(*names, preset="laptop"):
    args = argparse.Namespace(preset=preset, **ARGS)
    return [reproduce.Job(EXPERIMENTS[name], row, 0, args)
            for name in names for row in EXPERIMENTS[name]["rows"]]


# ---- experiments are data ----

def test_several_runs_have_a_bar_each_if_there_is_a_terminal(monkeypatch):
    monkeypatch.setattr(reproduce.subprocess, "run", lambda *command, env, stderr, **others: (
        seen.append((env.get("TQDM_POSITION"), stderr)) or argparse.Namespace(returncode=0)))
    start = lambda bar: reproduce.start(["-m", "x"], bar)
    for terminal, lines in (True, {("1", None), ("2", None)}), (False, {(None, -1)}):  # -1: a pipe
        seen = []
        monkeypatch.setattr(reproduce.sys.stderr, "isatty", lambda: terminal)
        job = argparse.Namespace(row={"label": ""}, seed=3, run=start)
        assert reproduce.run_all([job] * 9, 2) == [] and len(seen) == 9 and {*seen} <= lines


class Parsed(Exception):
    """A script has understood its command line, and shall not run."""


@pytest.mark.parametrize("preset", ["laptop", "paper"])
def test_every_command_is_one_that_its_script_takes(preset, monkeypatch):
    def stop():
        raise Parsed

    def parse_args(parser, argv=None, namespace=None, parse=flags.Parser.parse_args):
        args = parse(parser, argv, namespace)
        return stop() if argv and namespace is None else args  # training scripts check more

    monkeypatch.setattr(flags.Parser, "parse_args", parse_args)
    for script in ("train_bert", "train_opt", "train_vit"):
        monkeypatch.setattr(importlib.import_module(script), "start_processes", stop)
    commands = {tuple(words[:words.index("--seed")] if "--seed" in words else words)
                for job in jobs(*EXPERIMENTS, preset=preset) for text in job.text().split(" && ")
                for words in [shlex.split(text.replace("python -m", "python"))]}
    assert len(commands) > 100
    for _, script, *words in commands:
        with pytest.raises(Parsed):
            importlib.import_module(script.removesuffix(".py")).main(words)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_rows_of_a_table_differ(name):
    of_table = jobs(name)
    labels = {(job.row["family"], job.row["label"]) for job in of_table}
    assert len(labels) == len(of_table) > 0
    assert len({job.folder for job in of_table}) == len(of_table)
    assert all(job.row["source"] or str(job.folder.parent) == ARGS["runs"] for job in of_table)
    assert EXPERIMENTS[name]["columns"] in (*tables.COLUMNS, "remedies")


def test_no_row_and_no_experiment_has_a_setting_that_nothing_reads():
    for name, experiment in EXPERIMENTS.items():
        assert experiment.keys() == FILE["experiment"].keys() | {"title", "rows"}, name
        for row in experiment["rows"]:
            assert row.keys() == FILE["row"].keys() | {"label", "family"}, row


@pytest.mark.parametrize("name, others, shared", [
    ("cures-opt", ("table2",), 4), ("rates", ("table2",), 3), ("bits", ("table2",), 12),
    ("short", ("remedies",), 3), ("fig7", ("table4",), 4), ("quick", ("table1",), 0)])
def test_the_same_training_is_one_run(name, others, shared):
    assert len({job.folder for job in jobs(name)} & {job.folder for job in jobs(*others)}) == shared


@pytest.mark.parametrize("family, rates, without", [
    ("opt", 2, {"vanilla"}), ("bert", 1, {"vanilla", "row-clipped"})])
def test_every_cure_is_compared_in_both_families_and_in_opt_at_two_rates(family, rates, without):
    seen = re.findall(r"--attention (\S+)", " ".join(
        row["laptop"] or row["flags"] for row in EXPERIMENTS[f"cures-{family}"]["rows"]))
    assert set(seen) == set(ATTENTIONS) - without
    assert all(seen.count(name) >= rates for name in seen)


# ---- means, and what tables make of them ----

def test_means_are_over_training_seeds_and_beside_them_over_calibrations():
    a, b = [2.0, 4.0], [5.0, 5.0]
    calibrated = lambda x: {"mean": statistics.mean(x), "std": statistics.stdev(x), "all": x}
    seed = lambda x, words: {"fp": x[0], "nothing": None, "remedies": [
        {"floats": words, "quantized": {"8x8": calibrated(x) | {"sqnr": calibrated(x[::-1])}}}]}
    found = tables.over_seeds([seed(a, "1 of 9"), seed(b, "2 of 9")])
    std = pytest.approx(statistics.stdev((2, 5)))
    assert found["fp"] == {"mean": 3.5, "std": std, "all": [2.0, 5.0]}
    remedy, = found["remedies"]
    assert remedy["floats"] == "1 of 9; 2 of 9" and found["nothing"] is None
    eight = remedy["quantized"]["8x8"]
    assert eight["all"] == [a, b] and eight["sqnr"]["all"] == [a[::-1], b]
    assert eight["calibrations"] == pytest.approx(statistics.stdev(a) / 2)
    of_row = {"metric": "perplexity", "remedies": [remedy]}
    cells = tables.remedy_columns(of_row, remedy | {"remedy": "r"})
    assert cells["W8A8, ppl ↓"] == cells["W8A8, SQNR dB ↑"] == "4 ±1.4 (0.71)"
    alone = tables.over_seeds([{"mean": 3.0, "std": None, "all": [3.0]}])
    assert tables.with_std(alone) == "3" and alone["calibrations"] is None


def row(fp=10.0, at_bits=(10.0, 11.0, 13.0, 30.0, 90.0), metric="perplexity", **more):
    """A row of results as lab/reproduce.py makes it, of one training seed."""
    number = lambda x: {"mean": x, "std": None, "all": [x]}
    quantized = {f"{bits}x{bits}": number(x) | {"calibrations": None, "all": [[x]]}
                 for bits, x in zip((8, 7, 6, 5, 4), at_bits)}
    return {"label": "vanilla", "family": "opt", "attention": "vanilla",
            "metric": metric, "fp": number(fp), "max_inf_norm": number(9.0), "published": "",
            "avg_kurtosis": number(7.0), "quantized": quantized, "parameters": 1000} | more


@pytest.mark.parametrize("metric, fp, at_bits, expected", [
    ("perplexity", 10.0, (10.1, 11.0, 13.0, 30.0, 90.0), "6.50"),  # 10% lost at 7 bits, 30% at 6
    ("perplexity", 10.0, (12.5, 20.0, 30.0, 40.0, 50.0), "over 8"),
    ("perplexity", 10.0, (10.0, 10.0, 10.0, 10.0, 11.9), "under 4"),
    ("accuracy", 90.0, (90.5, 90.0, 89.0, 79.0, 50.0), "5.60"),  # 1 point lost at 6 bits, 11 at 5
    ("perplexity", 10.0, (10.1, 11.0, math.inf, math.nan, 14.0), "7.00"),  # nothing left below 7
    ("perplexity", 10.0, (10.1, 11.0, math.nan, math.nan, 14.0), "7.00"),
    ("perplexity", 10.0, (math.nan, math.nan, math.nan, math.nan, 14.0), "over 8")])
def test_bits_at_which_a_fifth_is_lost(metric, fp, at_bits, expected):
    columns = tables.COLUMNS["bits"](row(fp, at_bits, metric))
    assert columns[tables.BITS] == expected
    lost = f"+{fp - at_bits[-1]:.1f}" if metric == "accuracy" else f"{10 * at_bits[-1] - 100:+.1f}%"
    assert columns["W4A4"].endswith(f"({lost})")


def test_bits_of_every_seed_stand_beside_those_of_the_mean():
    found = row(fp=10.0)
    found["fp"]["all"].append(10.0)
    for value in found["quantized"].values():
        value["all"].append([2 * value["mean"] - 10.0])  # twice the loss: 20% at seven bits
    assert tables.bits_at_loss(found) == "6.50 (6.50, 7.00)"


def test_the_papers_columns_stand_beside_ours_and_bits_where_there_are_several():
    found = row(published="4.49 | 735 | | 1294")
    shown = tables.COLUMNS["quantized"](found)
    assert [*shown.values()] == ["10", "9", "7", "10", "6.50", "4.49", "735", "", "1294"]
    eight = tables.COLUMNS["quantized"](found | {"quantized": {"8x8": found["quantized"]["8x8"]}})
    assert eight[tables.BITS] == "" and eight | {tables.BITS: "6.50"} == shown
    rows = [found, row(family="bert")]
    assert tables.one_table(rows, "quantized").startswith("|  | family | FP | max inf norm |")
    assert "(paper)" not in tables.one_table(rows[1:], "quantized")  # empty throughout


# ---- what is recorded ----

@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_tables_are_made_from_their_results(path):
    table = json.loads(path.read_text())
    assert path.with_suffix(".md").read_text() == tables.rendered(table)
    table["machine"]["device"] = "A GPU"
    assert "; A GPU, PyTorch" in tables.rendered(table)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_show_the_recorded_tables(page):
    """Between <!-- results/NAME.md --> and <!-- end --> stands that file."""
    text = page.read_text()
    shown = re.findall(r"<!-- results/(\S+) -->\n(.*?)<!-- end -->", text, flags=re.DOTALL)
    assert len(shown) == text.count("<!-- results/")
    for name, found in shown:
        assert found == (ROOT / "results" / name).read_text()


# ---- python -m lab.reproduce ----


def test_the_paper_preset_prints_commands(tmp_path):
    out, _ = run("lab.reproduce", "blog", "--preset", "paper", "--seeds", 1, "--runs", tmp_path)
    assert out.count("python train_bert.py --preset blog") == len(EXPERIMENTS["blog"]["rows"])
    assert not list(tmp_path.iterdir())


def tiny(corpus, *rows, **settings):
    recipe = shlex.join([*SMALL, "--data", corpus, "--save-every", "3"])
    return FILE["experiment"] | {
        "title": "Tiny", "rows": [FILE["row"] | row for row in rows], "laptop": {"bert": recipe},
        "quantize": "--batches 1 --seeds 2 --eval-batches 1 --bits 8 4"} | settings


def of_bert(label, flags="", **settings):
    return {"label": label, "family": "bert", "flags": flags} | settings


@pytest.mark.slow
def test_runs_once_resumes_compares_and_names_what_fails(corpus, tmp_path, monkeypatch):
    """In processes, as a reader runs it; and it writes nothing but its own folder."""
    before = {path: path.stat().st_mtime_ns for path in (ROOT / "results").iterdir()}
    both = (of_bert("vanilla"), of_bert("CS", "--attention clipped"))
    runs = tmp_path / "runs"
    monkeypatch.setitem(EXPERIMENTS, "quick", tiny(
        corpus, *both, of_bert("broken", "--heads 5"), then="The end.", columns="outliers"))
    command = "lab.reproduce", "quick", "--jobs", 2, "--runs", runs
    out, err = run(*command, code=2)
    assert "--heads 5 does not divide --width 32" in err
    assert err.splitlines()[-1] == "error: failed, as said above: broken on bert"
    assert "Failed: broken on bert." in out and "The end." in out
    table = json.loads((runs / "results" / "quick.json").read_text())
    vanilla, clipped = table["rows"]
    assert vanilla["fp"]["mean"] > 1 and vanilla["quantized"]["4x4"]["calibrations"] > 0
    assert clipped["settings"]["gamma"] == -1 / 16 and clipped["ffn_output"]["share"]["std"] is None
    assert (runs / "results" / "quick.md").read_text() in out

    monkeypatch.setitem(EXPERIMENTS, "quick", tiny(corpus, *both))
    made = {path: path.stat().st_mtime_ns for path in runs.glob("bert-*/*")}
    run(*command)
    assert made == {path: path.stat().st_mtime_ns for path in runs.glob("bert-*/*")}
    path = min(runs.glob("bert-*/checkpoint.pt"))
    stopped = torch.load(path, weights_only=True) | {"step": 5}  # before its last step
    torch.save(stopped, path)
    run(*command)
    assert torch.load(path, weights_only=True)["step"] == 6

    monkeypatch.setattr(reproduce, "RECORDED", runs / "results")
    assert "2 of 2 runs have the weights of those in " in run(*command)[0]
    recorded = runs / "results" / "quick.json"
    one, = json.loads(recorded.read_text())["rows"][0]["weights_sha256"]
    recorded.write_text(recorded.read_text().replace(one, "0" * 64))
    assert "1 of 2 runs have the weights of those in " in run(*command)[0]
    monkeypatch.setitem(EXPERIMENTS, "quick", tiny(corpus, of_bert("broken", "--heads 5")))
    assert "all 1 runs failed" in run(*command, code=2)[1]
    assert before == {path: path.stat().st_mtime_ns for path in (ROOT / "results").iterdir()}


@pytest.mark.slow
def test_remedies_of_a_run_and_of_a_published_checkpoint(corpus, tmp_path, monkeypatch):
    monkeypatch.setitem(EXPERIMENTS, "remedies", tiny(
        corpus, of_bert("vanilla"), of_bert("theirs", source="somebody/theirs"),
        columns="remedies"))
    command = "lab.reproduce", "remedies", "--jobs", 1, "--runs", tmp_path
    out, err = run(*command, code=2)
    assert "checkpoint.pt: not there; python -m lab.convert somebody/theirs --out" in err
    assert "**BERT, vanilla**" in out and "BERT, theirs" not in out
    made, = tmp_path.glob("bert-*")
    (tmp_path / "theirs").mkdir()
    shutil.copy(made / "checkpoint.pt", tmp_path / "theirs")
    run(*command)
    ours, theirs = json.loads((tmp_path / "results" / "remedies.json").read_text())["rows"]
    assert ours["remedies"] == theirs["remedies"] and "loss" not in theirs and theirs["metric"]
    assert ours["remedies"][0]["quantized"]["8x8"]["all"] == ours["quantized"]["8x8"]["all"]
