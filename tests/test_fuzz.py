"""Broken files: cut short, with bits flipped, with headers that promise too much. A reader takes them or raises
UserError; it raises nothing else, runs no code, and needs no more than a GiB.

    MINQ_FUZZ=20000 pytest tests/test_fuzz.py       as many files of each kind, drawn at random, instead of a few
"""
import contextlib
import functools
import io
import json
import os
import pickle
import resource
import signal
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minq.checkpoints import load_checkpoint, read_log
from minq.data import load_text
from minq.errors import UserError
from minq.images import load_images
from minq.pretrained import convert
from minq.runs import open_run
from minq.weights import read_tensors

safetensors = pytest.importorskip("safetensors.torch")

MANY = int(os.environ.get("MINQ_FUZZ", 0))
GIB = 2 ** 30
SECONDS = 20  # for one file


def fuzz(test, few=60):
    return settings(max_examples=MANY or few, derandomize=not MANY, database=None, deadline=None,
                    suppress_health_check=list(HealthCheck))(test)


# ---- what is asked of a reader ----

@contextlib.contextmanager
def limits():
    """A GiB more than there is now, and some seconds."""
    def late(*_):
        raise TimeoutError(f"more than {SECONDS} seconds")
    pages = int(Path("/proc/self/statm").read_text().split()[0]) if os.path.exists("/proc/self/statm") else 0
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    previous = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    if pages:
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + GIB, hard))
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def refused_or_read(read):
    """What `read` gives, or None where it raised UserError, in one line."""
    with limits():
        try:
            return read()
        except UserError as error:
            assert str(error) and "\n" not in str(error)
            return None


def test_the_limits_are_real():
    with pytest.raises(MemoryError), limits():
        np.ones(2 * GIB, dtype=np.uint8)


# ---- what is done to a file ----

HUGE = [b"\xff" * 8, b"\xff\xff\xff\x7f", b"\xff" * 7 + b"\x7f", b"\x00" * 8, b"\x7f" + b"\xff" * 7, b"\x80\x00\x00\x00"]


@st.composite
def damage(draw):
    """A function from bytes to broken bytes. Most of what it does is done near the ends, where headers are."""
    edits = draw(st.lists(st.tuples(
        st.sampled_from(("cut", "flip", "write", "insert", "repeat")), st.booleans(),
        st.one_of(st.integers(0, 300), st.integers(0, 2 ** 20)), st.integers(0, 7),
        st.one_of(st.sampled_from(HUGE), st.binary(min_size=1, max_size=8))), min_size=1, max_size=4))

    def broken(content):
        content = bytearray(content)
        for kind, from_end, place, bit, some in edits:
            at = place % (len(content) + 1)
            at = len(content) - at if from_end else at
            if kind == "cut":
                del content[at:]
            elif kind == "flip" and at < len(content):
                content[at] ^= 1 << bit
            elif kind == "write":
                content[at:at + len(some)] = some
            elif kind == "insert":
                content[at:at] = some
            elif kind == "repeat":
                content[at:at] = content[at:at + 64]
        return bytes(content)
    return broken


def inside(content, member, broken):
    """A zip archive with one member broken, and a checksum that says it is not."""
    old, new = zipfile.ZipFile(io.BytesIO(content)), io.BytesIO()
    with zipfile.ZipFile(new, "w") as archive:
        for info in old.infolist():
            data = old.read(info)
            archive.writestr(info.filename, broken(data) if info.filename.endswith(member) else data)
    return new.getvalue()


NUMBERS = [0, -1, 1, 2, 7, 2 ** 31, 2 ** 63, 10 ** 30, 0.0, -1.0, 0.5, 1e300, float("nan"), float("inf")]
STRANGE = st.sampled_from([None, True, False, "", "4", "nan", "\0", "x" * 300, [], [4], [1, 2, 3, 4], {}, {"a": 1}, *NUMBERS])
ANYTHING = st.one_of(STRANGE, STRANGE, st.text(max_size=5), st.integers(-2, 300), st.floats())


# ---- checkpoints of minq ----

class Unshown(tuple):
    """Too long to be printed where a test fails."""
    __repr__ = object.__repr__


class UnshownFiles(dict):
    """The same."""
    __repr__ = object.__repr__


@pytest.fixture(scope="module")
def small_run(tmp_path_factory, corpus):
    """(bytes of a checkpoint, the same in PyTorch's older format, the dictionary)"""
    from running import saved, train
    folder = tmp_path_factory.mktemp("fuzz") / "run"
    train(corpus, folder, "--layers", "1", "--width", "8", "--heads", "2", "--steps", "1", "--attention", "gated", "--gate", "mlp")
    state, old = saved(folder), io.BytesIO()
    torch.save(state, old, _use_new_zipfile_serialization=False)
    return Unshown(((folder / "checkpoint.pt").read_bytes(), old.getvalue(), state))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("place")


def use(folder):
    """Open a run and let it see a batch, as quantize.py does first."""
    run = open_run(folder, torch.device("cpu"))
    inputs, _ = next(iter(run.validation()))
    with torch.no_grad():
        run.model(*inputs)


@pytest.mark.slow
@fuzz
@given(broken=damage(), how=st.sampled_from(("file", "older format", "pickle", "pickle")))
def test_checkpoints(small_run, place, broken, how):
    new, old, _ = small_run
    content = {"file": lambda: broken(new), "older format": lambda: broken(old), "pickle": lambda: inside(new, "data.pkl", broken)}[how]()
    (place / "checkpoint.pt").write_bytes(content)
    refused_or_read(lambda: use(place))


READ = ("data", "batch_size", "eval_batches", "seq_len", "vocab_size", "special_ids", "mask_prob", "seed", "image_size")


@pytest.mark.slow
@functools.partial(fuzz, few=200)
@given(part=st.sampled_from(("config", "config", "args", "all")), data=st.data())
def test_settings_in_checkpoints(small_run, place, part, data):
    _, _, state = small_run
    state = {key: dict(value) if isinstance(value, dict) else value for key, value in state.items()}
    changed = state if part == "all" else state[part]
    keys = READ if part == "args" else sorted(changed)
    for _ in range(data.draw(st.integers(1, 2))):
        changed[data.draw(st.sampled_from(keys))] = data.draw(ANYTHING)
    torch.save(state, place / "checkpoint.pt")
    refused_or_read(lambda: use(place))


def test_whole_files_are_read(small_run, tmp_path, published):
    """Else all of these would be refused for the same reason."""
    for content in small_run[:2]:
        (tmp_path / "checkpoint.pt").write_bytes(inside(content, "data.pkl", bytes) if content is small_run[0] else content)
        use(tmp_path)
    for name, files in LAYOUTS.items():
        fill(tmp_path / name, files)
        assert load_images(str(tmp_path / name)).classes >= 1
    for form in ("model.safetensors", "pytorch_model.bin"):
        fill(tmp_path / form, {name: published[name] for name in ("config.json", form)})
        assert convert(tmp_path / form).family == "bert"


class Ran:
    """A pickle that makes a folder where it is loaded."""
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@fuzz
@given(broken=damage(), name=st.sampled_from(("checkpoint.pt", "pytorch_model.bin")), plain=st.booleans())
def test_a_pickle_with_code_never_runs(place, broken, name, plain):
    buffer = io.BytesIO()
    torch.save({"format": "minq 1", "model": Ran(place / "ran")}, buffer)
    content = pickle.dumps(Ran(place / "ran")) if plain else inside(buffer.getvalue(), "data.pkl", broken)
    (place / name).write_bytes(content)
    refused_or_read(lambda: load_checkpoint(place) if name == "checkpoint.pt" else read_tensors(place / name))
    assert not (place / "ran").exists()


@fuzz
@given(broken=damage())
def test_logs(place, broken):
    line = json.dumps({"step": 3, "loss": 1.0, "ffn_output": {"inf_norm": [1.0], "kurtosis": [3.0]}}) + "\n"
    (place / "metrics.jsonl").write_bytes(broken(3 * line.encode()))
    refused_or_read(lambda: read_log(place))


# ---- published checkpoints ----

@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A BertModel's folder under Hugging Face's names."""
    folder = tmp_path_factory.mktemp("published")
    w, f, v, T = 8, 12, 20, 6
    shapes = {"embeddings.word_embeddings.weight": (v, w), "embeddings.position_embeddings.weight": (T, w),
              "embeddings.token_type_embeddings.weight": (2, w), "embeddings.LayerNorm.weight": (w,), "embeddings.LayerNorm.bias": (w,)}
    for name, rows, columns in (("attention.self.query", w, w), ("attention.self.key", w, w), ("attention.self.value", w, w),
                                ("attention.output.dense", w, w), ("intermediate.dense", f, w), ("output.dense", w, f)):
        shapes |= {f"encoder.layer.0.{name}.weight": (rows, columns), f"encoder.layer.0.{name}.bias": (rows,)}
    for name in ("attention.output.LayerNorm", "output.LayerNorm"):
        shapes |= {f"encoder.layer.0.{name}.{part}": (w,) for part in ("weight", "bias")}
    tensors = {name: torch.randn(shape) for name, shape in shapes.items()}
    safetensors.save_file(tensors, folder / "model.safetensors")
    torch.save(tensors, folder / "pytorch_model.bin")
    config = {"model_type": "bert", "num_hidden_layers": 1, "hidden_size": w, "num_attention_heads": 2, "intermediate_size": f,
              "vocab_size": v, "max_position_embeddings": T, "hidden_act": "gelu", "layer_norm_eps": 1e-12}
    (folder / "config.json").write_text(json.dumps(config))
    assert convert(folder).config["layers"] == 1
    return UnshownFiles({path.name: path.read_bytes() for path in folder.iterdir()})


def fill(folder, files):
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)


@fuzz
@given(broken=damage())
def test_safetensors(published, place, broken):
    (place / "config.json").write_bytes(published["config.json"])
    (place / "model.safetensors").write_bytes(broken(published["model.safetensors"]))
    refused_or_read(lambda: convert(place))


@fuzz
@given(name=st.sampled_from(("shape", "data_offsets", "dtype")), value=ANYTHING, size=st.one_of(st.none(), st.sampled_from(NUMBERS[:8])))
def test_safetensors_whose_header_lies(published, place, name, value, size):
    content = published["model.safetensors"]
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8:8 + length])
    header["embeddings.word_embeddings.weight"][name] = value if size is None else [size, size]
    text = json.dumps(header).encode()
    (place / "config.json").write_bytes(published["config.json"])
    (place / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length:])
    refused_or_read(lambda: convert(place))


@fuzz
@given(broken=damage(), member=st.booleans())
def test_pytorch_model_bin(published, place, broken, member):
    content = published["pytorch_model.bin"]
    (place / "pytorch_model.bin").write_bytes(inside(content, "data.pkl", broken) if member else broken(content))
    refused_or_read(lambda: read_tensors(place / "pytorch_model.bin"))


@fuzz
@given(broken=st.one_of(st.none(), damage()), data=st.data())
def test_config_json(published, place, broken, data):
    content = published["config.json"]
    if broken:
        content = broken(content)
    else:
        config = json.loads(content)
        config[data.draw(st.sampled_from([*config, "is_decoder", "quantization_config", "architectures", "position_embedding_type"]))] = data.draw(ANYTHING)
        content = json.dumps(config).encode()
    (place / "config.json").write_bytes(content)
    (place / "model.safetensors").write_bytes(published["model.safetensors"])
    refused_or_read(lambda: convert(place))


# ---- data ----

@fuzz
@given(content=st.binary(max_size=200), words=st.one_of(st.none(), st.binary(max_size=40), ANYTHING.map(lambda x: json.dumps(x).encode())))
def test_token_files(place, content, words):
    (place / "tokens.json").unlink(missing_ok=True)
    if words is not None:
        (place / "tokens.json").write_bytes(words)
    (place / "tokens.bin").write_bytes(content)
    text = refused_or_read(lambda: load_text(str(place / "tokens.bin"), 300))
    if text:
        assert len(content) % 2 == 0 and text.tokens.max() < 300


def npy(array):
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


RNG = np.random.default_rng(0)
IDX = lambda array: bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape) + array.tobytes()
ZEROS = lambda *shape: np.zeros(shape, dtype=np.uint8)
LAYOUTS = {
    "cifar": {"data_batch_1.bin": ZEROS(20, 3073).tobytes(), "test_batch.bin": ZEROS(10, 3073).tobytes()},
    "arrays": {"images.npy": npy(ZEROS(20, 4, 4, 3)), "labels.npy": npy(np.arange(20))},
    "idx": {"train-images-idx3-ubyte": IDX(ZEROS(20, 4, 4)), "train-labels-idx1-ubyte": IDX(ZEROS(20)),
            "t10k-images-idx3-ubyte": IDX(ZEROS(5, 4, 4)), "t10k-labels-idx1-ubyte": IDX(ZEROS(5))},
}


@fuzz
@given(layout=st.sampled_from(sorted(LAYOUTS)), data=st.data())
def test_images(tmp_path_factory, layout, data):
    folder = tmp_path_factory.mktemp("images")
    files = dict(LAYOUTS[layout])
    spoiled = data.draw(st.sampled_from(sorted(files)))
    for name, content in files.items():
        (folder / name).write_bytes(data.draw(damage())(content) if name == spoiled else content)
    source = refused_or_read(lambda: load_images(str(folder)))
    if source:
        images, labels = source.train.take(np.arange(len(source.train)))
        assert images.dtype == np.uint8 and images.shape[3] == 3 and 0 <= labels.min() and labels.max() < source.classes


@fuzz
@given(shape=st.lists(st.one_of(st.integers(0, 5), st.sampled_from((2 ** 31, 2 ** 63, 10 ** 30))), max_size=5).map(tuple),
       dtype=st.sampled_from(("|u1", "<i8", "|O", "<f4", "|V0", "|S0", "[('a', '<i8')]", "nonsense")),
       fortran=st.booleans(), name=st.sampled_from(("images.npy", "labels.npy")))
def test_npy_whose_header_lies(tmp_path_factory, shape, dtype, fortran, name):
    folder = tmp_path_factory.mktemp("arrays")
    for each, content in LAYOUTS["arrays"].items():
        (folder / each).write_bytes(content)
    descr = dtype if dtype.startswith("[") else repr(dtype)
    header = f"{{'descr': {descr}, 'fortran_order': {fortran}, 'shape': {shape}, }}".encode().ljust(117) + b"\n"
    (folder / name).write_bytes(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + bytes(1000))
    refused_or_read(lambda: load_images(str(folder)))
