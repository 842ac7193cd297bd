"""Hugging Face's models and torchao's eight bits, for lab/bench.py to compare with:
pip install -e '.[peers]'."""
from importlib.util import find_spec

import torch.nn as nn

INSTALLED = {package for package in ("transformers", "torchao") if find_spec(package)}


def hugging_face(model, attention):
    """Hugging Face's untrained model of the sizes of ours. attention: "sdpa" or "eager"."""
    import transformers as hf

    c = model.config
    build = {"bert": hf.BertForMaskedLM, "opt": hf.OPTForCausalLM,
             "vit": hf.ViTForImageClassification}[model.family]
    return build(build.config_class(  # which reads the names that it knows
        **vars(c), num_hidden_layers=c.layers, hidden_size=c.width, num_attention_heads=c.heads,
        intermediate_size=c.ffn, ffn_dim=c.ffn, word_embed_proj_dim=c.width,
        max_position_embeddings=c.seq_len, num_labels=getattr(c, "classes", 2),
        layer_norm_eps=c.norm_eps, hidden_dropout_prob=c.dropout, attention_dropout=c.dropout,
        attention_probs_dropout_prob=c.dropout, attn_implementation=attention)
    ).to(next(model.parameters()).device)


def torchao(kind, model):
    """torchao's `kind` on all Linears of ours but the last; attention stays in floating point.

    "QAT": fake quantizers, asymmetric per token, weights symmetric per channel. "int8 training":
    real ones, symmetric, a scale per row; backward products, too. "int8": for inference.
    """
    from torchao import quantization
    from torchao.prototype.quantized_training import Int8MixedPrecisionTrainingConfig
    from torchao.quantization.qat import QATConfig

    int8, per_channel = quantization.Int8DynamicActivationIntxWeightConfig, quantization.PerAxis(0)
    config = {"int8": quantization.Int8DynamicActivationInt8WeightConfig(),
              # without a swap of modules, torchao 0.18 computes floats
              "int8 training": Int8MixedPrecisionTrainingConfig(module_swap=True),
              "QAT": QATConfig(int8(weight_granularity=per_channel), step="prepare")}[kind]
    inner = lambda module, name: isinstance(module, nn.Linear) and name != model.final_linear
    quantization.quantize_(model, config, inner)
    return model
