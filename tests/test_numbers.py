"""Numbers that should not occur, and what is done about each; and the same numbers from the same command."""
import math

import pytest
import torch
import torch.nn.functional as F

from minq.attention import ClippedSoftmax
from minq.data import MaskedText, load_text
from minq.errors import UserError
from minq.model import Bert, BertConfig
from minq.outliers import watch
from minq.quant import W_ESTIMATORS, affine_parameters, calibrating, mse_threshold, quantize_model
from running import SMALL, SMALL_VIT, assert_same_weights, logged, run, saved, train

TOKENS = torch.arange(24).view(2, 12)


def small(**settings):
    torch.manual_seed(0)
    return Bert(BertConfig(layers=2, width=32, heads=4, ffn=64, seq_len=12, **settings)).eval()


def quantized(model, *settings):
    model = quantize_model(model, *settings)
    with calibrating(model):
        model(TOKENS)
    return model


# ---- in training ----

@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_for_20_steps_ends_the_run(corpus, tmp_path, monkeypatch, value):
    honest, calls = F.cross_entropy, []

    def lost(*args, **kwargs):
        calls.append(1)
        return honest(*args, **kwargs) + (value if len(calls) > 7 else 0.0)

    monkeypatch.setattr(F, "cross_entropy", lost)
    _, err = train(corpus, tmp_path / "run", "--steps", "100", "--eval-every", "100", "--save-every", "2", code=2)
    assert "stopped at step 40, the loss of the last 33 steps is not finite" in err.splitlines()[-1]  # looked at at 20 and 40
    assert saved(tmp_path / "run")["step"] == 6


def test_a_few_losses_that_are_not_finite_do_not(corpus, tmp_path, monkeypatch):
    honest, calls = F.cross_entropy, []

    def lost(*args, **kwargs):
        calls.append(1)
        return honest(*args, **kwargs) * (math.nan if 5 < len(calls) < 15 else 1.0)

    monkeypatch.setattr(F, "cross_entropy", lost)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda parameters, clip: [p.grad.nan_to_num_(0.0) for p in parameters])
    train(corpus, tmp_path / "run", "--steps", "40", "--eval-every", "20")
    assert saved(tmp_path / "run")["step"] == 40
    first, second = (line["loss"] for line in logged(tmp_path / "run"))
    assert math.isnan(first) and math.isfinite(second)  # a mean over steps of which one is NaN is NaN, and says so


def test_a_loss_scale_that_sinks_below_1_ends_the_run(corpus, tmp_path, monkeypatch):
    """The loss is finite and its gradients overflow fp16 at every scale: no step would ever be taken again."""
    honest = F.cross_entropy
    monkeypatch.setattr(F, "cross_entropy", lambda *args, **kwargs: honest(*args, **kwargs) * 1e25)
    _, err = train(corpus, tmp_path / "run", "--precision", "fp16", "--steps", "100", "--eval-every", "100", "--save-every", "4", code=2)
    line = err.splitlines()[-1]
    assert "stopped at step 20, fp16's gradients overflow at every loss scale (it is 0.0625)" in line and "--precision bf16" in line
    checkpoint = saved(tmp_path / "run")  # 65536 halved 16 times
    assert checkpoint["step"] == 16 and checkpoint["scaler"]["scale"] == 1.0
    assert all(value.isfinite().all() for value in checkpoint["model"].values())


def test_a_validation_set_smaller_than_a_batch(tmp_path):
    """It is one batch, as long as it is; what is averaged over it is averaged over what there is."""
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 20)
    train(text, tmp_path / "run", "--batch-size", "64", "--steps", "2")
    data = MaskedText(load_text(text), 16)
    ((tokens, labels),) = data.validation_batches(64, 2)
    assert len(tokens) == 90 // 14
    model = Bert(BertConfig(**saved(tmp_path / "run")["config"]))
    model.load_state_dict(saved(tmp_path / "run")["model"])
    (inputs, targets) = data.to_model(tokens, labels)
    assert logged(tmp_path / "run")[-1]["val_loss"] == pytest.approx(F.cross_entropy(model.eval()(*inputs), targets).item(), rel=1e-6)
    out, _ = run("quantize.py", tmp_path / "run", "--batches", 1, "--seeds", 1)
    assert "W8A8" in out


# ---- activations and weights ----

@pytest.mark.parametrize("bias", [0.0, 3.0, -0.7])
def test_a_constant_activation(bias):
    """It quantizes to itself. It has no kurtosis: NaN, or 1 where its mean is rounded."""
    model = small()
    model.layers[0].ffn_down.weight.data.zero_()
    model.layers[0].ffn_down.bias.data.fill_(bias)
    with watch(model) as outliers:
        expected = model(TOKENS)
    assert math.isnan(found := outliers.mean["ffn_output"]["kurtosis"][0]) or bias == -0.7 and found == pytest.approx(1)
    assert math.isnan(outliers.avg_kurtosis("ffn_output")) == math.isnan(found)
    assert outliers.mean["ffn_output"]["inf_norm"][0] == pytest.approx(abs(bias))
    assert math.isfinite(outliers.mean["ffn_output"]["kurtosis"][1])
    model = quantized(model, 16, 16)
    tap = model.layers[0].ffn_output_tap
    constant = torch.full((1, 2, 32), bias)
    torch.testing.assert_close(tap(constant), constant, rtol=1e-6, atol=0)
    torch.testing.assert_close(model(TOKENS), expected, rtol=0, atol=2e-3)


@pytest.mark.parametrize("estimator", W_ESTIMATORS)
@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_all_zero_weights(estimator, granularity):
    """They stay zero, and nothing is divided by their range."""
    model = small()
    for layer in model.layers:
        for weight in (layer.attention.qkv.weight, layer.ffn_up.weight, layer.norm1.weight):
            weight.data.zero_()
    model = quantized(model, 8, 8, estimator, "running", granularity)
    assert model.layers[0].ffn_up.weight.count_nonzero() == model.layers[0].norm1.weight.count_nonzero() == 0
    assert model(TOKENS).isfinite().all()


def test_weights_whose_squares_overflow_are_searched_no_further():
    """The search for the least squared error has nothing to compare then, and keeps the largest |w|."""
    weights = torch.tensor([[1e30, -2e30, 0.5e30]])
    assert mse_threshold(weights, 8).item() == pytest.approx(2e30)


def test_a_row_that_clipping_empties():
    """All its probabilities are zero: the head adds nothing, and learns nothing from the token."""
    scores = torch.randn(1, 1, 3, 10, requires_grad=True)
    probs = ClippedSoftmax(gamma=-2.0)(scores)
    probs.sum().backward()
    assert probs.count_nonzero() == 0 and scores.grad.count_nonzero() == 0

    model = small(attention="clipped", gamma=-2.0).train()
    F.cross_entropy(model(TOKENS).flatten(0, 1), TOKENS.flatten()).backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    q, k, v = gradients["layers.0.attention.qkv.weight"].chunk(3)
    assert q.count_nonzero() == k.count_nonzero() == v.count_nonzero() == 0
    model = quantized(model.eval())  # the range of its probabilities is zero
    assert model(TOKENS).isfinite().all()


@pytest.mark.parametrize("low, high", [(-3e38, 3e38), (0.0, math.inf), (math.nan, 1.0)])
def test_a_range_that_overflows_is_refused_by_name(low, high):
    scale, _ = affine_parameters(torch.tensor(low), torch.tensor(high), 8)
    assert not math.isfinite(scale)
    model = small()
    bias = model.layers[1].ffn_down.bias.data
    bias[0], bias[1] = low, high
    with pytest.raises(UserError, match=r"layers\.1\.ffn_output_tap: its calibrated scale is (inf|nan); the values range from"):
        quantized(model)


# ---- the same everywhere ----

@pytest.mark.parametrize("script, options", [
    ("train_bert.py", "--attention gated --dropout 0.1 --fake-quant"), ("train_opt.py", "--dropout 0.1 --precision bf16"),
    ("train_vit.py", "--dropout 0.1 --rand-augment 2 --jitter 0.4 --mixup 0.8 --cutmix 1")])
def test_the_same_command_gives_the_same_weights(corpus, cifar, tmp_path, script, options):
    """Bit for bit, whatever the process has drawn before."""
    small = [*SMALL_VIT, "--data", cifar] if script == "train_vit.py" else [*SMALL, "--data", corpus]
    for name in ("first", "second"):
        run(script, *small, *options.split(), "--out", tmp_path / name)
        torch.rand(7)
    assert_same_weights(tmp_path / "first", tmp_path / "second")
    assert (tmp_path / "first" / "metrics.jsonl").read_text() == (tmp_path / "second" / "metrics.jsonl").read_text()
