"""The numbers of lab/survey.py equal loops written out, the figures hold what they are given, and
lab/analyze.py runs on runs of every family."""
import json
import re
import sys

import numpy as np
import pytest
import torch

import lab
from lab import survey
from minq.data import load_text
from minq.outliers import is_outlier
from minq.runs import open_run
from running import ROOT, SMALL_VIT, logged, run
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
    means = {"by_dimension": np.zeros((2, 32)), "attention": np.zeros((2, 4)), "zeros": 0}
    by_token, peaks = np.zeros((2, 2, 260))
    sinks, gates = np.zeros((2, 4, 260)), np.zeros((2, 4, 20))
    for sequence, layer in ((sequence, layer) for sequence in text for layer in range(2)):
        with survey.record(model, ("ffn_output", "probs", "gate_output")) as kept:
            model(sequence[None])
        x, share = kept["ffn_output"][layer][0], kept["probs"][layer][0].mean(dim=1)  # (T, d)
        for t, dimension in is_outlier(x[None])[0].nonzero().tolist():
            means["by_dimension"][layer, dimension] += 1 / 7
            by_token[layer, sequence[t]] += 1
        means["attention"][layer] += share.amax(dim=1).numpy() / 7
        peaks[layer, sequence[x.abs().amax(dim=1).argmax()]] += 1
        for head in range(4):
            sinks[layer, head, sequence[share[head].argmax()]] += 1
            pi = kept["gate_output"][layer][0, head]
            gates[layer, head] += np.histogram(pi, bins=20, range=(0, 1))[0]
    outliers = found["outliers"]["ffn_output"]
    assert means["by_dimension"][0, 7] == means["by_dimension"].sum() >= 1
    for name, expected in means.items():
        np.testing.assert_allclose((outliers | found["heads"])[name], expected, rtol=1e-5)
    counts = {"samples": 7, "tokens": np.bincount(text.flatten(), minlength=260),
              "tokens_of_outliers": by_token, "tokens_of_peaks": peaks,
              "sinks": sinks.argmax(axis=-1), "gate_counts": gates}
    assert all(np.array_equal(found[name], expected) for name, expected in counts.items())
    assert survey.worst_dimension(outliers) == (0, 7)


def test_outliers_by_position_and_dimension():
    x = torch.randn(2, 30, 20, generator=torch.Generator().manual_seed(0))
    x[1, 3, 5], x[1, 3, 6] = 40.0, -50.0
    found = survey.outlier_measures(x)
    assert found["by_dimension"].nonzero().tolist() == [[1, 5], [1, 6]]
    assert (found["by_position"][1, 3], found["by_position"].sum()) == (2, 2)
    assert (found["peak_by_position"][1, 3], found["peak_by_dimension"][1, 5]) == (50, 40)


def test_the_worst_dimension():
    peaks = np.array([[1, 2, 3, 1], [1, 9, 1, 1], [1, 1, 1, 99]])
    quiet = {"by_dimension": np.zeros((3, 4)), "peak_by_dimension": peaks}
    assert survey.worst_dimension(quiet) == (1, 1)  # the last layer's outliers reach no head
    assert survey.worst_dimension({name: x[:1] for name, x in quiet.items()}) == (0, 2)
    quiet["by_dimension"][0, 3] = 1
    assert survey.worst_dimension(quiet) == (0, 3)


def test_groups_of_tokens_and_their_shares(corpus):
    names = survey.token_names(load_text(corpus))
    groups = survey.token_groups(names, is_bytes=True)
    kinds = {" ": "space", "\n": "newline", ".": "punctuation", "[": "punctuation", "a": "letter",
             "Z": "letter", "7": "digit"} | dict.fromkeys("\t\xe9\xff", "other byte")
    assert {byte: groups[ord(byte)] for byte in kinds} == kinds and names[ord(" ")] == "␣"
    assert names[256:] == groups[256:] == [*survey.SPECIALS]
    assert survey.token_groups(["0", "...", "[CLS]"], False) == ["token", "punctuation", "[CLS]"]

    counts = np.zeros(260)
    counts[[ord(" "), ord("."), 258, ord("a"), 259]] = 4, 3, 2, 1, 10
    shares = survey.group_shares(groups, counts)
    assert shares.pop("all delimiters") == pytest.approx(9 / 20)
    assert shares["space"] == 0.2 and sum(shares.values()) == pytest.approx(1)
    assert set(survey.group_shares(groups, np.zeros(260)).values()) == {0}


def test_outlier_patches():
    x = np.random.default_rng(0).normal(size=(2, 17, 40)).astype(np.float32)
    values = np.ones((2, 17, 8), np.float32)
    values[0, 1 + 6], x[0, 1 + 6, 3] = 0.25, 5  # the largest, but no outlier
    picture, name, means = survey.outlier_patches(x, values)
    assert name == "largest |x|" and picture[0, 1, 2] == 5 and means[0].tolist() == [0.25, 1]
    x[0, 1 + 6, 3] = 100
    picture, name, means = survey.outlier_patches(x, values)
    assert name == "outliers" and picture[0, 1, 2] == picture.sum() == 1
    np.testing.assert_array_equal(means, [[0.25, 1], [np.nan, 1]])  # the second image has none


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
        "layer 1: most at 1", "layer 1: most at 2", "layer 2: most at 1", "layer 2: most at 3",
        "layer 3: none", "layer 3: none"]  # layers from 1, positions and dimensions from 0
    assert figure.axes[0].get_ylim() == pytest.approx((0, 5.25))  # nothing is cut off
    peaks = {f"peak_{name}": x for name, x in counts.items()}
    figure = figures.histograms(peaks | {name: 0 * x for name, x in counts.items()}, "run")
    assert shown(figure) == expected and figure.get_supylabel() == "no outliers: largest |x|"


def test_lines_and_bars_show_the_values():
    series = {"perplexity": ([1, 2], [9, 8]), "loss": ([1, 2], [3, 2])}
    left, right = figures.curves({"a": series, "b": series}, "runs").axes
    assert lines(left) == {"a": [(1, 9), (2, 8)], "b": [(1, 9), (2, 8)]}
    assert (left.get_title(), right.get_title()) == ("perplexity (log scale)", "loss")
    assert (left.get_yscale(), right.get_yscale()) == ("log", "linear")

    rows = [{"tokens": "space", "outliers": 9, "all": 2}, {"tokens": "x", "outliers": 1, "all": 8}]
    (ax,) = figures.shares(rows, "run").axes
    bars = {x.get_label(): [bar.get_width() for bar in x] for x in ax.containers}
    assert bars == {"outliers": [9, 1], "all": [2, 8]}
    assert [label.get_text() for label in ax.get_yticklabels()] == ["space", "x"]

    counts = np.zeros((3, 2, 4))
    counts[2, 1] = 1, 0, 0, 3
    ax = figures.gate_histograms(counts, "run").axes[2]
    assert lines(ax)["head 2"] == [(0.125, 1), (0.375, 0), (0.625, 0), (0.875, 3)]


def test_maps_have_one_scale():
    maps = np.zeros((5, 2, 2))
    maps[3, 1, 0] = 7
    images = [ax.images[0] for ax in figures.patch_maps(maps, "run").axes if ax.images]
    assert len(images) == 5 and {image.get_clim() for image in images} == {(0, 7)}
    assert np.array_equal(images[3].get_array(), maps[3])
    figure = figures.magnitudes({"a": np.array([[1.0, -9]]), "b": np.array([[2.0, 3]])}, "x")
    assert {ax.images[0].get_clim() for ax in figure.axes[:2]} == {(0, 9)}
    drawn(figures.patch_maps(np.zeros((1, 2, 2)), "nothing"))


def test_a_head_on_text_and_on_images():
    labels, probs = ["[CLS]", "$", "$"], np.eye(3) / 2
    figure = figures.head_on_text(labels, probs, np.full((3, 2), -4.0), np.ones((3, 2)), "out", "")
    limits = [ax.images[0].get_clim() for ax in figure.axes[:3]]
    assert limits == [(0, 0.5), (-4, 4), (-4, 4)]
    assert words(drawn(figure).axes[0].get_xticklabels()) == labels

    values, patches = np.array([[1.0, 2], [np.nan, 3]]), np.ones((2, 4, 4))
    figure = figures.head_on_images(np.zeros((2, 8, 8, 3)), patches, "outliers", values, patches,
                                    np.ones((2, 17, 17)), "a head")
    bars = [ax for ax in drawn(figure).axes if len(ax.patches) == 2]
    np.testing.assert_array_equal([[x.get_height() for x in ax.patches] for ax in bars], values)
    assert bars[0].get_ylim() == bars[1].get_ylim()


def test_points_and_cells_are_numbered():
    names = ("attention", "sink_value", "score_range")
    measures = dict(zip(names, np.array([[[0.1, 0.9]], [[1.0, 0.2]], [[3.0, 8]]])))
    ax = figures.heads(measures, 1 / 3, "run").axes[0]
    assert words(ax.texts) == ["1.1", "1.2"]
    assert ax.collections[0].get_offsets().tolist() == [[0.1, 1], [0.9, 0.2]]
    drawn(figures.heads(dict.fromkeys(names, np.zeros((1, 1))), 1.0, "attends to nothing"))
    figure = drawn(figures.damage(["a", "b"], np.array([[1.4, 40], [np.inf, 20]]), "run"))
    assert words(figure.axes[0].texts) == ["1", "40", "inf", "20"]


def test_grids_lie_over_histograms_on_equal_axes():
    values = {"wide": np.array([-1.0, 0, 1, 100]), "narrow": np.array([-1.0, 0, 1, 1])}
    figure = figures.grids(values, {"wide": (0.5, 2), "narrow": (0.01, 100)}, 8, "tap")
    wide, narrow, wide_zoom, narrow_zoom = figure.axes
    for a, b in ((wide, narrow), (wide_zoom, narrow_zoom)):
        assert (a.get_xlim(), a.get_ylim()) == (b.get_xlim(), b.get_ylim())
    assert wide.get_yscale() == "log" and wide_zoom.get_xlim() == (-0.16, 0.16)
    points = lambda ax: [segment[0, 0] for segment in ax.collections[0].get_segments()]
    assert points(narrow_zoom) == pytest.approx(np.arange(-16, 17) / 100)
    assert points(wide) == pytest.approx(0.5 * (np.arange(0, 256, 16) - 2))
    assert "1 of 256" in wide_zoom.get_title() and "33 of 256" in narrow_zoom.get_title()


@pytest.mark.parametrize("r", [10, 40, 150])
def test_the_height_of_an_outlier_from_its_kurtosis(r):
    """One value r among many of deviation 1: moments written out, r is what comes back."""
    n = 128 * 768
    kurtosis = ((n - 1) * 3 + r ** 4) / n / (((n - 1) + r ** 2) / n) ** 2
    assert figures.height_of(kurtosis, n) == pytest.approx(r, rel=0.02)


def test_the_law_is_drawn():
    row = lambda x, heights: {"line": "BERT", "x": x, "max_over_sigma": {"all": heights}}
    rows = [row("64", [30.0, 20.0]), row("32", [15.0])]
    (ax,) = drawn(figures.law({"title": "law", "rows": rows})).axes
    assert lines(ax)["BERT"] == [(32, 15), (64, 20), (64, 30)]
    squares = [tuple(line.get_xydata()[0]) for line in ax.lines if line.get_marker() == "s"]
    assert squares == [point[1:] for point in figures.PUBLISHED]


# ---- the script ----

def analyzed(folder, *arguments):
    """What lab.analyze prints, the numbers it writes, and the names of its pictures."""
    out, _ = run("lab.analyze", *arguments, "--out", folder, "--json", folder / "numbers.json")
    numbers = json.loads((folder / "numbers.json").read_text())
    return out, numbers, {path.stem for path in folder.glob("*.png")}


TEXT, GATES = {"tokens", "head-0", "head-1"}, {"gates", "gates-0", "gates-1"}


@pytest.mark.slow
@pytest.mark.parametrize("name, options, more", [
    ("bert-gated", "--layer 1 --head 4 --gates", TEXT | GATES), ("opt-vanilla", "", TEXT),
    ("vit", "--head 4", {"head"})])
def test_every_family(tmp_path, cifar, name, options, more):
    folder = tmp_path / "vit" if name == "vit" else ZOO / name
    if name == "vit":
        run("train_vit", *SMALL_VIT, "--data", cifar, "--out", folder)
    out, numbers, pictures = analyzed(tmp_path, folder, "--batches", 2, *options.split())
    assert pictures == more | {"outliers-ffn_output", "outliers-layer_output", "norms", "heads",
                               "magnitudes"}
    opened = open_run(folder, CPU)
    found = survey.survey(opened.model, opened.validation(2), CPU, opened.model.norm_tap)
    assert (numbers["run"], numbers["samples"]) == (str(folder), found["samples"])
    assert numbers["heads"]["attention"] == found["heads"]["attention"].tolist()
    assert f"on {found['samples']} validation samples" in out and "_bits" not in out
    rows = re.findall(r"^\| \d.*", out.split("the most idle first")[1], re.MULTILINE)
    updates = [f"{update:.3g}" for update in sorted(found["heads"]["update"].ravel())]
    assert [row.split(" | ")[6] for row in rows] == updates
    assert not options or "head 4 at work" in out


@pytest.mark.slow
def test_curves(tmp_path):
    runs = [ZOO / name for name in ("bert-vanilla", "bert-gated")]
    out, numbers, pictures = analyzed(tmp_path, *runs, "--curves")
    log = logged(runs[1])
    assert pictures == {"curves"} and out.count("\n| ") == 3
    assert f"→ {max(log[-1]['ffn_output']['inf_norm']):.5g} |" in out
    assert numbers[str(runs[1])]["loss"] == [[x[key] for x in log] for key in ("step", "loss")]


@pytest.mark.slow
def test_compare(tmp_path):
    runs = ZOO / "bert-vanilla", ZOO / "bert-gated"
    out, rows, pictures = analyzed(tmp_path, *runs, "--compare", "--batches", 2, "--layer", 2)
    assert pictures == {"grids", "magnitudes"} and "ffn_output of layer 2" in out
    opened, norms = open_run(runs[1], CPU), []
    with survey.record(opened.model, ("ffn_output",)) as kept, torch.no_grad():
        for batch, _ in opened.validation(2):
            opened.model(*batch)
            x = kept["ffn_output"][1].numpy()  # in the end, of the last batch
            norms += abs(x).max(axis=(1, 2)).tolist()
    step, (low, high) = (x.max() - x.min()) / 255, np.percentile(x, (0.5, 99.5))
    assert [rows[1]["inf norm"], rows[1]["grid step"]] == pytest.approx([np.mean(norms), step])
    assert rows[1]["levels for the middle 99%"] == pytest.approx((high - low) / step + 1, abs=1)


def test_without_matplotlib_the_numbers_are_printed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # importing it fails
    monkeypatch.delitem(sys.modules, "lab.figures")
    monkeypatch.delattr(lab, "figures")
    out, numbers, pictures = analyzed(tmp_path, ZOO / "opt-vanilla", "--batches", 1)
    assert numbers and not pictures and out.endswith("pip install -e '.[plots]'\n")


@pytest.mark.parametrize("names, options, message", [
    ("nothing", "--curves", "metrics.jsonl"), ("bert-gated", "--layer 5", "--layer 5: .* has 4"),
    ("opt-vanilla", "--gates", "--gates True: .*opt-vanilla has 0"),
    ("bert-gated opt-vanilla", "--compare --batches 1", "a run of opt, expected one of bert"),
    ("bert-gated", "--compare", "expected one RUN, two with --compare, or several with --curves"),
    ("bert-gated opt-vanilla", "--compare --head 1", "--head changes nothing with --compare")])
def test_wrong_input(names, options, message):
    _, err = run("lab.analyze", *(ZOO / name for name in names.split()), *options.split(), code=2)
    assert re.search(message, err) and err.startswith("error: ") and err.count("\n") == 1
