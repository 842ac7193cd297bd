"""Turn a published checkpoint into a run, which quantize.py and lab/ open like any other.

    python -m lab.convert sentence-transformers/all-MiniLM-L6-v2       from the Hugging Face Hub
    python -m lab.convert FOLDER --out runs/mine           config.json, weights, tokenizer's files
    python -m lab.convert FOLDER --rows --text FILE        a BERT of sequences, one per line
    python -m lab.convert google/vit-base-patch16-224 --images FOLDER    as in train_vit.py --data

It needs pip install -e '.[pretrained]', and reads BERT with its masked-LM head or without any, OPT
(125m and the other pre-LN sizes) and ViT classifiers, in the files of transformers. These are the
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

from minq import flags
from minq.data import load_text
from minq.flags import TEXTS, UserError
from minq.images import IMAGES
from minq.model import Bert, Opt, ViT
from minq.runs import open_data, open_run

SPECIALS = {"bert": "[PAD] [CLS] [SEP] [MASK]", "opt": "<pad> </s> <s> <unk>"}  # OPT starts: </s>
WEIGHTS = (("model.safetensors", "model-*-of-*.safetensors"),  # the first form that there is counts
           ("pytorch_model.bin", "pytorch_model-*-of-*.bin"))


@flags.one_line_errors
def main(argv=None):
    # ---- arguments ----
    parser = flags.Parser(__doc__)
    add = parser.add_argument
    add("name", type=flags.place, metavar="NAME", help="a folder, or a model's id on the Hub")
    add("--out", type=flags.place, metavar="RUN", help="by default runs/ and the name's last part")
    add("--overwrite", action="store_true", help="replace the run in --out")
    add("--text", type=flags.source(TEXTS), help="stdlib (by default), or a file or folder of text")
    add("--rows", action="store_true", help="each line is [CLS] line [SEP], of T tokens")
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
    is_bert, is_vit, config = model.family == "bert", model.family == "vit", model.config
    if (args.text or args.seq_len if is_vit else args.images) or args.rows and not is_bert:
        raise UserError(f"{folder}: {model.family}; --images is for a ViT, --rows for a BERT, "
                        "--text and --seq-len for both of text")
    settings = vars(args) | dict(revision=revision, data=args.images or "shapes", seed=0, steps=0)

    # ---- its data, and the run: complete, or not there at all ----
    new = Path(f"{os.path.realpath(out)}.unfinished")  # --out may be . or a link
    try:
        with flags.writing(f"--out {out}"):
            new.mkdir(parents=True, exist_ok=True)
            if not is_vit:
                settings |= tokenize(folder, model, args, new / "tokens.bin")
            checkpoint = {"format": "minq 1", "family": model.family, "config": vars(config),
                          "step": 0, "args": settings, "model": model.state_dict()}
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
        get = lambda form: Path(snapshot_download(name, allow_patterns=["*.json", "*.txt", *form]))
        folder = get(WEIGHTS[0])
        folder = folder if any(folder.glob("*.safetensors")) else get(WEIGHTS[1])
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
    forms = [[path for x in patterns for path in folder.glob(x)] for patterns in WEIGHTS]
    files, tensors = forms[0] or forms[1], {}
    if len(files) > 1 and {path.stem[-5:] for path in files} != {f"{len(files):05}"}:
        raise UserError(f"{len(files)} files like {files[0].name}; expected one, or one whole set")
    for path in files:
        try:
            loaded = (load_file(path) if path.suffix == ".safetensors" else
                      torch.load(path, map_location="cpu", weights_only=True))
            tensors |= {PREFIX.sub("", name.replace("Norm.gamma", "Norm.weight").replace(
                "Norm.beta", "Norm.bias")): tensor.float() for name, tensor in loaded.items()
                if tensor.is_floating_point()}
        except Exception:  # bytes that are no checkpoint raise anything
            raise UserError(f"{path.name}: truncated, or no file of weights") from None
    return tensors


def one_line(error):
    hint = "; pip install -e '.[pretrained]'" * isinstance(error, ImportError)
    return "it has no " * isinstance(error, KeyError) + " ".join(str(error).split())[:300] + hint


# ---- text ----

def tokenize(folder, model, args, path):
    """Write text in the model's own tokens to `path`, a .bin, and their words beside it. Returns
    what the run's settings tell about them.

    With --rows T becomes the length whose lines hold the most tokens, or --seq-len if that is less;
    longer lines are cut to it, and shorter ones are left out: no row is padded.
    """
    # 4 MiB are more than calibration and evaluation need
    text = bytes(load_text(args.text or "stdlib").tokens[:4 * 2 ** 20]).decode(errors="replace")
    # pieces where none needs the next; all at once take 2 GB
    lines = text.split("\n") if args.rows else re.split(r"(?<=\S\n)(?=\S)", text)
    try:
        tokenizer = read_tokenizer(folder, model.family)
        found = [tokenizer.encode(line, add_special_tokens=False).ids for line in lines]
        words = {i: word for word, i in tokenizer.get_vocab().items()}
        ids = [tokenizer.get_vocab()[word] for word in SPECIALS[model.family].split()]
        if max(words) >= min(model.config.vocab_size, 2 ** 16):
            raise UserError(f"it has ids up to {max(words)}, more than the model or a .bin holds")
    except Exception as error:  # the tokenizers library raises plain Exceptions
        raise UserError(f"{folder}: its tokenizer cannot be used: {one_line(error)}") from None
    if args.rows:
        lengths, positions = [*map(len, found)], model.position_embedding.weight
        T = min(len(positions), 2 + int(np.bincount(lengths, lengths).argmax()))
        model.config.seq_len, positions.data = T, positions.data[:T].clone()
        found = [[ids[1], *x[:T - 2], ids[2]] for x in found if len(x) >= T - 2]
        print(f"{len(found)} of {len(lengths)} lines are rows of {T} tokens; others are shorter")
        found = found[:len(found) // 10 * 10]  # so that the validation part begins with a row
    np.array([i for x in found for i in x], dtype="<u2").tofile(path)
    # a few vocabularies skip ids; those of bytes have letters for the space and the line's end
    shown = json.dumps([words.get(i, str(i)) for i in range(max(words) + 1)], ensure_ascii=False)
    path.with_suffix(".json").write_text(shown.replace("Ġ", "␣").replace("Ċ", "↵"), "utf-8")
    return {"data": path.name, "vocab_size": model.config.vocab_size, "special_ids": ids,
            "seq_len": model.config.seq_len, "mask_prob": 0.15 * (model.metric == "perplexity"),
            "documents": "rows" if args.rows else None}


def read_tokenizer(folder, family):
    """tokenizer.json, or the vocabulary files of older checkpoints, there or a folder above."""
    import tokenizers
    file = lambda name: str((folder if (folder / name).exists() else folder.parent) / name)
    if (folder / "tokenizer.json").exists():
        tokenizer = tokenizers.Tokenizer.from_file(file("tokenizer.json"))
        tokenizer.no_truncation()  # some cut and pad every text to their model's length
        tokenizer.no_padding()
        return tokenizer
    if family == "opt":
        return tokenizers.ByteLevelBPETokenizer(file("vocab.json"), file("merges.txt"))
    options = {"tokenizer_class": "BertTokenizer"} | read_json(folder / "tokenizer_config.json")
    if not re.fullmatch("BertTokenizer(Fast)?", options["tokenizer_class"]):
        raise UserError(f"vocab.txt is for {options['tokenizer_class']}; expected BertTokenizer")
    cased = re.search("(?m)^[A-Z]", Path(file("vocab.txt")).read_text("utf-8"))
    return tokenizers.BertWordPieceTokenizer(
        file("vocab.txt"), lowercase=options.get("do_lower_case", not cased),
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
PREFIX = re.compile(r"^((module|_orig_mod|bert|vit|model|decoder)\.)*")  # of wrappers, with a head
# what is outside of these is a head
BASE = re.compile(r"embeddings|encoder|layers|embed_|project_|final_layer_norm|layernorm")


# ---- a checkpoint -> minq's model ----

# What no tensor tells of, as minq's models have it.
PLAIN = {"quantization_config": None, "position_embedding_type": "absolute", "is_decoder": False,
         "do_layer_norm_before": True, "do_normalize": True, "do_rescale": True,
         "rescale_factor": 1 / 255}
DEFAULTS = {"layer_norm_eps": 1e-12, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}


def convert(folder, seq_len=None):
    """The model in a folder, as minq's, in float32. Text models keep the first `seq_len` positions.
    Raises UserError if it is not a BERT, OPT or ViT that minq can be."""
    try:
        config = read_json(folder / "preprocessor_config.json") | read_json(folder / "config.json")
        old = "Bert" if config.get("type_vocab_size") == 2 else ""  # of 2018; a RoBERTa has one
        named = re.sub("(For|Model).*", "", config.get("architectures", [old])[0]).lower()
        kind = config.get("model_type") or named
        if str(kind) not in KINDS:
            raise UserError(f"its model_type is {kind!r}; expected one of {', '.join(KINDS)}")
        config = DEFAULTS | config
        if odd := [key for key, value in PLAIN.items() if config.get(key, value) != value]:
            raise UserError(f"{odd[0]} is {config[odd[0]]!r}; expected {PLAIN[odd[0]]!r}")
        read, theirs, build = KINDS[kind]
        tensors = read_weights(folder)
        if bad := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
            raise UserError(f"{bad[0]} holds values that are not finite")
        model, state = build(build.config_class(**read(config, tensors, seq_len))), {}
        for i, ours, part in product(range(model.config.layers), theirs, (".weight", ".bias")):
            path, dot, last = theirs[ours].replace("*", str(i)).rpartition(".")
            keys = [path + dot + name + part for name in last.split("|")]
            if all(key in tensors for key in keys):
                state[ours.replace("*", str(i)) + part] = torch.cat(list(map(tensors.pop, keys)))
        if heads := [name for name in tensors if not BASE.match(name)]:
            print(f"{folder}: ignored, of heads that minq does not have: {', '.join(heads)}")
        # which tells what is missing, and what is left
        model.load_state_dict(state | {name: tensors[name] for name in tensors.keys() - heads})
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
    has_head = any(name.startswith("cls.predictions.") for name in tensors)
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
    fold_pixels(tensors, config["image_mean"], config["image_std"])
    return sizes(config) | dict(image_size=config["image_size"], patch_size=config["patch_size"],
                                classes=len(tensors["classifier.bias"]))


def fold_pixels(tensors, mean, std):
    """minq's ViT sees u = 2 x - 1, the published one (x - mean) / std, which is u / (2 std) +
    (0.5 - mean) / std: a scale per colour for the weights, and a constant for the bias."""
    mean, std, patches = torch.tensor(mean), torch.tensor(std), VIT["patch_embedding"]
    weight = tensors[f"{patches}.weight"]  # (width, 3, size, size)
    tensors[f"{patches}.weight"] = (weight / (2 * std)[:, None, None]).flatten(1)
    tensors[f"{patches}.bias"] += weight.sum(dim=(2, 3)) @ ((0.5 - mean) / std)
    for name in (VIT["cls_embedding"], VIT["position_embedding"]):
        tensors[f"{name}.weight"] = tensors.pop(name).flatten(0, 1)  # (1, n, width) -> (n, width)


KINDS = dict(bert=(bert, BERT, Bert), opt=(opt, OPT, Opt), vit=(vit, VIT, ViT))


if __name__ == "__main__":
    main()
