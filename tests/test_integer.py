"""On real integers: exact accumulators, outputs within one step of the simulation, whole models, files, training."""
import contextlib
import copy
import hashlib
import io
import json
import math
import os
import shutil
import subprocess
import sys

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from minq import attention, integer, integer_training
from minq.attention import Tap
from minq.errors import UserError
from minq.fake_quant import FakeQuantLinear
from minq.integer import IntegerTap, OnGrid, floats, on_grid, to_integer
from minq.integer_training import IntegerLinear
from minq.model import FAMILIES, Bert, BertConfig
from minq.quant import ActivationQuantizer, calibrating, quantize_model
from running import ROOT, SMALL, SMALL_VIT, assert_same_weights, logged, run, saved, train

SIZES = dict(layers=2, width=32, heads=4, ffn=64, init_std=0.2)
KINDS = {
    "vanilla": dict(), "clipped": dict(attention="clipped", gamma=-0.05, zeta=1.1), "linear": dict(attention="gated"),
    "mlp": dict(attention="gated", gate="mlp"), "all-heads": dict(attention="gated", gate="all-heads"),
    "row-clipped": dict(attention="row-clipped", alpha=1.0)}
PAIRS = [(family, kind) for family in FAMILIES for kind in KINDS if family == "opt" or kind != "row-clipped"]


def inputs(family, n=4):
    return torch.rand(n, 3, 32, 32) if family == "vit" else torch.randint(256, (n, 16))


def models(family, kind="vanilla", w_bits=8, a_bits=8, **quantization):
    """(simulated, on integers): the same calibrated model of random weights, nothing symmetric about it."""
    torch.manual_seed(0)
    sizes = SIZES | (dict(patch_size=8) if family == "vit" else dict(seq_len=16))
    build = FAMILIES[family]
    model = build(build.config_class(**sizes, **KINDS[kind])).eval()
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)
    simulated = quantize_model(model, w_bits, a_bits, **quantization)
    with calibrating(simulated):
        for _ in range(3):
            simulated(inputs(family))
    return simulated, to_integer(copy.deepcopy(simulated))


@contextlib.contextmanager
def products():
    """While active, a list of (q_a, q_b, result) of every integer product, a Linear's or one of attention's two."""
    seen, kernel, exact_floats = [], integer.int_mm, integer.exact_floats
    def listen(a, b):
        seen.append((a.clone(), b.clone(), kernel(a, b)))
        return seen[-1][2]
    def listen_to_floats(a, b):
        p, q = exact_floats(a, b)
        seen.append((a.clone(), b.clone(), p @ q))
        return p, q
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(integer, "int_mm", listen)
        patch.setattr(integer, "exact_floats", listen_to_floats)
        yield seen


# ---- the kernel ----

EXTREMES = """
import torch
from minq.integer import SATURATES, int_mm
print(SATURATES)
torch.manual_seed(0)
for K in (1, 2, 3, 8, 65, 3072):
    for M in (1, 2, 17):
        for N in (1, 2, 3, 24):
            for a in (-128, 127, None):
                for b in (-128, 127, None):
                    fill = lambda x, *shape: torch.randint(-128, 128, shape) if x is None else torch.full(shape, x)
                    left, right = fill(a, M, K), fill(b, K, N)
                    for narrow in (right.to(torch.int8), right.t().contiguous().to(torch.int8).t()):
                        found = int_mm(left.to(torch.int8), narrow)
                        assert found.dtype == torch.int32 and torch.equal(found.long(), left @ right), (M, K, N, a, b)
"""


@pytest.mark.slow
@pytest.mark.parametrize("isa", ["", "AVX2", "AVX512_CORE"])  # oneDNN pretends to be on an older CPU, without VNNI
def test_products_are_exact_at_the_extremes_on_every_kind_of_cpu(isa):
    if not isa:
        return exec(EXTREMES, {})
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": isa}
    found = subprocess.run([sys.executable, "-c", EXTREMES], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr


@pytest.mark.parametrize("K", (7, 1024, 3000))
def test_batched_products_are_exact_in_floating_point(K):
    a, b = (torch.randint(-128, 128, shape, dtype=torch.int8) for shape in ((6, 9, K), (6, K, 5)))
    a[0], b[0] = -128, -128  # the largest sum there is
    p, q = integer.exact_floats(a, b)
    assert torch.equal((p @ q).long(), a.long() @ b.long())


# ---- one tensor ----

def some(*shape, scale=0.013, zero_point=-37.0, low=-128, high=128):
    x = on_grid(torch.randint(low, high, shape, dtype=torch.int8), torch.tensor(scale), torch.tensor(zero_point))
    return x, scale * (x.integers.double() - zero_point)


def test_a_tap_gives_exactly_the_grid_of_the_simulation():
    for n_bits in (8, 5):
        tap = ActivationQuantizer(n_bits)
        tap.range.update(torch.randn(1000) + 0.7)
        tap.observe(torch.randn(1000) + 0.7)
        x = torch.cat((torch.randn(10_000) * 3, tap.scale * (torch.arange(-300, 300) + 0.5)))  # halves, and beyond the range
        y = IntegerTap(tap)(x)
        assert y.integers.dtype == torch.int8 and torch.equal(floats(y), tap(x))


def test_whatever_is_not_a_product_sees_the_floats():
    (x, reference), (y, _) = some(3, 4, 8), some(3, 4, 8)
    assert x.shape == (3, 4, 8) and x.dtype == torch.float32 and len(x) == 3 and x.dim() == 3
    close = lambda found, expected: torch.testing.assert_close(found.double(), expected.double(), rtol=1e-4, atol=1e-5)
    close(x + 1, reference + 1)
    close(x.softmax(-1), reference.softmax(-1))
    close(torch.cat((x, torch.ones(3, 1, 8)), dim=1)[:, :4], reference)
    close(torch.einsum("bti,i->bt", x, torch.ones(8)), reference.sum(-1))
    close((x @ torch.ones(8, 2)), reference @ torch.ones(8, 2).double())
    close(F.layer_norm(x, (8,)), F.layer_norm(reference, (8,)))
    close(-x, -floats(x))
    close(x * y, floats(x) * floats(y))


def test_moving_values_about_keeps_the_integers():
    x, reference = some(3, 4, 8)
    for move in (lambda x: x.transpose(1, 2).reshape(3, 32), lambda x: x.unflatten(-1, (2, 4)).permute(2, 0, 1, 3),
                 lambda x: x[:, 0], lambda x: x.mT, lambda x: x.view(12, 8).unsqueeze(0), lambda x: F.dropout(x, 0.5, False)):
        moved = move(x)
        assert isinstance(moved, OnGrid) and moved.integers.dtype == torch.int8
        torch.testing.assert_close(floats(moved).double(), move(reference), rtol=1e-5, atol=1e-6)
    assert isinstance(x * 0.5, OnGrid) and isinstance(0.5 * x, OnGrid)
    torch.testing.assert_close(floats(x * 0.3).double(), reference * 0.3, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("change", [lambda x: x.clamp_(0, 1), lambda x: x.masked_fill_(x > 0, 0), lambda x: x.__setitem__(0, 0.0)])
def test_integers_cannot_be_changed_in_place_unnoticed(change):
    with pytest.raises(TypeError, match="cannot be changed in place"):
        change(some(3, 4)[0])


@pytest.mark.parametrize("K", [1, 7, 64, 300])
def test_a_product_of_two_activations_is_exact_up_to_its_scale(K):
    """Attention's: both have zero points. In int64, then one multiplication in float64."""
    (a, _), (b, _) = some(2, 3, 5, K, zero_point=-128.0), some(2, 3, K, 9, scale=0.2, zero_point=11.0)
    sums = (a.integers.long() + 128) @ (b.integers.long() - 11)
    with products() as seen:
        found = a @ b
    assert len(seen) == 1
    torch.testing.assert_close(found.double(), sums.double() * 0.013 * 0.2, rtol=1e-6, atol=0)


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize("parts, sign", [(1, 1), (3, 1), (1, 0)])  # (1, 0): no weight is negative, on the grid 0 .. 255
def test_a_linear_equals_its_simulated_twin(granularity, parts, sign):
    """Bit for bit in the accumulator, zero point included, and within float32's rounding behind it."""
    torch.manual_seed(1)
    module = nn.Module()
    module.float_modules, module.linear = (), attention.QKV(24, 36) if parts == 3 else nn.Linear(24, 36)
    module.tap = Tap()
    module.linear.weight.data *= torch.logspace(-2, 1, 36)[:, None]
    if not sign:
        module.linear.weight.data.abs_()
    quantize_model(module, w_granularity=granularity)
    x = torch.randn(4, 5, 24) + 0.3
    with calibrating(module):
        module.tap(x)
    quantizer = module.linear.parametrizations.weight[0]
    expected, weight = module.linear(module.tap(x)), module.linear.weight.double()
    scale = quantizer.scale.repeat_interleave(36 // len(quantizer.scale), dim=0).double()

    to_integer(module)
    with products() as seen:
        on_integers = module.tap(x)
        found = module.linear(on_integers)
    ((q_x, q_w, sums),) = seen
    z = on_integers.zero_point.long()
    held = module.linear.parametrizations.weight.original
    assert held.dtype == (torch.int8 if sign else torch.uint8)
    torch.testing.assert_close(held.double() * scale, weight, rtol=1e-6, atol=0)
    assert torch.equal(sums.long(), q_x.long() @ q_w.long())
    accumulator = (on_integers.integers.long() - z).flatten(0, 1) @ held.long().t()
    exact = accumulator.double() * on_integers.scale.double() * scale[:, 0] + module.linear.bias.double()
    largest = (on_integers.scale * scale[:, 0] * 128 * held.long().abs().sum(1)).max()
    assert (found.flatten(0, 1).double() - exact).abs().max() < 4e-7 * largest
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6 * largest.item())


# ---- whole models ----

@pytest.mark.parametrize("family, kind", PAIRS)
@torch.no_grad()
def test_a_model_on_integers_is_its_simulation(family, kind):
    """Every tap gives its simulated twin's floats for the same input, and the whole model the same perplexity."""
    simulated, on_integers = models(family, kind)
    batch = inputs(family, n=128 if family == "vit" else 16)  # 128 or 256 predictions
    taps = {name: tap for name, tap in on_integers.named_modules() if isinstance(tap, IntegerTap)}
    assert taps and not any(isinstance(m, ActivationQuantizer) for m in on_integers.modules())
    seen = {}
    for name, tap in taps.items():
        tap.register_forward_hook(lambda m, args, y, name=name: seen.update({name: (args[0], y)}))
    with products() as multiplied:
        found, expected = on_integers(batch), simulated(batch)
    for name, (x, y) in seen.items():
        twin = simulated.get_submodule(name)
        assert torch.equal(floats(y), twin(floats(x))), name
    targets = torch.randint(found.shape[-1], found.shape[:-1])
    perplexity = lambda logits: F.cross_entropy(logits.flatten(0, -2), targets.flatten()).exp().item()
    assert perplexity(found) == pytest.approx(perplexity(expected), rel=1e-3)
    assert (found - expected).norm() < 0.05 * expected.norm()  # a value that falls on the other side of a step moves those after it
    linears = [m for name, m in on_integers.named_modules() if isinstance(m, nn.Linear) and "weight" in getattr(m, "parametrizations", {})]
    attention = 2 * 2  # of both layers both products
    assert len(multiplied) == len(linears) - (family == "vit") + attention  # a ViT's pixels are on no grid
    for a, b, sums in multiplied:
        assert torch.equal(sums.long(), a.long() @ b.long())


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_each_tap_is_within_one_step_when_the_whole_model_runs(family):
    """Here errors could pile up, layer by layer: what float32 rounds differently must stay a step in few places."""
    simulated, on_integers = models(family)
    outputs = {}
    for which, model in enumerate((simulated, on_integers)):
        for name, tap in model.named_modules():
            if name.endswith("_tap"):
                tap.register_forward_hook(lambda m, args, y, key=(name, which): outputs.update({key: floats(y)}))
        torch.manual_seed(3)
        model(inputs(family, n=8))
    for name, _ in outputs:
        steps = (outputs[name, 0] - outputs[name, 1]).abs() / simulated.get_submodule(name).scale
        assert steps.max() < 1.5 and (steps > 0.5).float().mean() < 1e-3, name


@pytest.mark.parametrize("w_bits, a_bits", [(4, 4), (5, 7), (7, 6), (2, 8)])
@torch.no_grad()
def test_fewer_bits_run_too(w_bits, a_bits):
    simulated, on_integers = models("bert", "linear", w_bits, a_bits, w_granularity="channel")
    batch = inputs("bert")
    assert (on_integers(batch) - simulated(batch)).norm() < 1e-2 * simulated(batch).norm()
    levels = {len(m.original.unique()) for m in on_integers.modules() if isinstance(m, nn.utils.parametrize.ParametrizationList)}
    assert max(levels) <= 2 ** w_bits


def test_what_int8_cannot_hold_is_refused():
    with pytest.raises(UserError, match="9 bits; int8 holds at most 8"):
        models("bert", a_bits=9)
    with pytest.raises(UserError, match="not calibrated"):
        to_integer(quantize_model(Bert(BertConfig(**SIZES))))


@torch.no_grad()
def test_a_new_module_needs_to_be_named_nowhere(monkeypatch):
    """A student's block: another norm, a Linear that no tap feeds, a product of its own, in-between sums."""
    class RMSNorm(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.weight = nn.Parameter(torch.rand(width) + 0.5)

        def forward(self, x):
            return x * x.square().mean(dim=-1, keepdim=True).rsqrt() * self.weight

    class Student(nn.Module):
        float_modules = ()

        def __init__(self):
            super().__init__()
            self.untapped, self.norm, self.linear = nn.Linear(8, 8), RMSNorm(8), nn.Linear(8, 8)
            self.norm_tap, self.linear_tap = Tap(), Tap()

        def forward(self, x):
            x = self.norm_tap(self.norm(self.untapped(x)))
            y = self.linear_tap(self.linear(x) + x)
            return (y[:, :2].expand(-1, -1, 8) @ y.mT).cumsum(-1) + torch.stack((x, y)).sum()

    torch.manual_seed(0)
    simulated, x = quantize_model(Student()), torch.randn(3, 5, 8)
    with calibrating(simulated):
        simulated(x)
    on_integers = to_integer(copy.deepcopy(simulated))
    torch.testing.assert_close(on_integers(x), simulated(x), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@torch.no_grad()
def test_compiled_it_computes_the_same():
    """In one graph. A ViT has all that is hard to compile: an OnGrid within a list, to be concatenated, and a gate's unflatten."""
    _, on_integers = models("vit", "linear")
    batch = inputs("vit")
    torch._dynamo.reset()
    compiled = torch.compile(on_integers, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(batch), on_integers(batch), rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_a_published_checkpoint_on_integers(tmp_path):
    """A random BERT with Hugging Face's names, opened by pretrained.py."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    torch.manual_seed(0)
    vocabulary = {word: i for i, word in enumerate(("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz."))}
    theirs = transformers.BertModel(transformers.BertConfig(
        vocab_size=len(vocabulary), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=32), add_pooling_layer=False)
    for p in theirs.parameters():
        p.data += 0.2 * torch.randn_like(p)
    theirs.save_pretrained(tmp_path / "model")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "model" / "tokenizer.json"))
    text = tmp_path / "text.txt"
    text.write_text("a b c d e f g h i j k l m n o p q r s t u v w x y z . " * 300)
    run("pretrained.py", tmp_path / "model", "--out", tmp_path / "run", "--text", text, "--seq-len", 16)
    run("quantize.py", tmp_path / "run", "--export", tmp_path / "int8", "--seeds", 1, "--batches", 2, "--json", tmp_path / "a.json")
    (row,) = json.loads((tmp_path / "a.json").read_text())
    assert row["metric"] == "sqnr" and row["integer"]["metric"] == pytest.approx(row["quantized"]["8x8"]["mean"], rel=1e-3)
    run("quantize.py", tmp_path / "int8", "--json", tmp_path / "b.json")
    (again,) = json.loads((tmp_path / "b.json").read_text())
    assert 5 < again["integer"]["metric"] < 60  # of one batch


# ---- quantize.py ----

@pytest.mark.parametrize("family", FAMILIES)
def test_quantize_integer_export_and_the_file_again(family, corpus, cifar, tmp_path):
    small = [*SMALL_VIT, "--data", cifar] if family == "vit" else [*SMALL, "--data", corpus]
    run(f"train_{family}.py", *small, "--attention", "gated", "--out", tmp_path / "run")
    file = tmp_path / "model.int8"
    out, _ = run("quantize.py", tmp_path / "run", "--export", file, "--seeds", 1, "--batches", 2, "--json", tmp_path / "a.json")
    (row,) = json.loads((tmp_path / "a.json").read_text())
    found = row["integer"]
    assert found["metric"] == pytest.approx(row["quantized"]["8x8"]["mean"], rel=1e-3)
    assert found["bytes"] == file.stat().st_size and found["speedup_fp32"] > 0 and found["speedup_bf16"] > 0
    assert "| integers | MB | speed against fp32 | against bf16 |" in out and not list(tmp_path.glob("*.new"))
    state = contents_of(file)["model"]
    matrices = {name for name, x in state.items() if x.dim() == 2 and x.numel() > 100 and x.dtype == torch.float32}
    assert all(name.startswith(("head.decoder", "head.transform", "decoder")) for name in matrices if "scale" not in name)

    out, _ = run("quantize.py", file, tmp_path / "run", "--seeds", 1, "--batches", 2, "--json", tmp_path / "b.json")
    again, plain = json.loads((tmp_path / "b.json").read_text())
    assert again["integer"]["metric"] == found["metric"] and again["fp"] is None and again["quantized"] == {}
    assert plain["integer"] is None and out.count("\n") == 4 and "–" in out
    assert again["max_inf_norm"] == pytest.approx(row["max_inf_norm"], rel=0.1)


def test_the_file_is_a_quarter_of_the_weights_in_fp32(tmp_path, corpus):
    run("train_bert.py", *SMALL, "--width", 128, "--steps", 1, "--data", corpus, "--out", tmp_path / "run")
    run("quantize.py", tmp_path / "run", "--export", tmp_path / "int8", "--seeds", 1, "--batches", 1)
    fp32 = sum(4 * x.numel() for name, x in saved(tmp_path / "run")["model"].items() if name != "head.decoder.weight")
    assert (tmp_path / "int8").stat().st_size < 0.42 * fp32  # head and tied table, in fp32, are a tenth of so small a model


@pytest.mark.slow
@pytest.mark.parametrize("estimators", [["--best"], ["--w-estimator", "mse", "--a-estimator", "p99.99", "--w-granularity", "channel"]])
def test_integers_take_the_estimators_of_the_table(estimators, corpus, tmp_path):
    train(corpus, tmp_path / "run")
    run("quantize.py", tmp_path / "run", "--integer", *estimators, "--w-bits", 4, "--a-bits", 5, "--seeds", 1, "--batches", 1,
        "--json", tmp_path / "a.json")
    (row,) = json.loads((tmp_path / "a.json").read_text())
    assert row["integer"]["metric"] == pytest.approx(row["quantized"]["4x5"]["mean"], rel=1e-3)


@pytest.mark.parametrize("options, message", [
    (["--integer", "--w-bits", 9], "--integer: int8 holds at most 8 bits, not --w-bits 9 --a-bits 8"),
    (["--export", "{}/no/where"], "cannot be written: there is no folder"),
    (["{}/other", "--export", "{}/x"], "expected one run's folder, not")])
def test_what_cannot_be_exported_is_one_line(options, message, corpus, tmp_path):
    train(corpus, tmp_path / "run")
    shutil.copytree(tmp_path / "run", tmp_path / "other")
    options = [str(option).replace("{}", str(tmp_path)) for option in options]
    _, err = run("quantize.py", tmp_path / "run", *options, "--seeds", 1, "--batches", 1, code=2)
    assert message in err.splitlines()[-1] and not (tmp_path / "x").exists()


def test_a_damaged_or_foreign_file_is_one_line(corpus, tmp_path):
    train(corpus, tmp_path / "run")
    file = tmp_path / "int8"
    run("quantize.py", tmp_path / "run", "--export", file, "--seeds", 1, "--batches", 1)
    good = file.read_bytes()

    def refused(contents, message):
        file.write_bytes(contents)
        _, err = run("quantize.py", file, code=2)
        assert message in err and err.count("\n") == 1 and str(file) in err

    header, _, inside = good.partition(b"\n")
    resaved = lambda contents: b"minq int8 1, sha256 " + hashlib.sha256(contents).hexdigest().encode() + b"\n" + contents
    assert resaved(inside) == good
    refused(b"hello", "not a model that --export wrote")
    refused((tmp_path / "run" / "checkpoint.pt").read_bytes(), "a run is named by its folder")
    refused(b"", "not a model that --export wrote")
    for length in (len(header), len(header) + 1, len(good) // 2, len(good) - 1):
        refused(good[:length], "damaged or truncated")
    for position in range(len(header) + 1, len(good), len(good) // 20):
        refused(good[:position] + bytes([good[position] ^ 1]) + good[position + 1:], "damaged or truncated")  # a single bit
    contents = contents_of(file, good)
    for change, message in [(lambda c: c["model"].popitem(), "does not fit minq's Bert"), (lambda c: c["config"].update(layers=3), "Missing key"),
                            (lambda c: c["config"].update(width=64), "size mismatch"),
                            (lambda c: c["config"].update(attention="telepathy"), "its attention is 'telepathy'"),
                            (lambda c: c.update(data_sha256="0"), "has changed since")]:
        changed, stream = copy.deepcopy(contents), io.BytesIO()
        change(changed)
        torch.save(changed, stream)
        if message == "has changed since":
            file.write_bytes(resaved(stream.getvalue()))
            assert message in run("quantize.py", file, code=2)[1]
        else:
            refused(resaved(stream.getvalue()), message)


def contents_of(file, data=None):
    return torch.load(io.BytesIO((data or file.read_bytes()).partition(b"\n")[2]), weights_only=True)


# ---- training ----

@pytest.mark.parametrize("granularity", ["token", "tensor"])
@pytest.mark.parametrize("build", [lambda: nn.Linear(48, 24), lambda: attention.QKV(48, 72), lambda: nn.Linear(48, 8, bias=False)])
@pytest.mark.parametrize("bits", [(8, 8), (4, 6)])
def test_a_training_linear_on_integers_equals_the_simulated_one(granularity, build, bits):
    torch.manual_seed(0)
    linear, x0 = build(), torch.randn(3, 7, 48) + 0.4
    upstream = torch.randn(3, 7, linear.out_features)
    results = []
    for kind in (FakeQuantLinear, IntegerLinear):
        x = x0.clone().requires_grad_()
        linear.zero_grad()
        y = kind(linear, *bits, granularity)(x)
        y.backward(upstream)
        results.append((y.detach(), x.grad, *(p.grad.clone() for p in linear.parameters())))
    for found, expected in zip(*results):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_its_products_are_integers_and_it_keeps_integers():
    kept, seen = [], []
    kernel = integer_training.int_mm
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(integer_training, "int_mm", lambda a, b: seen.append((a.dtype, b.dtype)) or kernel(a, b))
        layer, x = IntegerLinear(nn.Linear(16, 24)), torch.randn(10, 16, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            layer(x * 1)
    assert seen == [(torch.int8, torch.int8)]
    assert {tuple(t.shape) for t in kept if t.dtype == torch.int8} == {(10, 16), (24, 16)}
    assert all(t.numel() <= 24 for t in kept if t.dtype != torch.int8)


@pytest.mark.slow
@pytest.mark.parametrize("precision, tolerance", [("fp32", 1e-3), ("bf16", 2e-2)])
def test_losses_follow_the_simulation(precision, tolerance, corpus, tmp_path):
    for name, options in (("simulated", []), ("integer", ["--integer"]), ("again", ["--integer"])):
        train(corpus, tmp_path / name, "--fake-quant", *options, "--steps", 20, "--eval-every", 2, "--precision", precision)
    losses = {name: [line["loss"] for line in logged(tmp_path / name)] for name in ("simulated", "integer")}
    assert losses["integer"] == pytest.approx(losses["simulated"], rel=tolerance)
    assert saved(tmp_path / "integer")["args"]["integer"] is True
    assert_same_weights(tmp_path / "integer", tmp_path / "again")
    off = [line["float_perplexity"] for line in logged(tmp_path / "integer")]
    assert all(map(math.isfinite, off))


@pytest.mark.parametrize("options, message", [
    (["--integer"], "--integer needs --fake-quant"),
    (["--integer", "--fake-quant", "--a-bits", "9"], "--integer: int8 holds at most 8 bits, not --w-bits 8 --a-bits 9")])
def test_bad_flags(options, message, corpus, tmp_path):
    _, err = train(corpus, tmp_path / "run", *options, code=2)
    assert message in err and err.count("\n") == 1 and not (tmp_path / "run").exists()
