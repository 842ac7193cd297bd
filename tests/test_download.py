"""Downloads from a local server that truncates, corrupts, stalls, denies, or is not there."""
import hashlib
import io
import tarfile
import threading
import zipfile

import numpy as np
import pytest

from minq import data, download, images
from minq.data import load_text
from minq.download import Archive, fetch, from_hub, unpacked
from minq.errors import UserError
from minq.images import load_images
from running import SMALL, run
from serving import COMMIT, as_hub
from test_images import make_cifar

CONTENT = np.random.default_rng(0).bytes(200_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()


# ---- one file ----

def get(server, folder):
    server.files["/file"] = CONTENT
    fetch(f"{server.url}/file", folder / "file", len(CONTENT), SHA256, "--data x")
    return (folder / "file").read_bytes()


def refused(server, folder):
    with pytest.raises(UserError) as error:
        get(server, folder)
    assert str(error.value).startswith("--data x: ") and "\n" not in str(error.value)
    assert not (folder / "file").exists()
    return str(error.value)


def test_a_file_comes_once(server, tmp_path):
    assert get(server, tmp_path) == get(server, tmp_path) == CONTENT
    assert len(server.asked) == 1 and [path.name for path in tmp_path.iterdir() if path.is_file()] == ["file"]


def test_it_goes_on_where_the_connection_broke_off(server, tmp_path):
    server.fault = "breaks off"  # after half of what is left, each time
    assert get(server, tmp_path) == CONTENT
    starts = [int(wanted[6:-1]) for _, wanted in server.asked]
    assert starts[:3] == [0, 100_001, 150_001] and starts == sorted(set(starts))


def test_the_next_command_goes_on_too(server, tmp_path):
    server.fault = "breaks off for good"
    assert "HTTP 503" in (message := refused(server, tmp_path)) and "100001 of 200000 bytes are kept" in message
    server.fault, server.asked = None, []
    assert get(server, tmp_path) == CONTENT and server.asked == [("/file", "bytes=100001-")]


def test_a_server_that_cannot_go_on_in_the_middle(server, tmp_path):
    (tmp_path / "file.part").write_bytes(b"of something else")
    server.fault = "no ranges"
    assert get(server, tmp_path) == CONTENT


@pytest.mark.slow
def test_a_server_that_stalls(server, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "TIMEOUT", 0.3)
    monkeypatch.setattr(download, "TRIES", 2)
    server.fault = "stalls"
    assert "timed out" in (message := refused(server, tmp_path)) and "bytes are kept" in message
    server.fault = None
    assert get(server, tmp_path) == CONTENT


@pytest.mark.parametrize("fault, reason", [
    ("corrupts", "checksum"), ("too long", "longer than the 200000 bytes"), (404, "HTTP 404"), (403, "HTTP 403"), (500, "HTTP 500")])
def test_what_is_wrong_is_not_kept(server, tmp_path, fault, reason):
    server.fault = fault
    assert reason in refused(server, tmp_path)
    assert not (tmp_path / "file.part").exists() or not (tmp_path / "file.part").stat().st_size
    server.fault = None
    assert get(server, tmp_path) == CONTENT


@pytest.mark.parametrize("kept", [b"x" * 100, b"x" * 200_000, b"x" * 300_000])
def test_kept_bytes_of_another_file_end_in_an_error_and_then_in_the_file(server, tmp_path, kept):
    (tmp_path / "file.part").write_bytes(kept)
    refused(server, tmp_path)
    assert get(server, tmp_path) == CONTENT


def test_offline(server, tmp_path):
    server.shutdown()
    server.server_close()
    message = refused(server, tmp_path)
    assert "Connection refused" in message and f"put that file at {tmp_path / 'file'} yourself" in message
    (tmp_path / "file").write_bytes(CONTENT)
    assert get(server, tmp_path) == CONTENT
    (tmp_path / "file").write_bytes(b"another")
    with pytest.raises(UserError, match="checksum"):
        get(server, tmp_path)
    assert (tmp_path / "file").read_bytes() == b"another"  # it may be somebody's


def test_a_full_disk(server, tmp_path):
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        assert "File too large" in refused(server, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert get(server, tmp_path) == CONTENT


# ---- archives: cifar10 and enwik8 ----

def zipped(name, content):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, content)
    return buffer.getvalue()


def tarred(add):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        add(archive)
    return buffer.getvalue()


def publish(server, name, content):
    """Archive(name) on the server."""
    server.files["/packed"] = content
    return Archive(name, f"{server.url}/packed", len(content), hashlib.sha256(content).hexdigest())


def in_cache(tmp_path):
    return sorted(path.name for path in (tmp_path / "cache" / "minq").iterdir())


def test_enwik8(server, tmp_path, monkeypatch):
    text = b"<mediawiki>[[an article]]" * 1000
    monkeypatch.setattr(data, "ENWIK8", publish(server, "enwik8", zipped("enwik8", text)))
    found = load_text("enwik8")
    assert found.tokens.tobytes() == text and found.is_bytes and found.vocab_size == 260
    assert found.sha256 == hashlib.sha256(text).hexdigest() and in_cache(tmp_path) == ["enwik8"]
    server.fault = 500
    assert load_text("enwik8").sha256 == found.sha256  # from the cache
    run("train_bert.py", *SMALL, "--data", "enwik8", "--steps", 1, "--out", tmp_path / "run")


def test_cifar10(server, tmp_path, monkeypatch):
    folder = make_cifar(tmp_path / "cifar-10-batches-bin")
    monkeypatch.setattr(images, "CIFAR10", publish(server, folder.name, tarred(lambda tar: tar.add(folder, folder.name))))
    assert load_images("cifar10").sha256 == load_images(folder).sha256 and in_cache(tmp_path) == [folder.name]
    server.fault = 500
    load_images("cifar10")


def test_what_is_published():
    """Sizes and checksums as several independent sources have them."""
    assert (download.ENWIK8.size, download.ENWIK8.sha256[:8]) == (36_445_475, "547994d9")
    assert (download.CIFAR10.size, download.CIFAR10.sha256[:8]) == (170_052_171, "c4a38c50")


@pytest.mark.parametrize("fault", [404, 503, "corrupts", "breaks off for good"])
@pytest.mark.parametrize("script, name", [("train_bert.py", "enwik8"), ("train_opt.py", "enwik8"), ("train_vit.py", "cifar10")])
def test_a_script_says_it_in_one_line(server, tmp_path, monkeypatch, fault, script, name):
    monkeypatch.setattr(data, "ENWIK8", publish(server, "enwik8", zipped("enwik8", CONTENT)))
    monkeypatch.setattr(images, "CIFAR10", data.ENWIK8)
    server.fault = fault
    _, err = run(script, "--data", name, "--device", "cpu", "--out", tmp_path / "run", code=2)
    assert err.startswith(f"error: --data {name}: ") and err.count("\n") == 1 and not (tmp_path / "run").exists()


def test_an_archive_cannot_write_elsewhere(server, tmp_path):
    (tmp_path / "evil").write_text("evil")
    for content in (tarred(lambda tar: tar.add(tmp_path / "evil", "../../escaped")), zipped("../../escaped", "evil")):
        with pytest.raises(UserError, match="--data x: cannot be unpacked"):
            unpacked(publish(server, "wanted", content), "--data x")
        assert not list(tmp_path.rglob("escaped")) and in_cache(tmp_path) == ["packed"]
        (tmp_path / "cache" / "minq" / "packed").unlink()


def test_two_at_once_download_once(server, tmp_path):
    archive, found = publish(server, "wanted", zipped("wanted", CONTENT)), []
    threads = [threading.Thread(target=lambda: found.append(unpacked(archive, "--data x"))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [tmp_path / "cache" / "minq" / "wanted"] * 4 and found[0].read_bytes() == CONTENT
    assert len(server.asked) == 1 and in_cache(tmp_path) == ["wanted"]


# ---- the Hub ----

WANTED, WEIGHTS = ("config.json", "vocab.txt"), [("model.safetensors",), ("pytorch_model.bin", "pytorch_model-*-of-*.bin")]


FILES = {"config.json": b"{}", "vocab.txt": b"a\nb\n", "README.md": b"no", "onnx/model.safetensors": b"no",
         "model.safetensors": CONTENT, "pytorch_model.bin": b"no"}


def test_a_model_of_the_hub(server, tmp_path):
    as_hub(server, FILES)
    folder, revision = from_hub("org/model", WANTED, WEIGHTS)
    assert revision == COMMIT and {path.name for path in folder.iterdir()} == {*WANTED, "model.safetensors", "complete"}
    assert (folder / "model.safetensors").read_bytes() == CONTENT and (folder / "vocab.txt").read_bytes() == b"a\nb\n"
    server.fault = 503
    assert from_hub("org/model", WANTED, WEIGHTS) == (folder, revision)  # an earlier download


def test_another_form_of_weights_where_there_is_no_first(server):
    shards = {f"pytorch_model-0000{i}-of-00002.bin": bytes(i) for i in (1, 2)}
    as_hub(server, {"config.json": b"{}", **shards, "pytorch_model-../../x-of-1.bin": b"evil"})
    folder, _ = from_hub("org/model", WANTED, WEIGHTS)
    assert {path.name for path in folder.iterdir()} == {"config.json", *shards, "complete"}


def test_a_model_that_comes_in_pieces(server):
    as_hub(server, FILES)
    server.fault = "breaks off"
    folder, _ = from_hub("org/model", WANTED, WEIGHTS)
    assert (folder / "model.safetensors").read_bytes() == CONTENT


@pytest.mark.parametrize("fault", [404, 401, 500, "corrupts", "breaks off for good", "absent"])
def test_a_hub_that_fails(server, tmp_path, fault):
    as_hub(server, FILES)
    server.fault = fault
    if fault == "absent":
        server.shutdown()
        server.server_close()
    _, err = run("pretrained.py", "org/model", "--out", tmp_path / "run", code=2)
    assert err.startswith("error: org/model: ") and err.count("\n") == 1 and not (tmp_path / "run").exists()
    assert not list((tmp_path / "cache").rglob("complete"))


@pytest.mark.parametrize("answer", [b"", b"[]", b"null", b"{", b'{"sha": "../../..", "siblings": []}', b'{"sha": "main"}',
                                    b'{"siblings": [{}]}', b'{"siblings": 7}', b'{"siblings": [{"rfilename": "config.json"}]}', b"\xff\xfe"])
def test_a_hub_that_answers_something_else(server, tmp_path, answer):
    server.files["/api/models/org/model"] = answer
    with pytest.raises(UserError, match="org/model: no such folder, and it cannot be downloaded"):
        from_hub("org/model", WANTED, WEIGHTS)


@pytest.mark.parametrize("name", ["a/b/c", "a" * 300, "-", "a b", "..", "../x", "org/..", "org/model?x", "", "/"])
def test_names_that_are_none(server, name):
    with pytest.raises(UserError):
        from_hub(name, WANTED, WEIGHTS)
    assert not server.asked


def test_a_file_whose_contents_changed_is_refused(server):
    as_hub(server, FILES)
    server.files[f"/org/model/resolve/{COMMIT}/config.json"] = b"[]"
    with pytest.raises(UserError, match="org/model: .*config.json has the checksum"):
        from_hub("org/model", WANTED, WEIGHTS)


