"""Hugging Face's models and torchao's eight bits, for bench.py to compare with: pip install -e '.[peers]'."""
from importlib import util

import torch
import torch.nn as nn


def installed(package):
    return util.find_spec(package) is not None


# ---- Hugging Face: the paper's three models ----

def hugging_face(family, attention, dropout, layers=12):
    """attention: "sdpa" or "eager"."""
    import transformers as hf

    if family == "opt":
        return hf.OPTForCausalLM(hf.OPTConfig(num_hidden_layers=layers, dropout=dropout, attention_dropout=dropout,
                                              attn_implementation=attention))
    shared = dict(num_hidden_layers=layers, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout,
                  attn_implementation=attention)
    if family == "bert":
        return hf.BertForMaskedLM(hf.BertConfig(**shared))
    return hf.ViTForImageClassification(hf.ViTConfig(
        **shared, hidden_size=384, num_attention_heads=6, intermediate_size=1536, layer_norm_eps=1e-6, num_labels=1000))


# ---- torchao, on minq's models ----

def swap(model, config):
    """`config` on all Linears but the last."""
    from torchao.quantization import quantize_

    quantize_(model, config, lambda module, name: isinstance(module, nn.Linear) and name != model.final_linear)
    return model


def qat(model):
    """Its QAT fake-quantizers: activations per token, weights per channel. It does less than minq's: queries, keys,
    probabilities and values stay in floating point."""
    from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

    return swap(model, QATConfig(activation_config=IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False),
                                 weight_config=IntxFakeQuantizeConfig(torch.int8, "per_channel", is_symmetric=True), step="prepare"))


def int8_training(model, **backward):
    """Its int8 training: both operands symmetric, a scale for each row; the backward products in int8 as well, unless
    `backward` says otherwise. Attention stays in floating point."""
    from torchao.prototype.quantized_training import Int8MixedPrecisionTrainingConfig

    return swap(model, Int8MixedPrecisionTrainingConfig(**backward))


def dynamic_int8(model):
    """Its int8 inference: symmetric, dynamic per token, weights per channel. Attention stays in floating point."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig

    return swap(model, Int8DynamicActivationInt8WeightConfig())
