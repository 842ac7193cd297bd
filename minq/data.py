"""Text as numbers, without a tokenizer: bytes, or integers that someone else tokenized.

Batch `step` of a run is a pure function of (seed, step): an interrupted run, or one split over
processes or micro-batches, sees the same data.
"""
import hashlib
import json
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from minq.download import ENWIK8, unpacked
from minq.errors import UserError
from minq.images import Images, load_images, mapped_files, share

IGNORE = -100            # a label that is not predicted (cross_entropy's default)
VALIDATION_SHARE = 0.1   # the last tenth of a text
SPECIALS = ("pad", "cls", "sep", "mask")
BYTES = 256
BACKCOPY_SYMBOLS = 64


# ---- corpora ----

@dataclass
class Text:
    """A corpus: `tokens` (uint8 or uint16), whether they are bytes or else (if known) the words that they
    stand for, the size of its vocabulary with specials, and the specials' ids."""
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
    """Open `--data`: a name in TEXTS, a file or folder of text (read as bytes), or a .bin of uint16 tokens.

    A .bin needs `vocab_size`; its special tokens are `special_ids` (pad, cls, sep, mask), or
    follow the vocabulary; a list of its words may lie beside it, as .json. Raises UserError for anything that cannot be read.
    """
    is_bin = str(source).endswith(".bin")
    if is_bin != (vocab_size is not None):
        raise UserError(f"--data {source} needs --vocab-size, the number of its tokens" if is_bin else
                        f"--vocab-size {vocab_size} is for .bin files of tokens; --data {source} is read as bytes")
    if special_ids and not is_bin:
        raise UserError(f"--special-ids {special_ids} is for .bin files of tokens; --data {source} is read as bytes")
    if is_bin:
        tokens = read_tokens(Path(source), vocab_size)
    elif source in TEXTS:
        tokens, vocab_size = TEXTS[source]()
    else:
        tokens, vocab_size = as_bytes(read_bytes(Path(source))), BYTES
    if tokens.size and tokens.max() >= vocab_size:
        raise UserError(f"--data {source}: holds token {tokens.max()}; its vocabulary has {vocab_size}")
    ids = special_ids or range(vocab_size, vocab_size + len(SPECIALS))
    is_bytes = not is_bin and vocab_size == BYTES
    words = read_words(Path(source)) if is_bin else None
    return Text(tokens, is_bytes, words, max(vocab_size, max(ids) + 1), *ids, sha256=hashlib.sha256(tokens).hexdigest())


def as_bytes(text):
    return np.frombuffer(text, dtype=np.uint8)


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


def bigram_backcopy(chains=16_384, length=256, triggers=3, seed=0):
    """The Bigram-Backcopy task (Guo et al., "Active-Dormant Attention Heads"), uint8 (chains * length,).

    Symbols are the most frequent bytes of the standard library, 0 the most frequent, and follow its
    bigrams; but after one of the first `triggers` symbols comes a copy of the symbol before it. A
    head that copies is needed after a trigger and must do nothing everywhere else.
    """
    source = as_bytes(stdlib_source())
    by_frequency = np.argsort(-np.bincount(source, minlength=256), kind="stable")
    symbol = np.empty(256, dtype=np.uint8)
    symbol[by_frequency] = np.arange(256)
    symbols = symbol[source]
    symbols = symbols[symbols < BACKCOPY_SYMBOLS].astype(np.int64)
    pairs = np.bincount(symbols[:-1] * BACKCOPY_SYMBOLS + symbols[1:], minlength=BACKCOPY_SYMBOLS ** 2)
    pairs = pairs.reshape(BACKCOPY_SYMBOLS, BACKCOPY_SYMBOLS)
    cumulative = pairs.cumsum(axis=1) / pairs.sum(axis=1, keepdims=True)

    rng = np.random.default_rng(seed)
    chain = np.empty((length, chains), dtype=np.uint8)
    chain[0] = rng.integers(BACKCOPY_SYMBOLS, size=chains)
    for t in range(1, length):  # all chains take a step at once
        chain[t] = (cumulative[chain[t - 1]] < rng.random((chains, 1))).sum(axis=1)
        if t > 1:
            chain[t] = np.where(chain[t - 1] < triggers, chain[t - 2], chain[t])
    return chain.T.reshape(-1)


# A name for --data -> (tokens uint8, size of their vocabulary). To add one, write its function and name it here.
TEXTS = {
    "stdlib": lambda: (as_bytes(stdlib_source()), BYTES),
    "backcopy": lambda: (bigram_backcopy(), BACKCOPY_SYMBOLS),
    "enwik8": lambda: (np.memmap(unpacked(ENWIK8, "--data enwik8"), dtype=np.uint8, mode="r"), BYTES),
}


def read_bytes(path, flag="--data"):
    """All bytes of a file, or of the files below a folder in the order of their names. `flag` named it."""
    if not path.exists():
        raise UserError(f"{flag} {path}: no such file or folder; built in: {', '.join(TEXTS)}")
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file() and not p.name.startswith("."))
    try:
        text = b"\n".join(file.read_bytes() for file in files)
    except OSError as error:
        raise UserError(f"{flag} {path}: cannot be read: {error.strerror}: {error.filename}") from None
    if not text:
        raise UserError(f"{flag} {path}: is empty; expected text")
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


def read_words(path):
    """What each token id of a .bin stands for: a list of strings in the .json beside it, or None without one."""
    path = path.with_suffix(".json")
    try:
        words = json.loads(path.read_text()) if path.exists() else None
    except (OSError, ValueError, RecursionError):
        words = []
    if words is not None and not (words and isinstance(words, list) and all(isinstance(word, str) for word in words)):
        raise UserError(f"{path}: expected a list of words, one a token id, in JSON")
    return words


# ---- batches ----

class Windows:
    """Windows of a text: at random places for training, evenly spread and apart for validation.

    A subclass sets `window`, their length, and turns them into (tokens, labels) with `sequences`.
    """
    unit = "tokens"

    def __init__(self, text, seq_len, window):
        if window < 1:
            raise UserError(f"--seq-len {seq_len} leaves no room beside the special tokens; expected at least 3")
        for name in ("train", "validation"):
            if len(text.split(name)) < window:
                raise UserError(f"--data: its {name} part has {len(text.split(name))} tokens, "
                                f"fewer than one sequence of --seq-len {seq_len}")
        self.text, self.seq_len, self.window, self.sha256 = text, seq_len, window, text.sha256
        self.files = mapped_files(text.tokens)
        self.sizes = {"seq_len": seq_len, "vocab_size": text.vocab_size}  # as the model's config must have them

    def train_batch(self, seed, step, size):
        """(tokens, labels), int64 (size, T), always the same for the same (seed, step)."""
        rng = np.random.default_rng((seed, step))
        tokens = self.text.split("train")
        return self.sequences(tokens, rng.integers(len(tokens) - self.window + 1, size=size), rng)

    def validation_batches(self, size, batches, rank=0, world=1):
        """Up to `batches` pairs (tokens, labels), always the same, that do not overlap."""
        tokens = self.text.split("validation")
        available = len(tokens) // self.window
        chosen = np.linspace(0, available - 1, min(available, size * batches)).astype(int)
        for i in share(range(0, len(chosen), size), rank, world):
            yield self.sequences(tokens, chosen[i:i + size] * self.window, np.random.default_rng((0, i)))

    def sequences(self, tokens, starts, rng):
        """Sequences of the text from `starts` on, (tokens, labels)."""
        raise NotImplementedError


class MaskedText(Windows):
    """Sequences [CLS] + T-2 tokens + [SEP] with masked tokens to predict (Devlin et al.; paper, C.1)."""

    def __init__(self, text, seq_len, mask_prob=0.15):
        super().__init__(text, seq_len, window=seq_len - 2)
        self.mask_prob = mask_prob
        self.specials = (text.pad, text.cls, text.sep, text.mask)
        self.ordinary = np.setdiff1d(np.arange(text.vocab_size), self.specials)

    def sequences(self, text, starts, rng):
        """Choose 15% of the tokens as labels; of these 80% become [MASK], 10% a random token, 10% stay."""
        tokens = np.empty((len(starts), self.seq_len), dtype=np.int64)
        tokens[:, 0], tokens[:, -1] = self.text.cls, self.text.sep
        tokens[:, 1:-1] = text[starts[:, None] + np.arange(self.window)]
        special = np.isin(tokens, self.specials)

        chosen = (rng.random(tokens.shape) < self.mask_prob) & ~special
        if self.mask_prob > 0 and not chosen.any():  # a tiny batch: its loss is a mean over at least one
            chosen.flat[rng.choice(np.flatnonzero(~special), size=1)] = True
        labels = np.where(chosen, tokens, IGNORE)
        fate = rng.random(tokens.shape)
        tokens[chosen & (fate < 0.8)] = self.text.mask
        replaced = chosen & (fate >= 0.9)
        tokens[replaced] = rng.choice(self.ordinary, size=replaced.sum())
        return tokens, labels

    def to_model(self, tokens, labels):
        """Arrays -> ((tokens, positions), targets): the model predicts at flat `positions` only.

        With a mask_prob of 0 there is nothing to predict, and all tokens are the targets: for an encoder.
        """
        if self.mask_prob == 0:
            return (torch.from_numpy(tokens),), torch.from_numpy(tokens)
        positions = np.flatnonzero(labels != IGNORE)
        return (torch.from_numpy(tokens), torch.from_numpy(positions)), torch.from_numpy(labels.reshape(-1)[positions])


class CausalText(Windows):
    """Sequences [CLS] + T-1 tokens whose labels are the T next tokens (paper, C.2)."""

    def __init__(self, text, seq_len):
        super().__init__(text, seq_len, window=seq_len)

    def sequences(self, text, starts, rng):
        labels = text[starts[:, None] + np.arange(self.window)].astype(np.int64)
        tokens = np.concatenate((np.full((len(starts), 1), self.text.cls), labels[:, :-1]), axis=1)
        return tokens, labels

    @staticmethod
    def to_model(tokens, labels):
        """Arrays -> ((tokens,), targets), both (B, T)."""
        return (torch.from_numpy(tokens),), torch.from_numpy(labels)


# ---- a run's data ----

def open_data(args):
    """The data of a run, from its arguments (a dict): images, masked text or causal text, as they tell.

    An object with `sha256`, `unit`, `files`, train_batch(seed, step, size) and validation_batches(size, batches,
    rank, world), which give arrays, and to_model(*arrays) -> (inputs, targets).
    """
    if "image_size" in args:
        return Images(load_images(args["data"]), args["image_size"])
    text = load_text(args["data"], args["vocab_size"], args["special_ids"])
    if "mask_prob" in args:
        return MaskedText(text, args["seq_len"], args["mask_prob"])
    return CausalText(text, args["seq_len"])


def stamps(files):
    """{file: (size, time of its last change)}, None for one that is gone."""
    return {file: (file.stat().st_size, file.stat().st_mtime_ns) if file.exists() else None for file in map(Path, files)}


def require_unchanged(then):
    """Raise UserError if a file that training reads from is no longer what it was when `then` was taken of it."""
    for file, now in stamps(then).items():
        if now != then[file]:
            raise UserError(f"--data {file}: was changed while this run reads it; put the old file back and --resume, "
                            "or begin another run")
