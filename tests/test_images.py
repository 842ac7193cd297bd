"""Image sources, what is refused, and batches. Every file is made here and tiny."""
import hashlib
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from minq.flags import UserError
from minq.images import EXTENT, SHAPES, Images, Part, draw_shapes, load_images


# ---- files made by hand ----

def record(label, *colour):
    """CIFAR-10's: a label, then all red values, green, blue."""
    return bytes([label]) + b"".join(bytes([channel]) * 1024 for channel in colour)


def make_cifar(folder):
    folder.mkdir(exist_ok=True)
    planes = (np.arange(3072) % 251).astype(np.uint8).tobytes()
    (folder / "data_batch_1.bin").write_bytes(record(1, 10, 20, 30) + record(0, 1, 2, 3))
    (folder / "data_batch_2.bin").write_bytes(record(2, 4, 5, 6))
    (folder / "test_batch.bin").write_bytes(bytes([9]) + planes)
    return folder


def make_arrays(folder, count=40, size=6, labels=None, prefixes=("", "val_")):
    """Image i is filled with i; labels are sorted by class."""
    folder.mkdir(exist_ok=True)
    values = np.arange(count).astype(np.uint8)[:, None, None, None]
    labels = np.arange(count, dtype=np.uint8) // 10 if labels is None else labels
    for prefix in prefixes:
        np.save(folder / f"{prefix}images.npy", np.broadcast_to(values, (count, size, size, 3)))
        np.save(folder / f"{prefix}labels.npy", labels)
    return folder


def everything(part):
    return part.take(np.arange(len(part.labels)))


def hash_of(*parts):
    """Of labels and pixels."""
    arrays = (array for part in parts for array in (part.labels, part.images))
    return hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()


# ---- folders ----

def test_cifar10_layout(tmp_path):
    source = load_images(make_cifar(tmp_path))
    pixels, labels = everything(source.train)
    assert pixels.shape == (3, 32, 32, 3) and pixels.dtype == np.uint8 and source.classes == 10
    assert labels.tolist() == [1, 0, 2] and labels.dtype == np.int64
    assert (pixels[1] == (1, 2, 3)).all() and (pixels[2] == (4, 5, 6)).all()
    (pixels,), labels = everything(source.validation)
    assert labels.tolist() == [9]
    planes = np.arange(3072).reshape(3, 32, 32) % 251  # row by row, one colour after another
    assert np.array_equal(pixels, planes.transpose(1, 2, 0))
    assert source.sha256 == hash_of(source.train, source.validation)


def test_arrays_stay_on_disk(tmp_path):
    labels = np.array([0, 26, 1], dtype=np.uint8)
    data = load_images(make_arrays(
        make_arrays(tmp_path, 300), 3, labels=labels, prefixes=["val_"]))
    assert all(isinstance(part.images, np.memmap) for part in (data.train, data.validation))
    assert (len(data.train.labels), data.classes) == (300, 27)
    assert everything(data.validation)[1].tolist() == [0, 26, 1]
    assert data.sha256 == hash_of(data.train, data.validation)  # read 256 images at a time
    batch = data.train_batch(0, 0, 8)
    for x in data.train_batch(0, 0, 8):
        x[:] += 1  # batches are copies
    assert all(map(np.array_equal, batch, data.train_batch(0, 0, 8)))


# ---- what is refused ----

ZEROS = partial(np.zeros, dtype=np.uint8)


@pytest.mark.parametrize("make, name, content, expected", [  # content: of one file; None: no file
    (lambda path: path.mkdir() or path, "x", b"", "images.npy"),
    (Path, "", b"a file", "images.npy"),
    (make_cifar, "data_batch_2.bin", bytes(3072), ""), (make_cifar, "test_batch.bin", b"", "(0,)"),
    (make_cifar, "test_batch.bin", None, "batch"), (make_arrays, "labels.npy", None, "labels.npy"),
    *((make_arrays, "labels.npy", x, "(") for x in (ZEROS(39), ZEROS(40) / 2, ZEROS((40, 4)))),
    *((make_arrays, "labels.npy", x, "65535") for x in (np.arange(40) - 1, np.arange(40) * 2000)),
    (make_arrays, "labels.npy", np.arange(40) // 10 + 1, "0 among them"),
    (make_arrays, "labels.npy", np.array([{}]), ""), (make_arrays, "images.npy", b"no npy", ""),
    (make_arrays, "images.npy", bytes(np.lib.format.magic(1, 0)), ""),  # cut short
    (make_arrays, "images.npy", np.zeros((40, 6, 6, 3)), "float64"),
    *((make_arrays, "images.npy", ZEROS((40, *shape)), ", ".join(map(str, shape)))
      for shape in ((3, 6, 6), (6, 6), (6, 8, 3))),
    (make_arrays, "val_labels.npy", ZEROS(2), "(2,)"),
    (partial(make_arrays, count=0), "x", b"", ""),
    (make_arrays, "val_images.npy", None, "val_images.npy"),
    (lambda path: make_arrays(make_arrays(path), 9, 8, prefixes=["val_"]), "x", b"", "8, 8, 3)")])
def test_bad_data_is_named_in_one_line(tmp_path, make, name, content, expected):
    path = make(folder := tmp_path / "data") / name
    if isinstance(content, np.ndarray):
        np.save(path, content)
    else:
        path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(UserError) as error:
        load_images(folder)
    message = str(error.value)
    assert f"--data {folder}" in message and expected in message and "\n" not in message


# ---- shapes ----

@pytest.fixture(scope="module")
def shapes():
    return load_images("shapes")


def test_shapes_are_drawn_alike_each_time_and_none_twice(shapes):
    assert shapes.train.images.shape == (20_000, 32, 32, 3) and shapes.classes == 10
    for part, each in ((shapes.train, 2000), (shapes.validation, 200)):
        assert np.bincount(part.labels).tolist() == [each] * 10 and part.images.dtype == np.uint8
    parts = (shapes.train, shapes.validation)
    assert len({row.tobytes() for part in parts for row in part.images}) == 22_000
    assert all(map(np.array_equal, draw_shapes(2_000, seed=1), everything(shapes.validation)))
    assert shapes.sha256.startswith("50eba72e34fc949c")  # of results/


@pytest.mark.parametrize("name", SHAPES)
def test_each_shape_has_area_2_within_its_extent(name):
    x, y = np.meshgrid(*[(np.arange(800) + 0.5) / 200 - 2] * 2)
    inside = SHAPES[name](x, y) < 0
    assert abs(inside.mean() * 16 - 2) < 0.03 and np.hypot(x, y)[inside].max() < EXTENT


# ---- batches ----

@pytest.fixture(scope="module")
def numbered():
    """Image i is filled with i."""
    def part(numbers):
        values = np.array(numbers, dtype=np.uint8)
        return Part(np.repeat(values, 48).reshape(-1, 4, 4, 3), values.astype(np.int64))
    return Images(part(range(100)), part(range(100, 150)))


def test_train_batches_are_pure_and_floats_from_0_to_1_for_the_model(numbered):
    pixels, labels = numbered.train_batch(seed=1, step=7, size=64)
    assert pixels.shape == (64, 4, 4, 3) and pixels.dtype == np.uint8 and labels.dtype == np.int64
    assert (pixels[:, 0, 0, 0] == labels).all()
    same = [np.array_equal(labels, numbered.train_batch(*key, 64)[1])
            for key in ((1, 7), (1, 8), (2, 7))]
    assert same == [True, False, False]
    assert set(numbered.train_batch(0, 0, 5000)[1]) == set(range(100))  # each can be drawn

    pixels[:, 1, 2] = (255, 51, 0)
    (x,), y = numbered.to_model(pixels, labels)
    assert torch.equal(x, torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255) and x.max() == 1
    assert torch.equal(y, torch.from_numpy(labels))
    drawn, again = numbered.to_float(*numbered.train.take(numbered.train_rows(1, 7, 64)))
    assert torch.equal(drawn[:, :, 0], x[:, :, 0]) and torch.equal(y, again)
    larger = Images(numbered.train, numbered.validation, image_size=8)
    assert larger.to_model(pixels, labels)[0][0].shape == (64, 3, 8, 8)
    assert (numbered.classes, numbered.image_size, larger.image_size) == (150, 4, 8)


def test_validation_batches_are_spread_evenly_and_end_with_the_images(numbered):
    found = lambda *split: [x.tolist() for _, x in numbered.validation_batches(*split)]
    labels, gaps = found(4, 3), np.diff(sum(found(4, 3), []))
    assert [len(batch) for batch in labels] == [4, 4, 4] and set(gaps) == {4, 5}
    assert labels[0][0] == 100 and labels[-1][-1] == 149
    assert [len(batch) for batch in found(20, 99)] == [20, 20, 10]
    assert sum(found(20, 99), []) == list(range(100, 150))