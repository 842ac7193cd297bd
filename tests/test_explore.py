"""docs/explore.html: well formed, labelled, alone in the world; its arithmetic is minq's, asked in
a real browser: Chromium, Chrome or Edge on the PATH. Without one those tests are skipped."""
import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from statistics import NormalDist

import pytest
import torch

from minq.attention import LinearGate, clipped_softmax
from minq.quant import affine_parameters, fake_quantize, quantize

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "explore.html"
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
        if tag == "input":  # a legend is the question of what lies in a label
            assert attributes.get("id") in labelled or {"label", "fieldset"} <= set(inside)
        if tag == "svg":
            assert "aria-hidden" in attributes or attributes["role"] and attributes["aria-label"]
    for used in re.findall(r'(?:byId|write|canvas|announce|number)\("([\w-]+)"[,)]', SOURCE):
        assert used in ids


def test_every_panel_names_its_source():
    panels = re.findall(r'<p class="same">.*?"\.\./(minq/\w+\.py)">(.*?)</p>', SOURCE, re.DOTALL)
    assert len(panels) == 3
    for source, functions in panels:
        for name in re.findall(r"<code>(\w+)</code>", functions):
            assert re.search(rf"^(def|class) {name}\b", (ROOT / source).read_text(), re.MULTILINE)


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
    page. Fails where the page has raised an error or loaded anything."""
    browser = next(filter(None, map(shutil.which, BROWSERS.split())), None)
    if browser is None:
        pytest.skip(f"none of {BROWSERS} on the PATH")
    page = tmp_path_factory.mktemp("explore") / "page.html"

    def ask(script, given=None):
        asked = ASKED.replace("SCRIPT", script).replace("GIVEN", json.dumps(given))
        page.write_text(SOURCE.replace("<head>", FIRST).replace("</body>", asked))
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
        const both = [quantize, fakeQuantize].map(f => x.map(v => f(v, grid, bits)));
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
