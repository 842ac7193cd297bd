"""bench.py: every group runs, with and without the peers; what is counted and timed is what it says."""
import argparse
import sys

import pytest
import torch
import torch.nn as nn

import bench
from minq import peers, workloads
from minq.model import FAMILIES, Bert, BertConfig
from running import TINY_MODELS, run

TINY = dict(layers=2, width=8, heads=2, ffn=8)


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(workloads, "MODELS", TINY_MODELS)
    monkeypatch.setattr(bench, "BERT_BASE", TINY | dict(seq_len=128))
    monkeypatch.setattr(bench, "ENCODER", ("tiny encoder", TINY | dict(seq_len=16)))
    monkeypatch.setattr(bench, "VIT_S", TINY_MODELS["vit"][1])
    monkeypatch.setattr(bench, "peak_memory", lambda kind, args: 2 ** 20)
    monkeypatch.setattr(bench.multiprocessing, "get_context", lambda _: argparse.Namespace(Pool=InThisProcess))
    monkeypatch.setattr(torch, "compile", lambda model: model)


class InThisProcess:
    def __init__(self, *_, **__):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def apply(self, function, arguments):
        return function(*arguments)


@pytest.mark.slow
@pytest.mark.parametrize("missing", [(), ("transformers", "torchao")])
def test_quick_runs_every_group(missing, tiny, monkeypatch):
    for package in missing:
        monkeypatch.setitem(sys.modules, package, None)
    if not missing:
        pytest.importorskip("transformers"), pytest.importorskip("torchao")
        monkeypatch.setattr(peers, "hugging_face", tiny_hugging_face)
    out, _ = run("bench.py", "--quick", "--device", "cpu", "--precision", "fp32")
    assert ("Hugging Face, sdpa" in out) == ("int8 Linears (torchao)" in out) == (not missing)
    assert ("Hugging Face: not installed" in out) == ("torchao: not installed" in out) == bool(missing)
    for name in ("two layers of tiny OPT: a training step, fp32, dropout 0.0", "two layers of tiny ViT, by attention", "BERT-base, batch 8",
                 "laptop preset at width 64", "peak memory", "masked text", "augmenting", "watching", "calibration",
                 "two layers of tiny encoder, compiled", "two layers of tiny encoder: inference, compiled, int8"):
        assert name in out


def tiny_hugging_face(family, attention, dropout, layers):
    import transformers as hf

    size = dict(num_hidden_layers=layers, hidden_size=8, num_attention_heads=2)
    if family == "opt":
        return hf.OPTForCausalLM(hf.OPTConfig(**size, word_embed_proj_dim=8, ffn_dim=8, attn_implementation=attention))
    if family == "bert":
        return hf.BertForMaskedLM(hf.BertConfig(**size, attn_implementation=attention))
    return hf.ViTForImageClassification(hf.ViTConfig(**size, patch_size=112, num_labels=1000, attn_implementation=attention))


@pytest.mark.parametrize("family", FAMILIES)
def test_hugging_faces_model_has_as_many_weights_as_ours(family):
    """But for what each has alone, such as BERT's segments and pooler, and more positions."""
    pytest.importorskip("transformers")
    name, shape = workloads.MODELS[family]
    with torch.device("meta"):
        theirs = peers.hugging_face(family, "eager", 0.1)
        ours = FAMILIES[family](FAMILIES[family].config_class(**shape))
    numbers = [sum(weight.numel() for weight in model.parameters()) for model in (theirs, ours)]
    assert numbers[0] == pytest.approx(numbers[1], rel=0.01)


def test_operations_are_two_for_each_multiplication():
    args = argparse.Namespace(device=torch.device("cpu"), precision="bf16")
    product, count = workloads.matrix_product("int8", args.device)
    assert product().dtype == torch.int32 and count == 2 * 2048 ** 3
    model = Bert(BertConfig(**TINY, seq_len=16, masked_head=False)).eval()
    tokens = torch.zeros(3, 16, dtype=torch.long)
    workloads.explicit(model, None)
    with torch.no_grad():
        counted = workloads.operations(lambda: model(tokens))
    linears = sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear))
    assert counted == 2 * 3 * 16 * (linears + 2 * 2 * 16 * 8)  # and queries keys^T, probabilities values, in two layers
