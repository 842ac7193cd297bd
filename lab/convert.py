"""Published checkpoints as minq's models: BERT, OPT and ViT, under Hugging Face's names or timm's.

    found = convert(folder)         # of config.json and model.safetensors (sharded or not) or pytorch_model.bin
    found.family, found.config, found.state_dict

The architectures are the paper's, so a checkpoint fits after its tensors have been renamed, and three things
that minq does not have are folded into weights that it has: BERT's segment embedding into the positions (there
is one segment), the two unused rows of OPT's position table, and a ViT's pixel normalization into its patches.
What is not one of these models is refused in one line.
"""
import math
import re
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from minq.errors import UserError
from minq.model import ACTIVATIONS, FAMILIES
from minq.weights import Source, read_json, read_weights


@dataclass
class Converted:
    """A checkpoint in minq's terms: `config` are the fields of the family's Config."""
    family: str
    config: dict
    state_dict: dict
    sha256: str  # of the files of weights


def convert(folder, seq_len=None):
    """Read a checkpoint's folder. Text models keep the first `seq_len` positions (BERT 128, OPT 512 by default).

    Raises UserError, in one line, if it is not a BERT, OPT or ViT that minq can be.
    """
    config = read_json(Path(folder, "config.json"))
    kind = config.get("model_type") or ("timm" if "architecture" in config else None)
    if "quantization_config" in config:
        raise UserError(f"{folder}: a quantized checkpoint; expected one in floating point")
    if kind not in list(KINDS):  # it may be anything that JSON can hold
        raise UserError(f"{folder}: its model_type is {kind!r}; expected one of {', '.join(KINDS)}")
    tensors, sha256 = read_weights(Path(folder))
    source = Source(folder, config, tensors)
    family, settings, state = KINDS[kind](source, seq_len)
    source.require_nothing_left()

    build = FAMILIES[family]
    try:
        with torch.device("meta"):  # shapes only
            model = build(build.config_class(**settings))
    except UserError as error:
        raise UserError(f"{folder}: config.json: {error}") from None
    except RuntimeError:  # sizes that overflow
        raise UserError(f"{folder}: config.json asks for more than any memory can hold") from None
    for name, expected in model.state_dict().items():
        found = state[name]
        if found.shape != expected.shape:
            raise UserError(f"{folder}: {source.origin.get(name, name)} has shape {tuple(found.shape)}; "
                            f"config.json asks for {tuple(expected.shape)}")
    return Converted(family, asdict(model.config), state, sha256)


# ---- the models ----

def bert(source, seq_len):
    """BertForMaskedLM, BertForPreTraining, or BertModel: an encoder without a head."""
    source.require("position_embedding_type", "absolute")
    source.require("is_decoder", False)
    T = source.length(seq_len, default=128)
    settings = dict(
        layers=source.setting("num_hidden_layers"), width=source.setting("hidden_size"),
        heads=source.setting("num_attention_heads"), ffn=source.setting("intermediate_size"), seq_len=T,
        activation=source.require("hidden_act", *ACTIVATIONS), norm_eps=source.setting("layer_norm_eps", float, 1e-12),
        vocab_size=source.setting("vocab_size"), masked_head="cls.predictions.bias" in source.tensors)
    state = source.layers({
        "attention.qkv": ("attention.self.query", "attention.self.key", "attention.self.value"),
        "attention.proj": "attention.output.dense", "norm1": "attention.output.LayerNorm",
        "ffn_up": "intermediate.dense", "ffn_down": "output.dense", "norm2": "output.LayerNorm"}, "encoder.layer.", settings["layers"])
    state |= source.modules({"embedding_norm": "embeddings.LayerNorm"})
    table = state["token_embedding.weight"] = source.take("embeddings.word_embeddings.weight", into="token_embedding.weight")
    positions = source.take("embeddings.position_embeddings.weight", into="position_embedding.weight")
    segments = source.take("embeddings.token_type_embeddings.weight")
    if positions.shape[1:] != segments.shape[1:] or not len(segments):
        raise UserError(f"{source.name}: position and token type embeddings are {tuple(positions.shape)} and {tuple(segments.shape)}")
    state["position_embedding.weight"] = positions[:T] + segments[0]  # every token is of the first segment
    if settings["masked_head"]:
        state |= source.modules({"head.transform": "cls.predictions.transform.dense", "head.norm": "cls.predictions.transform.LayerNorm"})
        state["head.decoder.weight"] = tied(source, "cls.predictions.decoder.weight", table)
        bias = state["head.decoder.bias"] = source.take("cls.predictions.bias", into="head.decoder.bias")
        tied(source, "cls.predictions.decoder.bias", bias)
    source.drop(r"pooler\.|cls\.seq_relationship\.|embeddings\.position_ids")
    return "bert", settings, state


def opt(source, seq_len):
    """OPTForCausalLM or OPTModel, pre-LN (125m, 1.3b and larger)."""
    source.require("do_layer_norm_before", True)
    for key in ("enable_bias", "layer_norm_elementwise_affine", "tie_word_embeddings"):
        source.require(key, True)
    source.require("_remove_final_layer_norm", False)
    width = source.setting("hidden_size")
    source.require("word_embed_proj_dim", width)
    T = source.length(seq_len, default=512)
    settings = dict(
        layers=source.setting("num_hidden_layers"), width=width, heads=source.setting("num_attention_heads"),
        ffn=source.setting("ffn_dim"), seq_len=T, activation=source.require("activation_function", "relu", *ACTIVATIONS),
        vocab_size=source.setting("vocab_size"))
    state = source.layers({
        "attention.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "attention.proj": "self_attn.out_proj",
        "norm1": "self_attn_layer_norm", "ffn_up": "fc1", "ffn_down": "fc2", "norm2": "final_layer_norm"}, "layers.", settings["layers"])
    state |= source.modules({"final_norm": "final_layer_norm"})
    table = state["token_embedding.weight"] = source.take("embed_tokens.weight", into="token_embedding.weight")
    positions = source.take("embed_positions.weight", into="position_embedding.weight")
    state["position_embedding.weight"] = positions[2:2 + T]  # OPT counts from 2
    state["decoder.weight"] = tied(source, "lm_head.weight", table)
    return "opt", settings, state


def tied(source, key, table):
    """The output layer's table (or bias), which must be this one if it is there at all."""
    if key in source.tensors and not torch.equal(source.take(key), table):
        raise UserError(f"{source.name}: {key} has values of its own; expected a tied output layer")
    return table


def vit(source, seq_len):
    """ViTForImageClassification."""
    source.require("qkv_bias", True)
    source.require("num_channels", 3)
    settings = dict(
        layers=source.setting("num_hidden_layers"), width=source.setting("hidden_size"),
        heads=source.setting("num_attention_heads"), ffn=source.setting("intermediate_size"),
        activation=source.require("hidden_act", *ACTIVATIONS), norm_eps=source.setting("layer_norm_eps", float, 1e-12))
    state = source.layers({
        "attention.qkv": tuple(f"attention.attention.{part}" for part in ("query", "key", "value")),
        "attention.proj": "attention.output.dense", "norm1": "layernorm_before",
        "ffn_up": "intermediate.dense", "ffn_down": "output.dense", "norm2": "layernorm_after"}, "encoder.layer.", settings["layers"])
    state |= source.modules({"final_norm": "layernorm", "head": "classifier"})
    state |= patches(source, "embeddings.patch_embeddings.projection", "embeddings.cls_token", "embeddings.position_embeddings",
                     *normalization(Path(source.name, "preprocessor_config.json")))
    source.drop(r"pooler\.")
    sizes = dict(image_size=source.setting("image_size"), patch_size=source.setting("patch_size"))
    return "vit", settings | sizes | {"classes": len(state["head.bias"])}, state


def normalization(path):
    """(mean, std) of a ViT's pixels, None where its processor's default of 0.5 holds."""
    options = read_json(path) if path.exists() else {}
    factor = options.get("rescale_factor", 1 / 255)
    if options.get("do_rescale", True) is not True or not isinstance(factor, float) or not math.isclose(factor, 1 / 255, rel_tol=1e-5):
        raise UserError(f"{path}: do_rescale is {options.get('do_rescale', True)!r}, rescale_factor {factor!r}; expected pixels from 0 to 1")
    if options.get("do_normalize", True) is False:
        return [0.0] * 3, [1.0] * 3
    return options.get("image_mean"), options.get("image_std")


def timm(source, seq_len):
    """A vit_*_patchN_S of timm, classified by its [CLS] token."""
    name = source.config.get("architecture")
    if not re.fullmatch(r"(vit|deit)_\w+_patch\d+_\d+", str(name)):  # vit_*_rope_* would have the same tensors
        raise UserError(f"{source.name}: config.json: architecture is {name!r}; expected a plain vit_*_patchN_S")
    source.require("global_pool", "token")
    cfg = source.setting("pretrained_cfg", dict, source.config)  # older files are flat
    args = source.setting("model_args", dict, {})
    unread = args.keys() - {"num_heads", "img_size", "patch_size", "in_chans", "num_classes", "embed_dim", "depth", "mlp_ratio"}
    if unread:  # most of these the tensors tell; another could change what they mean
        raise UserError(f"{source.name}: config.json: model_args has {min(unread)}; expected a plain {name}")
    state = {}
    n = 1 + max((int(key.split(".")[1]) for key in source.tensors if re.match(r"blocks\.\d{1,4}\.", key)), default=-1)
    state |= source.layers({"attention.qkv": "attn.qkv", "attention.proj": "attn.proj", "norm1": "norm1", "ffn_up": "mlp.fc1",
                            "ffn_down": "mlp.fc2", "norm2": "norm2"}, "blocks.", n)
    state |= source.modules({"final_norm": "norm", "head": "head"})
    state |= patches(source, "patch_embed.proj", "cls_token", "pos_embed", cfg.get("mean"), cfg.get("std"))
    width = len(state["final_norm.weight"])
    size = math.isqrt(state["patch_embedding.weight"].shape[1] // 3)
    side = max(1, math.isqrt(max(0, len(state["position_embedding.weight"]) - 1)))
    # up to ViT-L all heads are 64 wide, those of ViT-H and larger ones are not
    heads = args.get("num_heads", width // 64 if width % 64 == 0 and width <= 1024 else None)
    if type(heads) is not int or heads < 1:
        raise UserError(f"{source.name}: config.json: num_heads is {heads!r}; expected an int in its model_args")
    settings = dict(layers=n, width=width, heads=heads, ffn=len(state["layers.0.ffn_up.bias"]) if n else 1, norm_eps=1e-6,
                    image_size=side * size, patch_size=size, classes=len(state["head.bias"]))
    return "vit", settings, state


def patches(source, projection, cls, positions, mean, std):
    """Patch embedding, [CLS] and positions. minq's ViT sees u = 2 x - 1; the published one (x - mean) / std, which is
    u / (2 std) + (0.5 - mean) / std: a scale for the weights of each colour, and a constant for the bias."""
    given = f"mean {mean!r} and deviation {std!r}"
    try:
        mean, std = (torch.tensor([0.5] * 3 if values is None else values, dtype=torch.float32) for values in (mean, std))
        fit = mean.shape == std.shape == (3,) and (mean.isfinite() & std.isfinite() & (std > 0)).all()
    except Exception:  # they may be anything that JSON can hold
        fit = False
    if not fit:
        raise UserError(f"{source.name}: pixels have {given}; expected three numbers of each")
    weight = source.take(f"{projection}.weight", into="patch_embedding.weight")  # (width, 3, size, size)
    bias = source.take(f"{projection}.bias", into="patch_embedding.bias")
    if weight.dim() != 4 or weight.shape[1] != 3 or weight.numel() == 0:
        raise UserError(f"{source.name}: {projection}.weight has shape {tuple(weight.shape)}; expected (width, 3, size, size)")
    if bias.shape != weight.shape[:1]:
        raise UserError(f"{source.name}: {projection}.bias has shape {tuple(bias.shape)}, its weight {tuple(weight.shape)}")
    by_colour = weight.sum(dim=(2, 3))  # (width, 3)
    return {"patch_embedding.weight": (weight / (2 * std)[:, None, None]).flatten(1),
            "patch_embedding.bias": bias + by_colour @ ((0.5 - mean) / std),
            "cls_embedding.weight": source.table(cls, into="cls_embedding.weight"),
            "position_embedding.weight": source.table(positions, into="position_embedding.weight")}


KINDS = {"bert": bert, "opt": opt, "vit": vit, "timm": timm}
