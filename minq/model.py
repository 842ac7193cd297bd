"""Transformers built from one block in two orders: post-LN (BERT) and pre-LN (OPT, ViT).

Every tensor that is ever quantized or measured passes through a Tap, so this one forward pass is
the floating-point model, the quantized model and the measured model alike.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from minq.attention import ATTENTIONS, SelfAttention, Tap
from minq.errors import UserError


# ---- configuration ----

@dataclass
class Config:
    """What a block needs to know. The families below add their own fields and defaults."""
    layers: int = 4
    width: int = 128
    heads: int = 4
    ffn: int = 512             # hidden units of the feed-forward network
    seq_len: int = 64          # T, the most tokens a sequence can have
    dropout: float = 0.0
    attention: str = "vanilla"  # a key of attention.ATTENTIONS
    gamma: float = 0.0         # eq. 4
    zeta: float = 1.0          # eq. 4
    row_alpha: float | None = None  # instead of gamma: gamma_t = -row_alpha / (t + 1) in causal row t
    gate: str = "linear"       # a key of attention.GATES, for attention="gated"
    gate_hidden: int = 4       # n_hid of the MLP gate
    gate_init: float = 0.5     # pi_init, how open a gate starts
    pre_norm: bool = False     # LayerNorm before attention and FFN instead of after the residual sum
    causal: bool = False
    activation: str = "gelu"
    norm_eps: float = 1e-12
    init_std: float = 0.02

    def __post_init__(self):
        if self.width % self.heads:
            raise UserError(f"--heads {self.heads} does not divide --width {self.width}")
        if self.row_alpha is not None and not self.causal:
            raise UserError("--gamma-per-row needs causal attention, whose rows differ in length")


@dataclass
class BertConfig(Config):
    """Defaults of BERT (Devlin et al.): post-LN, GELU. `positions`: how the learned table starts."""
    vocab_size: int = 260
    positions: str = "normal"  # or "sinusoid"


@dataclass
class OptConfig(Config):
    """Defaults of OPT (Zhang et al.; paper, C.2): pre-LN, causal, ReLU."""
    pre_norm: bool = True
    causal: bool = True
    activation: str = "relu"
    norm_eps: float = 1e-5
    init_std: float = 0.006
    vocab_size: int = 260


@dataclass
class ViTConfig(Config):
    """Defaults of ViT (Dosovitskiy et al.; paper, C.3): pre-LN, GELU. T is one more than the patches: [CLS]."""
    pre_norm: bool = True
    norm_eps: float = 1e-6
    image_size: int = 32
    patch_size: int = 4
    classes: int = 10
    patch_layernorm: bool = False  # a LayerNorm after the patch embedding (Table 6)

    def __post_init__(self):
        super().__post_init__()
        if self.image_size % self.patch_size:
            raise UserError(f"--patch-size {self.patch_size} does not divide the images' {self.image_size} pixels")
        self.seq_len = 1 + (self.image_size // self.patch_size) ** 2


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
        self.norm1 = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.ffn_up = nn.Linear(config.width, config.ffn)
        self.activation = {"gelu": nn.GELU, "relu": nn.ReLU}[config.activation]()
        self.ffn_down = nn.Linear(config.ffn, config.width)
        self.norm2 = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.dropout = nn.Dropout(config.dropout)

        self.norm1_tap, self.residual1_tap = Tap(), Tap()
        self.ffn_hidden_tap, self.ffn_output_tap = Tap(), Tap()
        self.norm2_tap = Tap() if config.pre_norm else None
        self.residual2_tap = None if config.pre_norm else Tap()
        self.layer_output_tap = Tap()

    def feed_forward(self, x):
        hidden = self.ffn_hidden_tap(self.activation(self.ffn_up(x)))  # (B, T, ffn)
        return self.ffn_output_tap(self.ffn_down(hidden))

    def forward(self, x, attend=None):
        """x (B, T, width) -> (B, T, width)"""
        if self.pre_norm:
            update = self.attention(self.norm1_tap(self.norm1(x)), attend)
            x = self.residual1_tap(x + self.dropout(update))
            update = self.feed_forward(self.norm2_tap(self.norm2(x)))
            return self.layer_output_tap(x + self.dropout(update))
        update = self.attention(x, attend)
        x = self.norm1_tap(self.norm1(self.residual1_tap(x + self.dropout(update))))
        update = self.feed_forward(x)
        return self.layer_output_tap(self.norm2(self.residual2_tap(x + self.dropout(update))))


# ---- BERT ----

class Bert(nn.Module):
    """BERT for masked language modelling, post-LN; one segment only, so no segment embedding."""

    float_modules = ("head",)  # stays in floating point when the rest is quantized (sec. 5)
    final_linear = "head.decoder"  # stays in floating point in fake-quantized training (the blog)

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.width)
        self.position_embedding = nn.Embedding(config.seq_len, config.width)
        self.embedding_sum_tap = Tap()
        self.embedding_norm = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.embedding_norm_tap = Tap()
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.head = MaskedHead(config, self.token_embedding.weight)

        initialize(self, config.init_std)
        if config.positions == "sinusoid":
            self.position_embedding.weight.data = sinusoids(config.seq_len, config.width, config.init_std)

    def forward(self, tokens, positions=None, attend=None):
        """tokens (B, T) -> logits (B, T, vocab), or (N, vocab) at N flat `positions` into B * T.

        `attend` (B, T), bool: False at padding. Predicting at masked positions only saves most of
        the decoder's work.
        """
        T = tokens.shape[1]
        x = self.token_embedding(tokens) + self.position_embedding.weight[:T]  # (B, T, width)
        x = self.embedding_norm_tap(self.embedding_norm(self.embedding_sum_tap(x)))
        x = self.dropout(x)
        if attend is not None:
            attend = attend[:, None, None, :]
        for layer in self.layers:
            x = layer(x, attend)
        if positions is not None:
            x = x.flatten(0, 1)[positions]  # (N, width)
        return self.head(x)


class MaskedHead(nn.Module):
    """BERT's prediction head: transform, GELU, LayerNorm, and a decoder that shares the token table."""

    def __init__(self, config, token_table):
        super().__init__()
        self.transform = nn.Linear(config.width, config.width)
        self.norm = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.decoder = nn.Linear(config.width, config.vocab_size)
        self.decoder.weight = token_table

    def forward(self, x):
        return self.decoder(self.norm(F.gelu(self.transform(x))))


# ---- OPT ----

class Opt(nn.Module):
    """OPT for causal language modelling, pre-LN, with a final LayerNorm and a tied output layer."""

    float_modules = ("decoder",)  # stays in floating point when the rest is quantized (sec. 5)
    final_linear = "decoder"  # and in fake-quantized training

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.width)
        self.position_embedding = nn.Embedding(config.seq_len, config.width)
        self.embedding_sum_tap = Tap()
        self.layers = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.final_norm = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.final_norm_tap = Tap()
        self.decoder = nn.Linear(config.width, config.vocab_size, bias=False)
        self.decoder.weight = self.token_embedding.weight
        initialize(self, config.init_std)

    def forward(self, tokens):
        """tokens (B, T) -> logits of each next token (B, T, vocab)"""
        T = tokens.shape[1]
        x = self.embedding_sum_tap(self.token_embedding(tokens) + self.position_embedding.weight[:T])  # (B, T, width)
        for layer in self.layers:
            x = layer(x)
        return self.decoder(self.final_norm_tap(self.final_norm(x)))


# ---- ViT ----

class ViT(nn.Module):
    """A vision transformer, pre-LN; the class is read off the [CLS] token. All of it is quantized."""

    float_modules = ()
    final_linear = "head"  # stays in floating point in fake-quantized training

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.patch_size = config.patch_size
        self.patch_embedding = nn.Linear(3 * config.patch_size ** 2, config.width)
        self.patch_embedding_tap = Tap()
        self.patch_norm = nn.LayerNorm(config.width, eps=config.norm_eps) if config.patch_layernorm else None
        self.patch_norm_tap = Tap() if config.patch_layernorm else None
        self.cls_embedding = nn.Embedding(1, config.width)
        self.position_embedding = nn.Embedding(config.seq_len, config.width)
        self.embedding_sum_tap = Tap()
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.final_norm = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.final_norm_tap = Tap()
        self.head = nn.Linear(config.width, config.classes)
        initialize(self, config.init_std, truncated=True)

    def forward(self, images):
        """images (B, 3, H, W) in [0, 1] -> logits (B, classes)"""
        x = self.patch_embedding_tap(self.patch_embedding(self.patches(2 * images - 1)))  # (B, patches, width)
        if self.patch_norm is not None:
            x = self.patch_norm_tap(self.patch_norm(x))
        cls = self.cls_embedding.weight.to(x.dtype).expand(len(x), 1, -1)
        x = torch.cat((cls, x), dim=1) + self.position_embedding.weight  # (B, T, width)
        x = self.dropout(self.embedding_sum_tap(x))
        for layer in self.layers:
            x = layer(x)
        return self.head(self.final_norm_tap(self.final_norm(x[:, 0])))

    def patches(self, images):
        """(B, 3, H, W) -> (B, patches, 3 * patch_size^2), row by row"""
        size = self.patch_size
        x = images.unflatten(3, (-1, size)).unflatten(2, (-1, size))  # (B, 3, rows, size, columns, size)
        return x.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


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
    return rms * math.sqrt(2) * torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(1)[:, :width]


# ---- from a checkpoint ----

FAMILIES = {"bert": (Bert, BertConfig), "opt": (Opt, OptConfig), "vit": (ViT, ViTConfig)}


def from_checkpoint(checkpoint, name):
    """Rebuild the model of a run's checkpoint. Raises UserError, naming the run, where it does not fit this code."""
    if checkpoint["family"] not in FAMILIES:
        raise UserError(f"{name}: its family is {checkpoint['family']!r}; expected one of {', '.join(FAMILIES)}")
    build, configure = FAMILIES[checkpoint["family"]]
    if checkpoint["config"].get("attention") not in ATTENTIONS:
        raise UserError(f"{name}: its attention is {checkpoint['config'].get('attention')!r}; "
                        f"expected one of {', '.join(ATTENTIONS)}")
    try:
        model = build(configure(**checkpoint["config"]))
        model.load_state_dict(checkpoint["model"])
    except (TypeError, RuntimeError):
        raise UserError(f"{name}: its checkpoint was made by another architecture than minq's {build.__name__}") from None
    return model
