"""Turn a published checkpoint into a run that quantize.py and analyze.py open like any other.

    python pretrained.py sentence-transformers/all-MiniLM-L6-v2         downloads it: pip install -e '.[pretrained]'
    python pretrained.py FOLDER --out runs/mine                         config.json, weights and tokenizer in a folder
    python pretrained.py google/vit-base-patch16-224 --images FOLDER    as in train_vit.py --data

BERT with its masked-LM head or without any, OPT (125m and the other pre-LN sizes), ViT (also timm's). An encoder
without a head has nothing to predict: its metric is how near its last hidden states stay to floating point.
"""
import json
import os
import shutil
from pathlib import Path

import numpy as np
import torch

from minq import flags
from minq.data import load_text, read_bytes, stdlib_source
from minq.download import from_hub
from minq.errors import UserError, in_one_line, one_line_errors
from minq.images import IMAGES, load_images
from minq.pretrained import convert
from minq.runs import open_run
from minq.weights import read_json

TEXT_BYTES = 4 * 2 ** 20  # of text are tokenized at most: calibration and evaluation need less
SPECIALS = {"bert": ("[PAD]", "[CLS]", "[SEP]", "[MASK]"), "opt": ("<pad>", "</s>", "<s>", "<unk>")}  # OPT starts with </s>
WANTED = ("config.json", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json", "merges.txt")
WEIGHTS = [(f"{name}.{kind}", f"{name}.{kind}.index.json", f"{name}-*-of-*.{kind}")  # and no other copy of them
           for name, kind in (("model", "safetensors"), ("pytorch_model", "bin"))]
INSTALL = "pip install -e '.[pretrained]'"


@one_line_errors
def main(argv=None):
    # ---- arguments ----
    parser = flags.Parser(__doc__)
    parser.add_argument("name", type=flags.place, metavar="NAME", help="a folder, or a model's id on the Hugging Face Hub")
    parser.add_argument("--out", type=flags.place, metavar="RUN", help="the run's folder; by default runs/ and the name's last part")
    parser.add_argument("--overwrite", action="store_true", help="replace the run in --out")
    parser.add_argument("--text", type=flags.place, help="a file or folder of text; by default the Python standard library's source")
    parser.add_argument("--images", type=flags.place, help=f"for a ViT: {', '.join(IMAGES)}, or a folder as in train_vit.py")
    parser.add_argument("--seq-len", type=flags.positive, help="T, tokens per sequence; by default 128 for BERT, 512 for OPT")
    parser.add_argument("--batch-size", type=flags.positive, default=8, help="sequences per batch of calibration and evaluation")
    parser.add_argument("--eval-batches", type=flags.positive, default=6, help="validation batches")
    args = parser.parse_args(argv)
    is_folder = os.path.isdir(args.name)
    out = Path(args.out or Path("runs", Path(args.name).resolve().name if is_folder else Path(args.name).name))
    if os.path.exists(out) and not args.overwrite:
        raise UserError(f"--out {out}: already exists; replace it with --overwrite, or name another --out")
    if os.path.exists(out) and not (out / "checkpoint.pt").is_file():  # it could be somebody's home
        raise UserError(f"--out {out}: holds no run; --overwrite replaces nothing else")

    # ---- the model ----
    folder, revision = (Path(args.name), None) if is_folder else from_hub(args.name, WANTED, WEIGHTS)
    found = convert(folder, args.seq_len)
    for flag in ("text", "seq_len") if found.family == "vit" else ("images",):
        if getattr(args, flag):
            raise UserError(f"--{flag.replace('_', '-')} {getattr(args, flag)} is not for a {found.family}")
    settings = {"attention": "vanilla", "seed": 0, "steps": 0, "batch_size": args.batch_size, "eval_batches": args.eval_batches,
                "source": args.name, "revision": revision, "weights_sha256": found.sha256}

    # ---- its data, and the run: complete, or not there at all ----
    place = Path(os.path.realpath(out))  # --out may be . or a link
    new = place.with_name(place.name + ".new")
    shutil.rmtree(new, ignore_errors=True)
    try:
        new.mkdir(parents=True)
        if found.family == "vit":
            settings |= image_data(args.images or "shapes", found)
        else:
            settings |= text_data(folder, args.text, found, new)
        checkpoint = {"format": "minq 1", "family": found.family, "config": found.config, "model": found.state_dict,
                      "args": settings, "data_sha256": settings.pop("data_sha256"), "step": 0}
        try:
            torch.save(checkpoint, new / "checkpoint.pt")
        except RuntimeError:  # what it makes of a full disk
            raise OSError(f"{new / 'checkpoint.pt'} could not be completed") from None
        run = open_run(new, torch.device("cpu"))
        if place.exists():
            shutil.rmtree(place)
        new.rename(place)
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written: {error.strerror or error}") from None
    finally:
        shutil.rmtree(new, ignore_errors=True)

    # ---- report ----
    config, parameters = run.model.config, sum(p.numel() for p in run.model.parameters())
    print(f"{out}: {found.family}, {config.layers} layers of width {config.width}, {parameters / 1e6:.1f}M parameters, T {config.seq_len}, "
          f"metric {run.model.metric}; weights SHA-256 {found.sha256}" + (f", revision {revision}" if revision else ""))
    print(f"next: python quantize.py {out} --taps")


# ---- data ----

def text_data(folder, source, found, new):
    """Tokenize text with the model's own tokenizer into tokens.bin, and its words beside it; the settings of the run's data."""
    tokenizer, vocab_size, T = read_tokenizer(folder, found.family), found.config["vocab_size"], found.config["seq_len"]
    ids = [tokenizer.token_to_id(special) for special in SPECIALS[found.family]]
    if None in ids:
        raise UserError(f"{folder}: its tokenizer has no {SPECIALS[found.family][ids.index(None)]}")
    text = (read_bytes(Path(source), flag="--text") if source else stdlib_source())[:TEXT_BYTES]
    lines = text.decode(errors="replace").splitlines(keepends=True)
    pieces = ["".join(lines[i:i + 200]) for i in range(0, len(lines), 200)]
    try:
        encoded = tokenizer.encode_batch(pieces, add_special_tokens=False)
    except Exception as error:  # the tokenizers library raises plain Exceptions: here, of an unknown word
        raise UserError(f"{folder}: its tokenizer fails: {in_one_line(error)}") from None
    tokens = np.concatenate([np.array(piece.ids, dtype=np.int64) for piece in encoded])
    if len(tokens) < 10 * T:
        raise UserError(f"--text {source or 'stdlib'}: has {len(tokens)} tokens; expected {10 * T}, for its last tenth must hold a sequence")
    words = {i: word for word, i in tokenizer.get_vocab().items()}
    if vocab_size > 2 ** 16 or max(words) >= vocab_size:
        raise UserError(f"{folder}: its tokenizer has ids up to {max(words)}, the model {vocab_size} tokens; "
                        "expected the ids to fit, and at most 65536 of them")
    tokens.astype("<u2").tofile(new / "tokens.bin")
    shown = {"Ġ": "␣", "Ċ": "↵"}  # a byte-level tokenizer's space and newline
    names = ["".join(shown.get(c, c) for c in words.get(i, str(i))) for i in range(max(words) + 1)]  # a few skip an id
    (new / "tokens.json").write_text(json.dumps(names))
    settings = {"data": "tokens.bin", "vocab_size": vocab_size, "special_ids": ids, "seq_len": T}
    if found.family == "bert":
        settings["mask_prob"] = 0.15 if found.config["masked_head"] else 0.0
    return settings | {"data_sha256": load_text(new / "tokens.bin", vocab_size, ids).sha256}


def read_tokenizer(folder, family):
    """The model's own: tokenizer.json, or the vocabulary files of older checkpoints."""
    try:
        import tokenizers
    except ImportError:
        raise UserError(f"{folder}: to read its tokenizer: {INSTALL}") from None
    try:
        if (folder / "tokenizer.json").exists():
            tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
            tokenizer.no_truncation()  # some cut and pad every text to their model's length
            tokenizer.no_padding()
            return tokenizer
        if family == "bert" and (folder / "vocab.txt").exists():
            options = folder / "tokenizer_config.json"
            lowercase = read_json(options).get("do_lower_case", True) if options.exists() else True
            return tokenizers.BertWordPieceTokenizer(str(folder / "vocab.txt"), lowercase=lowercase)
        if family == "opt" and (folder / "merges.txt").exists():
            return tokenizers.ByteLevelBPETokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
    except UserError:
        raise
    except Exception as error:  # the tokenizers library raises plain Exceptions
        raise UserError(f"{folder}: its tokenizer cannot be read: {in_one_line(error)}") from None
    raise UserError(f"{folder}: no tokenizer; expected tokenizer.json, or vocab.txt (BERT), or vocab.json and merges.txt (OPT)")


def image_data(source, found):
    """The settings of a ViT's data. Its labels must be ones that the model knows."""
    source = source if source in IMAGES else str(Path(source).absolute())
    images = load_images(source)
    if images.classes > found.config["classes"]:
        raise UserError(f"--images {source}: has {images.classes} classes, the model {found.config['classes']}")
    return {"data": source, "image_size": found.config["image_size"], "data_sha256": images.sha256}


if __name__ == "__main__":
    main()
