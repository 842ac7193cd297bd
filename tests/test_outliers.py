"""The metrics against their formulas in numpy and scipy's definition written out."""
import numpy as np
import pytest
import torch

from minq.analysis import outlier_counts
from minq.attention import Tap
from minq.model import FAMILIES, Bert, BertConfig
from minq.outliers import inf_norm, is_outlier, kurtosis, watch

torch.manual_seed(0)
X = torch.randn(3, 50, 40)
X[1, 7, 5] = 60.0
X[2, :, 9] += 25.0


def test_norms_equal_numpy():
    for x, inf, kurt in zip(X.double().numpy(), inf_norm(X), kurtosis(X)):
        assert inf.item() == pytest.approx(np.abs(x).max())
        m2, m4 = np.mean((x - x.mean()) ** 2), np.mean((x - x.mean()) ** 4)
        assert kurt.item() == pytest.approx(m4 / m2 ** 2, rel=1e-4)  # scipy.stats.kurtosis(x, fisher=False)


def test_kurtosis_is_not_excess_and_has_no_epsilon():
    gaussian = torch.randn(1, 1000, 1000)
    assert kurtosis(gaussian).item() == pytest.approx(3.0, rel=0.01)
    assert kurtosis(gaussian * 0.02).item() == pytest.approx(3.0, rel=0.01)  # an epsilon of 1e-6 would give 0.4


def test_kurtosis_is_at_most_the_number_of_values():
    x = torch.zeros(1, 30, 20)
    x[0, 3, 4] = 1.0
    assert kurtosis(x).item() == pytest.approx(600, rel=0.01)


def test_outliers_are_values_beyond_six_sigma():
    expected = np.stack([np.abs(x - x.mean()) > 6 * x.std() for x in X.double().numpy()])
    assert np.array_equal(is_outlier(X).numpy(), expected) and expected.any()
    counts = outlier_counts(X)
    assert np.array_equal(counts["by_position"].numpy(), expected.sum(2))
    assert np.array_equal(counts["by_dimension"].numpy(), expected.sum(1))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Bert(BertConfig(layers=3, width=32, heads=4, ffn=64, seq_len=12)).eval()


def test_watch_averages_over_samples_not_batches(model):
    tokens, seen = torch.randint(256, (6, 12)), {"ffn_output": [], "layer_output": []}
    for layer in model.layers:
        layer.ffn_output_tap.register_forward_hook(lambda m, a, x: seen["ffn_output"].append(x))
        layer.layer_output_tap.register_forward_hook(lambda m, a, x: seen["layer_output"].append(x))
    model(tokens)
    whole = {tap: list(layers) for tap, layers in seen.items()}
    with watch(model) as outliers, torch.no_grad():
        for part in (tokens[:1], tokens[1:]):
            model(part)
    for tap, layers in whole.items():
        for layer, x in enumerate(layers):
            assert outliers.mean[tap]["inf_norm"][layer] == pytest.approx(inf_norm(x).mean().item(), rel=1e-5)
            assert outliers.mean[tap]["kurtosis"][layer] == pytest.approx(kurtosis(x).mean().item(), rel=1e-5)
    assert outliers.max_inf_norm("ffn_output") == pytest.approx(max(inf_norm(x).mean().item() for x in whole["ffn_output"]))
    assert outliers.avg_kurtosis("layer_output") == pytest.approx(
        np.mean([kurtosis(x).mean().item() for x in whole["layer_output"]]), rel=1e-5)


def test_watch_takes_any_tap_and_measure_and_leaves_no_hook(model):
    with watch(model, taps=("probs",), measure=lambda x: {"rows": x.sum(-1)}) as sums:
        model(torch.randint(256, (2, 12)))
    assert len(sums.mean["probs"]["rows"]) == 3
    assert np.allclose(sums.mean["probs"]["rows"][0], 1, atol=1e-5)
    assert not any(module._forward_hooks for module in model.modules())
    with pytest.raises(KeyError, match="no tap named nonsense"):
        with watch(model, taps=("nonsense",)):
            pass


def test_a_tap_that_nothing_passes_is_an_error(model):
    model.layers[1].attention.masked_scores_tap = Tap()  # a student's, not called yet
    with pytest.raises(KeyError, match="nothing has passed the model's tap masked_scores in place 0"):
        with watch(model, ("masked_scores",)):
            model(torch.randint(256, (2, 12)))


POOLS = {  # the tensors whose kurtosis the authors' code averages
    "bert": [f"layers.{i}.{tap}" for i in range(2) for tap in ("ffn_output_tap", "layer_output_tap")],
    "vit": [f"layers.{i}.{tap}" for i in range(2) for tap in ("ffn_output_tap", "layer_output_tap")],
    "opt": ["final_norm_tap"] + [f"layers.{i}.{tap}" for i in range(2) for tap in (
        "layer_output_tap", "ffn_output_tap", "attention.attention_output_tap", "norm1_tap", "norm2_tap")]}


@pytest.mark.parametrize("family", POOLS)
def test_the_papers_kurtosis_is_a_mean_over_the_authors_tensors(family):
    torch.manual_seed(0)
    build = FAMILIES[family]
    model = build(build.config_class(layers=2, width=32, heads=4)).eval()
    inputs = torch.rand(3, 3, 32, 32) if family == "vit" else torch.randint(256, (3, 12))
    seen = []
    for name in POOLS[family]:
        model.get_submodule(name).register_forward_hook(lambda m, a, x: seen.append(kurtosis(x).mean().item()))
    with watch(model, model.kurtosis_taps) as outliers, torch.no_grad():
        model(inputs)
    assert len(seen) == len(POOLS[family])
    assert outliers.avg_kurtosis(*model.kurtosis_taps) == pytest.approx(np.mean(seen), rel=1e-5)
