"""The cures since the paper: each against its formula in Python loops, an identity, and the scripts."""
import json
import math
import warnings

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils import parametrize

from minq.analysis import survey
from minq.attention import GATES, SelfAttention
from minq.cures import ATTENTIONS, ExtraKey, LearnedSink, QKNorm, ReLUAttention, SigmoidAttention, Softmax1, Softpick, WholeInputGate
from minq.errors import UserError
from minq.fake_quant import DynamicQuantizer, fake_quantize_training
from minq.model import BertConfig, Opt, OptConfig, ViT, ViTConfig
from minq.quant import calibrating, quantize_model
from minq.remedies import smooth
from running import SMALL, SMALL_VIT, assert_same_weights, logged, run, saved, stopped_at

H, D, T = 4, 8, 10  # heads, d_head, tokens
CURES = ("softmax1", "learned-sink", "sigmoid", "relu", "softpick", "headwise-gate", "elementwise-gate", "value-gate",
         "k-bias", "kv-bias", "qk-norm")
BARRED = -torch.inf


def test_every_cure_has_its_name():
    assert set(ATTENTIONS) >= set(CURES) and len(ATTENTIONS) == 4 + len(CURES)


def attention(name, causal=False, **settings):
    torch.manual_seed(1)
    layer = SelfAttention(BertConfig(width=H * D, heads=H, seq_len=T, causal=causal, attention=name, norm_eps=1e-5, **settings))
    for p in layer.parameters():
        nn.init.normal_(p, std=0.3)  # what starts at 0 or 1 matters, too
    return layer


X = torch.randn(2, T, H * D, generator=torch.Generator().manual_seed(0))


# ---- against the formulas, a number at a time ----

def softmax1(s, layer, h, q):
    return [math.exp(x) / (1 + sum(map(math.exp, s))) for x in s]


def learned_sink(s, layer, h, q):
    b = layer.softmax.sink[h].item()
    return [math.exp(x) / (math.exp(b) + sum(map(math.exp, s))) for x in s]


def sigmoid(s, layer, h, q):
    return [1 / (1 + math.exp(-(x - math.log(T)))) for x in s]


def relu(s, layer, h, q):
    return [max(x, 0) / len(s) for x in s]


def softpick(s, layer, h, q):
    total = sum(abs(math.exp(x) - 1) for x in s)
    return [max(math.exp(x) - 1, 0) / total for x in s]


def plain(s, layer, h, q):
    return [math.exp(x) / sum(map(math.exp, s)) for x in s]


def with_key(s, layer, h, q):
    extra = math.exp(sum(a * b for a, b in zip(q, layer.prepare.k_bias[h, 0].tolist())) / math.sqrt(D))
    return [math.exp(x) / (extra + sum(map(math.exp, s))) for x in s]


FORMULAS = {"softmax1": softmax1, "learned-sink": learned_sink, "sigmoid": sigmoid, "relu": relu, "softpick": softpick,
            "k-bias": with_key, "kv-bias": with_key}


def rms_norm(x, gain):
    rms = math.sqrt(sum(a * a for a in x) / D + 1e-5)
    return [a / rms * g for a, g in zip(x, gain)]


def by_loops(layer, name, x, causal):
    """The attention of one sequence x (T, width), a query, a head and a number at a time."""
    q, k, v = (part.tolist() for part in layer.qkv(x).double().view(T, 3, H, D).unbind(1))
    out = torch.zeros(T, H * D, dtype=torch.float64)
    for t in range(T):
        for h in range(H):
            query, keys = q[t][h], [k[j][h] for j in range(t + 1 if causal else T)]
            if name == "qk-norm":
                query = rms_norm(query, layer.prepare.of_queries.weight.tolist())
                keys = [rms_norm(key, layer.prepare.of_keys.weight.tolist()) for key in keys]
            s = [sum(a * b for a, b in zip(query, key)) / math.sqrt(D) for key in keys]
            p = FORMULAS.get(name, plain)(s, layer, h, query)
            for i in range(D):
                total = sum(p[j] * v[j][h][i] for j in range(len(p)))
                if name == "kv-bias":
                    total += (1 - sum(p)) * layer.prepare.v_bias[h, 0, i].item()
                if name == "headwise-gate":
                    total *= torch.sigmoid(layer.gate.weight[h] @ x[t]).item()
                if name == "elementwise-gate":
                    total *= torch.sigmoid(layer.gate.weight[h * D + i] @ x[t]).item()
                if name == "value-gate":
                    all_heads = [number for head in v[t] for number in head]
                    pi_hat = sum(w * number for w, number in zip(layer.gate.weight[h].tolist(), all_heads))
                    total *= 1 / (1 + math.exp(-pi_hat))
                out[t, h * D + i] = total
    return layer.proj(out.float())


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", CURES)
def test_the_formula_in_loops(name, causal):
    layer = attention(name, causal)
    with torch.no_grad():
        torch.testing.assert_close(layer(X)[0], by_loops(layer, name, X[0], causal), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", CURES)
def test_causal_attention_never_looks_ahead_however_short_the_sequence(name):
    layer, changed = attention(name, causal=True), X.clone()
    changed[:, 6:] += 1
    torch.testing.assert_close(layer(X)[:, :6], layer(changed)[:, :6])
    torch.testing.assert_close(layer(X)[:, :6], layer(X[:, :6]))


# ---- identities ----

SCORES = 4 * torch.randn(2, H, T, T, generator=torch.Generator().manual_seed(2))


def test_a_sink_of_minus_infinity_is_plain_softmax():
    sink = LearnedSink(H)
    nn.init.constant_(sink.sink, BARRED)
    assert torch.equal(sink(SCORES), SCORES.softmax(-1))


def test_a_sink_of_zero_is_softmax1_and_so_is_a_zero_key_with_a_zero_value():
    torch.testing.assert_close(LearnedSink(H)(SCORES), Softmax1()(SCORES))
    one, plain, extra = attention("softmax1"), attention("vanilla"), attention("k-bias")
    for layer in (one, plain, extra):
        layer.load_state_dict(attention("vanilla").state_dict(), strict=False)
    nn.init.zeros_(extra.prepare.k_bias)
    torch.testing.assert_close(one(X), extra(X))
    assert not torch.allclose(one(X), plain(X))
    values = torch.randn(2, H, T, D)
    with_zero = F.pad(SCORES, (0, 1)).softmax(-1) @ F.pad(values, (0, 0, 0, 1))
    torch.testing.assert_close(Softmax1()(SCORES) @ values, with_zero)


def test_an_extra_key_and_value_equal_pytorchs_own():
    """nn.MultiheadAttention's add_bias_kv is this cure, with an additive mask where it is causal."""
    for causal in (False, True):
        layer = attention("kv-bias", causal)
        theirs = nn.MultiheadAttention(H * D, H, add_bias_kv=True, batch_first=True)
        state = {"in_proj_weight": layer.qkv.weight, "in_proj_bias": layer.qkv.bias, "out_proj.weight": layer.proj.weight,
                 "out_proj.bias": layer.proj.bias, "bias_k": layer.prepare.k_bias.view(1, 1, -1), "bias_v": layer.prepare.v_bias.view(1, 1, -1)}
        theirs.load_state_dict(state)
        future = torch.ones(T, T, dtype=torch.bool).triu(1) if causal else None
        torch.testing.assert_close(layer(X), theirs(X, X, X, attn_mask=future, need_weights=False)[0])


def test_a_value_bias_of_zero_is_the_key_bias_alone():
    key, both = attention("k-bias"), attention("kv-bias")
    both.load_state_dict(key.state_dict(), strict=False)
    nn.init.zeros_(both.prepare.v_bias)
    torch.testing.assert_close(both(X), key(X))


def test_sigmoid_attention_of_equal_scores_is_nearly_even_attention():
    """What log T is for: at the start a row sums to about 1."""
    rows = SigmoidAttention(1000)(torch.zeros(1, 1, 1, 1000)).sum(-1)
    assert rows.item() == pytest.approx(1, abs=2e-3)


def test_softpick_of_large_scores_is_softmax_and_of_negative_ones_nothing():
    torch.testing.assert_close(Softpick()(SCORES + 100), SCORES.softmax(-1))
    assert (Softpick()(-SCORES.abs() - 0.1) == 0).all()


def test_relu_divides_by_the_keys_that_a_row_may_see():
    scores = torch.ones(1, 1, 3, 3).masked_fill(torch.ones(3, 3).triu(1).bool(), BARRED)
    assert torch.equal(ReLUAttention()(scores)[0, 0], torch.tensor([[1, 0, 0], [1 / 2, 1 / 2, 0], [1 / 3, 1 / 3, 1 / 3]]))


def test_the_headwise_gate_is_the_papers_all_heads_gate_without_a_bias():
    paper = GATES["all-heads"](BertConfig(width=H * D, heads=H))  # starts with the bias 0
    ours = WholeInputGate(H * D, H)
    ours.load_state_dict({"weight": paper.weight})
    torch.testing.assert_close(ours(X).squeeze(-1), paper(X))


def test_an_elementwise_gate_with_equal_rows_in_a_head_is_the_headwise_one():
    head, every = attention("headwise-gate"), attention("elementwise-gate")
    state = head.state_dict()
    every.load_state_dict(state | {"gate.weight": state["gate.weight"].repeat_interleave(D, dim=0)})
    torch.testing.assert_close(every(X), head(X))


def test_normalized_queries_and_keys_do_not_depend_on_their_lengths_and_fuse():
    layer, other = attention("qk-norm"), attention("qk-norm")
    with torch.no_grad():
        other.qkv.weight[:2 * H * D] *= 50
        other.qkv.bias[:2 * H * D] *= 50
    torch.testing.assert_close(other(X), layer(X), rtol=1e-3, atol=1e-3)
    assert layer.can_fuse(X)
    fused = layer(X)
    layer.probs_tap.register_forward_hook(lambda *_: None)
    torch.testing.assert_close(layer(X), fused)
    q, k, _ = QKNorm(D, 1e-12)(torch.randn(3, 2, H, T, D) * 7)
    torch.testing.assert_close(q.square().mean(-1), torch.ones(2, H, T))
    assert (q @ k.mT / math.sqrt(D)).abs().max() <= math.sqrt(D) * 1.0001


# ---- extremes ----

ROWS = torch.tensor([[0.0, 0.0, BARRED], [200.0, 90.0, 1.0], [-200.0, -90.0, -300.0], [5.0, BARRED, BARRED],
                     [-1e-9, 1e-9, 0.0], [BARRED, BARRED, BARRED]]).view(1, 1, 6, 3)


@pytest.mark.parametrize("softmax", [Softmax1(), LearnedSink(1), SigmoidAttention(3), ReLUAttention(), Softpick()], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masked_and_extreme_rows_give_finite_probabilities_and_gradients(softmax, dtype):
    scores = ROWS.to(dtype).detach().clone().requires_grad_()
    p = softmax(scores)
    assert p.isfinite().all() and (p >= 0).all()
    assert (p[scores == BARRED] == 0).all() and (p[0, 0, -1] == 0).all()
    (p * torch.tensor([1.0, -2.0, 3.0])).sum().backward()
    assert scores.grad.isfinite().all() and (scores.grad[scores == BARRED] == 0).all()
    assert all(q.grad is None or q.grad.isfinite().all() for q in softmax.parameters())


def test_softmax1_adds_one_whatever_the_largest_score_is():
    s = torch.tensor([[-90.0, -95.0], [0.0, 1.0], [80.0, 85.0], [300.0, 299.0]], dtype=torch.float64)
    expected = s.exp() / (1 + s.exp().sum(-1, keepdim=True))
    torch.testing.assert_close(Softmax1()(s.float()).double(), expected, rtol=1e-5, atol=1e-45)


@pytest.mark.parametrize("name", CURES)
def test_all_parameters_learn(name):
    layer = attention(name, causal=True)
    layer(X).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in layer.parameters())


# ---- parameters ----

@pytest.mark.parametrize("name, extra", [
    ("softmax1", 0), ("learned-sink", H), ("sigmoid", 0), ("relu", 0), ("softpick", 0), ("headwise-gate", H * D * H),
    ("elementwise-gate", (H * D) ** 2), ("value-gate", H * D * H), ("k-bias", H * D), ("kv-bias", 2 * H * D), ("qk-norm", 2 * D)])
def test_extra_parameters_are_those_of_the_table(name, extra):
    count = lambda name: sum(p.numel() for p in attention(name).parameters())
    assert count(name) - count("vanilla") == extra


# ---- quantized, fake-quantized, looked at ----

def small(name, family=Opt, **settings):
    torch.manual_seed(0)
    config = dict(layers=2, width=32, heads=4, ffn=64, attention=name, init_std=0.2, **settings)
    return ViT(ViTConfig(**config, patch_size=16)) if family is ViT else Opt(OptConfig(**config, seq_len=12))


TOKENS = torch.randint(256, (4, 12), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("name", CURES)
def test_every_tap_is_quantized_and_gates_and_sinks_are_not(name):
    quantized = quantize_model(small(name))
    with calibrating(quantized):
        quantized(TOKENS)
    inner = quantized.layers[0].attention
    taps = [tap for tap in dir(inner) if tap.endswith("_tap")]
    assert len(taps) == 7 and all(getattr(inner, tap).scale.isfinite() for tap in taps)
    touched = {path for path, module in quantized.named_modules() if parametrize.is_parametrized(module)}
    assert not any(".gate" in path or ".softmax" in path for path in touched)
    assert ("layers.0.attention.prepare.of_keys" in touched) == (name == "qk-norm")  # a norm's gain is a weight


def test_an_extra_key_shares_the_grid_of_the_keys():
    model = small("kv-bias")
    nn.init.constant_(model.layers[0].attention.prepare.k_bias, 50.0)
    quantized = quantize_model(model)
    with calibrating(quantized):
        quantized(TOKENS)
    assert quantized.layers[0].attention.keys_tap.range.high.item() == 50.0


@pytest.mark.parametrize("name", CURES)
def test_fake_quantization_leaves_gates_alone_and_sees_all_keys(name):
    model, plain = fake_quantize_training(small(name), 16, 16), small(name)
    assert isinstance(model.layers[0].attention.keys_tap, DynamicQuantizer)
    torch.testing.assert_close(model(TOKENS), plain(TOKENS), rtol=0.02, atol=0.02)
    assert not any(isinstance(module, DynamicQuantizer) for module in model.layers[0].attention.modules()
                   if "gate" in type(module).__name__.lower())


@pytest.mark.parametrize("name", CURES)
@pytest.mark.parametrize("family", [Opt, ViT])
def test_heads_and_gates_are_measured(name, family):
    model = small(name, family).eval()
    inputs = TOKENS if family is Opt else torch.rand(4, 3, 32, 32)
    found = survey(model, [((inputs,), inputs)], torch.device("cpu"), "layer_output", 260 if family is Opt else None)
    heads = found["heads"]
    assert all((0 <= heads[key]).all() and (heads[key] <= 1.001).all() for key in ("zeros", "ones"))
    assert all(values.shape == (2, 4) and values.dtype.kind == "f" and (values == values).all() for values in heads.values())
    gated = name.endswith("-gate")
    assert ("gate" in heads) == gated and (found["gate_counts"] is not None) == gated
    if gated:
        per_token = 8 if name == "elementwise-gate" else 1
        length = model.config.seq_len
        assert (found["gate_counts"].sum(-1) == 4 * length * per_token).all()


def test_the_mean_of_an_elementwise_gate_is_over_tokens_and_dimensions():
    model = small("elementwise-gate").eval()
    seen = []
    model.layers[0].attention.gate.register_forward_hook(lambda module, args, pi: seen.append(pi))
    found = survey(model, [((TOKENS,), TOKENS)], torch.device("cpu"), "layer_output", 260)
    assert seen[0].shape == (4, 4, 12, 8)
    torch.testing.assert_close(torch.from_numpy(found["heads"]["gate"][0]), seen[0].mean(dim=(0, 2, 3)))


def test_a_key_that_is_no_token_is_not_measured():
    """Neither as a sink nor as a value: with a learned value of any size, the tokens' own lengths are compared."""
    found = []
    for size in (0.0, 1000.0):
        model = small("kv-bias").eval()
        for layer in model.layers:
            nn.init.constant_(layer.attention.prepare.k_bias, -20.0)  # nobody looks there
            nn.init.constant_(layer.attention.prepare.v_bias, size)
            with torch.no_grad():
                layer.attention.qkv.weight[:32] = 0.0
                layer.attention.qkv.bias[:32] = 1.0
        found.append(survey(model, [((TOKENS,), TOKENS)], torch.device("cpu"), "layer_output", 260)["heads"])
    for measure in ("sink_value", "sink_rate", "update"):
        torch.testing.assert_close(torch.from_numpy(found[0][measure]), torch.from_numpy(found[1][measure]))


def test_smoothing_does_not_touch_a_gate_that_sees_values_and_needs_norms_with_gains():
    for name in ("value-gate", "headwise-gate"):
        model = small(name).eval()
        before = model(TOKENS)
        torch.testing.assert_close(smooth(model, [(TOKENS,)])(TOKENS), before, rtol=1e-3, atol=1e-3)
    assert smooth(small("vanilla", norm="rmsnorm").eval(), [(TOKENS,)]) is None


# ---- through the scripts ----

def data(family, corpus, cifar=None):
    return [*SMALL_VIT, "--data", cifar] if family == "vit" else [*SMALL, "--data", corpus]


SETTINGS = {**{name: ["--attention", name] for name in CURES}, "rmsnorm": ["--norm", "rmsnorm"], "muon": ["--optimizer", "muon"]}


@pytest.mark.parametrize("family", ["bert", "opt", "vit"])
@pytest.mark.parametrize("name", SETTINGS)
def test_it_trains_quantizes_and_is_shown(name, family, corpus, cifar, tmp_path):
    folder, short = tmp_path / "run", ["--steps", 3, "--layers", 1, "--eval-batches", 1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(f"train_{family}.py", *data(family, corpus, cifar), *short, *SETTINGS[name], "--out", folder)
    assert all(math.isfinite(line["val_loss"]) for line in logged(folder))
    run("quantize.py", folder, "--batches", 1, "--seeds", 1, "--json", tmp_path / "table.json")
    (row,) = json.loads((tmp_path / "table.json").read_text())
    assert row["quantized"]["8x8"]["mean"] == pytest.approx(row["fp"], rel=0.2)
    settings = row["settings"]
    assert row["attention"] == (name if name in CURES else "vanilla")
    assert settings["norm"] == ("rmsnorm" if name == "rmsnorm" else "layernorm")
    assert settings["optimizer"] == ("muon" if name == "muon" else "adamw")


@pytest.mark.slow
@pytest.mark.parametrize("name, family", [("kv-bias", "bert"), ("elementwise-gate", "vit")])
def test_it_is_analyzed_and_remedied(name, family, corpus, cifar, tmp_path):
    folder = tmp_path / "run"
    run(f"train_{family}.py", *data(family, corpus, cifar), "--steps", 1, "--layers", 1, "--attention", name, "--out", folder)
    out, _ = run("analyze.py", folder, "--batches", 1, *(["--gates"] if name.endswith("gate") else []))
    assert f"{name} attention" in out and "what each head does" in out
    out, _ = run("quantize.py", folder, "--remedies", "--bits", 8, "--batches", 1, "--seeds", 1, "--eval-batches", 1)
    assert "start token in floating point" in out


@pytest.mark.parametrize("options", [["--precision", "bf16"], ["--precision", "fp16"], ["--fake-quant"]])
def test_other_precisions(options, corpus, tmp_path):
    for name in ("learned-sink", "softpick", "kv-bias", "qk-norm"):
        run("train_opt.py", *data("opt", corpus), "--steps", 2, "--attention", name, *options, "--out", tmp_path / name)
        assert 4 < logged(tmp_path / name)[-1]["loss"] < 6


@pytest.mark.parametrize("options, message", [
    (["--attention", "softmax1", "--gamma", "-0.1"], "--gamma -0.1 needs --attention clipped, not softmax1"),
    (["--attention", "headwise-gate", "--gate-init", "0.3"], "--gate-init 0.3 needs --attention gated, not headwise-gate"),
    (["--norm", "rmsnorm", "--decay-layernorm"], "--decay-layernorm would change nothing"),
    (["--norm", "batchnorm"], "--norm: invalid choice"),
    (["--optimizer", "sgd"], "--optimizer: invalid choice")])
def test_what_would_change_nothing_is_refused(options, message, corpus, tmp_path):
    _, err = run("train_bert.py", *data("bert", corpus), *options, "--out", tmp_path / "run", code=2)
    assert message in err and err.count("\n") == 1 and not (tmp_path / "run").exists()


def test_a_query_norms_gain_decays_where_no_other_norm_has_one(corpus, tmp_path):
    run("train_bert.py", *data("bert", corpus), "--steps", 1, "--norm", "rmsnorm", "--attention", "qk-norm", "--decay-layernorm", "--out", tmp_path / "run")


def test_a_cured_run_is_resumed_to_the_same_weights(corpus, tmp_path, monkeypatch):
    options = ["--attention", "kv-bias", "--norm", "rmsnorm", "--save-every", "3"]
    run("train_bert.py", *data("bert", corpus), *options, "--out", tmp_path / "whole")
    with stopped_at(3, monkeypatch):
        run("train_bert.py", *data("bert", corpus), *options, "--out", tmp_path / "killed")
    _, err = run("train_bert.py", "--resume", "--norm", "layernorm", "--out", tmp_path / "killed", code=2)
    assert "--norm layernorm differs from the run's rmsnorm" in err
    run("train_bert.py", "--resume", "--norm", "rmsnorm", "--out", tmp_path / "killed")
    assert_same_weights(tmp_path / "killed", tmp_path / "whole")
    assert saved(tmp_path / "whole")["config"]["norm"] == "rmsnorm"


def test_a_run_of_before_there_were_norms_and_optimizers_goes_on(corpus, tmp_path, monkeypatch):
    with stopped_at(3, monkeypatch):
        run("train_bert.py", *data("bert", corpus), "--save-every", "3", "--out", tmp_path / "run")
    older = saved(tmp_path / "run")
    del older["config"]["norm"], older["args"]["norm"], older["args"]["optimizer"]
    torch.save(older, tmp_path / "run" / "checkpoint.pt")
    run("train_bert.py", "--resume", "--norm", "layernorm", "--optimizer", "adamw", "--out", tmp_path / "run")
    assert saved(tmp_path / "run")["step"] == 6


def test_rmsnorm_has_no_gain_and_is_its_formula():
    model = small("vanilla", norm="rmsnorm")
    assert not any("norm" in name for name, _ in model.named_parameters())
    x = torch.randn(2, 3, 32)
    torch.testing.assert_close(model.final_norm(x), x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt())


def test_an_extra_key_starts_as_its_authors_do():
    keys = torch.cat([ExtraKey(64, 64, with_value=True).k_bias.flatten() for _ in range(5)])
    assert keys.std().item() == pytest.approx(0.02, rel=0.05)


def test_a_model_without_gains_has_nothing_to_decay():
    from minq.training import parameter_groups
    with pytest.raises(UserError, match="no norm of this model has a gamma"):
        parameter_groups(small("vanilla", norm="rmsnorm"), 0.1, decay_layernorm=True)
