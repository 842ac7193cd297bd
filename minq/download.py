"""Files from the net: each is checked, is complete or not there at all, and goes on where it broke off.

    unpacked(CIFAR10, "--data cifar10")       # the folder or file in an archive
    from_hub("org/model", wanted, weights)    # a folder of a published checkpoint's files

They stay in ~/.cache/minq (or XDG_CACHE_HOME/minq), from where they are taken without asking the net again.
Whatever goes wrong raises UserError in one line that says what to do, offline too.
"""
import hashlib
import json
import os
import re
import shutil
import tarfile
import tempfile
import urllib.request
import zipfile
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fnmatch import fnmatch
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError

from tqdm import tqdm

from minq.errors import UserError, in_one_line

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

TIMEOUT = 30  # seconds without a byte
TRIES = 20    # connections for a file, as long as each brings something
NET_ERRORS = (OSError, HTTPException)  # URLError, HTTPError and timeouts are OSErrors


def cache():
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "minq")


# ---- one file ----

def fetch(url, path, size, digest, what):
    """Download `url` to `path`: `size` bytes of this digest. Raises UserError that begins with `what` needed it.

    What has come so far stays beside it as .part, and the next call asks for the rest only.
    """
    if path.exists():
        return require_digest(path, digest, what, f"{path} (delete it to download it again)")
    part = path.with_name(path.name + ".part")
    path.parent.mkdir(parents=True, exist_ok=True)
    had, problem = -1, None
    for _ in range(TRIES):
        have = part.stat().st_size if part.exists() else 0
        if have == size or have <= had:
            break
        had, problem = have, receive(url, part, have, size)
    have = part.stat().st_size if part.exists() else 0
    if have != size:
        kept = f"; {have} of {size} bytes are kept, the same command goes on from there" if have else ""
        raise UserError(f"{what}: cannot be downloaded from {url}: {problem}{kept}; or put that file at {path} yourself")
    try:
        require_digest(part, digest, what, url)
    except UserError:
        part.unlink()
        raise
    os.replace(part, path)


def receive(url, part, have, size):
    """Add to `part` what a connection brings. Returns what went wrong, in words."""
    request = urllib.request.Request(url, headers={"User-Agent": "minq", "Range": f"bytes={have}-"})
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT) as remote:
            mode = "ab" if remote.status == 206 else "wb"  # 200: a server that cannot go on in the middle
            with open(part, mode) as file, tqdm(total=size, initial=file.tell(), desc=part.stem, unit="B",
                                                unit_scale=True, disable=None) as progress:
                while block := remote.read1(2 ** 16):
                    if file.tell() + len(block) > size:
                        file.truncate(0)
                        return f"it is longer than the {size} bytes that it should have"
                    file.write(block)
                    progress.update(len(block))
                return "the connection broke off"
    except HTTPError as error:
        if error.code == 416:  # there is no such rest: what is kept is of another file
            part.unlink()
        return f"HTTP {error.code} {error.reason}"
    except NET_ERRORS as error:
        return str(getattr(error, "reason", None) or error) or type(error).__name__


def require_digest(path, digest, what, where):
    """Raise UserError if a file is not the one that it should be. 64 digits are its SHA-256, 40 git's SHA-1."""
    with open(path, "rb") as file:
        if len(digest) == 40:
            hashed = hashlib.sha1(b"blob %d\0" % path.stat().st_size)
            while block := file.read(2 ** 20):
                hashed.update(block)
        else:
            hashed = hashlib.file_digest(file, "sha256")
    if hashed.hexdigest() != digest:
        raise UserError(f"{what}: {where} has the checksum {hashed.hexdigest()}; expected {digest}; it was changed, or damaged on its way")


@contextmanager
def one_at_a_time(folder):
    """While active other processes wait here: torchrun's all ask at once, and one shall download for all."""
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY) if fcntl else None
    try:
        with suppress(OSError):  # a file system that knows no locks
            if fcntl:
                fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        if fcntl:
            os.close(handle)


# ---- an archive ----

@dataclass(frozen=True)
class Archive:
    """`name` is the file or folder in it that is wanted."""
    name: str
    url: str
    size: int
    sha256: str


# Alex Krizhevsky's page gives the MD5 c32a1d4ab5d03f1284b67883e8d87530.
CIFAR10 = Archive("cifar-10-batches-bin", "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz", 170_052_171,
                  "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd")
# 100 MB of Wikipedia; Matt Mahoney's page gives the MD5 a1fa5ffddb56f4953e226637dabbb36a, of what is in the archive.
ENWIK8 = Archive("enwik8", "http://mattmahoney.net/dc/enwik8.zip", 36_445_475,
                 "547994d9980ebed1288380d652999f38a14fe291a6247c157c3d33d4932534bc")


def unpacked(archive, what):
    """The path of what is in an archive, in the cache; the first call downloads it."""
    place, packed = cache() / archive.name, cache() / archive.url.rpartition("/")[2]
    if place.exists():
        return place
    try:
        with one_at_a_time(cache()):
            if place.exists():
                return place
            fetch(archive.url, packed, archive.size, archive.sha256, what)
            with tempfile.TemporaryDirectory(dir=cache()) as scratch:
                if zipfile.is_zipfile(packed):
                    shutil.unpack_archive(packed, scratch, "zip")
                else:
                    shutil.unpack_archive(packed, scratch, "gztar", filter="data")  # refuses paths that lead elsewhere
                os.replace(Path(scratch, archive.name), place)  # complete, or not there at all
            packed.unlink()
    except (OSError, EOFError, tarfile.TarError, zipfile.BadZipFile) as error:  # a full disk, mostly
        raise UserError(f"{what}: cannot be unpacked to {cache()}: {error}") from None
    return place


# ---- the Hugging Face Hub ----

def from_hub(name, wanted, weights):
    """(folder, revision) of the model `name` of the Hub: the files named in `wanted`, and its weights.

    weights: patterns of each form in which there may be weights; of the first that it has, all are taken. Where
    the Hub cannot be reached, an earlier download is given.
    """
    if len(name) > 96 or not re.fullmatch(r"(\w[\w.-]*/)?\w[\w.-]*", name):
        raise UserError(f"{name}: no such folder, and no model's id; expected one like org/model")
    hub = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    home = cache() / "hub" / name.replace("/", "--")
    try:
        revision, files = listing(f"{hub}/api/models/{name}?blobs=true")
    except (*NET_ERRORS, ValueError, KeyError, TypeError) as error:
        complete = sorted(home.glob("*/complete"), key=os.path.getmtime)
        if complete:
            return complete[-1].parent, complete[-1].parent.name
        reason = f"{type(error).__name__}: {in_one_line(error)}"
        raise UserError(f"{name}: no such folder, and it cannot be downloaded from {hub}: {reason}; expected a folder, "
                        "or the id of a public model") from None
    chosen = [file for file in files if file in wanted]
    for form in weights:
        found = [file for file in files if "/" not in file and any(fnmatch(file, pattern) for pattern in form)]
        if found:
            chosen += found
            break
    folder = home / revision
    try:
        with one_at_a_time(home):
            for file in chosen:
                fetch(f"{hub}/{name}/resolve/{revision}/{file}", folder / file, *files[file], what=name)
            (folder / "complete").touch()
    except OSError as error:
        raise UserError(f"{name}: {folder}: cannot be written: {error.strerror}") from None
    return folder, revision


def listing(url):
    """(commit, {file: (size, digest)}) of what the Hub answers. Raises what a wrong answer raises."""
    request = urllib.request.Request(url, headers={"User-Agent": "minq"})
    with urllib.request.urlopen(request, timeout=TIMEOUT) as remote:
        answer = json.loads(remote.read(2 ** 26))
    files = {}
    for each in answer["siblings"]:
        large = each.get("lfs")  # by its SHA-256; other files by git's SHA-1
        files[each["rfilename"]] = (large["size"], large["sha256"]) if large else (each["size"], each["blobId"])
    if not re.fullmatch("[0-9a-f]{40}", answer["sha"]):
        raise ValueError(f"no commit: {answer['sha']}")
    return answer["sha"], files
