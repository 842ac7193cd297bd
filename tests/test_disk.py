"""What can happen to a run's folder, and to what is downloaded: one clear line, and what was there
before stays."""
import hashlib
import os
import resource
import shutil
import tarfile
import zipfile

import pytest

from minq import data, runs
from minq.data import downloaded, load_text
from minq.flags import UserError, one_line_errors, write_atomically
from minq.images import load_images
from minq.runs import append_line, lock, truncate_log
from running import differences, logged, run, saved, train


def last_line(err):
    assert "Traceback" not in err and err.count("error: ") == 1
    return err.splitlines()[-1]


# ---- files ----

def limit_file_size(size):
    """As on a full disk, writing fails in the middle of a file; in this process alone."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def test_a_full_disk_leaves_the_checkpoint_before(corpus, tmp_path, monkeypatch):
    options = ["--save-every", "3", "--dropout", "0.1"]
    train(corpus, tmp_path / "whole", *options)
    save = runs.Run.save
    with monkeypatch.context() as patched:
        full = lambda self: (limit_file_size(50_000) if self.step > 3 else None, save(self))
        patched.setattr(runs.Run, "save", full)
        try:
            _, err = train(corpus, tmp_path / "run", *options, code=2)
        finally:
            limit_file_size(resource.RLIM_INFINITY)
    assert f"{tmp_path / 'run' / 'checkpoint.pt'}: cannot be written: " in last_line(err)
    assert "File too large" in last_line(err) and saved(tmp_path / "run")["step"] == 3
    run("train_bert.py", "--resume", "--out", tmp_path / "run")  # as soon as there is room again
    assert not differences(tmp_path / "run", tmp_path / "whole")


def test_what_is_written_is_on_the_disk_before_it_takes_its_place(tmp_path, monkeypatch):
    """In this order a power cut leaves the old file or the new one, whole."""
    inode = lambda x: os.fstat(x).st_ino if isinstance(x, int) else os.stat(x).st_ino
    path, done = tmp_path / "file", []
    path.write_text("old")
    for name in ("fsync", "replace"):
        monkeypatch.setattr(os, name, lambda *args, name=name, real=getattr(os, name): (
            done.append((name, inode(args[0]), path.read_text())), real(*args)))
    write_atomically(path, lambda file: file.write(b"new"))
    new = inode(path)
    assert done[:2] == [("fsync", new, "old"), ("replace", new, "old")]
    done.clear()
    append_line(path, "line")
    assert done == [("fsync", new, "newline\n")]


@pytest.mark.parametrize("error", [KeyboardInterrupt, UserError, ZeroDivisionError])
def test_an_interrupted_write_leaves_the_old_file_and_hides_nothing(tmp_path, error):
    def half(file):
        file.write(b"half")
        raise error

    write_atomically(tmp_path / "file", "old")
    with pytest.raises(error):
        write_atomically(tmp_path / "file", half)
    assert (tmp_path / "file").read_text() == "old"


def test_the_log_is_cut_to_the_checkpoint_whatever_stands_behind(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for tail in (b'{"step": 3}\n', b'{"st', b"\0" * 100, b"\0\0\n\xff\xfe\n", b'{"step": 3', b""):
        path.write_bytes(b'{"step": 1}\n{"step": 2}\n' + tail)
        truncate_log(path, 2)
        assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


# ---- the folder ----

@pytest.mark.parametrize("step, file", [(3, "metrics.jsonl"), (4, "checkpoint.pt")])
def test_a_folder_deleted_in_mid_run(corpus, tmp_path, monkeypatch, step, file):
    sync = runs.Run.sync
    delete = lambda self, *_: (self.step == step and shutil.rmtree(self.folder), sync(self, *_))
    monkeypatch.setattr(runs.Run, "sync", delete)
    _, err = train(corpus, tmp_path / "run", "--save-every", 2, "--eval-every", 3, code=2)
    assert last_line(err).startswith(f"error: {tmp_path / 'run' / file}: cannot be written: ")
    assert "No such file" in last_line(err) and not (tmp_path / "run").exists()


def test_two_trainings_in_one_folder(corpus, tmp_path):
    train(corpus, tmp_path / "run", "--steps", "3")
    before = (tmp_path / "run" / "checkpoint.pt").read_bytes()
    with lock(tmp_path / "run"):
        for more in (), ("--overwrite",), ("--resume",):
            _, err = train(corpus, tmp_path / "run", "--steps", 3, *more, code=2)
            assert "another process is training there" in last_line(err)
    assert (tmp_path / "run" / "checkpoint.pt").read_bytes() == before
    assert len(logged(tmp_path / "run")) == 1
    train(corpus, tmp_path / "run", "--overwrite", "--steps", 2, "--warmup", 0)


# ---- downloads, from a file:// ----

def packed(path, add):
    """An archive: its URL and hash."""
    with (zipfile.ZipFile if path.suffix == ".zip" else tarfile.open)(path, "w") as archive:
        add(archive)
    return path.as_uri(), hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "minq"


TEXT = b"<mediawiki>[[an article]]" * 1000


@pytest.mark.parametrize("wrong", ["another", "half", "absent", "empty"])
def test_a_wrong_download_is_not_kept_and_the_next_command_succeeds(tmp_path, cache, monkeypatch,
                                                                    wrong):
    path = tmp_path / "packed.zip"
    url, digest = packed(path, lambda archive: archive.writestr("enwik8", TEXT))
    right = path.read_bytes()
    monkeypatch.setattr(data, "ENWIK8", (url, digest))
    if wrong == "another":
        packed(path, lambda archive: archive.writestr("enwik8", TEXT[1:]))
    elif wrong == "absent":
        path.unlink()
    else:
        path.write_bytes(right[:len(right) // 2] if wrong == "half" else b"")
    _, err = run("train_bert.py", "--data", "enwik8", "--out", tmp_path / "run", code=2)
    line = last_line(err)
    assert line.startswith("error: --data enwik8: ") and url in line and str(cache) in line
    assert not list(cache.iterdir()) and not (tmp_path / "run").exists()
    path.write_bytes(right)
    assert load_text("enwik8").tokens.tobytes() == TEXT
    path.unlink()
    assert load_text("enwik8").tokens.tobytes() == TEXT  # it is in the cache
    assert os.listdir(cache) == ["enwik8"]


def test_without_a_home_downloads_are_kept_with_temporary_files(tmp_path, monkeypatch):
    for name in "HOME", "XDG_CACHE_HOME":
        monkeypatch.setenv(name, "")  # for what it is again afterwards
        monkeypatch.delenv(name)
    monkeypatch.setattr("pwd.getpwuid", {}.__getitem__)  # KeyError: an unknown user
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    found = packed(tmp_path / "p.zip", lambda archive: archive.writestr("enwik8", TEXT))
    downloads = one_line_errors(lambda argv: downloaded("enwik8", *found))
    assert downloads() == tmp_path / "minq" / "enwik8"


def test_images_come_out_of_an_archive_that_can_write_nowhere_else(tmp_path, cache, cifar,
                                                                   monkeypatch):
    name, path = "cifar-10-batches-bin", tmp_path / "packed.tar"
    found = packed(path, lambda archive: archive.add(cifar, name))
    monkeypatch.setattr("minq.images.CIFAR10", found)
    assert load_images("cifar10").sha256 == load_images(cifar).sha256
    evil = packed(path, lambda archive: archive.add(cifar, "../../../escaped"))
    with pytest.raises((UserError, tarfile.TarError)):
        downloaded("wanted", *evil)
    assert not list(tmp_path.rglob("escaped")) and os.listdir(cache) == [name]
