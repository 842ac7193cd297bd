"""What can happen to a run's folder and to its data while it trains: one clear line, and the checkpoint before stays."""
import os
import resource
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest

from minq import runs
from minq.checkpoints import append_line, forget_after, held, write_atomically
from minq.data import load_text
from minq.errors import UserError
from running import SMALL, SMALL_VIT, assert_same_weights, logged, run, saved, train


def at_step(step, action, monkeypatch, method="share"):
    """Have `action` happen once: after a step, before anything is logged or saved; or with "slices" within it."""
    real, to_do = getattr(runs.Run, method), [action]

    def acting(self, *args):
        if self.step == step and to_do:
            to_do.pop()()
        return real(self, *args)

    monkeypatch.setattr(runs.Run, method, acting)


def last_line(err):
    assert "Traceback" not in err and err.count("error: ") == 1
    return err.splitlines()[-1]


def limit_file_size(size):
    """As on a full disk, writing fails in the middle of a file; in this process alone."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def test_a_full_disk_leaves_the_checkpoint_before(corpus, tmp_path, monkeypatch):
    options = ["--save-every", "3", "--dropout", "0.1"]
    train(corpus, tmp_path / "whole", *options)
    at_step(5, lambda: limit_file_size(50_000), monkeypatch)
    try:
        _, err = train(corpus, tmp_path / "run", *options, code=2)
    finally:
        limit_file_size(resource.RLIM_INFINITY)
    assert last_line(err) == (f"error: {tmp_path / 'run' / 'checkpoint.pt'}: cannot be written: "
                              "File too large; it stays as it was before")
    assert saved(tmp_path / "run")["step"] == 3
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["checkpoint.pt", "metrics.jsonl"]
    run("train_bert.py", "--resume", "--out", tmp_path / "run")  # as soon as there is room again
    assert_same_weights(tmp_path / "run", tmp_path / "whole")
    assert logged(tmp_path / "run") == logged(tmp_path / "whole")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has it")
def test_a_log_that_cannot_grow_is_named():
    with pytest.raises(UserError, match="^/dev/full: cannot be written: No space left on device$"):
        append_line(Path("/dev/full"), "{}")


def test_another_error_while_writing_is_not_hidden(tmp_path):
    def write(path):
        raise RuntimeError("a bug")
    with pytest.raises(RuntimeError, match="a bug"):
        write_atomically(tmp_path / "file", write)


def test_what_is_written_is_on_the_disk_before_it_takes_its_place(tmp_path, monkeypatch):
    """In this order a power cut leaves the old file or the new one, whole."""
    done = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, name=name, real=real: (done.append((name, inode(args[0]))), real(*args)))
    inode = lambda x: os.fstat(x).st_ino if isinstance(x, int) else os.stat(x).st_ino
    write_atomically(tmp_path / "file", lambda path: path.write_text("new"))
    file, folder = inode(tmp_path / "file"), inode(tmp_path)
    assert done == [("fsync", file), ("replace", file), ("fsync", folder)]
    done.clear()
    append_line(tmp_path / "file", "line")
    assert done == [("fsync", file)] and (tmp_path / "file").read_text() == "newline\n"


def test_the_log_is_cut_to_the_checkpoint_whatever_stands_behind(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for tail in (b'{"step": 3}\n', b'{"st', b"\0" * 100, b"\0\0\n\xff\xfe\n", b'{"step": 3', b""):
        path.write_bytes(b'{"step": 1}\n{"step": 2}\n' + tail)
        forget_after(tmp_path, 2)
        assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


# ---- the folder ----

@pytest.fixture
def nobody():
    """A folder that everybody may read, and the rights of a user who may not write to it; root may write anywhere."""
    folder = Path(tempfile.mkdtemp())
    os.chmod(folder, 0o755)
    (folder / "run").mkdir()
    root = os.geteuid() == 0
    yield folder / "run", lambda: (os.chmod(folder / "run", 0o555), os.chmod(folder, 0o555), root and os.seteuid(65534))
    if root:
        os.seteuid(0)
    for path in (folder, folder / "run"):
        os.chmod(path, 0o755)
    shutil.rmtree(folder)


def test_a_folder_that_may_not_be_written_is_named(corpus, nobody):
    folder, forbid = nobody
    corpus = shutil.copy(corpus, folder.parent / "corpus.txt")
    train(corpus, folder, "--steps", "3")
    before = (folder / "checkpoint.pt").read_bytes()
    forbid()
    _, err = run("train_bert.py", "--resume", "--out", folder, code=2)
    assert last_line(err).startswith(f"error: {folder}/metrics.jsonl: cannot be written: Permission denied")
    _, err = train(corpus, folder, "--overwrite", code=2)
    assert last_line(err) == f"error: --out {folder}: cannot be written: Permission denied"
    _, err = train(corpus, folder.parent / "another", code=2)
    assert last_line(err) == f"error: --out {folder.parent / 'another'}: cannot be written: Permission denied"
    assert (folder / "checkpoint.pt").read_bytes() == before and not (folder.parent / "another").exists()


def test_a_file_where_the_folder_should_be_is_named(corpus, tmp_path):
    (tmp_path / "run").write_text("")
    _, err = train(corpus, tmp_path / "run", code=2)
    assert last_line(err) == f"error: --out {tmp_path / 'run'}: cannot be written: File exists"


@pytest.mark.parametrize("step, file", [(3, "metrics.jsonl"), (4, "checkpoint.pt")])
def test_a_folder_deleted_in_mid_run(corpus, tmp_path, monkeypatch, step, file):
    at_step(step, lambda: shutil.rmtree(tmp_path / "run"), monkeypatch)
    _, err = train(corpus, tmp_path / "run", "--save-every", "2", "--eval-every", "3", code=2)
    assert last_line(err) == f"error: {tmp_path / 'run' / file}: cannot be written: No such file or directory"
    assert not (tmp_path / "run").exists()


def test_two_trainings_in_one_folder(corpus, tmp_path):
    train(corpus, tmp_path / "run", "--steps", "3")
    before = (tmp_path / "run" / "checkpoint.pt").read_bytes()
    with held(tmp_path / "run"):
        for command in (["--overwrite"], []):
            _, err = train(corpus, tmp_path / "run", *command, code=2)
            assert "another process is training there" in last_line(err)
        _, err = run("train_bert.py", "--resume", "--out", tmp_path / "run", code=2)
        assert "another process is training there" in last_line(err)
    assert (tmp_path / "run" / "checkpoint.pt").read_bytes() == before and len(logged(tmp_path / "run")) == 1
    train(corpus, tmp_path / "run", "--overwrite", "--steps", "2")


def test_a_run_killed_before_it_had_anything_to_lose_is_started_again(corpus, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text("")
    train(corpus, tmp_path / "run", "--steps", "3")
    (tmp_path / "run" / "checkpoint.pt").unlink()
    _, err = train(corpus, tmp_path / "run", code=2)
    assert "ended before its first checkpoint; replace it with --overwrite" in last_line(err)
    assert len(logged(tmp_path / "run")) == 1


# ---- the data ----

def rewrite(path):
    with open(path, "r+b") as file:
        file.write(b"\x01\x00" * 10)


def truncate(path):
    os.truncate(path, 2000)


def replace(path):
    shutil.copy(path, path.with_suffix(".new"))
    os.replace(path.with_suffix(".new"), path)


@pytest.mark.parametrize("change", [rewrite, truncate, replace, os.unlink])
def test_tokens_that_change_in_mid_run(tmp_path, monkeypatch, change):
    data = tmp_path / "tokens.bin"
    np.random.default_rng(0).integers(0, 50, 20_000).astype("<u2").tofile(data)
    at_step(4, lambda: change(data), monkeypatch, "slices")  # in the fifth step
    _, err = run("train_opt.py", *SMALL, "--data", data, "--vocab-size", 50, "--out", tmp_path / "run", "--save-every", 1, code=2)
    assert last_line(err).startswith(f"error: --data {data}: was changed while this run reads it")
    assert saved(tmp_path / "run")["step"] == 4


def test_images_that_change_in_mid_run(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    np.save(tmp_path / "images.npy", rng.integers(0, 256, (80, 16, 16, 3), dtype=np.uint8))
    np.save(tmp_path / "labels.npy", rng.integers(0, 5, 80))
    at_step(5, lambda: rewrite(tmp_path / "images.npy"), monkeypatch, "slices")
    command = ["train_vit.py", *SMALL_VIT, "--data", tmp_path, "--out", tmp_path / "run", "--save-every", 1]
    _, err = run(*command, code=2)
    assert last_line(err).startswith(f"error: --data {tmp_path / 'images.npy'}: was changed")
    assert saved(tmp_path / "run")["step"] == 5


def test_a_text_is_read_once(corpus, tmp_path, monkeypatch):
    """The run goes on with what it read; to resume it, the old text must be there again."""
    data = Path(shutil.copy(corpus, tmp_path / "text.txt"))
    at_step(2, lambda: data.write_text("something else " * 1000), monkeypatch)
    train(data, tmp_path / "run")
    train(corpus, tmp_path / "whole")
    assert_same_weights(tmp_path / "run", tmp_path / "whole")
    _, err = run("train_bert.py", "--resume", "--out", tmp_path / "run", code=2)
    assert "has changed since this run was trained on it" in last_line(err)
    assert load_text(corpus).sha256 == saved(tmp_path / "run")["data_sha256"]
