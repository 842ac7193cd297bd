"""Experiments: every row's flags are ones that its script takes; runs are made once, resumed, verified, tabulated."""
import argparse
import importlib.util
import json
import math
import shlex
import shutil

import pytest
import torch

import bench
import reproduce
from minq import tables, workloads
from minq.experiments import EXPERIMENTS, Experiment, Row
from minq.remedies import REMEDIES
from running import ROOT, SMALL, TINY_MODELS, run


class Parsed(Exception):
    pass


@pytest.mark.parametrize("scale", ["laptop", "paper"])
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_row_is_a_command_that_its_script_takes(name, scale, monkeypatch):
    def stop():
        raise Parsed
    for row in EXPERIMENTS[name].rows:
        if row.source:  # not trained
            continue
        script = importlib.import_module(f"train_{row.family}")
        monkeypatch.setattr(script, "start_processes", stop)  # what a script does once its flags are read
        with pytest.raises(Parsed):
            script.main(EXPERIMENTS[name].settings(row, scale))


def test_labels_are_unique_within_a_table():
    for experiment in EXPERIMENTS.values():
        keys = [(row.family, row.label) for row in experiment.rows]
        assert len(set(keys)) == len(keys)


@pytest.fixture
def tiny(corpus, tmp_path, monkeypatch):
    """An experiment of two rows of a few steps, in a folder of its own."""
    recipe = {"laptop": {"bert": shlex.join([*SMALL, "--data", corpus, "--save-every", "3"])}}
    monkeypatch.setitem(EXPERIMENTS, "blog", Experiment(
        "Two rows", (Row("Vanilla", "bert", published="4.49 ±0.01 | 735 ±55 | 3076 ±262 | 1294 ±1046", line="T = 16", x="0"),
                     Row("CS", "bert", "--attention clipped", line="T = 16", x="1")), xlabel="alpha",
        quantize="--batches 1 --seeds 2", recipes=recipe))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_runs_once_draws_resumes_verifies_and_writes_its_table(tiny):
    out, _ = run("reproduce.py", "blog", "--jobs", 2)
    table = json.loads((tiny / "results" / "blog.json").read_text())
    assert [row["label"] for row in table["rows"]] == ["Vanilla", "CS"] and "735 ±55" in out
    assert (tiny / "results" / "blog.md").read_text() in out
    if importlib.util.find_spec("matplotlib"):
        assert (tiny / "results" / "blog-bert.png").read_bytes().startswith(b"\x89PNG")
    first = table["rows"][0]
    assert "1 training seed, 2 calibrations" in out
    assert first["fp"]["mean"] == first["as_trained"]["mean"] and first["quantized"]["8x8"]["calibrations"] > 0
    folders = sorted((tiny / "runs" / "reproduce").iterdir())
    assert len(folders) == 2
    times = {path: path.stat().st_mtime_ns for folder in folders for path in folder.iterdir()}

    run("reproduce.py", "blog", "--jobs", 2)
    assert times == {path: path.stat().st_mtime_ns for folder in folders for path in folder.iterdir()}

    path = folders[0] / "checkpoint.pt"
    torch.save(torch.load(path, weights_only=True) | {"step": 5}, path)  # as if it had been stopped before its last step
    run("reproduce.py", "blog", "--jobs", 1)
    assert torch.load(path, weights_only=True)["step"] == 6

    out, _ = run("reproduce.py", "blog", "--verify")
    assert "all weights are the same, bit by bit" in out
    table["rows"][0]["weights_sha256"] = ["0" * 64]
    (tiny / "results" / "blog.json").write_text(json.dumps(table))
    _, err = run("reproduce.py", "blog", "--verify", code=2)
    assert "blog, Vanilla: the weights differ" in err.splitlines()[-1]


@pytest.mark.slow
def test_a_published_checkpoint_is_a_row_where_it_is_there(tiny, monkeypatch):
    experiment = EXPERIMENTS["blog"]
    monkeypatch.setitem(EXPERIMENTS, "blog", Experiment(
        "Remedies", (experiment.rows[0], Row("Somebody's", "bert", source="somebody/theirs")), columns="remedies",
        quantize="--batches 1 --seeds 2 --remedies --bits 8", recipes=experiment.recipes))
    out, err = run("reproduce.py", "blog", "--jobs", 2)
    assert "runs/theirs is not there, so its row is left out; make it: python pretrained.py somebody/theirs" in err
    assert "**BERT, Vanilla**" in out and "Somebody's" not in out
    (made,) = (tiny / "runs" / "reproduce").iterdir()
    (tiny / "runs" / "theirs").mkdir()
    shutil.copy(made / "checkpoint.pt", tiny / "runs" / "theirs")  # and no log of its training
    out, err = run("reproduce.py", "blog", "--jobs", 2, "--seeds", 1)
    assert "left out" not in err
    ours, theirs = json.loads((tiny / "results" / "blog.json").read_text())["rows"]
    assert ours["remedies"] == theirs["remedies"] and ours["fp"] == theirs["fp"] and "loss" not in theirs
    assert theirs["commands"] == ["python pretrained.py somebody/theirs && python quantize.py runs/theirs "
                                  "--batches 1 --seeds 2 --remedies --bits 8"]
    first = ours["remedies"][0]
    assert first["quantized"]["8x8"] == ours["quantized"]["8x8"] | {"sqnr": first["quantized"]["8x8"]["sqnr"]}
    part = out.partition("**BERT, Somebody's**")[2]
    for name in REMEDIES:
        assert f"| {name} | " in part
    assert "| SmoothQuant | – | – |  |" in part


def test_remedies_over_seeds_keep_training_and_calibration_apart():
    def table(metric, sqnr, floats):
        return {"remedies": [{"remedy": "a", "floats": floats, "quantized": {"8x8": {"all": metric, "sqnr": {"all": sqnr}}}},
                             {"remedy": "b", "floats": "", "quantized": {}}]}
    a, b = tables.remedies_over_seeds([table([2.0, 4.0], [10.0, 12.0], "1 of 9"), table([5.0, 5.0], [20.0, 26.0], "2 of 9")])
    found = a["quantized"]["8x8"]
    assert found["mean"] == 4.0 and found["std"] == pytest.approx(math.sqrt(2)) and found["calibrations"] == pytest.approx(math.sqrt(2) / 2)
    assert found["sqnr"]["mean"] == 17.0 and found["sqnr"]["std"] == pytest.approx(12 / math.sqrt(2))
    assert a["floats"] == "1 of 9; 2 of 9" and b == {"remedy": "b", "quantized": {}, "floats": ""}
    text = tables.remedies_table({"metric": "perplexity", "remedies": [a, b]})
    assert "| a | 4 ±1.4 (0.71) | 17 ±8.5 (2.8) | 1 of 9; 2 of 9 |" in text and "| b | – | – |  |" in text


@pytest.mark.slow
def test_a_failing_run_is_named(tiny, monkeypatch):
    monkeypatch.setitem(EXPERIMENTS, "blog", Experiment("One", (Row("Vanilla", "bert", "--width 128 --heads 5"),)))
    _, err = run("reproduce.py", "blog", "--jobs", 2, code=2)
    assert "--heads 5 does not divide --width 128" in err.splitlines()[-1]
    _, err = run("reproduce.py", "blog", "--verify", code=2)
    assert "no results yet" in err


@pytest.mark.slow
def test_table8_times_every_attention_of_every_family(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(workloads, "MODELS", TINY_MODELS)
    monkeypatch.setattr(bench, "in_turns", lambda functions, rounds, device: {  # as if clipping took twice as long
        name: [function() or (2.0 if "clipped" in name else 1.0)] * rounds for name, function in functions.items()})
    out, _ = run("reproduce.py", "table8", "--steps", 2)
    rows = json.loads((tmp_path / "results" / "table8-2-steps.json").read_text())["rows"]
    assert [(row["family"], row["label"], row["ratio"]["mean"]) for row in rows] == [
        (family, label, 2.0 if "clipped" in label else 1.0) for family in ("bert", "opt", "vit")
        for label in ("vanilla", "clipped softmax", "gated attention, linear", "gated attention, mlp")]
    assert "fp32, 2 rounds in turns" in out.replace("bf16", "fp32") and "119.1" in out
    _, err = run("reproduce.py", "table8", "--verify", code=2)
    assert "never the same twice" in err


def test_the_paper_preset_prints_commands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out, _ = run("reproduce.py", "blog", "--preset", "paper")
    assert out.count("python train_bert.py --preset blog") == len(EXPERIMENTS["blog"].rows)
    assert not list(tmp_path.iterdir())


def test_an_unknown_name_is_named():
    _, err = run("reproduce.py", "table9", code=2)
    assert "table9: no such experiment; expected some of" in err and err.count("\n") == 1
    _, err = run("reproduce.py", code=2)
    assert "nothing to do" in err


@pytest.mark.parametrize("metric, fp, at_bits, expected", [
    ("perplexity", 10.0, (10.1, 11.0, 13.0, 30.0, 90.0), "6.50"),  # 10% lost at 7 bits, 30% at 6
    ("perplexity", 10.0, (12.5, 20.0, 30.0, 40.0, 50.0), "over 8"),
    ("perplexity", 10.0, (10.0, 10.0, 10.0, 10.0, 11.9), "under 4"),
    ("accuracy", 90.0, (90.5, 90.0, 89.0, 79.0, 50.0), "5.60"),  # 1 point lost at 6 bits, 11 at 5
    ("perplexity", 10.0, (10.1, 11.0, math.inf, math.nan, 14.0), "7.00"),  # nothing left below 7
    ("perplexity", 10.0, (10.1, 11.0, math.nan, math.nan, 14.0), "7.00"),
    ("perplexity", 10.0, (math.nan, math.nan, math.nan, math.nan, 14.0), "over 8"),
])
def test_bits_at_which_a_fifth_is_lost(metric, fp, at_bits, expected):
    row = {"metric": metric, "fp": {"mean": fp, "std": None, "all": [fp]},
           "quantized": {f"{bits}x{bits}": {"mean": value, "std": None, "all": [[value]]} for bits, value in zip((8, 7, 6, 5, 4), at_bits)}}
    columns = tables.bits_columns(row)
    assert list(columns.values())[-1] == expected
    assert columns["W4A4"].endswith("(+40.0)" if metric == "accuracy" else f"(+{10 * at_bits[-1] - 100:.1f}%)")


def test_what_is_not_finite_stays_so():
    for values in ([math.inf] * 3, [1.0, math.inf], [math.nan, 2.0, 3.0], [math.nan]):
        result = tables.mean_and_std(values)
        assert not math.isfinite(result["mean"]) and (result["std"] is None or math.isnan(result["std"]))
        assert math.isnan(result["mean"]) == any(map(math.isnan, values))
        assert str(result["mean"]) in tables.with_std(result)


# ---- what is written down ----

@pytest.mark.parametrize("path", sorted((ROOT / "results").glob("*.json")), ids=lambda path: path.stem)
def test_tables_are_made_from_their_results(path):
    assert path.with_suffix(".md").read_text() == tables.markdown(json.loads(path.read_text()))


def test_a_table_names_the_gpu_that_made_it_or_else_the_processor():
    machine = {"processor": "A Processor", "cores": 2, "device": "cpu"}
    assert tables.made_on(machine) == "A Processor" and tables.made_on(machine | {"device": "A GPU"}) == "A GPU"


@pytest.mark.parametrize("page", reproduce.pages(), ids=lambda page: page.name)
def test_pages_show_the_tables_of_results(page):
    assert tables.with_tables(page.read_text(), ROOT / "results") == page.read_text()


def test_write_docs_fills_every_page(tmp_path, monkeypatch):
    mark = "before\n<!-- results/{0}.md -->\nold\n<!-- end -->\nafter\n"
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text(mark.format("quick"))
    (tmp_path / "docs" / "results.md").write_text(mark.format("blog"))
    monkeypatch.setattr(reproduce, "ROOT", tmp_path)
    (tmp_path / "quick.md").write_text("| quick |\n")
    _, err = run("reproduce.py", "--write-docs", "--results", tmp_path, code=2)
    assert "blog.md: no results yet; run: python reproduce.py blog" in err and err.count("\n") == 1
    assert "old" in (tmp_path / "README.md").read_text()  # all pages or none
    (tmp_path / "blog.md").write_text("| blog |\n")
    run("reproduce.py", "--write-docs", "--results", tmp_path)
    for name, page in {"quick": "README.md", "blog": "docs/results.md"}.items():
        assert (tmp_path / page).read_text() == mark.format(name).replace("old", f"| {name} |")


def test_an_interrupted_run_goes_on_compiled_if_it_began_so(tmp_path, monkeypatch):
    commands = []
    monkeypatch.setattr(reproduce, "start", lambda command, quiet: commands.append(command))
    monkeypatch.setattr(reproduce.Job, "finished", lambda job: False)
    args = argparse.Namespace(preset="laptop", steps=None, runs=tmp_path)
    for name, resumed in (("table2", ["--compile"]), ("short", [])):
        job = reproduce.Job(name, EXPERIMENTS[name].rows[0], 0, args)
        job.folder.mkdir()
        (job.folder / "checkpoint.pt").touch()
        job.run(quiet=True)
        assert commands[-2] == ["train_bert.py", "--resume", "--out", str(job.folder), *resumed]
