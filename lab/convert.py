"""Turn a published checkpoint into a run, which quantize.py and lab/ open like any other.

    python -m lab.convert sentence-transformers/all-MiniLM-L6-v2       from the Hugging Face Hub
    python -m lab.convert FOLDER --out runs/mine           config.json, weights, tokenizer's files
    python -m lab.convert google/vit-base-patch16-224 --images FOLDER    as in train_vit.py --data

It needs pip install -e '.[pretrained]', and reads BERT with its masked-LM head or without any, OPT
(125m and the other pre-LN sizes) and ViT classifiers (of transformers and of timm). These are the
paper's architectures: their tensors are renamed, and what minq does not have is folded into weights
that it has: BERT's segment embedding into the positions (there is one segment), OPT's two unused
positions, and a ViT's pixel normalization into its patch embedding.
"""
import json
import os
import re
import shutil
from itertools import product
from pathlib import Path

import numpy as np
import torch

import lab.backcopy  # noqa: F401, a name for --text
from minq import flags
from minq.data import load_text
from minq.flags import TEXTS, UserError
from minq.images import IMAGES
from minq.model import FAMILIES
from minq.runs import open_data, open_run

TEXT_BYTES = 4 * 2 ** 20  # of text are tokenized at most: calibration and evaluation need less
SPECIALS = {"bert": "[PAD] [CLS] [SEP] [MASK]", "opt": "<pad> </s> <s> <unk>"}  # OPT starts: </s>
WEIGHTS = ("model.safetensors", "model-*-of-*.safetensors",  # the first that there are count
           "pytorch_model.bin", "pytorch_model-*-of-*.bin")


@flags.one_line_errors
def main(argv=None):
    # ---- arguments ----
    parser = flags.Parser(__doc__)
    add = parser.add_argument
    add("name", type=flags.place, metavar="NAME", help="a folder, or a model's id on the Hub")
    add("--out", type=flags.place, metavar="RUN", help="by default runs/ and the name's last part")
    add("--overwrite", action="store_true", help="replace the run in --out")
    add("--text", type=flags.source(TEXTS), help="stdlib (by default), or a file or folder of text")
    add("--images", type=flags.source(IMAGES), help="shapes (by default), cifar10, or a folder")
    add("--seq-len", type=flags.positive, help="T; by default 128 for BERT, 512 for OPT")
    add("--batch-size", type=flags.positive, default=8, help="sequences or images per batch")
    add("--eval-batches", type=flags.positive, default=6, help="validation batches")
    args = parser.parse_args(argv)
    out = Path(args.out or Path("runs", Path(args.name).resolve().name))
    if os.path.lexists(out) and not (args.overwrite and (out / "checkpoint.pt").is_file()):
        raise UserError(f"--out {out}: already exists; --overwrite replaces it, if it is a run")

    # ---- the model ----
    folder, revision = (Path(args.name), None) if os.path.isdir(args.name) else download(args.name)
    model = convert(folder, args.seq_len)
    is_vit, config = model.family == "vit", model.config
    if any([args.text, args.seq_len] if is_vit else [args.images]):
        raise UserError(f"{folder}: {model.family}; --images is for a ViT, --text, --seq-len not")
    settings = vars(args) | dict(revision=revision, data=args.images or "shapes", seed=0, steps=0)
    checkpoint = {"format": "minq 1", "family": model.family, "config": vars(config), "step": 0,
                  "args": settings, "model": model.state_dict()}

    # ---- its data, and the run: complete, or not there at all ----
    new = Path(f"{os.path.realpath(out)}.unfinished")  # --out may be . or a link
    try:
        with flags.writing(f"--out {out}"):
            new.mkdir(parents=True, exist_ok=True)
            if not is_vit:
                settings |= tokenize(folder, model, args.text or "stdlib", new / "tokens.bin")
            data = open_data(checkpoint, settings["data"] if is_vit else str(new / "tokens.bin"))
            with open(new / "checkpoint.pt", "wb") as file:  # given a name it hides a full disk
                torch.save(checkpoint | {"data_sha256": data.sha256}, file)
            open_run(new, torch.device("cpu"))  # what it refuses is no run
            shutil.rmtree(new.with_suffix(""), ignore_errors=True)
            new.rename(new.with_suffix(""))
    except UserError as error:  # what is --data elsewhere has other names here
        raise UserError(str(error).replace("--data", "--images" if is_vit else "--text")) from None
    finally:
        shutil.rmtree(new, ignore_errors=True)

    # ---- report ----
    script = ["-m", "lab.damage"] if model.metric == "sqnr" else ["quantize.py"]
    print(f"{out}: {model.family}, {config.layers} layers of width {config.width}, "
          f"T {config.seq_len}, metric {model.metric}\nnext: {flags.command(*script, out)}")


# ---- files ----

def download(name):
    """(folder, revision) of a model of the Hugging Face Hub, from its cache if it is there."""
    try:
        from huggingface_hub import snapshot_download
        for patterns in (WEIGHTS[:2], WEIGHTS[2:]):
            folder = Path(snapshot_download(name, allow_patterns=["*.json", "*.txt", *patterns]))
            if any(map(any, map(folder.glob, patterns))):
                break
        return folder, folder.name
    except Exception as error:  # a name that is none, the Hub's, or the net's
        raise UserError(f"{name}: no such folder, and no download: {one_line(error)}") from None


def read_json(path):
    """The object in a file; an empty one if there is no such file."""
    try:
        return dict(json.loads(path.read_text("utf-8"))) if path.exists() else {}
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path.name}: {one_line(error)}; expected a JSON object") from None


def read_weights(folder):
    """{name: tensor}, in float32; names without what a wrapper or a head puts before them."""
    from safetensors.torch import load_file
    tensors = {}
    for path in next(filter(None, map(sorted, map(folder.glob, WEIGHTS))), ()):
        try:
            loaded = (load_file(path) if path.suffix == ".safetensors" else
                      torch.load(path, map_location="cpu", weights_only=True))
            tensors |= {PREFIX.sub("", name.replace("Norm.gamma", "Norm.weight").replace(
                "Norm.beta", "Norm.bias")): tensor.float() for name, tensor in loaded.items()
                if tensor.is_floating_point() and not UNUSED.search(name)}
        except Exception:  # bytes that are no checkpoint raise anything
            raise UserError(f"{path.name}: truncated, or no file of weights") from None
    return tensors


def one_line(error):
    hint = "; pip install -e '.[pretrained]'" * isinstance(error, ImportError)
    return "it has no " * isinstance(error, KeyError) + " ".join(str(error).split())[:300] + hint


# ---- text ----

def tokenize(folder, model, source, path):
    """Write text in the model's own tokens to `path`, a .bin, and their words beside it. Returns
    what the run's settings tell about them."""
    text = bytes(load_text(source).tokens[:TEXT_BYTES]).decode(errors="replace")
    try:
        tokenizer = read_tokenizer(folder, model.family)
        tokens = np.array(tokenizer.encode(text, add_special_tokens=False).ids, dtype="<u2")
        words = {i: word for word, i in tokenizer.get_vocab().items()}
        ids = [tokenizer.get_vocab()[word] for word in SPECIALS[model.family].split()]
        if max(words) >= model.config.vocab_size:
            raise UserError(f"it has ids up to {max(words)}, more than the model has tokens")
    except Exception as error:  # the tokenizers library raises plain Exceptions
        raise UserError(f"{folder}: its tokenizer cannot be used: {one_line(error)}") from None
    tokens.tofile(path)
    words = [words.get(i, str(i)) for i in range(max(words) + 1)]  # a few vocabularies skip ids
    shown = json.dumps(words, ensure_ascii=False).replace("Ġ", "␣").replace("Ċ", "↵")  # of bytes
    path.with_suffix(".json").write_text(shown, "utf-8")
    return {"data": path.name, "vocab_size": model.config.vocab_size, "special_ids": ids,
            "seq_len": model.config.seq_len, "mask_prob": 0.15 * (model.metric == "perplexity")}


def read_tokenizer(folder, family):
    """tokenizer.json, or the vocabulary files of older checkpoints."""
    import tokenizers
    file = lambda name: str(folder / name)
    if os.path.exists(file("tokenizer.json")):
        tokenizer = tokenizers.Tokenizer.from_file(file("tokenizer.json"))
        tokenizer.no_truncation()  # some cut and pad every text to their model's length
        tokenizer.no_padding()
        return tokenizer
    if family == "opt":
        return tokenizers.ByteLevelBPETokenizer(file("vocab.json"), file("merges.txt"))
    options = read_json(folder / "tokenizer_config.json")
    return tokenizers.BertWordPieceTokenizer(
        file("vocab.txt"), lowercase=options.get("do_lower_case", True),
        strip_accents=options.get("strip_accents"),
        handle_chinese_chars=options.get("tokenize_chinese_chars", True))


# ---- names: minq's -> theirs; * is a layer's number; a|b|c are stacked ----

def names(prefix, block, **others):
    """prefix, block: their names of what a block has, in this order; others: of what is outside."""
    ours = ("attention.qkv", "attention.proj", "norm1", "ffn_up", "ffn_down", "norm2")
    return {f"layers.*.{name}": prefix + part for name, part in zip(ours, block.split())} | others


BERT = names(
    "encoder.layer.*.", "attention.self.query|key|value attention.output.dense "
    "attention.output.LayerNorm intermediate.dense output.dense output.LayerNorm",
    token_embedding="embeddings.word_embeddings", embedding_norm="embeddings.LayerNorm",
    position_embedding="embeddings.position_embeddings") | {
    "head.transform": "cls.predictions.transform.dense", "head.decoder": "cls.predictions.decoder",
    "head.norm": "cls.predictions.transform.LayerNorm"}
OPT = names(
    "layers.*.", "self_attn.q_proj|k_proj|v_proj self_attn.out_proj self_attn_layer_norm fc1 fc2 "
    "final_layer_norm", token_embedding="embed_tokens", position_embedding="embed_positions",
    final_norm="final_layer_norm", decoder="lm_head")
VIT = names(
    "encoder.layer.*.", "attention.attention.query|key|value attention.output.dense "
    "layernorm_before intermediate.dense output.dense layernorm_after", final_norm="layernorm",
    patch_embedding="embeddings.patch_embeddings.projection", cls_embedding="embeddings.cls_token",
    position_embedding="embeddings.position_embeddings", head="classifier")
TIMM = names(
    "blocks.*.", "attn.qkv attn.proj norm1 mlp.fc1 mlp.fc2 norm2", head="head", final_norm="norm",
    patch_embedding="patch_embed.proj", cls_embedding="cls_token", position_embedding="pos_embed")
PREFIX = re.compile(r"^((module|_orig_mod|bert|vit|model|decoder)\.)*")  # of wrappers, with a head
UNUSED = re.compile(r"(^|\.)(pooler|cls\.seq_relationship)\.")


# ---- a checkpoint -> minq's model ----

# What no tensor tells of, as minq's models have it.
PLAIN = {"quantization_config": None, "position_embedding_type": "absolute", "is_decoder": False,
         "do_layer_norm_before": True, "do_normalize": True, "do_rescale": True,
         "rescale_factor": 1 / 255, "global_pool": "token", "act_layer": None, "norm_layer": None}
DEFAULTS = {"layer_norm_eps": 1e-12, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}


def convert(folder, seq_len=None):
    """The model in a folder, as minq's, in float32. Text models keep the first `seq_len` positions.
    Raises UserError if it is not a BERT, OPT or ViT that minq can be."""
    try:
        config = read_json(folder / "preprocessor_config.json") | read_json(folder / "config.json")
        kind = config.get("model_type") or ("timm" if "architecture" in config else None)
        if str(kind) not in KINDS:
            raise UserError(f"its model_type is {kind!r}; expected one of {', '.join(KINDS)}")
        config = DEFAULTS | config | config.get("model_args", {})
        for key, value in PLAIN.items():
            if config.get(key, value) != value:
                raise UserError(f"{key} is {config[key]!r}; expected {value!r}")
        read, theirs = KINDS[kind]
        tensors = read_weights(folder)
        if bad := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
            raise UserError(f"{bad[0]} holds values that are not finite")
        build = FAMILIES["vit" if kind == "timm" else kind]
        model = build(build.config_class(**read(config, tensors, seq_len)))
        state = {}
        for i, ours, part in product(range(model.config.layers), theirs, (".weight", ".bias")):
            path, dot, last = theirs[ours].replace("*", str(i)).rpartition(".")
            keys = [path + dot + name + part for name in last.split("|")]
            if all(key in tensors for key in keys):
                state[ours.replace("*", str(i)) + part] = torch.cat(list(map(tensors.pop, keys)))
        model.load_state_dict(state | tensors)  # which tells what is missing, and what is left
        return model
    except (ImportError, LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise UserError(f"{folder}: {one_line(error)}") from None


def sizes(config, ffn="intermediate_size", activation="hidden_act"):
    return {"layers": int(config["num_hidden_layers"]), "width": int(config["hidden_size"]),
            "heads": int(config["num_attention_heads"]), "ffn": int(config[ffn]),
            "activation": config[activation], "norm_eps": float(config["layer_norm_eps"])}


def tie(tensors, key, copy):
    """Give a tensor both of its names. A file may leave one out."""
    tensors.setdefault(key, tensors.get(copy))
    if not torch.equal(tensors.setdefault(copy, tensors[key]), tensors[key]):
        raise UserError(f"{copy} has values of its own; expected those of {key}")


def cut_positions(config, tensors, key, seq_len, default, unused=0):
    """Keep T positions, `seq_len` or at most `default`. Returns T."""
    rows, most = len(tensors[key]) - unused, config["max_position_embeddings"]
    if rows != most or rows < (seq_len or 0):
        raise UserError(f"{key} is of {rows} positions, config.json {most}, --seq-len {seq_len}")
    tensors[key] = tensors[key][unused:][:seq_len or default]
    return len(tensors[key])


def bert(config, tensors, seq_len):
    """BertForMaskedLM, BertForPreTraining, or BertModel: an encoder without a head."""
    key = "embeddings.position_embeddings.weight"
    T = cut_positions(config, tensors, key, seq_len, default=128)
    tensors[key] = tensors[key] + tensors.pop("embeddings.token_type_embeddings.weight")[0]
    has_head = "cls.predictions.bias" in tensors
    if has_head:
        tie(tensors, "embeddings.word_embeddings.weight", "cls.predictions.decoder.weight")
        tie(tensors, "cls.predictions.bias", "cls.predictions.decoder.bias")
        del tensors["cls.predictions.bias"]
    return sizes(config) | dict(vocab_size=config["vocab_size"], seq_len=T, masked_head=has_head)


def opt(config, tensors, seq_len):
    """OPTForCausalLM or OPTModel, pre-LN (125m, 1.3b and larger). OPT counts positions from 2."""
    T = cut_positions(config, tensors, "embed_positions.weight", seq_len, default=512, unused=2)
    tie(tensors, "embed_tokens.weight", "lm_head.weight")
    return sizes(config, "ffn_dim", "activation_function") | dict(
        vocab_size=config["vocab_size"], seq_len=T, norm_eps=1e-5)


def vit(config, tensors, seq_len):
    """ViTForImageClassification."""
    fold_pixels(tensors, VIT, config["image_mean"], config["image_std"])
    return sizes(config) | dict(image_size=config["image_size"], patch_size=config["patch_size"],
                                classes=len(tensors["classifier.bias"]))


def timm(config, tensors, seq_len):
    """A vit_*_patchN_S of timm, classified by its [CLS] token; its tensors tell most sizes."""
    given = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}  # timm's: ImageNet's
    given |= config.get("pretrained_cfg", config)  # older files are flat
    patch = fold_pixels(tensors, TIMM, given["mean"], given["std"])
    width = len(tensors["norm.bias"])
    pixels = patch * int(len(tensors["pos_embed.weight"]) ** 0.5)
    if (not re.fullmatch(r"(vit|deit)_\w+_patch\d+_\d+", config["architecture"])  # ..._rope_224
            or config.get("img_size", pixels) not in (pixels, [pixels, pixels])):
        raise UserError(f"it is {config['architecture']}; expected a plain, square vit_*_patchN_S")
    if width % 64 == 0 and width <= 1024:  # up to ViT-L, heads are 64 wide unless it says else
        config = {"num_heads": width // 64} | config
    return {"layers": len({key.split(".")[1] for key in tensors if key.startswith("blocks.")}),
            "width": width, "heads": config["num_heads"], "image_size": pixels, "patch_size": patch,
            "ffn": len(tensors["blocks.0.mlp.fc1.bias"]), "classes": len(tensors["head.bias"])}


def fold_pixels(tensors, names, mean, std):
    """minq's ViT sees u = 2 x - 1, the published one (x - mean) / std, which is u / (2 std) +
    (0.5 - mean) / std: a scale per colour for the weights, and a constant for the bias. Returns the
    pixels per side of a patch."""
    mean, std, patches = torch.tensor(mean), torch.tensor(std), names["patch_embedding"]
    weight = tensors[f"{patches}.weight"]  # (width, 3, size, size)
    tensors[f"{patches}.weight"] = (weight / (2 * std)[:, None, None]).flatten(1)
    tensors[f"{patches}.bias"] += weight.sum(dim=(2, 3)) @ ((0.5 - mean) / std)
    for name in (names["cls_embedding"], names["position_embedding"]):
        tensors[f"{name}.weight"] = tensors.pop(name).flatten(0, 1)  # (1, n, width) -> (n, width)
    return weight.shape[-1]


KINDS = {"bert": (bert, BERT), "opt": (opt, OPT), "vit": (vit, VIT), "timm": (timm, TIMM)}


if __name__ == "__main__":
    main()
