"""On real integers: exact sums, outputs of the simulation, whole models, refusals, and training."""
import json
import os

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from lab import integer
from lab.integer import IntegerLinear, to_integer
from lab.remedies import PerToken
from minq import training
from minq.attention import ATTENTIONS, QKV, Tap
from minq.flags import UserError
from minq.model import FAMILIES
from minq.quant import calibrating, quantize_model
from running import run, same, small, start
from small import inputs
from small import small as tiny


def calibrated(family="opt", bits=(8, 8), width=32, settings=(), active=calibrating, **others):
    """A quantized model of random weights, nothing symmetric about it."""
    model = tiny(family, **{"width": width, "init_std": 0.2} | dict(settings)).eval()
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)
    model = quantize_model(model, *bits, **others)
    with active(model):
        for seed in range(3):
            model(inputs(family, seed))
    return model


# ---- the kernel ----

EXTREMES = """
import torch
from itertools import product
from lab.integer import int_mm
torch.manual_seed(0)
values = -128, 127, None  # None: random
for K, M, N, *ab in product((1, 2, 3, 8, 65, 3072), (0, 1, 2, 17), (1, 2, 3, 24), values, values):
    a, b = (torch.randint(-128, 128, shape) if x is None else torch.full(shape, x)
            for x, shape in zip(ab, ((M, K), (N, K))))
    found = int_mm(a.to(torch.int8), b.to(torch.int8))
    assert found.dtype == torch.int32 and torch.equal(found.long(), a @ b.t()), (M, K, N, ab)
"""


@pytest.mark.slow
@pytest.mark.parametrize("isa", ["DEFAULT", "AVX2", "AVX512_CORE"])
def test_products_are_exact_at_the_extremes_on_every_kind_of_cpu(isa):
    """oneDNN pretends to be on an older CPU, without VNNI."""
    process = start("-c", EXTREMES, env=os.environ | {"ONEDNN_MAX_CPU_ISA": isa})
    assert process.communicate()[1] == "" and process.returncode == 0


# ---- one Linear ----

@pytest.fixture(params=["int_mm", "oneDNN"])
def kernel(request, monkeypatch):
    if request.param == "int_mm":
        monkeypatch.setattr(integer, "ONEDNN", False)
    elif not integer.ONEDNN:
        pytest.skip("this machine has no exact kernel of oneDNN")


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize("build, bits", [(nn.Linear, (8, 8)), (QKV, (8, 8)), (QKV, (4, 6)),
                                         (lambda *n: nn.Linear(*n, bias=False), (2, 5))])
@torch.no_grad()
def test_a_linear_is_its_simulated_twin(build, bits, granularity, kernel):
    """In int64 up to the scales, zero point included; then, bit for bit, in float32."""
    torch.manual_seed(1)
    net = nn.ModuleDict({"linear": build(24, 36), "tap": Tap()})
    net["linear"].weight *= torch.logspace(-2, 1, 36)[:, None]
    net = quantize_model(net, *bits, w_granularity=granularity)
    linear, tap, x = net["linear"], net["tap"], torch.randn(4, 5, 24) + 0.3
    with calibrating(net):
        tap(x)
    x = torch.cat((x, tap.scale * (torch.arange(-240, 240).view(4, 5, 24) + 0.5)), dim=1)  # halves
    model = IntegerLinear(linear, tap)
    assert model.integers.dtype == torch.int8 and len(model.integers.unique()) <= 2 ** bits[0]
    levels = integer.on_grid(x, tap).long() - tap.zero_point.long()
    assert torch.equal(levels * tap.scale, tap(x))
    scale = linear.weight_grid[0].double().expand(-1, 36 // len(linear.weight_grid[0])).flatten()
    torch.testing.assert_close(model.integers * scale[:, None], linear.weight.double(),
                               rtol=1e-6, atol=0)
    bias = 0 if linear.bias is None else linear.bias
    exact = (levels @ model.integers.t().long()).float() * (tap.scale * scale.float()) + bias
    torch.testing.assert_close(model(x), exact, rtol=2e-7, atol=0)
    assert torch.equal(model(integer.on_grid(x, tap)), model(x))
    for post_op, activation in (("gelu", nn.GELU()), ("relu", nn.ReLU())):
        model.activation, model.post_op, model.next = activation, post_op, tap
        steps = model(x).int() - integer.on_grid(activation(exact), tap).int()
        assert steps.abs().max() <= 1 and steps.count_nonzero() <= 2


@pytest.mark.parametrize("K, sign", [(12_288, 1), (65_536, -1)])
@torch.no_grad()
def test_the_largest_sums_do_not_round_nor_wrap(K, sign, kernel):
    """In int64, where float32 would round the sum with the zero point in it."""
    net = quantize_model(nn.ModuleDict({"linear": nn.Linear(K, 3), "tap": Tap()}))
    x, tap = torch.rand(2, K) * sign, net["tap"]
    with calibrating(net):
        tap(x)
    net["linear"].weight[:] = net["linear"].weight_grid[0] * 127.0
    found = IntegerLinear(net["linear"], tap)(x)
    q = tap(x).div(tap.scale).round().long()
    scale = tap.scale * net["linear"].weight_grid[0][0]
    assert torch.equal(found, (127 * q.sum(dim=1, keepdim=True)).float() * scale
                       + net["linear"].bias)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_what_is_not_a_number_stays_so(family):
    """In the row that it is in, out of each Linear; and out of a model, though ffn_up gives uint8,
    since the residual sum has it, too. One sequence has it here, and one has not."""
    simulated, x = calibrated(family), torch.randn(2, 3, 64)
    model, x[0, 1, 5] = to_integer(simulated), torch.nan
    for (parent, name, _, _, _), (twin, _, place, tap, _) in zip(
            integer.pairs(model), integer.pairs(simulated)):
        if name != "ffn_up":
            given = x[..., :getattr(twin, name).in_features]
            expected = getattr(twin, name)(getattr(place, tap)(given)).isnan()
            assert torch.equal(getattr(parent, name)(given).isnan(), expected) and expected.any()
    found, expected = (m.layers(x[..., :32]).isnan() for m in (model, simulated))
    assert torch.equal(found, expected) and expected[0].any() and not expected[1].any()


# ---- whole models ----

KINDS = [{"attention": name, "alpha": 1.0} for name in ATTENTIONS] + [
    {"attention": "gated", "gate": "mlp"}, {"attention": "gated", "gate": "all-heads"}, {}]
CASES = [("opt", x) for x in KINDS] + [(x, y) for x in ("bert", "vit") for y in KINDS[-3:]]


@pytest.mark.parametrize("family, settings", CASES, ids=str)
@torch.no_grad()
def test_a_model_on_integers_is_its_simulation(family, settings):
    """Nearly: and exactly, once each integer Linear gives way to its simulated twin."""
    simulated, batch = calibrated(family, settings=settings), inputs(family, n=64)
    before = {name: x.clone() for name, x in simulated.state_dict().items()}
    model, expected = to_integer(simulated), simulated(batch)
    assert (model(batch) - expected).norm() < 0.05 * expected.norm()  # a step here and there
    of_both = list(zip(integer.pairs(model), integer.pairs(simulated)))
    assert len(of_both) == 4 * 2
    for (parent, name, place, tap, alone), (twin, _, grid, _, _) in of_both:
        assert isinstance(getattr(parent, name), IntegerLinear)
        assert isinstance(getattr(place, tap), Tap) == alone
        setattr(parent, name, nn.Sequential(getattr(grid, tap), getattr(twin, name)))
        if name == "ffn_up":
            parent.activation = twin.activation
    assert torch.equal(model(batch), expected)  # who reads a tap gets the same as ever
    assert same(before, dict(simulated.state_dict()))  # to_integer has changed a copy


class Scaled(nn.Linear):
    forward = lambda self, x: 2 * F.linear(x, self.weight, self.bias)


@pytest.mark.parametrize("quantization, change, message", [
    ({"bits": (8, 9)}, id, "int8 holds at most 8 bits"), ({"bits": (9, 8)}, id, "at most 8 bits"),
    ({"quantizer": PerToken}, id, "a static grid for the tensor"),
    ({"only": "*.weight"}, id, "a static grid for the tensor"),
    ({"only": "*_tap"}, id, "and one for the weights"),
    ({"active": lambda model: torch.no_grad()}, id, "not calibrated, its scale is nan"),
    ({}, lambda x: setattr(x, "in_features", 65_537), "65,536 products of int8, not 65537"),
    ({}, lambda x: setattr(x, "__class__", Scaled), "ffn_up behind norm2_tap: Scaled computes"),
    ({}, lambda x: setattr(x, "weight_grid", (*x.weight_grid[:3], False)), "of either sign"),
    ({}, lambda x: setattr(x, "weight_grid", (x.weight_grid[0].expand(128, 1), *x.weight_grid[1:])),
     "a row of weights needs one scale; 128 do not divide 64 rows")])
def test_what_int8_cannot_follow_is_refused(quantization, change, message):
    model = calibrated(**quantization)
    change(model.layers[1].ffn_up)
    with pytest.raises(UserError, match=rf"\A.*{message}.*\Z"):  # in one line
        to_integer(model)


@pytest.mark.slow
@torch.no_grad()
def test_compiled_it_computes_the_same():
    """By the compiler's own kernels, on one token: one row, whose strides are the compiler's."""
    model = to_integer(calibrated("opt", settings={"layers": 1}))
    token, compiled = torch.randint(256, (1, 1)), training.compiled(model)
    assert (compiled(token) - model(token)).abs().max() < 1e-3 * model(token).abs().max()


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_the_script(family, corpus, cifar, tmp_path):
    run(*small(f"train_{family}.py", corpus, cifar), "--width", 128, "--out", tmp_path / "run")
    out, _ = run("lab.integer", tmp_path / "run", "--batches", 2, "--bits", 7,
                 "--json", tmp_path / "x.json")
    (row,) = json.loads((tmp_path / "x.json").read_text())
    assert row["integer"] == pytest.approx(row["simulated"], rel=1e-3) and row["bits"] == 7
    assert row["bytes"] < 0.45 * row["bytes_fp32"]  # embeddings and head stay in fp32
    assert f"| {row['integer']:.4g} | {row['bytes'] / 1e6:.3g} (" in out
