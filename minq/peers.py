"""torchao's eight bits on minq's models, for bench.py to compare with: pip install -e '.[peers]'."""
import torch
import torch.nn as nn

from minq.errors import UserError


def torchao(name):
    """A module of torchao. Raises UserError if it is not installed."""
    try:
        return __import__(f"torchao.{name}", fromlist=["torchao"])
    except ImportError:
        raise UserError("this group compares with torchao: pip install -e '.[peers]'") from None


def swap(model, config):
    """`config` on all Linears but the last."""
    chosen = lambda module, name: isinstance(module, nn.Linear) and name != model.final_linear
    torchao("quantization").quantize_(model, config, chosen)
    return model


def qat(model):
    """Its QAT fake-quantizers: activations per token, weights per channel. It does less than minq's: queries, keys,
    probabilities and values stay in floating point."""
    ao = torchao("quantization.qat")
    config = ao.QATConfig(activation_config=ao.IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False),
                          weight_config=ao.IntxFakeQuantizeConfig(torch.int8, "per_channel", is_symmetric=True), step="prepare")
    return swap(model, config)


def int8_training(model, **backward):
    """Its int8 training: both operands symmetric, a scale for each row; the backward products in int8 as well, unless
    `backward` says otherwise. Attention stays in floating point."""
    return swap(model, torchao("prototype.quantized_training").Int8MixedPrecisionTrainingConfig(**backward))


def dynamic_int8(model):
    """Its int8 inference: symmetric, dynamic per token, weights per channel. Attention stays in floating point."""
    return swap(model, torchao("quantization").Int8DynamicActivationInt8WeightConfig())
