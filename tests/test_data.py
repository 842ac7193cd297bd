"""The byte loader: what a batch holds, that it is a pure function of (seed, step), and bad files."""
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn as nn

from minq.data import (BACKCOPY_SYMBOLS, BYTES, IGNORE, TEXTS, CausalText, MaskedText, bigram_backcopy, load_text,
                       open_data)
from minq.errors import UserError
from minq.images import Images
from minq.runs import Run


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(bytes(np.random.default_rng(0).integers(32, 127, 20_000).astype(np.uint8)))
    return load_text(path)


def test_bytes_and_four_specials(text):
    assert text.tokens.dtype == np.uint8 and text.vocab_size == 260
    assert (text.pad, text.cls, text.sep, text.mask) == (256, 257, 258, 259)


def test_the_built_in_text_is_python_without_tests():
    text = load_text("stdlib")
    source = text.tokens.tobytes()
    assert len(source) > 5_000_000 and b"def urlopen(" in source and b"class Regrtest" not in source
    assert load_text("stdlib").sha256 == text.sha256


def test_train_and_validation_never_overlap(text):
    train, validation = text.split("train"), text.split("validation")
    assert len(train) + len(validation) == len(text.tokens) and len(validation) == 2000
    assert np.array_equal(np.concatenate((train, validation)), text.tokens)


def test_a_batch_is_a_pure_function_of_seed_and_step(text):
    data = MaskedText(text, 16)
    for a, b in zip(data.train_batch(3, 7, 8), MaskedText(text, 16).train_batch(3, 7, 8)):
        assert np.array_equal(a, b)
    for seed, step in ((3, 8), (4, 7)):
        assert not np.array_equal(data.train_batch(3, 7, 8)[0], data.train_batch(seed, step, 8)[0])


def test_sequences_are_framed_windows_of_the_training_text(text):
    tokens, labels = MaskedText(text, 16).train_batch(0, 0, 64)
    assert tokens.shape == labels.shape == (64, 16)
    assert (tokens[:, 0] == text.cls).all() and (tokens[:, -1] == text.sep).all()
    original, train = np.where(labels != IGNORE, labels, tokens), text.split("train").tobytes()
    assert all(row[1:-1].astype(np.uint8).tobytes() in train for row in original)


def test_masking_is_15_percent_80_10_10_and_never_on_specials(text):
    tokens, labels = MaskedText(text, 66).train_batch(0, 0, 4000)
    chosen = labels != IGNORE
    assert not chosen[:, [0, -1]].any()
    assert chosen[:, 1:-1].mean() == pytest.approx(0.15, abs=0.003)
    masked, kept = tokens[chosen] == text.mask, tokens[chosen] == labels[chosen]
    assert masked.mean() == pytest.approx(0.8, abs=0.01)
    assert kept.mean() == pytest.approx(0.1 + 0.1 / 256, abs=0.01)
    replaced = tokens[chosen][~masked & ~kept]
    assert replaced.max() < 256 and len(np.unique(replaced)) == 256  # any ordinary token, never a special


def test_specials_inside_a_tokenized_text_are_not_masked(tmp_path):
    path = tmp_path / "tokens.bin"
    np.random.default_rng(0).integers(0, 6, 50_000).astype("<u2").tofile(path)
    text = load_text(path, vocab_size=1000, special_ids=[0, 1, 2, 3])
    assert text.vocab_size == 1000
    tokens, labels = MaskedText(text, 32).train_batch(0, 0, 500)
    assert set(np.unique(labels)) == {IGNORE, 4, 5}


def test_specials_follow_the_vocabulary_of_a_bin(tmp_path):
    path = tmp_path / "tokens.bin"
    np.arange(1000, dtype="<u2").tofile(path)
    text = load_text(path, vocab_size=1000)
    assert (text.vocab_size, text.mask) == (1004, 1003) and np.array_equal(text.tokens, np.arange(1000))


def test_validation_is_always_the_same_and_does_not_overlap(text):
    data = MaskedText(text, 16)
    first, second = list(data.validation_batches(8, 4)), list(data.validation_batches(8, 4))
    assert len(first) == 4 and all(np.array_equal(a[0], b[0]) and np.array_equal(a[1], b[1]) for a, b in zip(first, second))
    windows = np.concatenate([np.where(labels != IGNORE, labels, tokens)[:, 1:-1] for tokens, labels in first])
    starts = [text.split("validation").tobytes().find(row.astype(np.uint8).tobytes()) for row in windows]
    assert min(starts) >= 0 and (np.diff(sorted(starts)) >= 14).all()
    assert sum(len(tokens) for tokens, _ in data.validation_batches(8, 1000)) == 2000 // 14


def test_model_inputs_are_the_masked_positions_only(text):
    data = MaskedText(text, 16)
    tokens, labels = data.train_batch(0, 0, 8)
    (inputs, positions), targets = data.to_model(tokens, labels)
    assert torch.equal(inputs, torch.from_numpy(tokens))
    assert torch.equal(torch.from_numpy(labels).flatten()[positions], targets) and (targets != IGNORE).all()
    assert len(positions) == (labels != IGNORE).sum()


def test_causal_labels_are_the_next_tokens(text):
    data = CausalText(text, 16)
    tokens, labels = data.train_batch(0, 0, 8)
    assert tokens.shape == labels.shape == (8, 16) and (tokens[:, 0] == text.cls).all()
    assert np.array_equal(tokens[:, 1:], labels[:, :-1])
    train = text.split("train").tobytes()
    assert all(row.astype(np.uint8).tobytes() in train for row in labels)


@pytest.mark.slow
def test_backcopy_follows_bigrams_and_copies_after_triggers():
    chains = bigram_backcopy(chains=2000, length=50).reshape(2000, 50)
    after_trigger = chains[:, 1:-1] < 3
    assert np.array_equal(chains[:, 2:][after_trigger], chains[:, :-2][after_trigger])
    assert chains.max() < BACKCOPY_SYMBOLS and 0.1 < after_trigger.mean() < 0.9
    copied_by_chance = (chains[:, 2:] == chains[:, :-2])[~after_trigger].mean()
    assert copied_by_chance < 0.3
    assert np.array_equal(bigram_backcopy(chains=20, length=50), bigram_backcopy(chains=20, length=50))


@pytest.mark.parametrize("accumulate, world", [(1, 1), (4, 1), (1, 4), (2, 2)])
def test_ranks_and_micro_batches_slice_the_global_batch(text, accumulate, world):
    tokens, labels = MaskedText(text, 16).train_batch(0, 0, 16)
    parts = []
    for rank in range(world):
        run = SimpleNamespace(args=SimpleNamespace(accumulate=accumulate), rank=rank, world=world, trained=nn.Identity())
        for part in Run.slices(run, tokens, labels):
            parts.append(part)
            last = len(parts) % accumulate == 0
            assert run.trained.require_backward_grad_sync == last
    assert len(parts) == accumulate * world
    rows = np.concatenate([part[0] for part in parts])
    assert sorted(map(tuple, rows)) == sorted(map(tuple, tokens))


def test_a_folder_is_its_files_in_order(tmp_path):
    for name, words in (("b.txt", b"two"), ("a.txt", b"one"), (".hidden", b"no")):
        (tmp_path / name).write_bytes(words)
    assert load_text(tmp_path).tokens.tobytes() == b"one\ntwo"


def bad_bin(tmp_path):
    path = tmp_path / "tokens.bin"
    np.array([1, 2, 70], dtype="<u2").tofile(path)
    return path


@pytest.mark.parametrize("make, options, message", [
    (lambda d: d / "missing.txt", {}, "no such file or folder"),
    (lambda d: (d / "empty.txt").touch() or d / "empty.txt", {}, "is empty"),
    (lambda d: d, {}, "is empty"),
    (bad_bin, {}, "needs --vocab-size"),
    (bad_bin, {"vocab_size": 70}, "holds token 70, but --vocab-size is 70"),
    (lambda d: (d / "odd.bin").write_bytes(b"123") and d / "odd.bin", {"vocab_size": 9}, "has 3 bytes"),
    (lambda d: d / "missing.bin", {"vocab_size": 9}, "no such file"),
    (lambda d: (d / "a.txt").write_bytes(b"123") and d / "a.txt", {"vocab_size": 9}, "is for .bin files"),
    (lambda d: (d / "a.txt").write_bytes(b"123") and d / "a.txt", {"special_ids": [0, 1, 2, 3]}, "is for .bin files")])
def test_bad_data_is_named(tmp_path, make, options, message):
    with pytest.raises(UserError, match=message):
        load_text(make(tmp_path), **options)


def test_a_text_shorter_than_a_sequence_is_refused(tmp_path):
    path = tmp_path / "short.txt"
    path.write_bytes(b"x" * 100)
    with pytest.raises(UserError, match="validation part has 10 tokens, fewer than one sequence of --seq-len 64"):
        MaskedText(load_text(path), 64)
    with pytest.raises(UserError, match="--seq-len 2"):
        MaskedText(load_text(path), 2)


@pytest.mark.slow
def test_a_runs_data_is_told_by_its_arguments_not_by_a_familys_name(corpus):
    args = {"data": corpus, "vocab_size": None, "special_ids": None, "seq_len": 16}
    assert type(open_data(args)) is CausalText
    assert type(open_data(args | {"mask_prob": 0.15})) is MaskedText
    assert type(open_data({"data": "shapes", "image_size": None})) is Images


def test_a_text_with_a_name_is_one_entry(monkeypatch):
    letters = np.frombuffer(b"()" * 500, dtype=np.uint8)
    monkeypatch.setitem(TEXTS, "parens", lambda: (letters, BYTES))
    monkeypatch.setitem(TEXTS, "digits", lambda: (letters - ord("("), 2))
    monkeypatch.setitem(TEXTS, "too few", lambda: (letters, 2))
    with pytest.raises(UserError, match="--data too few: holds token 41; its vocabulary has 2"):
        load_text("too few")
    parens, digits = load_text("parens"), load_text("digits")
    assert parens.is_bytes and parens.vocab_size == 260 and parens.tokens[:2].tobytes() == b"()"
    assert not digits.is_bytes and digits.vocab_size == 6 and (digits.pad, digits.mask) == (2, 5)
