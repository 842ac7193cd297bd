"""Turn a published checkpoint into a run that quantize.py and analyze.py open like any other.

    python pretrained.py sentence-transformers/all-MiniLM-L6-v2         downloads it: pip install -e '.[pretrained]'
    python pretrained.py FOLDER --out runs/mine                         config.json, weights and tokenizer in a folder
    python pretrained.py google/vit-base-patch16-224 --images FOLDER    as in train_vit.py --data

BERT with its masked-LM head or without any, OPT (125m and the other pre-LN sizes), ViT (also timm's). An encoder
without a head has nothing to predict: its metric is how near its last hidden states stay to floating point.
"""
import json
import shutil
from pathlib import Path

import numpy as np
import torch

from minq import flags
from minq.data import load_text, read_bytes, stdlib_source
from minq.errors import UserError, one_line_errors
from minq.images import IMAGES, load_images
from minq.pretrained import convert, read_json
from minq.runs import open_run

TEXT_BYTES = 4 * 2 ** 20  # of text are tokenized at most: calibration and evaluation need less
SPECIALS = {"bert": ("[PAD]", "[CLS]", "[SEP]", "[MASK]"), "opt": ("<pad>", "</s>", "<s>", "<unk>")}  # OPT starts with </s>
WANTED = ("config.json", "preprocessor_config.json", "tokenizer*.json", "vocab.*", "merges.txt")
INSTALL = "pip install -e '.[pretrained]'"


@one_line_errors
def main(argv=None):
    # ---- arguments ----
    parser = flags.Parser(__doc__)
    parser.add_argument("name", metavar="NAME", help="a folder, or a model's id on the Hugging Face Hub")
    parser.add_argument("--out", metavar="RUN", help="the run's folder; by default runs/ and the name's last part")
    parser.add_argument("--overwrite", action="store_true", help="replace the run in --out")
    parser.add_argument("--text", help="a file or folder of text; by default the Python standard library's source")
    parser.add_argument("--images", help=f"for a ViT: {', '.join(IMAGES)}, or a folder as in train_vit.py")
    parser.add_argument("--seq-len", type=flags.positive, help="T, tokens per sequence; by default 128 for BERT, 512 for OPT")
    parser.add_argument("--batch-size", type=flags.positive, default=8, help="sequences per batch of calibration and evaluation")
    parser.add_argument("--eval-batches", type=flags.positive, default=6, help="validation batches")
    args = parser.parse_args(argv)
    out = Path(args.out or Path("runs", Path(args.name).resolve().name if Path(args.name).is_dir() else Path(args.name).name))
    if out.exists() and not args.overwrite:
        raise UserError(f"--out {out}: already exists; replace it with --overwrite, or name another --out")

    # ---- the model ----
    folder, revision = (Path(args.name), None) if Path(args.name).is_dir() else download(args.name)
    found = convert(folder, args.seq_len)
    for flag in ("text", "seq_len") if found.family == "vit" else ("images",):
        if getattr(args, flag):
            raise UserError(f"--{flag.replace('_', '-')} {getattr(args, flag)} is not for a {found.family}")
    settings = {"attention": "vanilla", "seed": 0, "steps": 0, "batch_size": args.batch_size, "eval_batches": args.eval_batches,
                "source": args.name, "revision": revision, "weights_sha256": found.sha256}

    # ---- its data, and the run: complete, or not there at all ----
    new = out.with_name(out.name + ".new")
    shutil.rmtree(new, ignore_errors=True)
    try:
        new.mkdir(parents=True)
        if found.family == "vit":
            settings |= image_data(args.images or "shapes", found)
        else:
            settings |= text_data(folder, args.text, found, new)
        checkpoint = {"format": "minq 1", "family": found.family, "config": found.config, "model": found.state_dict,
                      "args": settings, "data_sha256": settings.pop("data_sha256"), "step": 0}
        torch.save(checkpoint, new / "checkpoint.pt")
        run = open_run(new, torch.device("cpu"))
        if out.exists():
            shutil.rmtree(out)
        new.rename(out)
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written: {error.strerror}") from None
    finally:
        shutil.rmtree(new, ignore_errors=True)

    # ---- report ----
    config, parameters = run.model.config, sum(p.numel() for p in run.model.parameters())
    print(f"{out}: {found.family}, {config.layers} layers of width {config.width}, {parameters / 1e6:.1f}M parameters, T {config.seq_len}, "
          f"metric {run.model.metric}; weights SHA-256 {found.sha256}" + (f", revision {revision}" if revision else ""))
    print(f"next: python quantize.py {out} --taps")


def download(name):
    """(folder, revision) of a model of the Hub, in its cache."""
    try:
        from huggingface_hub import HfApi, snapshot_download
    except ImportError:
        raise UserError(f"{name}: no such folder; to download a model of that name: {INSTALL}") from None
    try:
        info = HfApi().model_info(name)
        files = [file.rfilename for file in info.siblings]
        weights = "model*.safetensors*" if any(file.endswith(".safetensors") and "/" not in file for file in files) else "pytorch_model*.bin*"
        folder = snapshot_download(name, revision=info.sha, allow_patterns=[*WANTED, weights])
    except Exception as first:  # offline, unknown, broken off: whatever it is, an earlier download may be there
        try:
            folder = snapshot_download(name, local_files_only=True)
        except Exception:
            reason = " ".join(str(first).split())[:200]
            raise UserError(f"{name}: no such folder, and it cannot be downloaded from the Hub: {reason}") from None
    return Path(folder), Path(folder).name  # the cache names a snapshot by its commit


# ---- data ----

def text_data(folder, source, found, new):
    """Tokenize text with the model's own tokenizer into tokens.bin, and its words beside it; the settings of the run's data."""
    tokenizer = read_tokenizer(folder, found.family)
    ids = [tokenizer.token_to_id(special) for special in SPECIALS[found.family]]
    if None in ids:
        raise UserError(f"{folder}: its tokenizer has no {SPECIALS[found.family][ids.index(None)]}")
    text = (read_bytes(Path(source), flag="--text") if source else stdlib_source())[:TEXT_BYTES]
    lines = text.decode(errors="replace").splitlines(keepends=True)
    pieces = ["".join(lines[i:i + 200]) for i in range(0, len(lines), 200)]
    encoded = tokenizer.encode_batch(pieces, add_special_tokens=False)
    tokens = np.concatenate([np.array(piece.ids, dtype=np.int64) for piece in encoded])
    vocab_size = found.config["vocab_size"]
    words = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    if vocab_size > 2 ** 16 or tokens.max(initial=0) >= vocab_size or max(ids) >= vocab_size or words[-1][1] != len(words) - 1:
        raise UserError(f"{folder}: its tokenizer has ids up to {max(tokens.max(initial=0), words[-1][1])}, its vocabulary "
                        f"{vocab_size} tokens; expected the tokens to fit, and at most 65536 of them")
    tokens.astype("<u2").tofile(new / "tokens.bin")
    shown = {"Ġ": "␣", "Ċ": "↵"}  # a byte-level tokenizer's space and newline
    (new / "tokens.json").write_text(json.dumps(["".join(shown.get(c, c) for c in word) for word, _ in words]))
    settings = {"data": "tokens.bin", "vocab_size": vocab_size, "special_ids": ids, "seq_len": found.config["seq_len"]}
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
        raise UserError(f"{folder}: its tokenizer cannot be read: {' '.join(str(error).split())[:200]}") from None
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
