"""docs/explore.html: well formed, labelled, alone in the world; its arithmetic and its model are
minq's, asked in a real browser: Chromium, Chrome or Edge on the PATH. Without one those tests are
skipped."""
import base64
import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from itertools import product
from pathlib import Path
from statistics import NormalDist

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from minq.attention import LinearGate, clipped_softmax
from minq.model import Opt, OptConfig
from minq.outliers import listening
from minq.quant import (ActivationQuantizer, affine_parameters, fake_quantize, quantize,
                        quantize_model)
from minq.runs import open_run
from explore import PAGE, page_with
from running import SMALL, run

ROOT = Path(__file__).parent.parent
SOURCE = PAGE.read_text()
BROWSERS = "chromium chromium-browser google-chrome google-chrome-stable chrome microsoft-edge"


# ---- without a browser ----

class Tree(HTMLParser):
    """Every element as (tag, attributes, tags it lies in); complains where an end is missing."""

    def __init__(self, source):
        super().__init__()
        self.elements, self.open = [], []
        self.feed(source)
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        self.handle_startendtag(tag, attributes)
        if tag not in ("meta", "link", "input", "br", "hr", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):  # <path/>, inside svg
        self.elements.append((tag, dict(attributes), tuple(self.open)))

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> at line {self.getpos()[0]}"
        self.open.pop()


def test_the_page_is_well_formed_and_alone():
    elements = Tree(SOURCE).elements
    assert len(SOURCE.encode()) <= 400_000
    assert not re.search(r"https?:|@import|url\(|fetch\(|XMLHttpRequest|\bimport\b", SOURCE)
    ids = [attributes["id"] for _, attributes, _ in elements if "id" in attributes]
    labelled = [attributes.get("for") for tag, attributes, _ in elements if tag == "label"]
    assert len(ids) == len(set(ids)) and SOURCE.startswith("<!DOCTYPE html>")
    for tag, attributes, inside in elements:
        assert "src" not in attributes
        target, _, anchor = attributes.get("href", "").partition("#")
        assert not target or target == "data:," or (PAGE.parent / target).exists(), target
        named = [attributes.get("for"), attributes.get("aria-labelledby"), anchor]
        assert set(filter(None, named)) <= set(ids)
        if tag in ("input", "textarea"):  # a legend is the question of what lies in a label
            assert attributes.get("id") in labelled or {"label", "fieldset"} <= set(inside)
        if tag == "svg":
            assert "aria-hidden" in attributes or attributes["role"] and attributes["aria-label"]
    for used in re.findall(r'(?:byId|write|canvas|announce|number)\("([\w-]+)"[,)]', SOURCE):
        assert used in ids


def test_every_panel_names_its_source():
    panels = re.findall(r'<p class="same">.*?"\.\./(minq/\w+\.py)">(.*?)</p>', SOURCE, re.DOTALL)
    assert len(panels) == 4
    for source, functions in panels:
        for name in re.findall(r"<code>(\w+)</code>", functions):
            assert re.search(rf"^(def|class) {name}\b|import .*\b{name}\b",
                             (ROOT / source).read_text(), re.MULTILINE)


# ---- in a browser ----

ASKED = """<script>
const answer = (given => { SCRIPT })(GIVEN), loaded = performance.getEntriesByType("resource");
const all = JSON.stringify([answer, errors, loaded.length]);
document.documentElement.innerHTML = `<pre>${all}</pre>`;
</script></body>"""
FIRST = """<head><script>
var errors = []; addEventListener("error", event => errors.push(event.message));
</script>"""


@pytest.fixture(scope="module")
def ask(tmp_path_factory):
    """ask(script, given): what the script, the body of a function of `given`, returns inside the
    page, or one with another `source`. Fails where that has raised an error or loaded anything."""
    browser = next(filter(None, map(shutil.which, BROWSERS.split())), None)
    if browser is None:
        pytest.skip(f"none of {BROWSERS} on the PATH")
    page = tmp_path_factory.mktemp("explore") / "page.html"

    def ask(script, given=None, source=SOURCE):
        asked = ASKED.replace("SCRIPT", script).replace("GIVEN", json.dumps(given))
        page.write_text(source.replace("<head>", FIRST).replace("</body>", asked))
        command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
                   "--disable-dev-shm-usage", f"--user-data-dir={page.parent}", "--dump-dom",
                   page.as_uri()]
        said = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        found = re.search("<pre>(.*)</pre>", said.stdout, re.DOTALL)
        assert found, said.stderr
        answer, errors, loaded = json.loads(html.unescape(found[1]))
        assert (errors, loaded) == ([], 0)
        return answer
    return ask


def wide_samples():
    """(bits, values) of many sizes, of one sign only; the first 200 of them make the grid, the
    others are its exact half-steps, also beyond its ends."""
    generator = torch.Generator().manual_seed(0)
    for n_bits in (8, 7, 6, 5, 4):
        for shift in (0.0, 0.3, 5.0, -5.0):
            x = (torch.randn(200, generator=generator) + shift) * 10 ** (shift / 2)
            scale, _ = affine_parameters(x.min(), x.max(), n_bits)
            yield n_bits, torch.cat((x, (torch.arange(-300, 300) + 0.5) * scale))
    yield 8, torch.zeros(3)


@pytest.mark.slow
def test_the_grid_is_minqs_bit_for_bit(ask):
    samples = list(wide_samples())
    answers = ask("""return given.map(([bits, x]) => {
        const grid = affineParameters(Math.min(...x.slice(0, 200)), Math.max(...x.slice(0, 200)),
                                      bits);
        const both = [quantize, fakeQuantize].map(f => x.map(v => f(v, grid)));
        return [grid.scale, grid.zeroPoint, ...both];
    });""", [(n_bits, x.tolist()) for n_bits, x in samples])
    for (n_bits, x), answer in zip(samples, answers, strict=True):
        grid = *affine_parameters(x[:200].min(), x[:200].max(), n_bits), n_bits
        for ours, pages in zip((*grid[:2], quantize(x, *grid), fake_quantize(x, *grid)), answer):
            assert torch.equal(ours, torch.tensor(pages, dtype=torch.float32))


@pytest.mark.slow
def test_the_panels_show_minqs_numbers(ask):
    grids, rows, heads = ask("""
    const slide = (id, value) => {
      byId(id).value = value; byId(id).dispatchEvent(new Event("input")); };
    const press = (name, value) =>
      document.querySelector(`input[name=${name}][value="${value}"]`).click();
    const grids = [], rows = [], heads = [];
    const shown = ["grid-scale", "grid-zero", "grid-levels", "grid-error"];
    for (const bits of [8, 6, 4]) for (const place of [0, 34, 100]) {
      press("bits", bits); slide("outlier", place);
      grids.push([outlier, bits, ...shown.map(id => byId(id).textContent)]);
    }
    for (const gamma of [0, -0.03, -0.3]) for (const zeta of [1, 1.03, 1.25]) {
      press("head", "busy"); slide("gamma", gamma); slide("zeta", zeta);
      const cells = [...byId("clip-rows").rows].map(row => row.cells[2].innerText);
      rows.push([SCORES.busy, gamma, zeta, clippedSoftmax(SCORES.busy, gamma, zeta), cells]);
    }
    for (const gap of [0, 3.2, 7]) for (const tokens of [8, 128]) for (const piHat of [-7, 0, 4]) {
      const says = headSays(gap, tokens, piHat);
      heads.push([gap, tokens, piHat, ...["plain", "clipped", "gated"].map(x => says[x].through)]);
    }
    return [grids, rows, heads];""")
    half = [round(NormalDist().inv_cdf((i + 0.5) / 100), 2) for i in range(50, 100)]
    for outlier, n_bits, *figures in grids:
        x = torch.tensor([*half, *(-value for value in half), outlier])
        grid = *affine_parameters(x.min(), x.max(), n_bits), n_bits
        levels, back = quantize(x, *grid)[:-1], fake_quantize(x, *grid)
        error = (back - x)[:-1].square().mean().sqrt()
        ours = map(float, (*grid[:2], levels.max() - levels.min() + 1, error))
        assert [*map(float, figures)] == pytest.approx([*ours], abs=0.00051)
    for scores, gamma, zeta, pages, cells in rows:
        ours = clipped_softmax(torch.tensor(scores), gamma, zeta).tolist()
        assert pages == pytest.approx(ours, abs=1e-6)
        assert [cell.startswith("exactly") for cell in cells] == [p in (0, 1) for p in ours]
    for gap, tokens, pi_hat, *pages in heads:
        scores, gate = torch.tensor([gap] + [0.0] * (tokens - 1)), LinearGate(width=2, heads=1)
        torch.nn.init.constant_(gate.bias, pi_hat)
        plain, clipped = (clipped_softmax(scores, gamma)[1:].sum() for gamma in (0, -0.03))
        pi = gate(torch.zeros(1, 1, 2), None).item()
        assert pages == pytest.approx([plain.item(), clipped.item(), pi * plain.item()],
                                      rel=1e-4, abs=1e-6 * tokens)


# ---- its model ----

FLOATING, BOTH = (16, False, False, False), (True, True)  # bits, weights, activations, removed
SETTINGS = [(16, *BOTH, False), (16, *BOTH, True), (8, *BOTH, False), (7, *BOTH, True),
            (6, False, True, False), (5, True, False, True), (4, *BOTH, False)]
TEXTS = ["def f(x):\n    return x + 1\n",
         "It was the best of times, it was the worst of times, it was the age of wisdom, <&>",
         "x = \u00e9t\u00e9", "#"]
ASKED_OF_THE_MODEL = """return given[1].map(text => given[0].map(setting => {
    const [bits, weights, activations, removed] = setting;
    const how = {bits, weights, activations, removed};
    const lasts = sequences(text).map(({tokens}) => forward(tokens, how).logits.at(-1));
    return [perplexity(text, how), lasts.map(row => Array.from(row))];
}));"""


def shipped(source=SOURCE):
    """(minq's model with the weights in the page, all that the page knows of it)"""
    there = json.loads(re.search(r'id="model">\n(.*)\n</script>', source)[1])
    model = Opt(OptConfig(**there["config"])).eval()
    packed, at = base64.b64decode(there["packed"]), 0
    assert there["shapes"] == {name: [*weight.shape] for name, weight in model.named_parameters()}
    for weight in model.parameters():
        n, end = len(weight), at + 4 * len(weight)
        scales = np.frombuffer(packed, np.float32, n, at).reshape(n, 1)
        integers = np.frombuffer(packed, np.int8, weight.numel(), end).reshape(n, -1)
        weight.data, at = torch.tensor(scales * integers).view_as(weight), end + weight.numel()
    assert at == len(packed)
    return model, there


def as_set(model, there, bits, weights, activations, removed):
    """The quantized model that the page's settings stand for, with the page's ranges, in float64,
    as the page computes: in float32 a sum may be rounded to another side of a level."""
    only = "*" if weights and activations else "*.weight" if weights else "*_tap"
    model = quantize_model(model, bits, bits, only=only).double()
    for name, tap in model.named_modules():
        if isinstance(tap, ActivationQuantizer):
            ends = there["removed" if removed else "kept"][name.removesuffix("_tap")]
            tap.scale, tap.zero_point = affine_parameters(*torch.tensor(ends), bits)
    for layer, dimensions in there["outliers"].items() if removed else ():
        def remove(module, args, output, dimensions=dimensions):
            output[:, 0, dimensions] = 0.0
        model.layers[int(layer)].ffn_down.register_forward_hook(remove)
    return model


@torch.no_grad()
def minq_says(model, text):
    """(perplexity of a text, the last logits of each sequence of it)"""
    targets = torch.tensor([*text.encode()]).split(model.config.seq_len)
    logits = [model(F.pad(part[:-1], (1, 0), value=257)[None])[0] for part in targets]
    loss = F.cross_entropy(torch.cat(logits), torch.cat(targets))
    return loss.exp().item(), [part[-1].tolist() for part in logits]


def assert_the_model_is_minqs(ask, source):
    model, there = shipped(source)
    answers = ask(ASKED_OF_THE_MODEL, [[FLOATING, *SETTINGS], TEXTS], source)
    for text, (floating, *quantized) in zip(TEXTS, answers, strict=True):
        perplexity, logits = minq_says(model, text)  # in float32
        assert floating[0] == pytest.approx(perplexity, rel=1e-4)
        assert np.allclose(floating[1], logits, rtol=0, atol=1e-4)
        if text is TEXTS[0]:  # of a kind with the training text: within the ranges
            assert quantized[0][0] == pytest.approx(perplexity, rel=0.01)  # 16 bits
        for setting, (perplexity, logits) in zip(SETTINGS, quantized, strict=True):
            ours = minq_says(as_set(model, there, *setting), text)
            assert perplexity == pytest.approx(ours[0], rel=1e-6), setting
            assert np.allclose(logits, ours[1], rtol=0, atol=1e-6), setting


@pytest.mark.slow
def test_the_model_is_minqs(ask):
    assert_the_model_is_minqs(ask, SOURCE)


@pytest.mark.slow
def test_the_last_panel_shows_the_model(ask):
    text, setting = 3 * TEXTS[0], (6, True, True, True)
    answer = ask("""
    const shown = ["live-float", "live-perplexity", "live-largest", "live-parked", "live-even"];
    const press = (name, value) =>
        document.querySelector(`input[name=${name}][value="${value}"]`).click();
    byId("own-text").value = given;
    byId("live-bits").value = 6;
    press("rounded", "both"); press("removed", "yes");
    press("live-layer", 2); press("live-head", 3);
    const figures = shown.map(id => byId(id).textContent), how = liveSettings();
    clearTimeout(next); known = {};
    for (const bits of [4, 10, 16]) for (const removed of [false, true])
        perplexityOf({...how, bits, removed});
    drawCurves(how);
    const curves = known, points = ["circle", "path.f-blue"].map(
        kind => document.querySelectorAll(`#curve-picture ${kind}`).length);
    byId("own-text").value = "";
    drawLive();
    return [figures, curves, points, shown.map(id => byId(id).textContent)];""", text)
    figures, curves, points, without_text = answer
    model, there = shipped()
    quantized, seen = as_set(model, there, *setting), {}
    perplexity = [minq_says(part, text)[0] for part in (model, quantized)]
    with torch.no_grad(), listening(quantized, ("layer_output", "probs"),
                                    lambda tap, place, x: seen.setdefault((tap, place), x)):
        minq_says(quantized, text[:32])
    parked = seen["probs", 2][0, 3, :, 0].mean()
    even = (1 / torch.arange(1, 33)).mean()
    largest = seen["layer_output", 2].abs().max()
    assert figures == [f"{perplexity[0]:.3g}", f"{perplexity[1]:.3g}", f"{largest:.2f}",
                       f"{100 * parked:.0f}%",
                       f"attention of head 4 on the start token (even: {100 * even:.0f}%)"]
    assert points == [4, 4] and len(curves) == 1 + 6  # all that is known, and a key
    for bits, removed in product((4, 10, 16), (False, True)):
        ours = minq_says(as_set(model, there, bits, True, True, removed), text)[0]
        pages = curves[f"{bits},true,true,{str(removed).lower()}"]
        assert pages == pytest.approx(ours, rel=1e-6)
    assert without_text[:4] == 4 * ["\u2013"]


@pytest.mark.slow
def test_what_the_page_says_of_the_model_holds():
    model, there = shipped()
    five = [as_set(model, there, 5, False, True, removed).float() for removed in (True, False)]
    without = as_set(model, there, 16, False, True, removed=True).float()
    run = open_run(ROOT / there["run"], torch.device("cpu"))
    before, *after = map(run.score, (model, without, *five))
    said = re.search(r"rises by (\S+)% in floating point.*?rises by (\d+)%\s+instead of (\d+)%",
                     SOURCE, re.DOTALL)
    lost = [100 * (perplexity / before - 1) for perplexity in after]
    assert [*map(float, said.groups())] == pytest.approx(lost, abs=0.6)
    assert run.score(run.model) == pytest.approx(before, rel=1e-3)  # what eight bits per row cost


# ---- tests/explore.py ----

@pytest.mark.slow
def test_the_page_has_the_run_that_it_names():
    (_, here), (model, again) = shipped(), shipped(page_with(ROOT / "zoo" / "opt-vanilla"))
    assert here["run"] == "zoo/opt-vanilla" and here["outliers"] == again["outliers"]
    assert here["packed"] == again["packed"]
    for ranges in ("kept", "removed"):
        assert {*here[ranges]} == {name.removesuffix("_tap") for name, _ in model.named_modules()
                                   if name.endswith("_tap")}
        for tap in here[ranges]:
            assert here[ranges][tap] == pytest.approx(again[ranges][tap], rel=1e-3, abs=1e-3)
    for layer, dimensions in here["outliers"].items():  # nothing of them is left
        tap, width = f"layers.{layer}.ffn_output", here["config"]["width"]
        widths = [ranges[tap][1] - ranges[tap][0] for ranges in (here["kept"], here["removed"])]
        assert (widths[1] < widths[0] / 2) == bool(dimensions) and len(dimensions) < width / 10


@pytest.mark.slow
@pytest.mark.parametrize("flags", ["--attention gated --gate-init 0.2",
                                   "--attention clipped --gamma -0.2"])
def test_another_run_can_be_put_in(ask, corpus, tmp_path, flags):
    run("train_opt.py", *SMALL, *flags.split(), "--data", corpus, "--out", tmp_path / "run")
    assert_the_model_is_minqs(ask, page_with(tmp_path / "run"))
