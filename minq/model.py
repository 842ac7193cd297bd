"""Transformers built from one block in two orders: post-LN (BERT) and pre-LN (OPT, ViT).

Every tensor that is ever quantized or measured passes through a Tap, so this one forward pass is
the floating-point model, the quantized model and the measured model alike.
"""
import math
from dataclasses import dataclass, fields

import torch
import torch.nn as nn

from minq.attention import ATTENTIONS, GATES, Dropout, SelfAttention, Tap
from minq.flags import (UserError, above_0, at_least_0, at_least_1, at_most_0, below_1, flag,
                        fraction, positive)

ACTIVATIONS = {"gelu": nn.GELU, "relu": nn.ReLU}
NORMS = {"layernorm": lambda c: nn.LayerNorm(c.width, eps=c.norm_eps)}


# ---- configuration: what has a help text is a flag of the training scripts, too ----

CLIPPED, ROW, GATED = ("clipped",), ("clipped", "row-clipped"), ("gated",)  # who reads a setting


@dataclass
class Config:
    """What a block needs to know. The families below add their own fields and defaults."""
    layers: int = flag(4, "number of blocks", type=positive)
    width: int = flag(128, "hidden dimensions, d_model", type=positive)
    heads: int = flag(4, "attention heads per layer; divides --width", type=positive)
    ffn: int | None = flag(None, "hidden units of the FFN; by default 4 x width", type=positive)
    dropout: float = flag(0.0, "dropout probability", type=below_1)
    norm: str = flag("layernorm", "of every norm; rmsnorm has no gain", choices=NORMS)
    init_std: float = flag(0.02, "deviation of initial weights", type=above_0)
    attention: str = flag("vanilla", "what the heads do (sec. 4)", choices=ATTENTIONS)
    gamma: float | None = flag(None, "lower stretch factor (eq. 4)", CLIPPED, type=at_most_0)
    zeta: float = flag(1.0, "upper stretch factor (eq. 4)", ROW, type=at_least_1)
    alpha: float | None = flag(None, "gamma = -alpha / T (sec. 5.2)", ROW, type=at_least_0)
    gate: str = flag("linear", "the gate's network (Table 3)", GATED, choices=GATES)
    gate_hidden: int = flag(4, "hidden units n_hid of the MLP gate", GATED, type=positive)
    gate_init: float = flag(0.5, "pi_init, how open gates start (sec. 5.3)", GATED, type=fraction)
    fused: bool = flag(False, "train with PyTorch's fused attention; softmax must be plain")
    activation: str = flag("gelu", "of the FFN", choices=ACTIVATIONS)
    pre_norm: bool = False  # LayerNorm before attention and FFN, not after the residual sum
    causal: bool = False
    norm_eps: float = 1e-12

    @classmethod
    def of(cls, args, **sizes):
        """From a script's arguments, by name, and `sizes` that its data tell."""
        return cls(**{f.name: getattr(args, f.name) for f in fields(cls) if f.name in args} | sizes)

    def __post_init__(self):
        if self.width % self.heads:
            raise UserError(f"--heads {self.heads} does not divide --width {self.width}")
        if self.fused and self.attention not in ("vanilla", "gated"):
            raise UserError(f"--fused needs a plain softmax; --attention {self.attention} has none")
        if self.ffn is None:
            self.ffn = 4 * self.width
        if self.gamma is None:
            self.gamma = 0.0 if self.alpha is None else -self.alpha / self.seq_len  # sec. 5.2


@dataclass
class BertConfig(Config):
    """Defaults of BERT (Devlin et al.): post-LN, GELU."""
    seq_len: int = flag(64, "T, tokens per sequence", type=positive)
    positions: str = flag("normal", "how positions start", choices=("normal", "sinusoid"))
    vocab_size: int = 260
    masked_head: bool = True   # False: an encoder, which gives its last hidden states


@dataclass
class OptConfig(Config):
    """Defaults of OPT (Zhang et al.; paper, C.2): pre-LN, causal, ReLU."""
    seq_len: int = flag(64, "T, tokens per sequence", type=positive)
    activation: str = flag("relu", "of the FFN", choices=ACTIVATIONS)
    init_std: float = flag(0.006, "deviation of initial weights", type=above_0)
    pre_norm: bool = True
    causal: bool = True
    norm_eps: float = 1e-5
    vocab_size: int = 260


@dataclass
class ViTConfig(Config):
    """Defaults of ViT (Dosovitskiy et al.; paper, C.3): pre-LN, GELU."""
    patch_size: int = flag(4, "pixels per side of a patch", type=positive)
    patch_layernorm: bool = flag(False, "LayerNorm after the patch embedding (Table 6)")
    pre_norm: bool = True
    norm_eps: float = 1e-6
    image_size: int = 32
    classes: int = 10
    seq_len: int = 0  # T, which follows: [CLS] and the patches

    def __post_init__(self):
        if self.image_size % self.patch_size:
            raise UserError(f"--patch-size {self.patch_size} does not divide {self.image_size}")
        self.seq_len = 1 + (self.image_size // self.patch_size) ** 2
        super().__post_init__()


# ---- the block ----

class Block(nn.Module):
    """Attention and a feed-forward network, each with a residual sum and a LayerNorm.

    post-LN: x = norm(x + f(x));  pre-LN: x = x + f(norm(x)).
    `ffn_output` and `layer_output` are the two tensors whose outliers the paper reports.
    """

    def __init__(self, config):
        super().__init__()
        self.pre_norm = config.pre_norm
        self.attention = SelfAttention(config)
        self.norm1 = NORMS[config.norm](config)
        self.ffn_up = nn.Linear(config.width, config.ffn)
        self.activation = ACTIVATIONS[config.activation]()
        self.ffn_down = nn.Linear(config.ffn, config.width)
        self.norm2 = NORMS[config.norm](config)
        self.dropout = Dropout(config.dropout)

        self.norm1_tap, self.residual1_tap = Tap(), Tap()
        self.ffn_hidden_tap, self.ffn_output_tap = Tap(), Tap()
        self.norm2_tap = Tap() if config.pre_norm else None  # post-LN: it gives the layer's output
        self.residual2_tap = None if config.pre_norm else Tap()  # pre-LN: it is the layer's output
        self.layer_output_tap = Tap()

    def feed_forward(self, x):
        hidden = self.ffn_hidden_tap(self.activation(self.ffn_up(x)))  # (B, T, ffn)
        return self.ffn_output_tap(self.ffn_down(hidden))

    def forward(self, x):
        """x (B, T, width) -> (B, T, width)"""
        if self.pre_norm:
            update = self.attention(self.norm1_tap(self.norm1(x)))
            x = self.residual1_tap(x + self.dropout(update))
            update = self.feed_forward(self.norm2_tap(self.norm2(x)))
            return self.layer_output_tap(x + self.dropout(update))
        update = self.attention(x)
        x = self.norm1_tap(self.norm1(self.residual1_tap(x + self.dropout(update))))
        update = self.feed_forward(x)
        return self.layer_output_tap(self.norm2(self.residual2_tap(x + self.dropout(update))))


# ---- BERT ----

class Bert(nn.Module):
    """BERT for masked language modelling, post-LN; one segment only, so no segment embedding."""

    family, config_class = "bert", BertConfig
    hidden_tap = "layer_output"  # whose last place is the last hidden states
    norm_tap = "ffn_output"  # Table 2's max inf. norm; post-LN writes its outliers there
    # its avg. kurtosis, as in the authors' code
    kurtosis_taps = dict.fromkeys(("ffn_output", "layer_output"), "kurtosis")
    float_modules = ("head",)  # stays in floating point when the rest is quantized (sec. 5)
    final_linear = "head.decoder"  # and in fake-quantized training (the blog)

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.width)
        self.position_embedding = nn.Embedding(config.seq_len, config.width)
        self.embedding_sum_tap = Tap()
        self.embedding_norm = NORMS[config.norm](config)
        self.embedding_norm_tap = Tap()
        self.dropout = Dropout(config.dropout)
        self.layers = nn.Sequential(*(Block(config) for _ in range(config.layers)))
        self.head = MaskedHead(config, self.token_embedding) if config.masked_head else None
        # without a head there is nothing to predict: how near to floating point do states stay?
        self.metric = "perplexity" if config.masked_head else "sqnr"

        initialize(self, config.init_std)
        if config.positions == "sinusoid":
            waves = sinusoids(config.seq_len, config.width, config.init_std)
            self.position_embedding.weight.data = waves

    def forward(self, tokens, positions=None):
        """tokens (B, T) -> logits (B, T, vocab), or (N, vocab) at N flat `positions` into B * T.

        Predicting at masked positions only saves most of the decoder's work.
        """
        T = tokens.shape[1]
        x = self.token_embedding(tokens) + self.position_embedding.weight[:T]  # (B, T, width)
        x = self.embedding_norm_tap(self.embedding_norm(self.embedding_sum_tap(x)))
        x = self.layers(self.dropout(x))
        if positions is not None:
            x = x.flatten(0, 1)[positions]  # (N, width)
        return x if self.head is None else self.head(x)


class MaskedHead(nn.Module):
    """BERT's prediction head: transform, activation, LayerNorm, decoder tied to the token table."""

    def __init__(self, config, token_embedding):
        super().__init__()
        self.transform = nn.Linear(config.width, config.width)
        self.activation = ACTIVATIONS[config.activation]()
        self.norm = NORMS[config.norm](config)
        self.decoder = nn.Linear(config.width, config.vocab_size)
        self.decoder.weight = token_embedding.weight

    def forward(self, x):
        return self.decoder(self.norm(self.activation(self.transform(x))))


# ---- OPT ----

class Opt(nn.Module):
    """OPT for causal language modelling, pre-LN, with a final LayerNorm and a tied output layer."""

    family, config_class, metric = "opt", OptConfig, "perplexity"
    hidden_tap = "final_norm"
    norm_tap = "layer_output"
    # Hugging Face's OPT flattens to (B T, d) before norm2 and FFN, and the authors' hooks see that
    kurtosis_taps = {"norm2": "token_kurtosis", "ffn_output": "token_kurtosis"} | dict.fromkeys(
        ("layer_output", "attention_output", "norm1", "final_norm"), "kurtosis")
    float_modules = ("decoder",)  # stays in floating point when the rest is quantized (sec. 5)
    final_linear = "decoder"  # and in fake-quantized training

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.width)
        self.position_embedding = nn.Embedding(config.seq_len, config.width)
        self.embedding_sum_tap = Tap()
        self.layers = nn.Sequential(*(Block(config) for _ in range(config.layers)))
        self.final_norm = NORMS[config.norm](config)
        self.final_norm_tap = Tap()
        self.decoder = nn.Linear(config.width, config.vocab_size, bias=False)
        self.decoder.weight = self.token_embedding.weight
        initialize(self, config.init_std)

    def forward(self, tokens):
        """tokens (B, T) -> logits of each next token (B, T, vocab)"""
        T = tokens.shape[1]
        x = self.token_embedding(tokens) + self.position_embedding.weight[:T]  # (B, T, width)
        x = self.layers(self.embedding_sum_tap(x))
        return self.decoder(self.final_norm_tap(self.final_norm(x)))


# ---- ViT ----

class ViT(nn.Module):
    """A vision transformer, pre-LN; the class is read off the [CLS] token. All is quantized."""

    family, config_class, metric = "vit", ViTConfig, "accuracy"
    hidden_tap = "final_norm"
    norm_tap = "layer_output"
    kurtosis_taps = Bert.kurtosis_taps  # no code is published
    float_modules = ()
    final_linear = "head"  # stays in floating point in fake-quantized training

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.patch_embedding = nn.Linear(3 * config.patch_size ** 2, config.width)
        self.patch_embedding_tap = Tap()
        self.patch_norm = NORMS[config.norm](config) if config.patch_layernorm else None
        self.patch_norm_tap = Tap() if config.patch_layernorm else None
        self.cls_embedding = nn.Embedding(1, config.width)
        self.position_embedding = nn.Embedding(config.seq_len, config.width)
        self.embedding_sum_tap = Tap()
        self.dropout = Dropout(config.dropout)
        self.layers = nn.Sequential(*(Block(config) for _ in range(config.layers)))
        self.final_norm = NORMS[config.norm](config)
        self.final_norm_tap = Tap()
        self.head = nn.Linear(config.width, config.classes)
        initialize(self, config.init_std, truncated=True)

    def forward(self, images):
        """images (B, 3, H, W) in [0, 1] -> logits (B, classes)"""
        patches = self.patches(2 * images - 1)  # (B, patches, 3 * patch_size^2)
        x = self.patch_embedding_tap(self.patch_embedding(patches))  # (B, patches, width)
        if self.patch_norm is not None:
            x = self.patch_norm_tap(self.patch_norm(x))
        cls = self.cls_embedding.weight.to(x.dtype).expand(len(x), 1, -1)
        x = torch.cat((cls, x), dim=1) + self.position_embedding.weight  # (B, T, width)
        x = self.layers(self.dropout(self.embedding_sum_tap(x)))
        return self.head(self.final_norm_tap(self.final_norm(x[:, 0])))

    def patches(self, images):
        """(B, 3, H, W) -> (B, patches, 3 * patch_size^2), row by row"""
        x = nn.functional.pixel_unshuffle(images, self.config.patch_size)
        return x.flatten(2).mT.contiguous()


# ---- initialization ----

def initialize(model, std, truncated=False):
    """Normal(0, std) for every Linear and Embedding, zero biases; gates keep their own (sec. 5.3).

    `truncated` cuts the normal at two standard deviations (ViT)."""
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            if truncated:
                nn.init.trunc_normal_(module.weight, std=std, a=-2 * std, b=2 * std)
            else:
                nn.init.normal_(module.weight, std=std)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)


def sinusoids(length, width, rms):
    """Sine and cosine waves (Vaswani et al.), (length, width), of root mean square `rms`.

    Their wavelengths grow geometrically from 2 pi to 2 pi * length: with the usual 10000 most of
    them would hardly change over a short sequence.
    """
    position = torch.arange(length)[:, None]
    frequency = length ** (-torch.arange(0, width, 2) / width)
    angle = position * frequency  # (length, width / 2)
    waves = torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(1)[:, :width]
    return rms * math.sqrt(2) * waves


FAMILIES = {model.family: model for model in (Bert, Opt, ViT)}
