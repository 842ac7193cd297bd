"""The numbers of lab/survey.py equal loops written out, the figures hold what they are given, and
lab/analyze.py runs on runs of every family."""
import json
import re
import string
import sys

import numpy as np
import pytest
import torch

import lab
import lab.cures  # noqa: F401, names of attentions
from lab import survey
from minq.data import load_text
from minq.runs import open_run
from running import ROOT, SMALL, SMALL_VIT, logged, run
from small import inputs, small

CPU, ZOO = torch.device("cpu"), ROOT / "zoo"
figures = pytest.importorskip("lab.figures", reason="pip install -e '.[plots]'")


# ---- the numbers ----

@pytest.mark.parametrize("causal", [False, True])
def test_heads_equal_single_ones_in_numpy(causal):
    B, H, T, d = 2, 3, 5, 4
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(B, H, T, T)).astype(np.float32) * 3
    masked = np.where(np.tril(np.ones((T, T), bool)), scores, -np.inf) if causal else scores
    probs = (1.2 * torch.from_numpy(masked).float().softmax(-1) - 0.1).clamp(0, 1).numpy()
    values = rng.normal(size=(B, H, T, d)).astype(np.float32)
    gate = rng.random((B, H, T)).astype(np.float32)
    tensors = map(torch.from_numpy, (probs, scores, values, gate))
    found, sinks = survey.head_measures(*tensors, causal=causal)
    for b, h in np.ndindex(B, H):
        p, v, share = probs[b, h], values[b, h], probs[b, h].mean(axis=0)
        keys = [range(t + 1) if causal else range(T) for t in range(T)]
        possible = np.concatenate([p[t, keys[t]] for t in range(T) if len(keys[t]) > 1])
        norms, sees = np.linalg.norm(v, axis=1), [len(x) for x in keys]
        assert sinks[b, h] == share.argmax()
        assert {name: x[b, h].item() for name, x in found.items()} == pytest.approx({
            "attention": share.max(), "sink_value": norms[share.argmax()] / norms.mean(),
            "even": np.mean([(share.argmax() in keys[t]) / sees[t] for t in range(T)]),
            "even_update": np.mean(np.reciprocal(np.sqrt(sees))),
            "zeros": (possible == 0).mean(), "ones": (possible == 1).mean(),
            "score_range": np.mean([np.ptp(scores[b, h, t, keys[t]]) for t in range(T)]),
            "update": np.linalg.norm(p @ v, axis=1).mean() / norms.mean(),
            "pi": gate[b, h].mean()}, rel=1e-5, abs=1e-7)
    assert 0 < found["zeros"].mean() < 1  # or the comparison of zeros was one of nothing


def test_a_head_of_zeros_divides_by_nothing():
    zeros = torch.zeros(1, 1, 3, 3)
    found, _ = survey.head_measures(zeros, zeros, zeros)
    assert all(x.isfinite().all() for x in found.values()) and found["zeros"].item() == 1


rows, one_hot = torch.arange(1, 33)[:, None], torch.eye(32)


@pytest.mark.parametrize("probs, causal, attention, even, update, parks", [
    (torch.ones(32, 32).tril() / rows, True, 0.127, 0.127, 0.311, False),  # each of t gets 1 / t
    (torch.ones(32, 32) / 32, False, 0.031, 0.031, 0.177, False),
    (one_hot, True, 0.031, 0.127, 1, False), (one_hot, False, 0.031, 0.031, 1, False),
    (one_hot[:1].expand(32, 32), True, 1, 0.127, 1, True),  # a start token for a sink
    (one_hot[9:10].expand(32, 32), False, 1, 0.031, 1, True),  # a delimiter
    (one_hot[:1].expand(32, 32) * 0.2, True, 0.2, 0.127, 0.2, False),  # the rest on no token
    (torch.ones(2, 2).tril() / rows[:2], True, 0.75, 0.75, 0.854, False)])  # high, because even
def test_who_parks(probs, causal, attention, even, update, parks):
    """Values are orthogonal, as independent ones nearly are."""
    values = torch.eye(len(probs))[None, None]
    pad = torch.nn.functional.pad
    for extra in 0, 1:  # keys that are no token
        keys = pad(values, (0, 0, 0, extra), value=7)
        found, _ = survey.parking(pad(probs, (0, extra))[None, None], keys, causal)
        assert [found[x].item() for x in ("attention", "even", "update")] == pytest.approx(
            [attention, even, update], abs=6e-4)
        if 0 < probs[-1, -1] < 1:
            assert found["even_update"].item() == pytest.approx(update, abs=6e-4)
        assert survey.parks(found["attention"], found["even"]).item() == parks


@pytest.mark.parametrize("family", ["bert", "opt"])
@torch.no_grad()
def test_survey_equals_a_loop_over_single_sequences(family):
    model = small(family, attention="gated").eval()
    model.layers[0].ffn_down.weight[7] *= 100  # outliers, for an untrained model has none
    text = inputs(family, n=7) % 40
    batches = [((text[:4],), text[:4]), ((text[4:],), text[4:])]
    found = survey.survey(model, batches, CPU, "ffn_output", 260)
    means = {"by_dimension": np.zeros((2, 32)), "by_position": np.zeros((2, 12)),
             "peak_by_dimension": np.zeros((2, 32)), "peak_by_position": np.zeros((2, 12)),
             "attention": np.zeros((2, 4)), "zeros": 0}
    by_token, sinks = np.zeros(260), np.zeros((2, 4, 260))
    for sequence, layer in ((sequence, layer) for sequence in text for layer in range(2)):
        with survey.record(model, ("ffn_output", "probs")) as kept:
            model(sequence[None])
        x, share = kept["ffn_output"][layer][0], kept["probs"][layer][0].mean(dim=1)  # (T, d)
        for t, dimension in survey.is_outlier(x[None])[0].nonzero().tolist():
            means["by_dimension"][layer, dimension] += 1 / 7
            means["by_position"][layer, t] += 1 / 7
            by_token[sequence[t]] += 1
        means["peak_by_dimension"][layer] += x.abs().amax(dim=0).numpy() / 7
        means["peak_by_position"][layer] += x.abs().amax(dim=1).numpy() / 7
        means["attention"][layer] += share.amax(dim=1).numpy() / 7
        for head in range(4):
            sinks[layer, head, sequence[share[head].argmax()]] += 1
    outliers = found["outliers"]["ffn_output"]
    assert means["by_dimension"][0, 7] == means["by_dimension"].sum() >= 1
    for name, expected in means.items():
        np.testing.assert_allclose((outliers | found["heads"])[name], expected, rtol=1e-5)
    counts = {"samples": 7, "tokens": np.bincount(text.flatten(), minlength=260),
              "tokens_of_outliers": by_token, "sinks": sinks.argmax(axis=-1)}
    assert all(np.array_equal(found[name], expected) for name, expected in counts.items())
    assert survey.worst_dimension(outliers) == (0, 7)


@pytest.mark.parametrize("attention", ["vanilla", "gated", "kv-bias", "elementwise-gate"])
@torch.no_grad()
def test_work_is_at_triggers(attention):
    model = small("opt", attention=attention, init_std=0.2, vocab_size=68).eval()
    tokens = torch.randint(6, (5, 12), generator=torch.Generator().manual_seed(0))
    found = survey.at_triggers(model, [((x,), x) for x in (tokens[:2], tokens[2:])], CPU)
    with survey.record(model, ("probs", "gate_output")) as kept:
        model(tokens)
    for name, work in ("at triggers", True), ("elsewhere", False):
        places = [(b, t) for b in range(5) for t in range(2, 12) if (tokens[b, t] < 3) == work]
        for layer, head in np.ndindex(2, 4):
            p, pi = kept["probs"][layer][:, head], kept["gate_output"][layer]
            expected = {"start": [p[b, t, 0] for b, t in places],
                        "before": [p[b, t, t - 1] for b, t in places]}
            if attention.endswith(("gate", "gated")):
                expected["pi"] = [pi[b, head, t].mean() for b, t in places]
            measured = {key: x[layer][head] for key, x in found[name].items()}
            assert measured == pytest.approx({k: np.mean(x) for k, x in expected.items()}, rel=1e-4)


def test_the_worst_dimension():
    peaks = np.array([[1, 2, 3, 1], [1, 9, 1, 1], [1, 1, 1, 99]])
    quiet = {"by_dimension": np.zeros((3, 4)), "peak_by_dimension": peaks}
    assert survey.worst_dimension(quiet) == (1, 1)  # the last layer's outliers reach no head
    assert survey.worst_dimension({name: x[:1] for name, x in quiet.items()}) == (0, 2)
    quiet["by_dimension"][0, 3] = 1
    assert survey.worst_dimension(quiet) == (0, 3)


def test_tokens_by_name(corpus):
    names = survey.token_names(load_text(corpus))
    assert [names[ord(x)] for x in " \na\xff"] == ["␣", "↵", "a", "ff"]
    assert names[256:] == ["[PAD]", "[CLS]", "[SEP]", "[MASK]"]
    ends = {name for name in (*names, "...", "the") if survey.is_delimiter(name)}
    assert ends == {"[CLS]", "[SEP]", "␣", "↵", "...", *string.punctuation}


# ---- the figures ----

lines = lambda ax: {line.get_label(): [*map(tuple, line.get_xydata())] for line in ax.lines}
words = lambda labels: [label.get_text().strip() for label in labels]
drawn = lambda figure: figure.canvas.draw() or figure


def test_histograms_show_the_counts():
    counts = {"by_position": np.array([[0, 2, 1], [1, 5, 0], [0, 0, 0]]),
              "by_dimension": np.array([[0, 0, 3, 0], [0, 0, 0, 6], [0, 0, 0, 0]])}
    shown = lambda figure: [ax.patches[0].get_data().values.tolist() for ax in figure.axes]
    figure = figures.histograms(counts, "run")
    expected = [x[layer].tolist() for layer in range(3) for x in counts.values()]
    assert shown(figure) == expected and figure.get_supylabel() == "outliers per sample"
    assert [ax.get_title(loc="right") for ax in figure.axes] == [
        "layer 1: 67% at 1", "layer 1: 100% at 2", "layer 2: 83% at 1", "layer 2: 100% at 3",
        "layer 3", "layer 3"]  # layers from 1, positions and dimensions from 0
    assert figure.axes[0].get_ylim() == pytest.approx((0, 5.25))  # nothing is cut off
    peaks = {f"peak_{name}": x for name, x in counts.items()}
    figure = figures.histograms(peaks | {name: 0 * x for name, x in counts.items()}, "run")
    assert shown(figure) == expected and figure.get_supylabel() == "no outliers: largest |x|"


def test_lines_show_the_values():
    series = {"perplexity": ([1, 2], [9, 8]), "loss": ([1, 2], [3, 2])}
    left, right = figures.curves({"a": series, "b": series}, "runs").axes
    assert lines(left) == {"a": [(1, 9), (2, 8)], "b": [(1, 9), (2, 8)]}
    assert (left.get_title(), right.get_title()) == ("perplexity (log scale)", "loss")
    assert (left.get_yscale(), right.get_yscale()) == ("log", "linear")


def test_a_head_on_text():
    labels, probs = ["[CLS]", "$x$", "$"], np.eye(3)[None] / 2
    panels = {"attention": probs, "values": np.full((1, 3, 2), -4.0), "out": -np.ones((1, 3, 2))}
    figure = drawn(figures.head(panels, "a head", [labels]))
    limits = [ax.images[0].get_clim() for ax in figure.axes[:3]]
    assert limits == [(0, 0.5), (-4, 4), (-4, 4)]
    ticks = figure.axes[0].get_xticklabels(), figure.axes[0].get_yticklabels()
    assert [words(x) for x in ticks] == [labels, labels]
    assert not any(label.get_parse_math() for x in ticks for label in x)  # "$x$" is a token
    drawn(figures.head(panels, "of an image"))


def test_cells_are_numbered():
    figure = drawn(figures.damage({"run": "run", "bits": 8, "layers": {
        "a": [{"sqnr": 1.4}, {"sqnr": 40}], "b": [{"sqnr": np.inf}, {"sqnr": 20}]}}))
    assert words(figure.axes[0].texts) == ["1", "40", "inf", "20"]


# ---- the script ----

def analyzed(folder, *arguments):
    """What lab.analyze prints, the numbers it writes, and the names of its pictures."""
    out, _ = run("lab.analyze", *arguments, "--out", folder, "--json", folder / "numbers.json")
    numbers = json.loads((folder / "numbers.json").read_text())
    return out, numbers, {path.stem for path in folder.glob("*.png")}


@pytest.mark.slow
@pytest.mark.parametrize("name, options", [
    ("bert-gated", "--layer 1 --head 4"), ("opt-vanilla", ""), ("vit", "--head 4")])
def test_every_family(tmp_path, cifar, name, options):
    folder = tmp_path / "vit" if name == "vit" else ZOO / name
    if name == "vit":
        run("train_vit", *SMALL_VIT, "--data", cifar, "--out", folder)
    out, numbers, pictures = analyzed(tmp_path, folder, "--eval-batches", 2, *options.split())
    assert pictures == {"outliers-ffn_output", "outliers-layer_output", "head"}
    opened = open_run(folder, CPU)
    found = survey.survey(opened.model, opened.validation(2), CPU, opened.model.norm_tap)
    assert (numbers["run"], numbers["samples"]) == (str(folder), found["samples"])
    assert numbers["heads"]["attention"] == found["heads"]["attention"].tolist()
    assert f"on {found['samples']} validation samples" in out
    rows = re.findall(r"^\| \d.*", out.split("sorted by attention / even")[1], re.MULTILINE)
    order = np.argsort((found["heads"]["attention"] / found["heads"]["even"]).ravel())[::-1]
    values = [f"{value:.3g}" for value in found["heads"]["sink_value"].ravel()[order]]
    assert [row.split(" | ")[6] for row in rows] == values
    assert not options or "head 4 at work" in out
    if name != "vit":
        counts = numbers["tokens_of_outliers"]
        first = out.split("the ten that carry most")[1].splitlines()[4]
        assert first.split(" | ")[1] == f"{max(counts) / sum(counts):.3g}"


@pytest.mark.slow
def test_curves(tmp_path):
    runs = [ZOO / name for name in ("bert-vanilla", "bert-gated")]
    out, numbers, pictures = analyzed(tmp_path, *runs, "--curves")
    log = logged(runs[1])
    assert pictures == {"curves"} and out.count("\n| ") == 3
    assert f"→ {max(log[-1]['ffn_output']['inf_norm']):.5g} |" in out
    assert numbers[str(runs[1])]["loss"] == [[x[key] for x in log] for key in ("step", "loss")]


@pytest.mark.slow
def test_by_trigger_of_a_run(tmp_path):
    run("train_opt", *SMALL, "--data", "backcopy", "--out", tmp_path / "run")
    file = tmp_path / "numbers.json"
    out, _ = run("lab.analyze", tmp_path / "run", "--by-trigger", "--json", file)
    numbers = json.loads(file.read_text())
    assert numbers["at triggers"].keys() == {"start", "before"}
    for layer, head in np.ndindex(2, 4):
        cells = [f"{numbers[where][key][layer][head]:.3g}" for where in ("at triggers", "elsewhere")
                 for key in ("start", "before")]
        assert f"| {layer + 1} | {head + 1} | {' | '.join(cells)} |" in out


def test_without_matplotlib_the_numbers_are_printed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # importing it fails
    monkeypatch.delitem(sys.modules, "lab.figures")
    monkeypatch.delattr(lab, "figures")
    out, numbers, pictures = analyzed(tmp_path, ZOO / "opt-vanilla", "--eval-batches", 1)
    assert numbers and not pictures and out.endswith("pip install -e '.[plots]'\n")


@pytest.mark.parametrize("names, options, message", [
    ("nothing", "--curves", "metrics.jsonl"), ("bert-gated", "--layer 5", "--layer 5: .* has 4"),
    ("bert-gated opt-vanilla", "", "opt-vanilla: expected one RUN, or several with --curves"),
    ("opt-vanilla", "--by-trigger", "opt-vanilla: its data is .*stdlib.txt, not backcopy"),
    ("bert-gated", "--by-trigger", "a run of bert, expected one of opt")])
def test_wrong_input(names, options, message):
    _, err = run("lab.analyze", *(ZOO / name for name in names.split()), *options.split(), code=2)
    assert re.search(message, err) and err.startswith("error: ") and err.count("\n") == 1
