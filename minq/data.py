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
BYTES = 256
PACKED = (b"\x93NUMPY", b"PK\x03\x04", b"\x1f\x8b\x08", b"\x28\xb5\x2f\xfd", b"BZh", b"\xfd7zXZ")
ENWIK8 = ("http://mattmahoney.net/dc/enwik8.zip",  # 100 MB of Wikipedia
          "547994d9980ebed1288380d652999f38a14fe291a6247c157c3d33d4932534bc")


# ---- corpora ----

class Text(NamedTuple):
    """A corpus: `tokens` (uint8 or uint16), whether they are bytes or else (if known) the words
    that they stand for, the size of its vocabulary with specials, and the specials' ids. Specials
    among the tokens are attended to, but never predicted nor scored."""
    tokens: np.ndarray
    is_bytes: bool
    words: list | None
    vocab_size: int
    pad: int
    cls: int
    sep: int
    mask: int
    sha256: str
    documents: str | None = None  # what the tokens hold delimiters around: files, lines, tokens

    def split(self, name):
        """The 'train' or 'validation' part, the last tenth; they never overlap."""
        boundary = int(len(self.tokens) * 0.9)
        return self.tokens[:boundary] if name == "train" else self.tokens[boundary:]


def load_text(source, vocab_size=None, special_ids=None, documents=None):
    """Open `--data`: a name in TEXTS, a file or folder of text (read as bytes), or a .bin.

    A .bin needs `vocab_size`; its special tokens are `special_ids` (pad, cls, sep, mask), or follow
    the vocabulary; a list of its words may lie beside it, as .json. With `documents` the tokens
    are [CLS] document [SEP] [CLS] document [SEP] ..., as the authors concatenate theirs: each file
    or each line that is not blank; "tokens" says that a .bin is such a stream already, "rows" that
    it holds rows of T tokens (lab.convert --rows). Raises UserError for anything that cannot be
    read.
    """
    path, is_bin = Path(source), str(source).endswith(".bin")
    if is_bin != (vocab_size is not None) or special_ids and not is_bin:
        raise UserError(f"--data {source}: --vocab-size is for .bin files of tokens, which need it")
    words = None
    try:
        if is_bin:
            tokens, words = read_tokens(path)
        else:
            files, vocab_size = TEXTS.get(source, lambda: (read_files(path), BYTES))()
            if not any(map(len, files)):
                raise ValueError("is empty; expected text")
            tokens = np.frombuffer(b"\n".join(files), dtype=np.uint8)
    except (OSError, ValueError) as error:
        raise UserError(f"--data {source}: {error}; built in: {', '.join(TEXTS)}") from None
    if (most := tokens.max()) >= vocab_size:
        raise UserError(f"--data {source}: holds token {most} as uint16; --vocab-size {vocab_size}")
    ids = special_ids or range(vocab_size, vocab_size + 4)
    is_bytes, sha256 = not is_bin and vocab_size == BYTES, hashlib.sha256(tokens).hexdigest()
    if documents and is_bytes == (documents in ("tokens", "rows")):
        raise UserError(f"--data {source}: --documents files or lines is for text, tokens for .bin")
    if documents in ("files", "lines"):
        parts = files if documents == "files" else tokens.tobytes().splitlines()
        _, cls, sep, _ = map(chr, ids)  # the stream is made of characters, for speed
        stream = "".join(cls + part.decode("latin-1") + sep for part in parts if part.strip())
        tokens = np.frombuffer(stream.encode("utf-16-le"), dtype="<u2")
    return Text(tokens, is_bytes, words, max(vocab_size, max(ids) + 1), *ids, sha256, documents)


def read_files(path):
    """The bytes of a file, or of each file below a folder in the order of their names."""
    below = sorted(p for p in path.rglob("*") if p.is_file() and not p.name.startswith("."))
    files = {file: file.read_bytes() for file in (below if path.is_dir() else [path])}
    for file, content in files.items():
        refuse_others(file.name, content)
    return [*files.values()]


def read_tokens(path):
    """A .bin file, memory-mapped: little-endian uint16, one per token (nanoGPT's convention). And
    the list of words beside it, or None."""
    tokens = np.memmap(path, dtype="<u2", mode="r")  # a ValueError where bytes are odd or none
    refuse_others(path.name, tokens[:2 ** 20].tobytes(), tokens[:2 ** 20])
    names = path.with_suffix(".json")
    words = json.loads(names.read_text("utf-8")) if names.exists() else None
    if not isinstance(words or [], list):
        raise ValueError(f"{names.name} holds no list of words")
    return tokens, words


def refuse_others(name, content, tokens=None):
    """A ValueError if a file does not look like text or, with `tokens`, not like tokens.

    Tokens of a text are no random numbers: small ones are common, wherever they stand in a group of
    four. Of integers of 4 or 8 bytes some place holds zeros; of floats from 1 on (in half precision
    this is 0x3c00, as bf16, fp32 and fp64 it begins with more) some place holds large ones.
    """
    kinds = {"a NumPy array, or a compressed file": content.startswith(PACKED)}
    if tokens is None:
        kinds["numbers (it holds bytes of 0)"] = b"\0" in content
    elif len(tokens) >= 64:  # of fewer nothing can be said
        of_four = tokens[:len(tokens) // 4 * 4].reshape(-1, 4)
        is_small = ((of_four > 0) & (of_four < 0x3c00)).any(axis=0)
        others = tokens.any() and not (is_small.all() and (tokens % 256).any())
        kinds |= {"floats, integers of 4 or 8 bytes, or big-endian ones": others,
                  "text": min(content) > 8}
    if found := [kind for kind, is_it in kinds.items() if is_it]:
        raise ValueError(f"{name} looks like {found[0]}; expected text, in UTF-8 or alike, or a "
                         ".bin of little-endian uint16 tokens")


def stdlib_files():
    """The source of the Python standard library, tests left out, in the order of file names."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    paths = sorted(root.rglob("*.py"), key=Path.as_posix)
    return [path.read_bytes().replace(b"\r\n", b"\n") for path in paths
            if not skipped & set(path.relative_to(root).parts)
            and not path.name.startswith("_sysconfigdata")]


def downloaded(name, url, sha256):
    """The path of the file or folder `name` in an archive, kept in ~/.cache/minq (or
    XDG_CACHE_HOME/minq); the first call downloads it, checks it and unpacks it."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "minq")
    try:
        if not (cache / name).exists():
            cache.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=cache) as scratch:  # complete, or not there at all
                file = Path(scratch, url.rpartition("/")[2])
                torch.hub.download_url_to_file(url, str(file), hash_prefix=sha256)
                shutil.unpack_archive(file, scratch, **{"filter": "data"} if ".tar" in url else {})
                os.replace(Path(scratch, name), cache / name)
    except (OSError, RuntimeError, shutil.ReadError) as error:
        raise UserError(f"{url}: no download: {error}; or put {name} into {cache}") from None
    return cache / name


# A name for --data -> (the bytes of files, the size of their vocabulary). To add one, name it here
# (or as lab/backcopy.py).
TEXTS["stdlib"] = lambda: (stdlib_files(), BYTES)
TEXTS["enwik8"] = lambda: (read_files(downloaded("enwik8", *ENWIK8)), BYTES)


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

    length: of a window, with the specials `ends` that stand before and after its tokens. A text of
    documents has specials of its own, and its windows are tokens as they come; of rows each window
    is one. A subclass turns tokens (size, length), and which of them are special, into (tokens,
    labels) with `sequences`.
    """

    def __init__(self, text, seq_len, length, ends):
        self.text, self.seq_len, self.sha256 = text, seq_len, text.sha256
        self.ends = [] if text.documents else ends
        self.window = length - len(self.ends)
        self.stride = self.window if text.documents == "rows" else 1  # between starts in training
        self.specials = [text.pad, text.cls, text.sep, text.mask]
        self.sizes = {"seq_len": seq_len, "vocab_size": text.vocab_size}  # what a model must take
        if self.window < 1:
            raise UserError(f"--seq-len {seq_len}: expected at least 3, for [CLS] and [SEP]")
        self.train, self.validation = text.split("train"), text.split("validation")
        for part in (self.train, self.validation):
            if (n := len(part)) < self.window:
                raise UserError(f"--seq-len {seq_len}: a part of --data has only {n} tokens")
            blocks = (part[i:i + 2 ** 20] for i in range(0, n, 2 ** 20))  # most stop at the first
            if all(np.isin(block, self.specials).all() for block in blocks):
                raise UserError("--data: a part of it holds special tokens only, none to predict")

    def gathered(self, text, starts, rng):
        tokens = text[starts[:, None] + np.arange(self.window)].astype(np.int64)
        tokens = np.insert(tokens, [0, self.window][:len(self.ends)], self.ends, axis=1)
        return self.sequences(tokens, np.isin(tokens, self.specials), rng)

    def train_batch(self, seed, step, size):
        """(tokens, labels), int64 (size, T), always the same for the same (seed, step)."""
        rng = np.random.default_rng((seed, step))
        starts = rng.integers((len(self.train) - self.window) // self.stride + 1, size=size)
        return self.gathered(self.train, starts * self.stride, rng)

    def validation_batches(self, size, batches, rank=0, world=1):
        """Up to `batches` pairs (tokens, labels), always the same, that do not overlap."""
        part = self.validation
        for i, chosen in spread(len(part) // self.window, size, batches, rank, world):
            yield self.gathered(part, chosen * self.window, np.random.default_rng((0, i)))


class MaskedText(Windows):
    """Sequences [CLS] + T-2 tokens + [SEP] with masked tokens to predict (Devlin et al.; C.1)."""

    def __init__(self, text, seq_len, mask_prob=0.15):
        super().__init__(text, seq_len, length=seq_len, ends=[text.cls, text.sep])
        self.mask_prob = mask_prob
        self.ordinary = np.setdiff1d(np.arange(text.vocab_size), self.specials)

    def sequences(self, tokens, special, rng):
        """Choose 15% of the tokens as labels; of these 80% become [MASK], 10% a random token."""
        chosen = (rng.random(tokens.shape) < self.mask_prob) & ~special
        if self.mask_prob > 0 and not (chosen | special.all()).any():  # a mean needs one, if it can
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
    """Sequences [CLS] + T-1 tokens whose labels are the T next tokens (paper, C.2). OPT has no
    [SEP]: in a text of documents [CLS] stands where each begins."""

    def __init__(self, text, seq_len):
        if text.documents in ("files", "lines"):
            text = text._replace(tokens=text.tokens[text.tokens != text.sep])
        super().__init__(text, seq_len, length=seq_len + 1, ends=[text.cls])

    def sequences(self, tokens, special, rng):
        return tokens[:, :-1], np.where(special, IGNORE, tokens)[:, 1:]

    @staticmethod
    def to_model(tokens, labels):
        """Arrays -> ((tokens,), targets), both (B, T)."""
        return (torch.from_numpy(tokens),), torch.from_numpy(labels)
