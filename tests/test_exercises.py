"""The exercises can be solved, by the package and as a student would; and who makes a mistake is told which."""
import importlib
import inspect
import math
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn

from minq import attention, outliers, quant
from running import ROOT, start

EXERCISES = sorted(path.stem.removeprefix("exercise_") for path in (ROOT / "exercises").glob("exercise_*.py"))


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
    return (quantize(x, scale, zero_point, n_bits) - zero_point) * scale


def clipped_softmax(scores, gamma, zeta):
    p = scores.softmax(-1)
    y = (zeta - gamma) * p + gamma
    return y.clip(0, 1)


def clipped_softmax_backward(scores, gamma, zeta, g):
    y, p = clipped_softmax(scores, gamma, zeta), scores.softmax(dim=-1)
    dp = (zeta - gamma) * g * ((y > 0) & (y < 1))
    return p * (dp - (dp * p).sum(-1, keepdim=True))


def kurtosis(x):
    x = x.flatten(1)
    x = x - x.mean(1, keepdim=True)
    return (x ** 4).mean(1) / (x ** 2).mean(1) ** 2


def is_outlier(x):
    mean, std = x.mean((1, 2), keepdim=True), x.std((1, 2), keepdim=True)
    return (x - mean).abs() > 6 * std


class LinearGate(nn.Module):
    def __init__(self, width, heads, gate_init=0.5):
        super().__init__()
        self.heads, self.d_head = heads, width // heads
        bound = 1 / math.sqrt(self.d_head)
        self.weight = nn.Parameter(bound * (2 * torch.rand(heads, self.d_head) - 1))
        self.bias = nn.Parameter(torch.full((heads,), math.log(gate_init / (1 - gate_init))))

    def forward(self, x):
        B, T, width = x.shape
        x = x.view(B, T, self.heads, self.d_head)
        pi_hat = (x * self.weight).sum(-1) + self.bias
        return pi_hat.sigmoid().transpose(1, 2)


class RunningRange:
    low = high = None

    def __init__(self, momentum=0.9):
        self.momentum = momentum

    def update(self, x):
        if self.low is None:
            self.low, self.high = x.min(), x.max()
            return
        self.low = self.momentum * self.low + (1 - self.momentum) * x.min()
        self.high = self.momentum * self.high + (1 - self.momentum) * x.max()


def accumulate(q_x, z, q_w):
    q_x, q_w = q_x.int(), q_w.int()
    return q_x @ q_w.T - z * q_w.sum(1, dtype=torch.int32)


def integer_linear(q_x, s_x, z, q_w, s_w, bias):
    return s_x * s_w * accumulate(q_x, z, q_w) + bias


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
    scores = scores.requires_grad_()
    return torch.autograd.grad(attention.clipped_softmax(scores, gamma, zeta), scores, g)[0]


PACKAGE = {
    "1_quantizer": quant,
    "2_clipped_softmax": SimpleNamespace(clipped_softmax=attention.clipped_softmax,
                                         clipped_softmax_backward=autograd_backward),
    "3_outliers": outliers,
    "4_gate": attention,
    "5_running_range": quant,
}


@pytest.mark.parametrize("exercise", EXERCISES)
def test_a_student_can_solve_it(exercise):
    for test in graders(exercise).values():
        test(SimpleNamespace(**{part.__name__: part for part in HANDED_IN[exercise]}))


@pytest.mark.parametrize("exercise, name", [(exercise, name) for exercise in PACKAGE for name in graders(exercise)])
def test_the_package_solves_it(exercise, name):
    graders(exercise)[name](PACKAGE[exercise])


# ---- mistakes ----

# exercise -> (what stands in the solution, what a student writes, what the student must be told)
MISTAKES = {
    "1_quantizer": [
        ("/ (2 ** n_bits - 1)", "/ 2 ** n_bits", "you divided by 2^b"),
        ("(high - low) /", "high /", "you left out low"),
        ("((high - low) / (2 ** n_bits - 1))", "(torch.maximum(-low, high) / (2 ** (n_bits - 1) - 1))",
         "you made a symmetric grid"),
        ("(-low / scale).round()", "-low / scale", "your zero point is not a whole number"),
        ("(-low / scale).round()", "(low / scale).round()", "your zero point has the wrong sign"),
        ("(-low / scale).round()", "(-low / scale).floor()", "you cut the zero point's fraction off"),
        ("(-low / scale).round()", "torch.zeros_like(scale)", "you gave no zero point"),
        ("(-low / scale).round()", "None", "the zero point of [-1, 3] in 8 bits: you returned nothing"),
        ("return scale, (-low / scale).round()", "return scale",
         "affine_parameters must return scale, zero_point"),
        ("low, high = low.clamp(max=0), high.clamp(min=0)", "pass",
         "your grid does not contain 0: for values from 2 to 4"),
        ("low, high = low.clamp(max=0), high.clamp(min=0)", "low = low.clamp(max=0)",
         "your grid does not contain 0: for values from -4 to -2"),
        (".clamp(min=1e-30)", "", "the scale of a tensor of zeros is 0.0"),
        (".clamp(min=1e-30)", ".clamp(min=1e-5)", "is the least scale that you allow too large"),
        ("torch.round(x / scale)", "torch.floor(x / scale + 0.5)", "you rounded halves up"),
        ("torch.round(x / scale)", "torch.trunc(x / scale)", "you cut fractions off"),
        ("torch.round(x / scale)", "x / scale", "you did not round"),
        ("torch.round(x / scale) + zero_point", "torch.round(x / scale + zero_point)",
         "you added z before rounding"),
        ("torch.round(x / scale) + zero_point", "torch.round(x / scale)", "you forgot to add z"),
        ("torch.round(x / scale) + zero_point", "torch.round(x / scale) - zero_point",
         "you subtracted z: it is added here"),
        (".clamp(0, 2 ** n_bits - 1)", "", "your levels leave the grid"),
        (".clamp(0, 2 ** n_bits - 1)", ".clamp(0, 2 ** n_bits)", "your grid is one level too long"),
        (".clamp(0, 2 ** n_bits - 1)", ".clamp(-2 ** (n_bits - 1), 2 ** (n_bits - 1) - 1)",
         "your grid is the signed one"),
        ("(torch.round(x / scale) + zero_point).clamp(0, 2 ** n_bits - 1)",
         "torch.round(x / scale).clamp(0, 2 ** n_bits - 1) + zero_point",
         "you clipped before adding z"),
        ("(quantize(x, scale, zero_point, n_bits) - zero_point) * scale",
         "quantize(x, scale, zero_point, n_bits) * scale",
         "you forgot to subtract z on the way back"),
        ("(quantize(x, scale, zero_point, n_bits) - zero_point) * scale",
         "quantize(x, scale, zero_point, n_bits)",
         "you gave the levels"),
        ("- zero_point) * scale", "- zero_point)", "you forgot to multiply by s on the way back"),
        ("- zero_point) * scale", "- zero_point) / scale", "you divided by s on the way back"),
        (".clamp(0, 2 ** n_bits - 1)", "", "you did not clip: beyond the grid's ends"),
        ("torch.round(x / scale)", "x.div_(scale).round_()", "you changed x itself"),
        ("return (torch.round", "(torch.round", "you returned nothing"),
    ],
    "2_clipped_softmax": [
        ("scores.softmax(-1)", "scores.softmax(1)", "you normalized over dimension 1"),
        ("scores.softmax(-1)", "scores.softmax(-2)", "you normalized over dimension 2"),
        ("scores.softmax(-1)", "scores.exp() / scores.exp().sum(-1, keepdim=True)", "exp(1000) overflows"),
        ("y.clip(0, 1)", "y", "you did not clip after the stretch"),
        ("y.clip(0, 1)", "y.relu()", "you clipped at 0 only"),
        ("y.clip(0, 1)", "y.clip(max=1)", "you clipped at 1 only"),
        ("(zeta - gamma) * p", "zeta * p", "you stretched by zeta: "),
        ("(zeta - gamma) * p", "(zeta + gamma) * p", "you stretched by zeta + gamma"),
        ("* p + gamma", "* p", "you forgot to add gamma"),
        ("    y = (zeta - gamma) * p + gamma", "    y = ((zeta - gamma) * scores + gamma).softmax(-1)",
         "you stretched the scores"),
        ("y.clip(0, 1)", "y.clip(0, 1) / y.clip(0, 1).sum(-1, keepdim=True)",
         "you normalized again after clipping"),
        ("    y = (zeta - gamma) * p + gamma", "    y = p", "you gave the plain softmax"),
        ("(zeta - gamma) * g", "g", "you forgot the stretch"),
        (" * ((y > 0) & (y < 1))", "", "you let g pass where y was clipped: "),
        ("(zeta - gamma) * g * ((y > 0) & (y < 1))", "g",
         "you let g pass where y was clipped, and forgot the stretch"),
        (" * ((y > 0) & (y < 1))\n    return p", "\n    return (y > 0) * (y < 1) * p",
         "you set dscores to 0 where y was clipped: "),
        ("return p * (dp", "return (y > 0) * (y < 1) * p * (dp",
         "you set dscores to 0 where y was clipped, too"),
        ("p * (dp - (dp * p).sum(-1, keepdim=True))", "p * (1 - p) * dp",
         "you took p * (1 - p) as the softmax's gradient"),
        ("(dp - (dp * p).sum(-1, keepdim=True))", "dp", "you left out the sum"),
        ("(dp * p).sum(-1, keepdim=True)", "(dp * p).sum(1, keepdim=True)",
         "you summed over the wrong dimension"),
        ("(dp * p).sum(-1, keepdim=True)", "(dp * p).sum()", "you summed over the whole tensor"),
        ("return p * (dp - (dp * p)", "return y * (dp - (dp * y)", "you used y for p in the last line"),
        ("(zeta - gamma) * g *", "(zeta - gamma) *", "you left g out"),
        ("(dp - (dp * p).sum(-1, keepdim=True))", "((dp * p).sum(-1, keepdim=True) - dp)",
         "your gradient has the wrong sign"),
        ("return p * (dp - (dp * p).sum(-1, keepdim=True))", "return dp", "you stopped at dp"),
    ],
    "3_outliers": [
        ("x = x.flatten(1)\n", "x = x.flatten()[None]\n",
         "the kurtosis of 5 samples: the shape is (5,), yours is (1,)"),
        (" / (x ** 2).mean(1) ** 2", "  / (x ** 2).mean(1) ** 2 - 3", "that is the excess kurtosis"),
        ("(x ** 2).mean(1) ** 2", "x.var(1) ** 2", "you divided by n - 1"),
        ("    x = x - x.mean(1, keepdim=True)\n", "", "you forgot to subtract the mean"),
        ("x = x - x.mean(1, keepdim=True)\n    return (x ** 4)", "return ((x - x.mean(1, keepdim=True)) ** 4)",
         "above but not below"),
        ("(x ** 2).mean(1) ** 2", "(x ** 2).mean(1)", "you divided by sigma^2"),
        ("(x ** 2).mean(1) ** 2", "(x ** 2).mean(1) ** 4", "you divided by sigma^8"),
        ("(x ** 4).mean(1) / (x ** 2).mean(1) ** 2", "(x ** 3).mean(1) / (x ** 2).mean(1) ** 1.5",
         "that is the skewness"),
        ("(x ** 2).mean(1) ** 2", "((x ** 2).mean(1) ** 2 + 1e-6)", "Is there an epsilon below the line?"),
        ("(x ** 2).mean(1) ** 2", "((x ** 2).mean(1) + 1e-6) ** 2", "Is there an epsilon below the line?"),
        ("(x ** 2).mean(1)", "(x ** 2).mean()", "expected"),
        ("    x = x.flatten(1)\n    x = x - x.mean(1, keepdim=True)\n",
         "    x = x - x.mean(-1, keepdim=True)\n",
         "the shape is (5,)"),
        ("    return (x ** 4).mean(1) / (x ** 2).mean(1) ** 2",
         "    return ((x ** 4).mean(1) / (x ** 2).mean(1) ** 2).mean()",
         "you took the mean over samples"),
        ("    x = x.flatten(1)\n    x = x - x.mean(1, keepdim=True)\n    return (x ** 4).mean(1) / (x ** 2).mean(1) ** 2",
         "    x = x - x.mean()\n    return (x ** 4).mean() / (x ** 2).mean() ** 2",
         "you measured the whole batch at once"),
        ("    x = x.flatten(1)\n    x = x - x.mean(1, keepdim=True)\n    return (x ** 4).mean(1) / (x ** 2).mean(1) ** 2",
         "    x = x - x.mean(-1, keepdim=True)\n    return (x ** 4).mean(-1) / (x ** 2).mean(-1) ** 2",
         "you measured each token"),
        ("    x = x.flatten(1)\n", "", "you measured each dimension of each sample"),
        ("    x = x.flatten(1)\n    x = x - x.mean(1, keepdim=True)\n    return (x ** 4).mean(1) / (x ** 2).mean(1) ** 2",
         "    x = x - x.mean((0, 1))\n    return (x ** 4).mean((0, 1)) / (x ** 2).mean((0, 1)) ** 2",
         "you measured over the batch"),
        ("(x - mean).abs() >", "(x - mean) >", "you found none below the mean"),
        ("(x - mean).abs() >", "x.abs() >", "you measured from 0"),
        ("x.mean((1, 2), keepdim=True), x.std((1, 2), keepdim=True)", "x.mean(), x.std()",
         "you took mean and sigma of the whole batch"),
        ("x.mean((1, 2), keepdim=True), x.std((1, 2), keepdim=True)",
         "x.mean(-1, keepdim=True), x.std(-1, keepdim=True)",
         "you took mean and sigma of each token"),
        ("6 * std", "3 * std", "you drew the line at 3 sigma"),
        ("6 * std", "6 * std ** 2", "you compared with the variance"),
        (".abs() > 6 * std", ".abs() <= 6 * std", "you marked the values that are no outliers"),
        ("return (x - mean).abs() > 6 * std", "return x[(x - mean).abs() > 6 * std]",
         "expected True or False for each value"),
        ("return (x - mean).abs() > 6 * std", "return ((x - mean).abs() > 6 * std).any(-1)",
         "the shape is (2, 20, 50), yours is (2, 20)"),
    ],
    "4_gate": [
        ("nn.Parameter(torch.full", "(torch.full", "self.bias is no nn.Parameter"),
        ("torch.rand(heads, self.d_head)", "torch.rand(self.d_head)",
         "self.weight: the shape is (3, 4), yours is (4,)"),
        ("torch.full((heads,)", "torch.full((1,)", "self.bias: the shape is (3,), yours is (1,)"),
        ("self.weight", "self.w", "your gate has no self.weight"),
        ("math.log(gate_init / (1 - gate_init))", "gate_init", "your bias is pi_init itself"),
        ("gate_init / (1 - gate_init)", "(1 - gate_init) / gate_init", "your bias has the wrong sign"),
        ("math.log(gate_init / (1 - gate_init))", "1 / (1 + math.exp(-gate_init))",
         "your bias is sigmoid(pi_init)"),
        ("gate_init / (1 - gate_init)", "gate_init", "your bias is log(pi_init)"),
        ("math.log(gate_init / (1 - gate_init))", "0.0", "your bias is 0"),
        ("bound * (2 * torch.rand(heads, self.d_head) - 1)", "torch.zeros(heads, self.d_head)",
         "your weights start at 0"),
        ("bound * (2 * torch.rand(heads, self.d_head) - 1)", "torch.full((heads, self.d_head), bound)",
         "your weights are all the same"),
        ("(2 * torch.rand(heads, self.d_head) - 1)", "torch.rand(heads, self.d_head)",
         "your weights have one sign only"),
        ("bound * (2 * torch.rand(heads, self.d_head) - 1)", "bound * torch.randn(heads, self.d_head)",
         "are they uniform in that range"),
        ("math.sqrt(self.d_head)", "math.sqrt(width)", "did you take the width for d_head"),
        ("bound * (2 * torch.rand(heads, self.d_head) - 1)",
         "(bound / 3 * torch.randn(heads, self.d_head)).clamp(-bound, bound)",
         "your weights are not uniform"),
        (".sum(-1) + self.bias", ".sum(-1)", "you forgot the bias"),
        ("pi_hat.sigmoid()", "pi_hat", "you returned pi_hat"),
        ("pi_hat.sigmoid()", "pi_hat.softmax(-1)", "you took a softmax over the heads"),
        ("pi_hat.sigmoid()", "pi_hat.softmax(1)", "you took a softmax over the tokens"),
        (".transpose(1, 2)", "", "you returned (B, T, heads)"),
        ("x.view(B, T, self.heads, self.d_head)", "x.view(B, T, self.d_head, self.heads).mT",
         "you dealt the dimensions out one by one"),
        ("x.view(B, T, self.heads, self.d_head)", "x[:, :, None, :self.d_head]",
         "all your heads see the first slice"),
        ("x.view(B, T, self.heads, self.d_head)", "x.view(B, self.heads, T, self.d_head).transpose(1, 2)",
         "that mixes tokens"),
        ("pi_hat = (x * self.weight).sum(-1) + self.bias",
         "pi_hat = ((x * self.weight).sum(-1) + self.bias).mean(1, keepdim=True).expand(B, T, self.heads)",
         "you gave all tokens one pi"),
        ("return pi_hat.sigmoid()", "return pi_hat.detach().sigmoid()", "no gradient reaches the gate"),
        ("x * self.weight", "x * self.weight.data", "no gradient reaches self.weight"),
    ],
    "5_running_range": [
        ("        if self.low is None:\n            self.low, self.high = x.min(), x.max()\n            return\n",
         "        if self.low is None:\n            self.low = self.high = torch.tensor(0.0)\n",
         "you averaged the first batch with 0"),
        ("low = high = None", "low = high = torch.tensor(0.0)",
         "low and high must be None before the first batch"),
        ("self.low, self.high = x.min(), x.max()", "self.low, self.high = -x.abs().max(), x.abs().max()",
         "you made the range symmetric"),
        ("self.momentum * self.low + (1 - self.momentum) * x.min()",
         "(1 - self.momentum) * self.low + self.momentum * x.min()",
         "you mixed up the weights"),
        ("self.momentum * self.low + (1 - self.momentum) * x.min()", "torch.minimum(self.low, x.min())",
         "you kept the extremes"),
        ("self.momentum * self.high + (1 - self.momentum) * x.max()", "torch.maximum(self.high, x.max())",
         "you kept the extremes"),
        ("self.momentum * self.low + (1 - self.momentum) * x.min()", "x.min()", "you kept the last batch only"),
        ("self.momentum * self.low + (1 - self.momentum) * x.min()", "self.low",
         "you kept the first batch only"),
        ("(1 - self.momentum) * x.max()", "x.max()", "you added the new batch whole"),
        ("(1 - self.momentum) * x.max()", "(1 - self.momentum) * x.min()", "you pulled high with the minimum"),
        ("(1 - self.momentum) * x.min()", "(1 - self.momentum) * x.max()",
         "you pulled high with the minimum, or low with the maximum"),
        ("self.momentum * self.low + (1 - self.momentum) * x.min()", "0.9 * self.low + 0.1 * x.min()",
         "you wrote 0.9 into update"),
        ("self.low, self.high = x.min(), x.max()", "self.low, self.high = x.min().clamp(max=0), x.max()",
         "you stretched the range to contain 0"),
        ("self.low, self.high = x.min(), x.max()", "self.low, self.high = x.min(), x.max().clamp(min=0)",
         "you stretched the range to contain 0"),
        ("self.low, self.high = x.min(), x.max()", "RunningRange.low, RunningRange.high = x.min(), x.max()",
         "share one low"),
        ("self.low = self.momentum * self.low + (1 - self.momentum) * x.min()",
         "self.n = getattr(self, 'n', 1) + 1; self.low = self.low + (x.min() - self.low) / self.n",
         "you took the mean over all batches"),
    ],
    "6_integer_linear": [
        (" - z * q_w.sum(1, dtype=torch.int32)", "", "you forgot the zero point"),
        (" - z *", " + z *", "you added z"),
        (" - z * q_w.sum(1, dtype=torch.int32)", " - z", "you subtracted z once"),
        ("q_w.sum(1, dtype=torch.int32)", "q_w.sum()", "you subtracted z times the sum of all of q_w"),
        ("q_w.sum(1, dtype=torch.int32)", "q_x.sum(1, keepdim=True)",
         "you subtracted z times the sums of q_x's rows"),
        (" - z * q_w.sum", " - q_w.sum", "you subtracted the sums of q_w's rows without z"),
        ("q_x @ q_w.T - z * q_w.sum(1, dtype=torch.int32)", "q_x @ (q_w - z).T",
         "as if the weights had a zero point"),
        ("q_x @ q_w.T - z * q_w.sum(1, dtype=torch.int32)", "(q_x - z) @ (q_w - z).T",
         "you subtracted z from both"),
        ("q_x, q_w = q_x.int(), q_w.int()", "q_x, q_w = q_x.to(torch.int8), q_w",
         "your sums are in 8 bits and overflow"),
        ("q_x, q_w = q_x.int(), q_w.int()", "q_x, q_w = q_x.short(), q_w.short()",
         "in 16 bits and overflow: convert to int32 before you multiply"),
        ("return q_x @ q_w.T - z * q_w.sum(1, dtype=torch.int32)", "return (q_x - z).short() @ q_w.short().T",
         "your sums are in 16 bits, and overflow"),
        ("q_x.int(), q_w.int()", "q_x.to(torch.int8).int(), q_w.int()", "you read q_x as int8"),
        ("    q_x, q_w = q_x.int(), q_w.int()\n    return q_x @ q_w.T - z * q_w.sum(1, dtype=torch.int32)",
         "    return (q_x - z).int() @ q_w.int().T",
         "you subtracted z in uint8"),
        ("q_x.int(), q_w.int()", "q_x.float(), q_w.float()", "your sum is torch.float32"),
        ("q_x @ q_w.T", "(q_x.float() @ q_w.float().T).int()",
         "the sum of 8191 products, which no float can hold"),
        (" + bias", "", "you forgot the bias"),
        ("s_x * s_w * accumulate(q_x, z, q_w) + bias", "s_x * s_w * (accumulate(q_x, z, q_w) + bias)",
         "you scaled the bias, too"),
        ("s_x * s_w *", "s_x *", "you forgot s_w"),
        ("s_x * s_w *", "s_w *", "you forgot s_x"),
        ("s_x * s_w *", "(s_x + s_w) *", "you added the scales"),
        ("s_x * s_w *", "1 / (s_x * s_w) *", "you divided by the scales"),
        ("s_x * s_w *", "", "you forgot the scales"),
        ("return s_x * s_w * accumulate(q_x, z, q_w) + bias",
         "return (s_x * s_w * accumulate(q_x, z, q_w) + bias).round()",
         "you rounded y"),
        ("return s_x * s_w * accumulate(q_x, z, q_w) + bias",
         "return (s_x * s_w * accumulate(q_x, z, q_w) + bias).int()",
         "you cut y's fraction off"),
        ("s_x * s_w *", "s_x * torch.as_tensor(s_w).view(-1, 1) *", "you gave the scales to the rows of x"),
        ("s_x * s_w *", "s_x * torch.as_tensor(s_w).flatten()[0] *",
         "you used one scale for all rows of weights"),
    ],
}


def source(exercise):
    parts = "\n\n".join(inspect.getsource(part) for part in HANDED_IN[exercise])
    return f"import math\n\nimport torch\nimport torch.nn as nn\n\n\n{parts}"


def with_mistake(exercise, right, wrong):
    assert right in source(exercise)
    namespace = {}
    exec(source(exercise).replace(right, wrong), namespace)
    return SimpleNamespace(**namespace)


def told(exercise, solution):
    """The messages that an exercise's tests fail with."""
    messages = []
    for test in graders(exercise).values():
        try:
            test(solution)
        except Exception as error:
            messages.append(str(error))
    return messages


@pytest.mark.parametrize("exercise, right, wrong, words", [
    pytest.param(name, *mistake, id=f"{name}: {mistake[2]}") for name in MISTAKES for mistake in MISTAKES[name]])
def test_a_mistake_is_named(exercise, right, wrong, words):
    messages = told(exercise, with_mistake(exercise, right, wrong))
    assert any(words in message for message in messages), messages


def test_the_page_counts_right():
    page = (ROOT / "exercises" / "README.md").read_text()
    tests = sum(len(graders(exercise)) for exercise in EXERCISES)
    assert f"{tests} tests, so {tests} points" in page and f"{sum(map(len, MISTAKES.values()))} wrong solutions" in page


# ---- as a student meets them ----

HINTS = dict(zip(EXERCISES, (3, 2, 2, 2, 1, 2)))  # how often an empty file raises


@pytest.mark.parametrize("exercise", EXERCISES)
def test_an_empty_exercise_says_what_to_write(exercise):
    empty = importlib.import_module(f"exercises.exercise_{exercise}")
    hints = re.findall(r'raise NotImplementedError\("(.*)"\)', inspect.getsource(empty))
    if len(hints) < HINTS[exercise]:
        pytest.skip("somebody has filled it in")
    messages = told(exercise, empty)
    assert len(messages) == len(graders(exercise)) and set(messages) <= set(hints)


@pytest.mark.slow
def test_pytest_grades_what_was_handed_in(tmp_path):
    """One exercise without and one with a mistake."""
    folder = tmp_path / "exercises"
    shutil.copytree(ROOT / "exercises", folder, ignore=shutil.ignore_patterns("exercise_*", "__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (folder / "exercise_3_outliers.py").write_text(source("3_outliers"))
    (folder / "exercise_5_running_range.py").write_text(source("5_running_range").replace("x.max()", "x.min()"))
    names = [f"exercises/test_{name}.py" for name in ("3_outliers", "5_running_range")]
    process = start("-m", "pytest", "-q", "-p", "no:cacheprovider", *names, cwd=tmp_path)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 1 and "you pulled high with the minimum, or low with the maximum" in out, out + err
    failed = len(told("5_running_range", with_mistake("5_running_range", "x.max()", "x.min()")))
    passed = sum(len(graders(name)) for name in ("3_outliers", "5_running_range")) - failed
    assert f"{failed} failed, {passed} passed" in out
