"""Text as numbers, without a tokenizer: bytes, or integers that someone else tokenized.

Batch `step` of a run is a pure function of (seed, step): an interrupted run, or one split over
processes or micro-batches, sees the same data.
"""
import hashlib
import os
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from minq.errors import UserError

IGNORE = -100            # a label that is not predicted (cross_entropy's default)
VALIDATION_SHARE = 0.1   # the last tenth of a text
SPECIALS = ("pad", "cls", "sep", "mask")


# ---- corpora ----

@dataclass
class Text:
    """A corpus: `tokens` (uint8 or uint16), the size of its vocabulary with specials, and their ids."""
    tokens: np.ndarray
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
    """Open `--data`: "stdlib", a file or folder of text (read as bytes), or a .bin file of uint16 tokens.

    A .bin needs `vocab_size`; its special tokens are `special_ids` (pad, cls, sep, mask), or
    follow the vocabulary. Raises UserError for anything that cannot be read.
    """
    is_bin = str(source).endswith(".bin")
    if is_bin != (vocab_size is not None):
        raise UserError(f"--data {source} needs --vocab-size, the number of its tokens" if is_bin else
                        f"--vocab-size {vocab_size} is for .bin files of tokens; --data {source} is read as bytes")
    if special_ids and not is_bin:
        raise UserError(f"--special-ids {special_ids} is for .bin files of tokens; --data {source} is read as bytes")
    if is_bin:
        tokens = read_tokens(Path(source), vocab_size)
    else:
        vocab_size = 256
        tokens = np.frombuffer(stdlib_source() if source == "stdlib" else read_bytes(Path(source)), dtype=np.uint8)
    ids = special_ids or range(vocab_size, vocab_size + len(SPECIALS))
    return Text(tokens, max(vocab_size, max(ids) + 1), *ids, sha256=hashlib.sha256(tokens).hexdigest())


def stdlib_source():
    """The source of the Python standard library, tests left out, in the order of the file names."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    paths = [path for path in root.rglob("*.py") if not skipped & set(path.relative_to(root).parts)
             and not path.name.startswith("_sysconfigdata")]
    paths.sort(key=lambda path: path.relative_to(root).as_posix())
    if not paths:
        raise UserError(f"--data stdlib: no Python source in {root}; give --data a text file")
    return b"\n".join(path.read_bytes().replace(b"\r\n", b"\n") for path in paths)


def read_bytes(path):
    """All bytes of a file, or of the files below a folder in the order of their names."""
    if not path.exists():
        raise UserError(f"--data {path}: no such file or folder; 'stdlib' is built in")
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file() and not p.name.startswith("."))
    try:
        text = b"\n".join(file.read_bytes() for file in files)
    except OSError as error:
        raise UserError(f"--data {path}: cannot be read: {error.strerror}: {error.filename}") from None
    if not text:
        raise UserError(f"--data {path}: is empty; expected text")
    return text


def read_tokens(path, vocab_size):
    """A .bin file, memory-mapped: little-endian uint16, one a token (nanoGPT's convention)."""
    if not path.is_file():
        raise UserError(f"--data {path}: no such file")
    size = path.stat().st_size
    if size == 0 or size % 2:
        raise UserError(f"--data {path}: has {size} bytes; expected uint16 tokens, two bytes each")
    try:
        tokens = np.memmap(path, dtype="<u2", mode="r")
    except OSError as error:
        raise UserError(f"--data {path}: cannot be read: {error.strerror}") from None
    if tokens.max() >= vocab_size:
        raise UserError(f"--data {path}: holds token {tokens.max()}, but --vocab-size is {vocab_size}")
    return tokens


# ---- batches ----

class MaskedText:
    """Sequences [CLS] + T-2 tokens + [SEP] with masked tokens to predict (Devlin et al.; paper, C.1)."""

    def __init__(self, text, seq_len, mask_prob=0.15):
        self.text, self.seq_len, self.mask_prob, self.sha256 = text, seq_len, mask_prob, text.sha256
        self.window = seq_len - 2
        if self.window < 1:
            raise UserError(f"--seq-len {seq_len} leaves no room between [CLS] and [SEP]; expected at least 3")
        self.specials = (text.pad, text.cls, text.sep, text.mask)
        self.ordinary = np.setdiff1d(np.arange(text.vocab_size), self.specials)
        for name in ("train", "validation"):
            if len(text.split(name)) < self.window:
                raise UserError(f"--data: its {name} part has {len(text.split(name))} tokens, "
                                f"fewer than one sequence of --seq-len {seq_len}")

    def train_batch(self, seed, step, size):
        """(tokens, labels), both (size, T): windows at random places, the same for the same (seed, step)."""
        rng = np.random.default_rng((seed, step))
        tokens = self.text.split("train")
        return self.masked(tokens, rng.integers(len(tokens) - self.window + 1, size=size), rng)

    def validation_batches(self, size, batches):
        """Up to `batches` pairs (tokens, labels): evenly spread windows that do not overlap, masked always alike."""
        tokens = self.text.split("validation")
        available = len(tokens) // self.window
        chosen = np.linspace(0, available - 1, min(available, size * batches)).astype(int)
        for i in range(0, len(chosen), size):
            yield self.masked(tokens, chosen[i:i + size] * self.window, np.random.default_rng((0, i)))

    def masked(self, tokens, starts, rng):
        """Choose 15% of the tokens as labels; of these 80% become [MASK], 10% a random token, 10% stay."""
        sequences = np.empty((len(starts), self.seq_len), dtype=np.int64)
        sequences[:, 0], sequences[:, -1] = self.text.cls, self.text.sep
        sequences[:, 1:-1] = tokens[starts[:, None] + np.arange(self.window)]
        special = np.isin(sequences, self.specials)

        chosen = (rng.random(sequences.shape) < self.mask_prob) & ~special
        labels = np.where(chosen, sequences, IGNORE)
        fate = rng.random(sequences.shape)
        sequences[chosen & (fate < 0.8)] = self.text.mask
        replaced = chosen & (fate >= 0.9)
        sequences[replaced] = rng.choice(self.ordinary, size=replaced.sum())
        return sequences, labels

    @staticmethod
    def to_model(tokens, labels):
        """Arrays -> ((tokens, positions), targets): the model predicts at flat `positions` only."""
        positions = np.flatnonzero(labels != IGNORE)
        return (torch.from_numpy(tokens), torch.from_numpy(positions)), torch.from_numpy(labels.reshape(-1)[positions])


def open_data(family, args):
    """The data of a run, from its arguments (a dict): an object with train_batch, validation_batches and to_model."""
    text = load_text(args["data"], args["vocab_size"], args["special_ids"])
    return {"bert": lambda: MaskedText(text, args["seq_len"], args["mask_prob"])}[family]()
