"""Text: what a batch holds, that it is a function of (seed, step), and files that are refused."""
import bz2
import contextlib
import gzip
import io
import lzma
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn as nn

from lab.backcopy import SYMBOLS, bigram_backcopy
from minq.data import BYTES, IGNORE, TEXTS, CausalText, MaskedText, load_text
from minq.flags import UserError
from minq.runs import Run


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    np.random.default_rng(0).integers(32, 127, 20_000).astype(np.uint8).tofile(path)
    return load_text(path)


def as_text(tokens):
    return tokens.astype(np.uint8).tobytes()


# ---- corpora ----

def test_a_text_is_its_bytes_four_specials_and_two_parts_that_never_overlap(text):
    assert text.tokens.dtype == np.uint8 and text.is_bytes and text.vocab_size == 260
    assert (text.pad, text.cls, text.sep, text.mask) == (256, 257, 258, 259)
    train, validation = text.split("train"), text.split("validation")
    assert len(validation) == 2000
    assert np.array_equal(np.concatenate((train, validation)), text.tokens)


def test_the_built_in_text_is_python_without_tests():
    source = load_text("stdlib").tokens.tobytes()
    assert len(source) > 5_000_000 and b"def urlopen(" in source and b"class Regrtest" not in source
    assert load_text("stdlib").tokens.tobytes() == source


@pytest.mark.slow
def test_backcopy_follows_bigrams_and_copies_after_triggers():
    chains, again = (bigram_backcopy(2000, length=50).reshape(2000, 50) for _ in range(2))
    after_trigger, copied = chains[:, 1:-1] < 3, chains[:, 2:] == chains[:, :-2]
    assert copied[after_trigger].all() and copied[~after_trigger].mean() < 0.3  # by chance
    assert chains.max() < SYMBOLS and 0.1 < after_trigger.mean() < 0.9
    assert np.array_equal(again, chains)


@pytest.mark.parametrize("special_ids, expected", [
    (None, (1004, 1000, 1001, 1002, 1003)), ([0, 1, 2, 3], (1000, 0, 1, 2, 3)),
    ([5, 2000, 7, 8], (2001, 5, 2000, 7, 8))])
def test_a_bin_has_specials_behind_its_vocabulary_or_elsewhere(tmp_path, special_ids, expected):
    np.arange(1000, dtype="<u2").tofile(tmp_path / "tokens.bin")
    text = load_text(tmp_path / "tokens.bin", 1000, special_ids)
    assert np.array_equal(text.tokens, np.arange(1000)) and not text.is_bytes and not text.words
    assert (text.vocab_size, text.pad, text.cls, text.sep, text.mask) == expected
    (tmp_path / "tokens.json").write_text('["a", "b"]')
    assert load_text(tmp_path / "tokens.bin", 1000, special_ids).words == ["a", "b"]


@pytest.mark.parametrize("offset, size, expected", [
    (0, BYTES, (True, 260, 256, 259)), (ord("("), 2, (False, 6, 2, 5))])
def test_a_text_with_a_name_is_one_entry(offset, size, expected, monkeypatch):
    tokens = np.frombuffer(b"()" * 500, dtype=np.uint8) - np.uint8(offset)
    monkeypatch.setitem(TEXTS, "parens", lambda: ([tokens], size))
    text = load_text("parens")
    assert (text.is_bytes, text.vocab_size, text.pad, text.mask) == expected


TOKENS = np.array([1, 2, 70], dtype="<u2").tobytes()


@pytest.mark.parametrize("name, content, options, message", [
    ("missing.txt", None, {}, "No such file"), ("empty.txt", b"", {}, "is empty"),
    ("", None, {}, "is empty"), ("t.bin", TOKENS, {}, "--vocab-size"),
    ("t.bin", TOKENS, {"vocab_size": 70}, "holds token 70"),
    ("odd.bin", b"123", {"vocab_size": 9}, "not a multiple"),
    ("missing.bin", None, {"vocab_size": 9}, "No such file"),
    ("a.txt", b"123", {"vocab_size": 9}, "--vocab-size is for .bin files"),
    ("a.txt", b"123", {"documents": "tokens"}, "--documents files or lines is for text"),
    ("t.bin", TOKENS, {"vocab_size": 71, "documents": "lines"}, "tokens for .bin"),
    ("a.txt", b"123", {"special_ids": [0, 1, 2, 3]}, "is for .bin files")])
def test_bad_data_is_named(tmp_path, name, content, options, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=f"--data {tmp_path / name}: .*{message}"):
        load_text(tmp_path / name, **options)


@pytest.mark.parametrize("seq_len, message", [
    (64, "--seq-len 64: .* 10 tokens"), (2, "--seq-len 2: expected at least 3")])
def test_a_text_shorter_than_a_sequence_is_refused(tmp_path, seq_len, message):
    (tmp_path / "short.txt").write_bytes(b"x" * 100)
    with pytest.raises(UserError, match=message):
        MaskedText(load_text(tmp_path / "short.txt"), seq_len)


RANKS = np.random.default_rng(0).zipf(1.3, 9000) % 50_000  # tokens as those of a text
PROSE = b"It was a bright cold day in April, and the clocks were striking thirteen. " * 9
np.save(NPY := io.BytesIO(), RANKS.astype("<u2"))


@pytest.mark.parametrize("name, content, kind", [
    *[("t.bin", RANKS.astype(dtype).tobytes(), "floats, integers of 4") for dtype in (
        "<u4", ">u4", "<i8", ">i8", "<f4", "<f8", "<f2")],
    ("t.bin", (RANKS % 128).astype(">u2").tobytes(), "or big-endian ones"),
    ("t.bin", PROSE, "text"), ("t.bin", NPY.getvalue(), "NumPy"), ("t", NPY.getvalue(), "NumPy"),
    ("t.txt", bz2.compress(b"!"), "a compressed file"), ("t.txt", lzma.compress(PROSE), "compress"),
    ("t.txt", gzip.compress(PROSE), "a compressed"), ("t.txt", b"PK\3\4" + PROSE, "a compressed"),
    ("t.txt", PROSE.decode().encode("utf-16-le"), "numbers"), ("t.txt", TOKENS * 99, "numbers"),
    ("t.bin", RANKS.astype("<u2").tobytes(), None), ("t.bin", TOKENS, None),
    ("t.bin", bytes(9000), None), ("t.bin", np.full(900, 70, "<u2").tobytes(), None),
    ("t.txt", "Straße".encode("latin-1"), None)])
def test_a_file_that_is_not_what_its_name_says(tmp_path, name, content, kind):
    path, options = tmp_path / name, {"vocab_size": 50_000} if name == "t.bin" else {}
    path.write_bytes(content)
    refused = pytest.raises(UserError, match=f"--data {path}: .*looks like .*{kind}.*expected")
    with refused if kind else contextlib.nullcontext():
        load_text(path, **options)


# ---- documents and special tokens ----

@pytest.mark.parametrize("documents", ["files", "lines", "tokens"])
def test_documents_are_delimited_inside_the_windows(tmp_path, documents):
    files = [b"one\ntwo, and more\n\n", b"  ", b"three\r\nfour"] * 50
    parts = ([files[0], files[2]] if documents == "files" else
             [b"one", b"two, and more", b"three", b"four"]) * 50
    stream = [i for part in parts for i in (257, *part, 258)]
    np.array(stream, "<u2").tofile(tmp_path / "t.bin")
    os.mkdir(tmp_path / "folder")
    for name, content in [(".hidden", b"no"), *zip(range(999, 849, -1), reversed(files))]:
        (tmp_path / "folder" / f"{name}").write_bytes(content)
    whole = load_text(tmp_path / "folder").tokens  # in the order of their names
    assert whole.tobytes() == b"\n".join(files)
    text = (load_text(tmp_path / "t.bin", 260, [256, 257, 258, 259], documents)
            if documents == "tokens" else load_text(tmp_path / "folder", documents=documents))
    assert text.tokens.tolist() == stream

    tokens, labels = MaskedText(text, 9).train_batch(0, 0, 300)
    windows = {tuple(stream[i:i + 9]) for i in range(len(stream))}
    assert set(map(tuple, np.where(labels != IGNORE, labels, tokens))) <= windows
    assert labels.max() < 256 and (tokens[:, 1:-1] == 258).any() and (tokens[:, 0] < 256).any()

    if documents != "tokens":  # OPT has its start token where a document begins
        stream = [i for i in stream if i != 258]
    named = [IGNORE if i > 255 else i for i in stream]
    windows = {(*stream[i:i + 9], *named[i + 1:i + 10]) for i in range(len(stream))}
    batch = CausalText(text, 9).train_batch(0, 0, 300)
    assert set(map(tuple, np.concatenate(batch, axis=1))) <= windows and (batch[1] == IGNORE).any()


@pytest.mark.parametrize("kind", [MaskedText, CausalText])
def test_special_tokens_are_never_predicted(tmp_path, kind):
    np.array([5, 1, 6, 0, 0, 0, 7, 2] * 200, "<u2").tofile(tmp_path / "t.bin")
    data = kind(load_text(tmp_path / "t.bin", 1000, [0, 1, 2, 3]), 16)
    batches = [data.train_batch(0, 0, 99), *data.validation_batches(8, 9)]
    assert {*np.concatenate([labels.ravel() for _, labels in batches])} == {IGNORE, 5, 6, 7}
    assert all((tokens == 0).any() for tokens, _ in batches)  # attention sees them
    np.zeros(1000, "<u2").tofile(tmp_path / "t.bin")
    with pytest.raises(UserError, match="holds special tokens only"):
        kind(load_text(tmp_path / "t.bin", 1000, [0, 1, 2, 3]), 16)


# ---- batches ----

def test_a_batch_is_a_function_of_seed_and_step_out_of_the_training_text(text):
    data, train = MaskedText(text, 16), as_text(text.split("train"))
    tokens, labels = data.train_batch(3, 7, 64)
    same = [np.array_equal(MaskedText(text, 16).train_batch(*key, 64), (tokens, labels))
            for key in ((3, 7), (3, 8), (4, 7))]
    assert same == [True, False, False] and tokens.shape == labels.shape == (64, 16)
    assert (tokens[:, 0] == text.cls).all() and (tokens[:, -1] == text.sep).all()
    assert all(as_text(row[1:-1]) in train for row in np.where(labels != IGNORE, labels, tokens))
    (given, positions), targets = data.to_model(tokens, labels)  # the masked positions only
    assert torch.equal(given, torch.from_numpy(tokens)) and (targets != IGNORE).all()
    assert torch.equal(torch.from_numpy(labels).flatten()[positions], targets)
    assert len(positions) == (labels != IGNORE).sum()

    tokens, labels = CausalText(text, 16).train_batch(0, 0, 8)
    assert tokens.shape == labels.shape == (8, 16) and (tokens[:, 0] == text.cls).all()
    assert np.array_equal(tokens[:, 1:], labels[:, :-1])  # labels are the next tokens
    assert all(as_text(row) in train for row in labels)
    (given,), targets = CausalText.to_model(tokens, labels)
    assert np.array_equal(given, tokens) and np.array_equal(targets, labels)


def test_masking_is_15_percent_80_10_10_and_never_on_specials(text):
    tokens, labels = MaskedText(text, 66).train_batch(0, 0, 4000)
    chosen = labels != IGNORE
    assert chosen[:, 1:-1].mean() == pytest.approx(0.15, abs=0.003) and not chosen[:, [0, -1]].any()
    masked, kept = tokens[chosen] == text.mask, tokens[chosen] == labels[chosen]
    assert masked.mean() == pytest.approx(0.8, abs=0.01)
    assert kept.mean() == pytest.approx(0.1 + 0.1 / 256, abs=0.01)
    replaced = tokens[chosen][~masked & ~kept]  # any ordinary token, never a special
    assert replaced.max() < 256 and len(np.unique(replaced)) == 256

    tiny = MaskedText(text, 6)
    assert all((tiny.train_batch(0, step, 1)[1] != IGNORE).any() for step in range(99))


def test_validation_is_always_the_same_and_does_not_overlap(text):
    found = lambda *split: list(MaskedText(text, 16).validation_batches(8, *split))
    first, validation = found(4), as_text(text.split("validation"))
    assert len(first) == 4 and np.array_equal(first, found(4))
    windows = [np.where(labels != IGNORE, labels, tokens)[:, 1:-1] for tokens, labels in first]
    starts = [validation.find(as_text(row)) for row in np.concatenate(windows)]
    assert min(starts) >= 0 and (np.diff(sorted(starts)) >= 14).all()
    assert sum(len(tokens) for tokens, _ in found(1000)) == 2000 // 14


@pytest.mark.parametrize("accumulate, world", [(1, 1), (4, 1), (1, 4), (2, 2)])
def test_ranks_and_micro_batches_slice_the_global_batch(text, accumulate, world):
    batch, parts, synced = MaskedText(text, 16).train_batch(0, 0, 16), [], []
    for rank in range(world):
        run = SimpleNamespace(args=SimpleNamespace(accumulate=accumulate), rank=rank, world=world,
                              trained=nn.Identity())
        for part in Run.micro_batches(run, *batch):
            parts.append(np.concatenate(part, axis=1))
            synced.append(run.trained.require_backward_grad_sync)
    assert synced == ([False] * (accumulate - 1) + [True]) * world
    expected = np.concatenate(batch, axis=1)
    assert sorted(map(tuple, np.concatenate(parts))) == sorted(map(tuple, expected))
