"""The exercises can be solved, by the package and as a student would; who makes a mistake is told
which. And the edits of docs/projects.md, and three that a class made, work in a copy of the tree.
"""
import difflib
import importlib
import inspect
import json
import math
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn

from lab import survey
from minq import attention, outliers, quant
from minq.model import Opt, OptConfig
from running import ROOT, SMALL, saved, start

EXERCISES = sorted(path.stem.removeprefix("exercise_")
                   for path in (ROOT / "exercises").glob("exercise_*.py"))


def graders(exercise):
    """The tests of an exercise, functions of a solution."""
    module = importlib.import_module(f"exercises.test_{exercise}")
    return {name: test for name, test in vars(module).items() if name.startswith("test_")}


# ---- what a student may hand in ----

def affine_parameters(low, high, n_bits):
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = ((high - low) / (2 ** n_bits - 1)).clamp(min=1e-30)
    return scale, (-low / scale).round()


def quantize(x, scale, zero_point, n_bits):
    return (torch.round(x / scale) + zero_point).clamp(0, 2 ** n_bits - 1)


def fake_quantize(x, scale, zero_point, n_bits):
    q = quantize(x, scale, zero_point, n_bits)
    return (q - zero_point) * scale


def clipped_softmax(scores, gamma, zeta):
    p = scores.softmax(-1)
    y = (zeta - gamma) * p + gamma
    return y.clip(0, 1)


def clipped_softmax_backward(scores, gamma, zeta, g):
    y, p = clipped_softmax(scores, gamma, zeta), scores.softmax(dim=-1)
    dp = (zeta - gamma) * g * ((y > 0) & (y < 1))
    return p * (dp - (dp * p).sum(-1, keepdim=True))


def kurtosis(x, dims=(1, 2)):
    x = x - x.mean(dims, keepdim=True)
    k = (x ** 4).mean(dims) / (x ** 2).mean(dims) ** 2
    return k


def is_outlier(x, d=(1, 2)):
    std, mean = torch.std_mean(x, d, keepdim=True)
    return (x - mean).abs() > 6 * std


class LinearGate(nn.Module):
    def __init__(self, width, heads, gate_init=0.5):
        super().__init__()
        self.heads, self.d = heads, width // heads
        bound = 1 / math.sqrt(self.d)
        u = 2 * torch.rand(heads, self.d) - 1
        bias = torch.full((heads,), math.log(gate_init / (1 - gate_init)))
        self.weight, self.bias = nn.Parameter(bound * u), nn.Parameter(bias)

    def forward(self, x):
        B, T, width = x.shape
        x = x.view(B, T, self.heads, self.d)
        z = (x * self.weight).sum(-1) + self.bias
        return z.sigmoid().transpose(1, 2)


class RunningRange:
    low = high = None

    def __init__(self, momentum=0.9):
        self.m = momentum

    def update(self, x):
        a, b, m = x.min(), x.max(), self.m
        if self.low is None:
            self.low, self.high = a, b
            return
        self.low = m * self.low + (1 - m) * a
        self.high = m * self.high + (1 - m) * b


def accumulate(q_x, z, q_w):
    q_x, q_w = q_x.int(), q_w.int()
    return q_x @ q_w.T - z * q_w.sum(1, dtype=torch.int32)


def integer_linear(q_x, s_x, z, q_w, s_w, bias):
    y = s_x * s_w * accumulate(q_x, z, q_w) + bias
    return y


HANDED_IN = {
    "1_quantizer": (affine_parameters, quantize, fake_quantize),
    "2_clipped_softmax": (clipped_softmax, clipped_softmax_backward),
    "3_outliers": (kurtosis, is_outlier),
    "4_gate": (LinearGate,),
    "5_running_range": (RunningRange,),
    "6_integer_linear": (accumulate, integer_linear),
}


# ---- what the package has ----

def autograd_backward(scores, gamma, zeta, g):
    y = attention.clipped_softmax(scores.requires_grad_(), gamma, zeta)
    return torch.autograd.grad(y, scores, g)[0]


class GateOfInput(attention.LinearGate):
    """The package's gates get the values, too, which this one does not read."""

    def forward(self, x):
        return super().forward(x, None)


PACKAGE = {
    "1_quantizer": quant,
    "2_clipped_softmax": SimpleNamespace(clipped_softmax=attention.clipped_softmax,
                                         clipped_softmax_backward=autograd_backward),
    "3_outliers": SimpleNamespace(kurtosis=outliers.kurtosis, is_outlier=survey.is_outlier),
    "4_gate": SimpleNamespace(LinearGate=GateOfInput),
    "5_running_range": quant,
}


@pytest.mark.parametrize("exercise", EXERCISES)
def test_it_can_be_solved(exercise):
    parts = {part.__name__: part for part in HANDED_IN[exercise]}
    for solution in (SimpleNamespace(**parts), PACKAGE.get(exercise)):
        for test in graders(exercise).values() if solution else ():
            test(solution)


# ---- mistakes ----

def source(exercise):
    parts = "\n\n".join(inspect.getsource(part) for part in HANDED_IN[exercise])
    return f"import math\n\nimport torch\nimport torch.nn as nn\n\n\n{parts}"


def told(exercise, right="", wrong=""):
    """The messages that an exercise's tests fail with, where `right` is replaced by `wrong`."""
    assert right in source(exercise), right
    solution = {}
    exec(source(exercise).replace(right, wrong), solution)
    for test in graders(exercise).values():
        try:
            test(SimpleNamespace(**solution))
        except Exception as error:
            yield str(error)


def mistakes(exercise):
    """(what stands in the solution, what a student writes, what the student must be told)..."""
    table = (ROOT / "tests" / "mistakes.txt").read_text().split(f"# {exercise}\n")[1]
    for row in table.split("\n\n")[0].rstrip("\n").splitlines():
        found = re.fullmatch("(.*?)  ->  (?:(.*)  )?::  (.*)", row).groups("")
        yield [part.replace("\\n", "\n") for part in found]


@pytest.mark.parametrize("exercise", EXERCISES)
def test_mistakes_are_named(exercise):
    for right, wrong, words in mistakes(exercise):
        first = next(told(exercise, right, wrong), "")  # later ones may show bare numbers
        assert words in first, (right, wrong, first)


def test_the_page_counts_right():
    page = (ROOT / "exercises" / "README.md").read_text()
    tests, wrong = (sum(len(list(of(name))) for name in EXERCISES) for of in (graders, mistakes))
    assert f"{tests} tests, so {tests} points" in page and f"{wrong} wrong solutions" in page


# ---- as a student meets them ----

@pytest.mark.parametrize("exercise", EXERCISES)
def test_an_empty_exercise_says_what_to_write(exercise):
    path = ROOT / "exercises" / f"exercise_{exercise}.py"
    empty = importlib.import_module(f"exercises.{path.stem}")
    hints = re.findall(r'raise NotImplementedError\(\s*"(.*)"\)', path.read_text())
    for test in graders(exercise).values():
        with pytest.raises(NotImplementedError) as raised:
            test(empty)
        assert str(raised.value) in hints


@pytest.mark.slow
def test_pytest_grades_what_was_handed_in(tmp_path):
    """One exercise without and one with a mistake."""
    folder, wrong = tmp_path / "exercises", ("x.max()", "x.min()")
    shutil.copytree(ROOT / "exercises", folder, ignore=shutil.ignore_patterns("exercise_*"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (folder / "exercise_3_outliers.py").write_text(source("3_outliers"))
    (folder / "exercise_5_running_range.py").write_text(source("5_running_range").replace(*wrong))
    names = [f"exercises/test_{name}.py" for name in ("3_outliers", "5_running_range")]
    process = start("-m", "pytest", "-q", "-p", "no:cacheprovider", *names, cwd=tmp_path)
    out, _ = process.communicate(timeout=120)
    failed = len(list(told("5_running_range", *wrong)))
    passed = len(graders("3_outliers")) + len(graders("5_running_range")) - failed
    assert f"{failed} failed, {passed} passed" in out and "you pulled high with the minimum" in out


# ---- edits: those of docs/projects.md, and three that a class made ----

PAGE = (ROOT / "docs" / "projects.md").read_text()
TOP_FOUR = re.search(r"```python\n(class TopFour.*?)```", PAGE, re.S)[1]
ATTENTION, MODEL, QUANT = "minq/attention.py", "minq/model.py", "minq/quant.py"
HEADS = "\n# ---- multi-head self-attention"
PLACES = "self.token_embedding(tokens) + self.position_embedding.weight[:T]"
IN_OPT = f'T, vocab)"""\n        T = tokens.shape[1]\n        x = {PLACES}'
DROPOUT = "        self.dropout = Dropout(config.dropout)\n        self.proj"


def shown(first, indent=4):
    """The line of the page's code that begins so; of a function or a class all of it."""
    more = r".*\n(?:\n?[ ].*\n)*" if first.startswith(("def", "class")) else r".*\n"
    (code,) = re.findall("^" + re.escape(first) + more, PAGE, re.MULTILINE)
    return code if "\n " in code else " " * indent + code


def before(file, place, code):
    return file, place, code + place


def instead(file, first, code):
    """In place of the line that begins so."""
    (line,) = re.findall(f"^ *{first}.*\n", (ROOT / file).read_text(), re.MULTILINE)
    return file, line, code


def softmax_plus(scores, n):
    m = scores.amax(dim=-1, keepdim=True).clamp(min=0)
    e = (scores - m).exp()
    return e / (n * (-m).exp() + e.sum(dim=-1, keepdim=True))


# name -> how many lines it may change, then (file, what stands there, what is written there)
EDITS = {
    "a softmax": (8, before(ATTENTION, HEADS, f"\n{TOP_FOUR}\n")),
    "a softmax with a parameter": (
        8, before(ATTENTION, "# To add a variant", inspect.getsource(softmax_plus) + "\n\n"),
        before(ATTENTION, '    "gated": lambda', shown('"plus": ')),
        before(MODEL, "    gate: str = flag", shown("sink: float"))),
    "one more tensor": (2, before(ATTENTION, "        self.context_tap, ", shown("self.pi_tap", 8)),
                        instead(ATTENTION, "context = context", shown("context = ", 12))),
    "an estimator": (1, before(QUANT, '    "running": ', shown('"p99.9"'))),
    "a data set": (
        5, before("minq/data.py", "# A name for --data", shown("def repeats") + "\n\n"),
        before("minq/data.py", 'TEXTS["enwik8"]', shown('TEXTS["repeats"]', 0))),
    "SGD": (1, instead("train_bert.py", "optimizer = ", shown("optimizer = "))),
    "RMSNorm": (1, before(MODEL, "\n\n# ---- configuration", shown("NORMS[", 0))),
    "rotary positions": (
        13, before(ATTENTION, HEADS, "\n" + shown("def rotate") + "\n"),
        before(ATTENTION, DROPOUT, "        self.rotary = config.rotary\n"),
        before(ATTENTION, "        q, k, v = self.queries_tap", "        if self.rotary:\n"
               "            q, k = rotate(q), rotate(k)\n"),
        before(MODEL, "    pre_norm: bool = False", shown("rotary: ")),
        (MODEL, IN_OPT, IN_OPT.replace(PLACES, f"({PLACES} if not self.config.rotary else\n"
                                       "             self.token_embedding(tokens))"))),
    "a family": (14, before(MODEL, "\n# ---- OPT", "\n@dataclass\n" + shown("class PreBertC")
                            + "\n\n" + shown("class PreBert(") + "\n"),
                 (MODEL, "(Bert, Opt, ViT)", "(Bert, Opt, ViT, PreBert)"),
                 ("minq/runs.py", '== "bert"', 'in ("bert", "prebert")')),
    "no start token": (1, instead("train_opt.py", "window = ", shown("window = ", 8))),
    "a temperature per head": (
        2, before(ATTENTION, DROPOUT, "        self.temperature = "
                  "nn.Parameter(torch.ones(config.heads, 1, 1))\n"),
        (ATTENTION, "self.softmax(scores)", "self.softmax(self.temperature * scores)")),
    "weights in groups of 64 columns": (
        3, ("quantize.py", '("tensor", "channel")', '("tensor", "channel", "group")'),
        before(QUANT, "    groups, symmetric = ", (
            '    if granularity == "group" and weight.shape[-1] % 64 == 0:\n'
            "        n_scales = weight.numel() // 64\n"))),
    "ALiBi": (4, before(ATTENTION, "            if self.causal:\n", (
        "            t, heads = torch.arange(T), torch.arange(self.heads)[:, None, None]\n"
        "            slopes = 2.0 ** (-8 * (heads + 1) / self.heads)\n"
        "            scores = scores - slopes * (t[:, None] - t)\n")),
              (MODEL, IN_OPT, IN_OPT.replace(PLACES, "self.token_embedding(tokens)"))),
}


def edited(folder, *names):
    """A copy of the project's code in `folder`, edited."""
    for name in ("minq", "lab"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in (*ROOT.glob("train_*.py"), ROOT / "quantize.py"):
        shutil.copy(path, folder)
    for name in names:
        lines, *changes = EDITS[name]
        changed = {}
        for file, old, new in changes:
            text = (folder / file).read_text()
            assert text.count(old) == 1, (name, file, old, text.count(old))
            (folder / file).write_text(text.replace(old, new))
            diff = difflib.ndiff(old.splitlines(), new.splitlines())
            changed[file] = changed.get(file, 0) + sum(bool(re.match(r"\+ .*\S", x)) for x in diff)
        assert sum(changed.values()) <= lines <= 15 and len(changed) <= 2, (name, changed)


TRAIN_AND_QUANTIZE = """
import importlib, json, sys, torch
from minq.quant import ActivationQuantizer, calibrating, quantize_model
from minq.runs import open_run
options, script, *arguments = sys.argv[1:]
importlib.import_module(script).main([*arguments, "--out", "run"])
run = open_run("run", torch.device("cpu"))
for name, parameter in run.model.named_parameters():
    parameter.data[...] = 50 if "temperature" in name else parameter.data  # so that it matters
inputs, found = next(iter(run.validation()))[0], {"fp": run.score(run.model)}
found |= {"inputs": inputs, "logits": run.model(*inputs), "model": run.model.state_dict()}
model = quantize_model(run.model, 16, 16)
with calibrating(model):
    model(*inputs)
found["in 16 bits"] = model(*inputs)
model = quantize_model(run.model, **json.loads(options))
run.calibrate(model, 0, 8)
found |= {"in 8 bits": run.score(model), "weight": model.layers[0].ffn_down.weight}
found["taps"] = [name for name, x in model.named_modules() if isinstance(x, ActivationQuantizer)]
torch.save(found, "found.pt")
if "--sink" in arguments:
    importlib.import_module(script).main(["--sample", "20", "--out", "run"])
"""
CASES = {
    "top-four": (["a softmax", "a data set"], "train_opt --attention top-four --data repeats", {}),
    "plus": (["a softmax with a parameter", "rotary positions", "no start token"],
             "train_opt --attention plus --sink 2 --rotary", {}),
    "pi": (["one more tensor", "RMSNorm", "an estimator"],
           "train_opt --attention gated --norm rms-gain", {"a_estimator": "p99.9"}),
    "SGD": (["SGD"], "train_bert --lr 0.1", {}),
    "prebert": (["a family"], "train_prebert", {}),
    "temperature": (["a temperature per head"], "train_opt --lr 1e-2", {}),
    "groups": (["weights in groups of 64 columns"], "train_bert", {"w_granularity": "group"}),
    "ALiBi": (["ALiBi"], "train_opt", {}),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_an_edit_works(case, corpus, tmp_path):
    """It trains without NaN, and eight bits and sixteen see the same forward pass as floats."""
    names, command, options = CASES[case]
    edited(tmp_path, *names)
    bert = (tmp_path / "train_bert.py").read_text().replace('"bert"', '"prebert"')
    (tmp_path / "train_prebert.py").write_text(re.sub(r"\bBert", "PreBert", bert))
    script, *more = *command.split(), *SMALL, "--width", 64
    more += ["--data", corpus] * ("repeats" not in command)
    process = start("-c", TRAIN_AND_QUANTIZE, json.dumps(options), script, *more, cwd=tmp_path)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    found, checkpoint = torch.load(tmp_path / "found.pt"), saved(tmp_path / "run")
    config, error = checkpoint["config"], (found["in 16 bits"] - found["logits"]).abs().max()
    assert error < 0.01 * found["logits"].std()
    assert found["in 8 bits"] == pytest.approx(found["fp"], rel=0.1)
    if case in ("temperature", "ALiBi"):  # without the edit the same weights compute something else
        plain = Opt(OptConfig(**config))
        plain.load_state_dict(found["model"], strict=False)
        assert (plain(*found["inputs"]) - found["logits"]).abs().max() > 10 * error
    learned = checkpoint["model"].get("layers.0.attention.temperature", torch.zeros(1))
    assert (learned != 1).all()
    assert case != "plus" or config["sink"] == 2 and config["rotary"]
    assert ("layers.0.attention.pi_tap" in found["taps"]) == (case == "pi")
    assert ("momentum_buffer" in checkpoint["optimizer"]["state"][0]) == (case == "SGD")
    assert ("head.0.weight" in checkpoint["model"]) == (case == "prebert")
    if case == "groups":
        groups = found["model"]["layers.0.ffn_down.weight"].view(-1, 64)
        step = groups.abs().amax(1, keepdim=True) / 127
        torch.testing.assert_close(found["weight"].view(-1, 64), (groups / step).round() * step)
