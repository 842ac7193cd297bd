"""Text as numbers, without a tokenizer: bytes, or integers that someone else tokenized.

Batch `step` of a run is a pure function of (seed, step): an interrupted run, or one split over
processes or micro-batches, sees the same data.
"""
import hashlib
import json
import os
import shutil
import sysconfig
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from minq.flags import TEXTS, UserError

IGNORE = -100            # a label that is not predicted (cross_entropy's default)
VALIDATION_SHARE = 0.1   # the last tenth of a text; of an array of images a tenth
BYTES = 256
ENWIK8 = ("http://mattmahoney.net/dc/enwik8.zip",  # 100 MB of Wikipedia
          "547994d9980ebed1288380d652999f38a14fe291a6247c157c3d33d4932534bc")


# ---- corpora ----

class Text(NamedTuple):
    """A corpus: `tokens` (uint8 or uint16), whether they are bytes or else (if known) the words
    that they stand for, the size of its vocabulary with specials, and the specials' ids."""
    tokens: np.ndarray
    is_bytes: bool
    words: list | None
    vocab_size: int
    pad: int
    cls: int
    sep: int
    mask: int
    sha256: str

    def split(self, name):
        """The 'train' or 'validation' part; they never overlap."""
        boundary = int(len(self.tokens) * (1 - VALIDATION_SHARE))
        return self.tokens[:boundary] if name == "train" else self.tokens[boundary:]


def load_text(source, vocab_size=None, special_ids=None):
    """Open `--data`: a name in TEXTS, a file or folder of text (read as bytes), or a .bin.

    A .bin needs `vocab_size`; its special tokens are `special_ids` (pad, cls, sep, mask), or follow
    the vocabulary; a list of its words may lie beside it, as .json. Raises UserError for anything
    that cannot be read.
    """
    path, is_bin = Path(source), str(source).endswith(".bin")
    if is_bin != (vocab_size is not None) or special_ids and not is_bin:
        raise UserError(f"--data {source}: --vocab-size is for .bin files of tokens, which need it")
    words = None
    try:
        if is_bin:
            tokens, names = read_tokens(path), path.with_suffix(".json")
            words = json.loads(names.read_text("utf-8")) if names.exists() else None
        else:
            tokens, vocab_size = TEXTS.get(source, lambda: (as_bytes(read_bytes(path)), BYTES))()
    except (OSError, ValueError) as error:
        raise UserError(f"--data {source}: {error}; built in: {', '.join(TEXTS)}") from None
    if tokens.size and (most := tokens.max()) >= vocab_size:
        raise UserError(f"--data {source}: holds token {most}; --vocab-size is {vocab_size}")
    ids = special_ids or range(vocab_size, vocab_size + 4)
    return Text(tokens, not is_bin and vocab_size == BYTES, words, max(vocab_size, max(ids) + 1),
                *ids, sha256=hashlib.sha256(tokens).hexdigest())


def as_bytes(text):
    return np.frombuffer(text, dtype=np.uint8)


def read_bytes(path):
    """All bytes of a file, or of the files below a folder in the order of their names."""
    below = sorted(p for p in path.rglob("*") if p.is_file() and not p.name.startswith("."))
    text = b"\n".join(file.read_bytes() for file in (below if path.is_dir() else [path]))
    if not text:
        raise ValueError("is empty; expected text")
    return text


def read_tokens(path):
    """A .bin file, memory-mapped: little-endian uint16, one per token (nanoGPT's convention)."""
    if not (size := path.stat().st_size) or size % 2:
        raise ValueError(f"has {size} bytes; expected uint16 tokens, two bytes each")
    return np.memmap(path, dtype="<u2", mode="r")


def stdlib_source():
    """The source of the Python standard library, tests left out, in the order of file names."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    paths = [path for path in root.rglob("*.py") if not skipped & set(path.relative_to(root).parts)
             and not path.name.startswith("_sysconfigdata")]
    paths.sort(key=lambda path: path.relative_to(root).as_posix())
    if not paths:
        raise ValueError(f"no Python source in {root}; give --data a text file")
    return b"\n".join(path.read_bytes().replace(b"\r\n", b"\n") for path in paths)


def downloaded(name, url, sha256):
    """The path of the file or folder `name` in an archive, kept in ~/.cache/minq (or
    XDG_CACHE_HOME/minq); the first call downloads it, checks it and unpacks it."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "minq")
    if (cache / name).exists():
        return cache / name
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as scratch:  # complete, or not there at all
            packed = Path(scratch, url.rpartition("/")[2])
            torch.hub.download_url_to_file(url, str(packed), hash_prefix=sha256)
            shutil.unpack_archive(packed, scratch, **{"filter": "data"} if ".tar" in url else {})
            os.replace(Path(scratch, name), cache / name)
    except (OSError, RuntimeError, shutil.ReadError) as error:
        raise UserError(f"{url}: no download: {error}; or put {name} into {cache}") from None
    return cache / name


# A name for --data -> (tokens uint8, size of their vocabulary). To add one, name it here (or as
# lab/backcopy.py).
TEXTS |= {
    "stdlib": lambda: (as_bytes(stdlib_source()), BYTES),
    "enwik8": lambda: (np.memmap(downloaded("enwik8", *ENWIK8), np.uint8, "r"), BYTES),
}


# ---- batches ----

def spread(available, size, batches, rank=0, world=1):
    """Which items each validation batch holds: always the same, evenly spread, none twice. Of
    `world` processes each gets its part, or all where there are too few batches."""
    chosen = np.linspace(0, available - 1, min(available, size * batches)).astype(int)
    starts = range(0, len(chosen), size)
    for i in starts[rank::world] if len(starts) >= world else starts:
        yield i, chosen[i:i + size]


class Windows:
    """Windows of a text: at random places for training, evenly spread and apart for validation.

    A subclass sets `window`, their length, and turns them into (tokens, labels) with `sequences`.
    """

    def __init__(self, text, seq_len, window):
        if window < 1:
            raise UserError(f"--seq-len {seq_len}: expected at least 3, for [CLS] and [SEP]")
        if (n := min(len(text.split("train")), len(text.split("validation")))) < window:
            raise UserError(f"--seq-len {seq_len}: a part of --data has only {n} tokens")
        self.text, self.seq_len, self.window, self.sha256 = text, seq_len, window, text.sha256
        self.sizes = {"seq_len": seq_len, "vocab_size": text.vocab_size}  # what a model must take

    def train_batch(self, seed, step, size):
        """(tokens, labels), int64 (size, T), always the same for the same (seed, step)."""
        rng = np.random.default_rng((seed, step))
        tokens = self.text.split("train")
        return self.sequences(tokens, rng.integers(len(tokens) - self.window + 1, size=size), rng)

    def validation_batches(self, size, batches, rank=0, world=1):
        """Up to `batches` pairs (tokens, labels), always the same, that do not overlap."""
        tokens = self.text.split("validation")
        for i, chosen in spread(len(tokens) // self.window, size, batches, rank, world):
            yield self.sequences(tokens, chosen * self.window, np.random.default_rng((0, i)))


class MaskedText(Windows):
    """Sequences [CLS] + T-2 tokens + [SEP] with masked tokens to predict (Devlin et al.; C.1)."""

    def __init__(self, text, seq_len, mask_prob=0.15):
        super().__init__(text, seq_len, window=seq_len - 2)
        self.mask_prob, self.specials = mask_prob, (text.pad, text.cls, text.sep, text.mask)
        self.ordinary = np.setdiff1d(np.arange(text.vocab_size), self.specials)

    def sequences(self, text, starts, rng):
        """Choose 15% of the tokens as labels; of these 80% become [MASK], 10% a random token."""
        tokens = np.empty((len(starts), self.seq_len), dtype=np.int64)
        tokens[:, 0], tokens[:, -1] = self.text.cls, self.text.sep
        tokens[:, 1:-1] = text[starts[:, None] + np.arange(self.window)]
        special = np.isin(tokens, self.specials)

        chosen = (rng.random(tokens.shape) < self.mask_prob) & ~special
        if self.mask_prob > 0 and not chosen.any():  # a tiny batch: its loss is a mean over one
            chosen.flat[rng.choice(np.flatnonzero(~special), size=1)] = True
        labels = np.where(chosen, tokens, IGNORE)
        fate = rng.random(tokens.shape)
        tokens[chosen & (fate < 0.8)] = self.text.mask
        replaced = chosen & (fate >= 0.9)
        tokens[replaced] = rng.choice(self.ordinary, size=replaced.sum())
        return tokens, labels

    def to_model(self, tokens, labels):
        """Arrays -> ((tokens, positions), targets): the model predicts at flat `positions` only.

        With a mask_prob of 0 there is nothing to predict, and all tokens are the targets.
        """
        if self.mask_prob == 0:
            return (torch.from_numpy(tokens),), torch.from_numpy(tokens)
        positions = np.flatnonzero(labels != IGNORE)
        targets = torch.from_numpy(labels.reshape(-1)[positions])
        return (torch.from_numpy(tokens), torch.from_numpy(positions)), targets


class CausalText(Windows):
    """Sequences [CLS] + T-1 tokens whose labels are the T next tokens (paper, C.2)."""

    def __init__(self, text, seq_len):
        super().__init__(text, seq_len, window=seq_len)

    def sequences(self, text, starts, rng):
        labels = text[starts[:, None] + np.arange(self.window)].astype(np.int64)
        start = np.full((len(starts), 1), self.text.cls)
        return np.concatenate((start, labels[:, :-1]), axis=1), labels

    @staticmethod
    def to_model(tokens, labels):
        """Arrays -> ((tokens,), targets), both (B, T)."""
        return (torch.from_numpy(tokens),), torch.from_numpy(labels)
