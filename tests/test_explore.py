"""docs/explore.html: well formed, labelled, alone in the world; its arithmetic is minq's, asked in a real browser.

The browser tests need Chromium, Chrome or Edge on the PATH, and are skipped without one.
"""
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
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "microsoft-edge")
VOID = {"meta", "link", "input", "br", "hr", "img"}  # elements without an end


# ---- without a browser ----

class Tree(HTMLParser):
    """Every element as (tag, attributes, tags it lies in); complains where an end is missing."""

    def __init__(self, source):
        super().__init__()
        self.elements, self.open = [], []
        self.feed(source)
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes), tuple(self.open)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):  # <path/>, inside svg
        self.elements.append((tag, dict(attributes), tuple(self.open)))

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> at line {self.getpos()[0]} closes {self.open[-1:]}"
        self.open.pop()

    def all(self, tag):
        return [attributes for name, attributes, _ in self.elements if name == tag]


TREE = Tree(SOURCE)
IDS = [attributes["id"] for _, attributes, _ in TREE.elements if "id" in attributes]


def test_the_page_is_small():
    assert len(SOURCE.encode()) < 60_000


def test_the_page_asks_nobody_for_anything():
    assert not re.search(r"https?:|@import|url\(|fetch\(|XMLHttpRequest|WebSocket|EventSource|sendBeacon|\bimport\b", SOURCE)
    assert not [attributes for _, attributes, _ in TREE.elements if "src" in attributes or "srcset" in attributes]
    assert [link["href"] for link in TREE.all("link")] == ["data:,"]  # no favicon either
    policy = next(meta["content"] for meta in TREE.all("meta") if "http-equiv" in meta)
    assert policy.startswith("default-src 'none';")


def test_the_page_is_well_formed():
    assert SOURCE.startswith("<!DOCTYPE html>") and TREE.all("html") == [{"lang": "en"}]
    assert any(meta.get("name") == "viewport" for meta in TREE.all("meta"))
    assert len(IDS) == len(set(IDS))
    for _, attributes, _ in TREE.elements:
        named = [attributes.get("for"), attributes.get("aria-labelledby"), attributes.get("href", "").partition("#")[2]]
        assert set(filter(None, named)) <= set(IDS)
    for used in re.findall(r'(?:byId|write|canvas|announce|number)\("([\w-]+)"[,)]', SOURCE):
        assert used in IDS


def test_every_control_has_a_label():
    labelled = {label.get("for") for label in TREE.all("label")}
    controls = [(attributes, inside) for tag, attributes, inside in TREE.elements if tag == "input"]
    assert sum(attributes["type"] == "range" for attributes, _ in controls) == 5
    for attributes, inside in controls:
        if attributes["type"] == "range":
            assert attributes["id"] in labelled
        else:
            assert "label" in inside and "fieldset" in inside  # whose legend is the question
    assert len(TREE.all("legend")) == len(TREE.all("fieldset"))
    for svg in TREE.all("svg"):
        assert svg.get("aria-hidden") == "true" or svg["role"] == "img" and svg["aria-label"]


def test_every_panel_asks_tells_and_names_its_source():
    panels = re.findall(r"<section.*?</section>", SOURCE, re.DOTALL)
    assert len(panels) == 3
    for panel in panels:
        assert re.search(r"<h2[^>]*>[^<]*\?[”]?</h2>", panel)
        assert "What to notice" in panel and 'aria-live="polite"' in panel and re.search(r"Equations? \d", panel)
        source, functions = re.search(r'<p class="same">.*?<a href="\.\./(minq/\w+\.py)">(.*?)</p>', panel, re.DOTALL).groups()
        names = re.findall(r"<code>(\w+)</code>", functions)
        assert names
        for name in names:
            assert re.search(rf"^(def|class) {name}\b", (ROOT / source).read_text(), re.MULTILINE), f"no {name} in {source}"


def test_links_lead_somewhere():
    for link in TREE.all("a"):
        assert link["href"].startswith("#") or (PAGE.parent / link["href"]).exists(), link["href"]


def luminance(colour):
    """WCAG 2's relative luminance of #rrggbb."""
    channels = [int(colour[i:i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", range(3), ids=["light", "dark", "print"])
def test_text_can_be_read(scheme):
    """WCAG 2 AA: 4.5 to 1 for every colour that text has, on every ground that it stands on."""
    roots = re.findall(r":root \{(.*?)\}", SOURCE, re.DOTALL)
    expand = lambda colour: colour if len(colour) == 7 else "#" + "".join(2 * digit for digit in colour[1:])
    colours = {name: expand(value) for name, value in re.findall(r"--(\w+): (#\w{3,6});", roots[scheme])}
    for text in ("ink", "soft", "blue", "orange"):
        for ground in ("paper", "card", "tint"):
            dark, light = sorted((luminance(colours[text]), luminance(colours[ground])))
            assert (light + 0.05) / (dark + 0.05) >= 4.5, f"{text} on {ground}"


def test_the_ordinary_values_are_the_quantiles_of_a_bell_curve():
    half = json.loads(re.search(r"const HALF = (\[.*?\]);", SOURCE, re.DOTALL)[1])
    assert half == [round(NormalDist().inv_cdf((i + 0.5) / 100), 2) for i in range(50, 100)]


# ---- in a browser ----

BEFORE = """<head><script>
var errors = [], setTimeout = call => call();  // what waits for the hand to rest is said at once
addEventListener("error", event => errors.push(event.message));
addEventListener("securitypolicyviolation", event => errors.push(event.violatedDirective));
Element.prototype.setPointerCapture = () => {};  // refuses pointers that are not real
</script>"""

AFTER = """<script>
const answer = (given => { SCRIPT })(GIVEN), loaded = performance.getEntriesByType("resource").length;
parent.document.getElementById("answer").textContent = JSON.stringify({answer, errors, loaded, width: innerWidth});
</script></body>"""

# Windows have a least width, which is more than a phone's; frames have none.
FRAME = '<!DOCTYPE html><pre id="answer"></pre><iframe style="width: WIDTHpx; height: 900px; border: 0" srcdoc="PAGE"></iframe>'


def dump(browser, source, folder):
    """The page's document after its scripts have run, as text."""
    page = folder / "page.html"
    page.write_text(source)
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
               f"--user-data-dir={folder / 'profile'}", "--window-size=1400,1000", "--dump-dom", page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False).stdout


def working_browser(folder):
    found = [path for path in map(shutil.which, BROWSERS) if path]
    for path in found:
        try:
            if "it is 42" in dump(path, "<p><script>document.write('it is ' + 6 * 7)</script>", folder):
                return path
        except (OSError, subprocess.TimeoutExpired):
            pass
    tried = f"cannot show a page with {', '.join(found)}" if found else f"none of {', '.join(BROWSERS)} on the PATH"
    pytest.skip(f"no browser to try docs/explore.html in: {tried}")


@pytest.fixture(scope="module")
def ask(tmp_path_factory):
    """ask(script, given): what the script, the body of a function of `given`, returns inside the page.

    Fails where the page has raised an error, broken its own policy or loaded anything.
    """
    folder = tmp_path_factory.mktemp("explore")
    browser = working_browser(folder)

    def ask(script, given=None, width=1280):
        after = AFTER.replace("SCRIPT", script).replace("GIVEN", json.dumps(given))
        source = SOURCE.replace("<head>", BEFORE).replace("</body>", after)
        frame = FRAME.replace("WIDTH", str(width)).replace("PAGE", html.escape(source))
        found = re.search(r'<pre id="answer">(.+?)</pre>', dump(browser, frame, folder), re.DOTALL)
        assert found, "the page's script has stopped"
        said = json.loads(html.unescape(found[1]))
        assert (said["errors"], said["loaded"], said["width"]) == ([], 0, width)
        return said["answer"]
    return ask


def wide_samples():
    """(bits, values) of many sizes, among them the exact half-steps of their grid; of one sign only; all zero."""
    generator = torch.Generator().manual_seed(0)
    for n_bits in (8, 7, 6, 5, 4):
        for shift in (0.0, 0.3, 5.0, -5.0):
            x = (torch.randn(200, generator=generator) + shift) * 10 ** torch.empty(1).uniform_(-3, 3, generator=generator)
            scale, _ = affine_parameters(x.min(), x.max(), n_bits)
            yield n_bits, torch.cat((x, ((torch.arange(-150, 150) + 0.5) * scale).clamp(x.min(), x.max())))
    yield 8, torch.zeros(3)


@pytest.mark.slow
def test_the_grid_is_minqs_bit_for_bit(ask):
    samples = list(wide_samples())
    answers = ask("""return given.map(([bits, x]) => {
        const grid = affineParameters(Math.min(...x), Math.max(...x), bits);
        return [grid.scale, grid.zeroPoint, x.map(v => quantize(v, grid, bits)), x.map(v => fakeQuantize(v, grid, bits))];
    });""", [(n_bits, x.tolist()) for n_bits, x in samples])
    divided = upwards = 0  # how many values would notice another rounding
    for (n_bits, x), answer in zip(samples, answers):
        scale, zero_point = affine_parameters(x.min(), x.max(), n_bits)
        on_grid = [scale, zero_point, quantize(x, scale, zero_point, n_bits), fake_quantize(x, scale, zero_point, n_bits)]
        for ours, pages in zip(on_grid, answer):
            assert torch.equal(ours, torch.tensor(pages, dtype=torch.float32))
        divided += ((x / scale).round() != (x * (1 / scale)).round()).sum()
        upwards += ((x * (1 / scale) + 0.5).floor() != (x * (1 / scale)).round()).sum()
    assert divided > 0 and upwards > 0


def minqs_grid(outlier, n_bits):
    """Scale, zero point, levels that are left to the ordinary values, and their error."""
    half = torch.tensor([round(NormalDist().inv_cdf((i + 0.5) / 100), 2) for i in range(50, 100)])
    x = torch.cat((half, -half, torch.tensor([float(outlier)])))
    scale, zero_point = affine_parameters(x.min(), x.max(), n_bits)
    integers, on_grid = quantize(x, scale, zero_point, n_bits)[:-1], fake_quantize(x, scale, zero_point, n_bits)[:-1]
    error = (on_grid - x[:-1]).double().square().mean().sqrt()
    return [scale.item(), zero_point.item(), (integers.max() - integers.min() + 1).item(), error.item()]


OPERATE = """
const press = (name, value) => document.querySelector(`input[name=${name}][value="${value}"]`).click();
const slide = (id, value) => { byId(id).value = value; byId(id).dispatchEvent(new Event("input", {bubbles: true})); };
const read = ids => ids.map(id => byId(id).textContent);
"""


@pytest.mark.slow
def test_panel_1_shows_minqs_numbers(ask):
    """Slider, buttons, and the diamond itself."""
    shown = ask(OPERATE + """
    const seen = [], look = how => seen.push([how, outlier, Number(chosen("bits")), byId("outlier-value").textContent,
        byId("grid-live").textContent, ...read(["grid-scale", "grid-zero", "grid-levels", "grid-error"])]);
    for (const bits of [8, 7, 6, 5, 4]) {
      press("bits", bits);
      for (const place of [0, 13, 34, 61, 88, 100]) { slide("outlier", place); look("slider"); }
      for (const button of document.querySelectorAll("[data-outlier]")) { button.click(); look("button"); }
      const svg = byId("grid-picture"), box = svg.getBoundingClientRect(), at = fraction => (
        {clientX: box.left + fraction * box.width, clientY: box.top + 60, bubbles: true, pointerId: 1});
      svg.querySelector(".grab").dispatchEvent(new PointerEvent("pointerdown", at(0.3))); look("drag");
      svg.dispatchEvent(new PointerEvent("pointermove", at(0.6))); look("drag");
      svg.dispatchEvent(new PointerEvent("pointerup", at(0.6)));
      svg.dispatchEvent(new PointerEvent("pointermove", at(0.9))); look("drag");
    }
    return seen;""")
    assert len(shown) == 5 * (6 + 4 + 3)
    for _, outlier, n_bits, value, live, *figures in shown:
        assert [float(figure) for figure in figures] == pytest.approx(minqs_grid(outlier, n_bits), abs=0.00051)
        assert value.startswith(f"{outlier:g}") and f"Outlier {outlier:g}, {n_bits} bits" in live and figures[-1] in live
    assert [outlier for how, outlier, *_ in shown if how == "button"] == [3, 20, 200, 700] * 5
    start, end, after = [outlier for how, outlier, *_ in shown if how == "drag"][:3]
    assert 200 < start < 280 and 440 < end < 520 and after == end
    ends = [outlier for how, outlier, *_ in shown if how == "slider"][:6]
    assert ends[0] == 3 and ends[-1] == 800 and ends == sorted(ends)


def exact(p, low, high, margin=1e-6):
    """Which softmax values lie clearly off both thresholds, so that no rounding decides."""
    return ((p - low).abs() > margin) & ((p - high).abs() > margin)


@pytest.mark.slow
def test_clipped_softmax_is_minqs(ask):
    torch.manual_seed(0)
    rows = 4 * torch.randn(60, 9)
    stretches = [(gamma, zeta) for gamma in (0.0, -0.003, -0.03, -0.1, -0.3) for zeta in (1.0, 1.003, 1.03, 1.3)]
    answers = ask("return given[1].map(([g, z]) => given[0].map(row => clippedSoftmax(row, g, z)));",
                  [rows.tolist(), stretches])
    zeros = ones = 0
    for (gamma, zeta), answer in zip(stretches, answers):
        pages, ours = torch.tensor(answer, dtype=torch.float64), clipped_softmax(rows, gamma, zeta)
        torch.testing.assert_close(pages, ours.double(), atol=1e-6, rtol=0)
        clear = exact(rows.softmax(-1), -gamma / (zeta - gamma), (1 - gamma) / (zeta - gamma))
        assert torch.equal((pages == 0)[clear], (ours == 0)[clear]) and torch.equal((pages == 1)[clear], (ours == 1)[clear])
        zeros, ones = zeros + (ours == 0).sum(), ones + (ours == 1).sum()
    assert zeros > 1000 and ones > 100


@pytest.mark.slow
def test_panel_2_shows_minqs_numbers(ask):
    shown = ask(OPERATE + """
    const seen = [];
    for (const head of ["idle", "busy"]) for (const gamma of [0, -0.03, -0.1, -0.3]) for (const zeta of [1, 1.03, 1.25]) {
      press("head", head); slide("gamma", gamma); slide("zeta", zeta);
      const cells = [...byId("clip-rows").rows].map(row => row.cells[2].innerText);
      seen.push([SCORES[head], gamma, zeta, cells, ...read(["clip-low", "clip-high", "clip-zeros", "clip-sum"])]);
    }
    return seen;""")
    assert len(shown) == 24
    for scores, gamma, zeta, cells, low, high, zeros, total in shown:
        p = clipped_softmax(torch.tensor(scores), gamma, zeta)
        assert low == ("never" if gamma == 0 else f"{-gamma / (zeta - gamma):.3f}")
        assert high == ("never" if zeta == 1 else f"{(1 - gamma) / (zeta - gamma):.3f}")
        assert int(zeros) == (p == 0).sum() and float(total) == pytest.approx(p.sum().item(), abs=0.00051)
        for cell, value in zip(cells, p.tolist(), strict=True):
            assert cell.startswith("exactly") == (value in (0, 1))
            assert float(cell.removeprefix("exactly").split()[0]) == pytest.approx(value, abs=0.00051)
    assert any("exactly 1" in cell for *_, cells, _, _, _, _ in shown for cell in cells)


@torch.no_grad()
def minqs_head(gap, tokens, pi_hat):
    """What a head takes of the tokens beside the full stop, whose value is 0: plain, clipped, gated (eq. 3 to 7)."""
    scores = torch.tensor([gap] + [0.0] * (tokens - 1))
    values = torch.tensor([0.0] + [1.0] * (tokens - 1))
    gate = LinearGate(width=2, heads=1)
    torch.nn.init.zeros_(gate.weight)
    torch.nn.init.constant_(gate.bias, pi_hat)
    plain = clipped_softmax(scores) @ values
    clipped = clipped_softmax(scores, gamma=-0.03) @ values
    gated = plain * gate(torch.zeros(1, 1, 2)).squeeze()
    return [plain.item(), clipped.item(), gated.item()]


CASES = [(gap, tokens, pi_hat) for gap in (0.0, 1.0, 2.5, 3.2, 3.4, 7.0, 14.0) for tokens in (8, 32, 128)
         for pi_hat in (-10.0, -7.0, -2.0, 0.0, 4.0)]


@pytest.mark.slow
def test_a_head_says_what_minqs_head_says(ask):
    """And crosses a thousandth where the page says that it does."""
    answers = ask("""return given.map(([gap, tokens, piHat]) => {
        const says = headSays(gap, tokens, piHat), shares = [says.plain.through, says.clipped.through, says.gated.through];
        return [shares, Object.values(gapNeeded(tokens, piHat))];
    });""", CASES)
    needed = set()
    for (gap, tokens, pi_hat), (shares, gaps) in zip(CASES, answers, strict=True):
        ours = minqs_head(gap, tokens, pi_hat)
        assert shares == pytest.approx(ours, rel=1e-5, abs=2e-6 * tokens if ours[1] else 0)
        assert (shares[1] == 0) == (ours[1] == 0)
        for kind, enough in enumerate(gaps):
            assert minqs_head(enough + 0.01, tokens, pi_hat)[kind] < 0.001
            assert enough == 0 or minqs_head(enough - 0.01, tokens, pi_hat)[kind] > 0.001
            needed.add((kind, enough > 0))
    assert needed == {(0, True), (1, True), (1, False), (2, True), (2, False)}


@pytest.mark.slow
def test_panel_3_shows_minqs_numbers(ask):
    shown = ask(OPERATE + """return given.map(([gap, tokens, piHat]) => {
        press("tokens", tokens); slide("gap", gap); slide("pi-hat", piHat);
        return ["plain", "clipped", "gated"].map(kind => byId("row-" + kind).querySelector(".through").textContent);
    });""", CASES[::4])
    for case, texts in zip(CASES[::4], shown, strict=True):
        for share, text in zip(minqs_head(*case), texts):
            if share == 0 or text == "exactly 0":
                assert share == 0 and text == "exactly 0", case
            elif text.startswith("<"):
                assert 100 * share < 0.00001
            else:
                assert float(text.rstrip("%")) == pytest.approx(100 * share, rel=0.06, abs=1e-5), case


@pytest.mark.slow
@pytest.mark.parametrize("width", [360, 390, 1280])
def test_nothing_jumps_and_nothing_sticks_out(ask, width):
    """A panel is as high at every place of its sliders, and the page is as wide as the window."""
    answer = ask(OPERATE + """
    const heights = {grid: [], clip: [], nothing: []}, measure = panel => heights[panel].push(byId(panel).offsetHeight);
    let widest = 0;
    for (const panel of Object.keys(heights)) {
      measure(panel);
      for (const choice of byId(panel).querySelectorAll("input[type=radio]")) {
        choice.click();
        for (const slider of byId(panel).querySelectorAll("input[type=range]"))
          for (let i = 0; i <= 6; i++) {
            slide(slider.id, Number(slider.min) + (slider.max - slider.min) * i / 6);
            measure(panel);
            widest = Math.max(widest, document.documentElement.scrollWidth);
          }
      }
    }
    return [widest, Object.values(heights).map(seen => [...new Set(seen)])];""", width=width)
    widest, heights = answer
    assert widest <= width
    assert [len(seen) for seen in heights] == [1, 1, 1], heights


@pytest.mark.slow
def test_what_the_page_claims_is_so():
    """The numbers in the sentences, computed by minq."""
    prose = " ".join(re.sub(r"<[^>]*>", "", SOURCE).split())
    scale, _, levels, _ = minqs_grid(700, 8)
    assert levels == 3 and "At 700 three levels are left" in prose
    assert 1.37 < scale / 2 < 1.44 and "every value between −1.37 and 1.37 becomes 0" in prose
    for a, b in ((minqs_grid(100, 8), minqs_grid(200, 8)), (minqs_grid(100, 8), minqs_grid(100, 7))):
        assert b[0] / a[0] == pytest.approx(2, abs=0.1) and b[3] / a[3] == pytest.approx(2, abs=0.1)
    assert minqs_grid(80, 4)[2] == 1 and minqs_grid(60, 4)[2] > 1  # the question has an answer

    busy = json.loads(re.search(r"busy: (\[.*?\])", SOURCE)[1])
    assert (clipped_softmax(torch.tensor(busy), gamma=-0.3) > 0).sum() == 1 and "keeps one token of eight" in prose
    assert minqs_head(3.25, 8, 0.0)[1] > 0 == minqs_head(3.35, 8, 0.0)[1] and "exactly 0 from a gap of 3.3 on" in prose
    assert minqs_head(0.0, 128, 0.0)[1] == 0 and "In a row of 128 it needs no gap at all" in prose
    tenth = minqs_head(10.0, 8, 0.0)[0] / minqs_head(12.3, 8, 0.0)[0]
    assert tenth == pytest.approx(10, rel=0.01) and "Each further tenth costs 2.3 of score" in prose
    assert f"{0.03 / 1.03:.3f}" == "0.029" and "its threshold of 0.029" in prose
