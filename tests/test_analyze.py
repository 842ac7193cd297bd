"""The figures hold the numbers they are given, the numbers equal loops written out, the script runs on real runs."""
import json
import re
import sys

import numpy as np
import pytest
import torch

import minq
from minq import analysis
from minq.checkpoints import from_checkpoint, load_checkpoint
from minq.data import load_text
from minq.outliers import is_outlier
from minq.runs import open_run
from running import SMALL, SMALL_VIT, run

figures = pytest.importorskip("minq.figures", reason="pip install -e '.[plots]'")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A tiny run of every family, and a gated and a clipped one."""
    folder = tmp_path_factory.mktemp("runs")
    text = folder / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 500)
    np.save(folder / "images.npy", np.random.default_rng(0).integers(0, 256, (60, 32, 32, 3), dtype=np.uint8))
    np.save(folder / "labels.npy", np.arange(60) % 10)
    for name, options in {"bert": [], "gated": ["--attention", "gated"], "clipped": ["--attention", "clipped"]}.items():
        run("train_bert.py", *SMALL, "--data", text, *options, "--out", folder / name)
    run("train_opt.py", *SMALL, "--data", text, "--out", folder / "opt")
    run("train_vit.py", *SMALL_VIT, "--data", folder, "--out", folder / "vit")
    return folder


# ---- the numbers ----

def test_heads_equal_loops_written_out():
    B, H, T, d = 2, 3, 5, 4
    rng = np.random.default_rng(0)
    for causal in (False, True):
        scores = rng.normal(size=(B, H, T, T)).astype(np.float32) * 3
        masked = np.where(np.tril(np.ones((T, T), bool)), scores, -np.inf) if causal else scores
        probs = (1.2 * torch.from_numpy(masked).float().softmax(-1) - 0.1).clamp(0, 1).numpy()
        values = rng.normal(size=(B, H, T, d)).astype(np.float32)
        gate = rng.random((B, H, T)).astype(np.float32)
        context = (probs @ values * gate[..., None]).transpose(0, 2, 1, 3).reshape(B, T, H * d)
        tensors = map(torch.from_numpy, (probs, scores, values, context, gate))
        found, sinks = analysis.head_measures(*tensors, causal=causal)
        some = 0
        for b, h in np.ndindex(B, H):
            shares = [sum(probs[b, h, t, s] for t in range(T)) / T for s in range(T)]
            sink = int(np.argmax(shares))
            norm = [np.sqrt(sum(v ** 2 for v in values[b, h, t])) for t in range(T)]
            zeros = ones = possible = 0
            ranges, handed_on = [], []
            for t in range(T):
                keys = range(t + 1) if causal else range(T)
                ranges.append(max(scores[b, h, t, s] for s in keys) - min(scores[b, h, t, s] for s in keys))
                update = sum(probs[b, h, t, s] * values[b, h, s] for s in range(T))
                handed_on.append(np.linalg.norm(gate[b, h, t] * update))
                for s in keys if len(keys) > 1 else ():
                    possible += 1
                    zeros += probs[b, h, t, s] == 0
                    ones += probs[b, h, t, s] == 1
            some += zeros
            expected = {"sink_rate": shares[sink], "sink_value": norm[sink] / np.mean(norm), "zeros": zeros / possible,
                        "ones": ones / possible, "score_range": np.mean(ranges), "gate": np.mean(gate[b, h]),
                        "update": np.mean(handed_on) / np.mean(norm)}
            assert sinks[b, h] == sink and found.keys() == expected.keys()
            for name, value in expected.items():
                assert found[name][b, h].item() == pytest.approx(float(value), rel=1e-5, abs=1e-7), name
        assert some  # or the comparison of zeros was one of nothing


def test_a_dead_head_divides_by_nothing():
    zeros = torch.zeros(1, 1, 3, 3)
    found, _ = analysis.head_measures(zeros, zeros, zeros, torch.zeros(1, 3, 3))
    assert all(torch.isfinite(value).all() for value in found.values()) and found["zeros"].item() == 1


@pytest.mark.slow
@pytest.mark.parametrize("family", ["bert", "opt"])
def test_survey_equals_a_loop_over_single_sequences(runs, family):
    checkpoint = load_checkpoint(runs / family)
    model = from_checkpoint(checkpoint, family).eval()
    with torch.no_grad():  # real outliers, for there are none in so young a run
        model.layers[0].ffn_down.weight[7] *= 100
    text = torch.from_numpy(load_text(runs / "text.txt").tokens[:7 * 16].copy()).long().view(7, 16)
    batches = [((text[:4],), text[:4]), ((text[4:],), text[4:])]
    found = analysis.survey(model, batches, torch.device("cpu"), "ffn_output", 260)
    assert found["samples"] == 7 and np.array_equal(found["tokens"], np.bincount(text.flatten(), minlength=260))

    by_dimension, sink_rate, by_token, peaks = (np.zeros((2, n)) for n in (32, 4, 260, 260))
    for sequence in text:
        with analysis.record(model, ("ffn_output", "probs")) as kept:
            model(sequence[None])
        for layer in range(2):
            x = kept["ffn_output"][layer]
            for t, dimension in is_outlier(x)[0].nonzero().tolist():
                by_dimension[layer, dimension] += 1
                by_token[layer, sequence[t]] += 1
            peaks[layer, sequence[x[0].abs().amax(dim=1).argmax()]] += 1
            sink_rate[layer] += kept["probs"][layer][0].mean(dim=1).amax(dim=-1).numpy() / 7
    assert by_dimension[0, 7] == by_dimension[0].sum() > 7
    np.testing.assert_array_equal(found["outliers"]["ffn_output"]["by_dimension"], by_dimension)
    np.testing.assert_array_equal(found["tokens_of_outliers"], by_token)
    np.testing.assert_array_equal(found["tokens_of_peaks"], peaks)
    np.testing.assert_allclose(found["heads"]["sink_rate"], sink_rate, rtol=1e-5)
    assert analysis.worst_dimension(found["outliers"]["ffn_output"]) == (0, 7)
    if family == "opt":
        assert (found["heads"]["zeros"] == 0).all() and (found["heads"]["ones"] == 0).all()  # masked ones do not count


def test_the_worst_dimension():
    peaks = np.array([[1, 2, 3, 1], [1, 9, 1, 1], [1, 1, 1, 99]])
    quiet = {"by_dimension": np.zeros((3, 4)), "peak_by_dimension": peaks}
    assert analysis.worst_dimension(quiet) == (1, 1)  # the last layer's outliers reach no head
    quiet["by_dimension"][0, 3] = 1
    assert analysis.worst_dimension(quiet) == (0, 3)
    alone = {"by_dimension": np.zeros((1, 4)), "peak_by_dimension": peaks[:1]}
    assert analysis.worst_dimension(alone) == (0, 2)


def test_groups_of_tokens_and_their_shares(runs):
    names = analysis.token_names(load_text(runs / "text.txt"))
    groups = analysis.token_groups(names, is_bytes=True)
    for byte, group in {" ": "space", "\n": "newline", "\t": "other byte", ".": "punctuation", "[": "punctuation",
                        "a": "letter", "Z": "letter", "7": "digit", "\xe9": "other byte"}.items():
        assert groups[ord(byte)] == group
    assert names[256:] == groups[256:] == ["[PAD]", "[CLS]", "[SEP]", "[MASK]"] and names[ord(" ")] == "␣"

    counts = np.zeros(260)
    counts[[ord(" "), ord("."), 258, ord("a"), 259]] = 4, 3, 2, 1, 10
    shares = analysis.group_shares(groups, counts)
    assert shares["space"] == 0.2 and shares["[MASK]"] == 0.5 and sum(shares.values()) == pytest.approx(1)
    assert analysis.delimiter_share(shares) == pytest.approx(9 / 20)
    assert set(analysis.group_shares(groups, np.zeros(260)).values()) == {0}
    assert analysis.token_groups(["0", "[CLS]"], is_bytes=False) == ["token", "[CLS]"]


def test_outlier_patches():
    x, values = np.random.default_rng(0).normal(size=(2, 17, 40)).astype(np.float32), np.ones((2, 17, 8), np.float32)
    values[0, 1 + 6] = 0.25
    x[0, 1 + 6, 3] = 5  # the largest, but no outlier
    picture, name, means, kinds = analysis.outlier_patches(x, values)
    assert name == "largest |x|" and kinds == ("largest", "others")
    assert picture[0, 1, 2] == 5 and means[0].tolist() == [0.25, 1]
    x[0, 1 + 6, 3] = 100
    picture, name, means, kinds = analysis.outlier_patches(x, values)
    assert name == "outliers" and picture.shape == (2, 4, 4) and picture.sum() == picture[0, 1, 2] == 1
    assert means[0].tolist() == [0.25, 1] and np.isnan(means[1, 0]) and means[1, 1] == 1  # none in the second image


# ---- the figures ----

def titles(figure):
    return [ax.get_title() or ax.get_title(loc="right") for ax in figure.axes]


def test_histograms_show_the_counts():
    by_position = np.array([[0, 2, 1], [1, 5, 0], [0, 0, 0]])
    by_dimension = np.array([[0, 0, 3, 0], [0, 0, 0, 6], [0, 0, 0, 0]])
    axes = figures.histograms(by_position, by_dimension, "outliers", "run").axes
    counts = [ax.patches[0].get_data().values.tolist() for ax in axes]
    assert counts == [[0, 2, 1], [0, 0, 3, 0], [1, 5, 0], [0, 0, 0, 6], [0, 0, 0], [0, 0, 0, 0]]
    assert [ax.get_title(loc="right") for ax in axes] == [
        "layer 1: most at 1", "layer 1: most at 2", "layer 2: most at 1", "layer 2: most at 3",
        "layer 3: none", "layer 3: none"]  # layers from 1, positions and dimensions from 0
    assert [ax.get_ylim()[1] for ax in axes] == pytest.approx([5.25, 6.3] * 3)  # nothing is cut off


def test_lines_and_bars_show_the_values():
    figure = figures.norms_by_layer({"ffn_output": [3, 5], "layer_output": [2, 1]}, {"ffn_output": [4, 40]}, "run")
    line, other = figure.axes[0].lines
    assert line.get_xdata().tolist() == [1, 2] and line.get_ydata().tolist() == [3, 5]
    assert other.get_ydata().tolist() == [2, 1]
    assert figure.axes[1].get_yscale() == "log" and "log" in figure.axes[1].get_ylabel()
    ax, = figures.shares(["space", "letter"], [0.9, 0.1], [0.2, 0.8], "outliers", "run").axes
    assert [bar.get_width() for bar in ax.patches] == pytest.approx([90, 10, 20, 80])
    assert [label.get_text() for label in ax.get_yticklabels()] == ["space", "letter"]
    series = {"perplexity": ([1, 2], [9, 8]), "training loss": ([1, 2], [3, 2])}
    figure = figures.curves({"a": series, "b": series}, "runs")
    assert [line.get_label() for line in figure.axes[0].lines] == ["a", "b"]
    assert figure.axes[0].lines[1].get_ydata().tolist() == [9, 8] and figure.axes[0].get_yscale() == "log"
    assert titles(figure) == ["perplexity (log scale)", "training loss"]
    counts = np.zeros((5, 2, 4))
    counts[0, 1] = 1, 0, 0, 3
    stairs = figures.gate_histograms(counts, "run").axes[0].patches
    assert stairs[1].get_data().values.tolist() == [25, 0, 0, 75] and stairs[1].get_label() == "head 2"


def test_maps_have_one_scale():
    maps = np.zeros((5, 2, 2))
    maps[3, 1, 0] = 7
    images = [ax.images[0] for ax in figures.patch_maps(maps, "outliers", "run").axes if ax.images]
    assert len(images) == 5 and {image.get_clim() for image in images} == {(0, 7)}
    assert np.array_equal(images[3].get_array(), maps[3])
    figure = figures.magnitudes({"a": np.array([[1.0, -9]]), "b": np.array([[2.0, 3]])}, "x")
    assert {ax.images[0].get_clim() for ax in figure.axes[:2]} == {(0, 9)}
    assert figures.png(figures.patch_maps(np.zeros((1, 2, 2)), "outliers", "nothing")).startswith(b"\x89PNG")


@pytest.mark.slow
def test_a_head_on_text_and_on_images():
    labels, probs = ["[CLS]", "$", "$"], np.eye(3) / 2
    figure = figures.head_on_text(labels, probs, np.full((3, 2), -4.0), np.ones((3, 2)), "product", "a head")
    pictures = [ax.images[0] for ax in figure.axes[:3]]
    assert pictures[0].get_clim() == (0, 0.5) and pictures[1].get_clim() == pictures[2].get_clim() == (-4, 4)
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == labels and titles(figure)[2] == "product"
    assert figures.png(figure)
    assert len(figures.head_on_text(["x"] * 200, np.eye(200), np.ones((200, 2)), np.ones((200, 2)), "", "")
               .axes[0].get_xticklabels()) <= 64

    magnitudes = np.array([[1.0, 2], [np.nan, 3]])
    figure = figures.head_on_images(np.zeros((2, 8, 8, 3)), np.ones((2, 4, 4)), "outliers", magnitudes,
                                    ("outlier", "others"), np.ones((2, 4, 4)), np.ones((2, 17, 17)), "a head")
    bars = [ax for ax in figure.axes if ax.patches and len(ax.patches) == 2]
    assert [[bar.get_height() for bar in ax.patches] for ax in bars] == [[1, 2], [0, 3]]
    assert bars[1].texts[0].get_text() == "none" and bars[0].get_ylim() == bars[1].get_ylim()
    assert figures.png(figures.gates_on_tokens(labels, np.ones((2, 3)), "gates"))


def test_points_are_numbered_layer_and_head():
    figure = figures.heads(np.array([[0.1, 0.9]]), np.array([[1.0, 0.2]]), np.array([[3.0, 8]]), 1 / 3, "run")
    ax = figure.axes[0]
    assert [text.get_text() for text in ax.texts] == ["1.1", "1.2", "even attention"]
    assert ax.collections[0].get_offsets().tolist() == [[0.1, 1], [0.9, 0.2]]
    nothing = np.zeros((1, 1))
    assert figures.png(figures.heads(nothing, nothing, nothing, 1.0, "a head that attends to nothing"))


def test_grids_lie_over_histograms_on_equal_axes():
    values = {"wide": np.array([-1.0, 0, 1, 100]), "narrow": np.array([-1.0, 0, 1, 1])}
    figure = figures.grids(values, {"wide": (0.5, 2), "narrow": (0.01, 100)}, 8, "tap")
    wide, narrow, wide_zoom, narrow_zoom = figure.axes
    assert wide.get_xlim() == narrow.get_xlim() and wide.get_ylim() == narrow.get_ylim() and wide.get_yscale() == "log"
    assert wide_zoom.get_xlim() == narrow_zoom.get_xlim() == (-0.16, 0.16)
    assert wide_zoom.get_ylim() == narrow_zoom.get_ylim()
    assert sum(bar.get_height() for bar in wide.patches) == 4
    lines = lambda ax: [segment[0, 0] for segment in ax.collections[0].get_segments()]
    assert lines(wide_zoom) == [0] and lines(narrow_zoom) == pytest.approx(np.arange(-16, 17) / 100)
    assert lines(wide) == pytest.approx(0.5 * (np.arange(0, 256, 16) - 2))
    assert "1 of 256" in wide_zoom.get_title() and "33 of 256" in narrow_zoom.get_title()


# ---- the script ----

def pictures(folder):
    return {path.stem for path in folder.glob("*.png")}


EVERY_RUN = {"outliers-ffn_output", "outliers-layer_output", "norms", "heads", "magnitudes"}


@pytest.mark.slow
def test_every_family(runs, tmp_path):
    for family, more in {"bert": {"tokens", "head-0", "head-1"}, "opt": {"tokens", "head-0", "head-1"},
                         "vit": {"patches", "head"}}.items():
        out, _ = run("analyze.py", runs / family, "--batches", 2, "--out", tmp_path / family)
        assert pictures(tmp_path / family) == EVERY_RUN | more
        samples = 6 if family == "vit" else 16
        assert f"{family}, vanilla attention, step 6, measured on {samples} validation samples" in out
        table = out.split("the most idle first")[1].split("update:")[0]
        rows = [line.split(" | ") for line in table.splitlines() if re.match(r"\| \d", line)]
        assert len(rows) == 8 and [float(row[2]) for row in rows] == sorted(float(row[2]) for row in rows)
        assert "No value of layer_output is an outlier" in out  # a young run has none, and is drawn all the same
        assert (family == "vit") != ("Delimiters" in out)


@pytest.mark.slow
def test_gates_layer_head_and_a_page_that_stands_alone(runs, tmp_path):
    data = tmp_path / "moved.txt"
    data.write_text((runs / "text.txt").read_text())
    out, _ = run("analyze.py", runs / "gated", "--layer", 1, "--head", 4, "--gates", "--html", "--data", data,
                 "--batches", 1, "--out", tmp_path)
    assert "layer 1, head 4 at work" in out and pictures(tmp_path) >= {"gates", "gates-0", "gates-1"}
    page = (tmp_path / "analysis.html").read_text()
    assert page.count("<img ") == page.count('src="data:image/png;base64,') == len(pictures(tmp_path))
    assert "http" not in page and page.count("src=") == page.count("<img ") and "<link" not in page
    assert f"python analyze.py {runs / 'gated'} --layer 1 --head 4 --gates --html" in page
    assert page.count("<tr>") == len(re.findall(r"(?m)^\| (?!---)", out)) and "softmax input range" in page


@pytest.mark.slow
def test_curves(runs, tmp_path):
    out, _ = run("analyze.py", runs / "bert", runs / "gated", "--curves", "--out", tmp_path)
    last = json.loads((runs / "gated" / "metrics.jsonl").read_text().splitlines()[-1])
    assert pictures(tmp_path) == {"curves"} and f"-> {last['perplexity']:.4g}" in out
    assert f"-> {max(last['ffn_output']['inf_norm']):.4g}" in out and out.count("\n| ") == 4


def test_compare(runs, tmp_path):
    out, _ = run("analyze.py", runs / "bert", runs / "clipped", "--compare", "--batches", 1, "--layer", 2, "--html",
                 "--out", tmp_path)
    assert pictures(tmp_path) == {"grids", "magnitudes"} and "ffn_output of layer 2" in out
    model = from_checkpoint(load_checkpoint(runs / "clipped"), "").eval()
    batches = open_run(runs / "clipped", torch.device("cpu")).validation(1)
    with analysis.record(model, ("ffn_output",)) as kept, torch.no_grad():
        model(*next(batches)[0])
    x = kept["ffn_output"][1].numpy()
    step = (x.max() - x.min()) / 255
    low, high = np.percentile(x, (0.5, 99.5))
    row = re.search(r"\| \S+clipped \|.*", out).group().split(" | ")
    assert float(row[3]) == pytest.approx(step, rel=5e-3)
    assert int(row[4].rstrip(" |")) == pytest.approx((high - low) / step + 1, abs=1)


def test_without_matplotlib_the_numbers_are_printed(runs, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # importing it fails
    monkeypatch.delitem(sys.modules, "minq.figures")
    monkeypatch.delattr(minq, "figures")
    out, _ = run("analyze.py", runs / "bert", "--batches", 1, "--out", tmp_path / "figures")
    assert "pip install -e '.[plots]'" in out and "the most idle first" in out and not (tmp_path / "figures").exists()
