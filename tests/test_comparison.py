"""The cures side by side: two learning rates, the better shown; what failed is named."""
import argparse
import json
import shlex

import pytest

import bench
import reproduce
from minq.comparison import COLUMNS, better_rates
from minq.experiments import EXPERIMENTS, Experiment, Row
from minq.cures import ATTENTIONS
from minq.tables import BITS, bits_at_loss
from running import SMALL, run


def result(line, x, fp, parameters=1000, metric="perplexity", seeds=1, **more):
    """A row of results as reproduce.py makes it: 10% lost at 7 bits, 30% at 6 (twice that in the second seed)."""
    factors = {"8x8": 1.0, "7x7": 1.1, "6x6": 1.3, "5x5": 3.0, "4x4": 9.0}
    number = lambda value: {"mean": value, "std": None, "all": [value] * seeds}
    quantized = {key: number(fp * factor) | {"calibrations": None, "all": [[fp * (1 + (factor - 1) * (seed + 1))] for seed in range(seeds)]}
                 for key, factor in factors.items()}
    return {"label": f"{line}, lr {x}", "family": "opt", "line": line, "x": x, "attention": line, "metric": metric, "fp": number(fp),
            "settings": {"norm": "layernorm"}, "max_inf_norm": number(9.0), "avg_kurtosis": number(7.0), "quantized": quantized,
            "parameters": parameters, "published": "a claim"} | more


def test_the_better_floating_point_is_shown_and_the_other_rate_named():
    rows = better_rates([result("vanilla", "0.005", 4.6), result("vanilla", "0.003", 4.7),
                         result("softpick", "0.005", 5.5, 1004), result("softpick", "0.003", 4.5, 1004)])
    assert [(row["label"], row["x"], row["other_rate"]["x"]) for row in rows] == [("vanilla", "0.005", "0.003"), ("softpick", "0.003", "0.005")]
    columns = [COLUMNS["cures"](row | {"step_time": [1.5, 1.2, 9.0]}) for row in rows]
    assert columns[1] == {"FP": "4.5", "at lr (FP at the other)": "0.003 (0.005: 5.5)", "max inf norm": "9", "avg kurtosis": "7",
                          "W8A8": "4.5", "bits at which 20% are lost": "6.50", "step time": "1.50", "extra parameters": "+4",
                          "its paper's claim": "a claim"}
    assert columns[0]["extra parameters"] == "+0"


def test_what_is_not_a_number_is_never_the_better_and_accuracy_may_be_large():
    nan = float("nan")
    (row,) = better_rates([result("vanilla", "a", nan), result("vanilla", "b", 900.0)])
    assert row["x"] == "b"
    (row,) = better_rates([result("vanilla", "a", 90.0, metric="accuracy"), result("vanilla", "b", 91.0, metric="accuracy")])
    assert row["x"] == "b"


def test_rows_that_were_trained_at_one_rate_only_stay_apart():
    rows = better_rates([result("", "", 4.6) | {"label": label, "attention": label} for label in ("vanilla", "clipped")])
    assert [row["label"] for row in rows] == ["vanilla", "clipped"]
    assert [COLUMNS["cures"](row)["at lr (FP at the other)"] for row in rows] == ["", ""]


def test_a_cure_with_one_rate_left_is_shown_alone():
    rows = better_rates([result("vanilla", "0.005", 4.6), result("relu", "0.003", 5.0, 990)])
    assert COLUMNS["cures"](rows[1])["at lr (FP at the other)"] == "0.003" and COLUMNS["cures"](rows[1])["extra parameters"] == "-10"


def test_bits_of_every_seed_stand_beside_those_of_the_mean():
    assert bits_at_loss(result("vanilla", "", 10.0, seeds=2)) == "6.50 (6.50, 7.00)"  # 20% at 7 bits in the second


def test_the_papers_columns_have_the_bits_where_more_widths_than_eight_were_tried():
    row = result("vanilla", "", 10.0, published="4.49 | 735 | 3076 | 1294")
    swept = COLUMNS["quantized"](row)
    assert swept[BITS] == "6.50" and swept["W8A8"] == "10" and swept["W8A8 (paper)"] == "1294"
    assert list(COLUMNS["quantized"](row | {"quantized": {"8x8": row["quantized"]["8x8"]}})) == [key for key in swept if key != BITS]


def test_every_cure_is_compared_in_both_families_and_in_opt_at_two_rates():
    for family in ("opt", "bert"):
        rows = EXPERIMENTS[f"cures-{family}"].rows
        attentions = {words[words.index("--attention") + 1] for row in rows if "--attention" in (words := shlex.split(row.flags_at("laptop")))}
        assert attentions == set(ATTENTIONS) - {"vanilla"} - ({"row-clipped"} if family == "bert" else set())
        pairs = {}
        for row in rows:
            pairs.setdefault(row.line, []).append(row)
        for own, *others in pairs.values():
            assert "--lr" not in own.flags_at("laptop") and len(others) == (family == "opt")
            for other in others:
                rate, times = ("0.02", 4) if "muon" in own.flags else ("0.003", 0.6)
                assert other.flags_at("laptop") == f"{own.flags_at('laptop')} --lr {rate}".strip()
                assert float(other.x) == pytest.approx(times * float(own.x))
    assert EXPERIMENTS["cures"].rows == EXPERIMENTS["cures-opt"].rows + EXPERIMENTS["cures-bert"].rows


def test_the_wide_berts_differ_in_attention_and_rate_only():
    experiment = EXPERIMENTS["wide"]
    seen = []
    for row in experiment.rows:
        words = experiment.settings(row, "laptop")
        last = lambda flag: words[len(words) - 1 - words[::-1].index(flag) + 1] if flag in words else None
        seen.append((last("--attention"), last("--lr")))
        assert (last("--width"), last("--warmup"), last("--steps"), last("--init-std")) == ("512", "4000", "75000", "0.025")
    assert seen == [(attention, lr) for attention in (None, "clipped", "gated") for lr in ("0.0005", "0.0003")]


def test_the_papers_own_rows_are_runs_of_other_tables():
    """Their folders are the same, so nothing is trained twice."""
    def folders(*names):
        args = argparse.Namespace(preset="laptop", steps=None, runs="runs")
        return {reproduce.Job(name, row, 0, args).folder for name in names for row in EXPERIMENTS[name].rows
                if name != "cures" or row.line in ("vanilla", "clipped", "row-clipped", "gated") and "lr" not in row.label}

    assert len(folders("cures")) == 7 and folders("cures") <= folders("table2", "table4")
    assert len(folders("cures") & folders("table4")) == 3  # the BERTs, of which these tables train many
    assert len(folders("rates")) == 6 and len(folders("rates") & folders("table2")) == 3


class InTurn:
    """A pool of no threads: scripts that are called in this process catch signals, which only its main thread may."""

    def __init__(self, workers):
        self.map = map

    __enter__, __exit__ = lambda self: self, lambda *_: None


@pytest.fixture
def tiny(corpus, tmp_path, monkeypatch):
    recipe = shlex.join([*SMALL, "--layers", "1", "--steps", "2", "--data", corpus])
    rows = tuple(Row(f"{name}, lr {lr}", "opt", f"{flags} --lr {lr}", line=name, x=lr)
                 for name, flags in (("vanilla", ""), ("KV bias", "--attention kv-bias"), ("Muon", "--optimizer muon --norm rmsnorm"))
                 for lr in ("1e-3", "1e-4"))
    monkeypatch.setitem(EXPERIMENTS, "cures", Experiment("Cures", rows, columns="cures", quantize="--sweep --batches 1 --seeds 1 --eval-batches 1",
                                                         recipes={"laptop": {"opt": recipe}}, may_fail=True))
    monkeypatch.setattr(reproduce, "start", lambda command, quiet: run(*command))
    monkeypatch.setattr(reproduce, "ThreadPoolExecutor", InTurn)
    monkeypatch.setattr(reproduce, "ROUNDS", 2)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_the_experiment_runs_times_its_steps_and_prints(tiny):
    out, _ = run("reproduce.py", "cures", "--jobs", 1)
    table = json.loads((tiny / "results" / "cures.json").read_text())
    assert [row["label"] for row in table["rows"]] == ["vanilla", "KV bias", "Muon"]
    vanilla, bias, muon = table["rows"]
    assert vanilla["step_time"] == [1.0, 1.0] and all(ratio > 0 for ratio in bias["step_time"])
    assert (vanilla["extra_parameters"], bias["extra_parameters"]) == (0, 2 * 32)
    assert muon["extra_parameters"] == -3 * 2 * 32  # three norms' gains and biases
    assert {row["x"] for row in (bias, bias["other_rate"])} == {"1e-3", "1e-4"}
    assert "6 trainings" in out and "| KV bias |" in out and "failed" not in out.lower()
    assert (tiny / "results" / "cures.md").read_text() in out
    out, _ = run("reproduce.py", "cures", "--verify")
    assert "vanilla: retrained, and all weights are the same" in out


@pytest.mark.slow
def test_a_row_whose_run_fails_is_named_and_the_others_are_shown(tiny, monkeypatch):
    experiment = EXPERIMENTS["cures"]
    rows = experiment.rows[:3] + (Row("too wide", "opt", "--heads 5", line="too wide", x="1"),)
    monkeypatch.setitem(EXPERIMENTS, "cures", Experiment("Cures", rows, "cures", quantize=experiment.quantize, recipes=experiment.recipes, may_fail=True))

    def start(command, quiet):
        if "5" in command:
            raise reproduce.UserError("--heads 5 does not divide --width 32")
        run(*command)
    monkeypatch.setattr(reproduce, "start", start)
    out, err = run("reproduce.py", "cures", "--jobs", 1)
    assert "Failed: too wide on opt." in out and "| KV bias |" in out and "1 of 4 runs failed: --heads 5" in err
    monkeypatch.setitem(EXPERIMENTS, "cures", Experiment("Cures", rows, "cures", quantize=experiment.quantize, recipes=experiment.recipes))
    _, err = run("reproduce.py", "cures", "--jobs", 1, code=2)
    assert "1 of 4 runs failed: --heads 5" in err


def test_steps_are_timed_in_turns_with_each_runs_own_optimizer(tiny, corpus, monkeypatch):
    run("train_opt.py", *SMALL, "--steps", 1, "--optimizer", "muon", "--data", corpus, "--out", tiny / "a")
    run("train_opt.py", *SMALL, "--steps", 1, "--data", corpus, "--out", tiny / "b")
    made, make = [], bench.training_step
    monkeypatch.setattr(bench, "training_step", lambda *args: made.append(args[-1]) or make(*args))
    seconds = bench.run_seconds({"a": tiny / "a", "b": tiny / "b"}, 3, reproduce.pick_device("cpu"))
    assert made == ["muon", "adamw"] and all(len(each) == 3 and min(each) > 0 for each in seconds.values())
