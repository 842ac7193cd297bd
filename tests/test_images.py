"""Image sources, their errors, and batches. Every file is made here and tiny."""
import hashlib
import os
import struct

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from minq.errors import UserError
from minq.images import Images, ImageSource, Part, load_images
from minq.shapes import EXTENT, SHAPES, draw_shapes


# ---- files made by hand ----

def cifar_record(label, red, green, blue):
    return bytes([label]) + bytes([red]) * 1024 + bytes([green]) * 1024 + bytes([blue]) * 1024


def make_cifar(folder, train_files=2):
    folder.mkdir(parents=True, exist_ok=True)
    for k in range(1, train_files + 1):
        (folder / f"data_batch_{k}.bin").write_bytes(cifar_record(k, 10 * k, 20, 30) + cifar_record(0, 1, 2, 3))
    (folder / "test_batch.bin").write_bytes(cifar_record(9, 200, 100, 50))
    return folder


def make_arrays(folder, count=40, size=6, prefix="", labels=None):
    """Image i is filled with i; labels are sorted by class."""
    folder.mkdir(exist_ok=True)
    values = np.arange(count).astype(np.uint8)[:, None, None, None]
    np.save(folder / f"{prefix}images.npy", np.broadcast_to(values, (count, size, size, 3)))
    np.save(folder / f"{prefix}labels.npy", np.arange(count, dtype=np.uint8) // 10 if labels is None else labels)
    return folder


def idx(values):
    """An IDX file as the format's page words it: magic number and sizes most significant byte first."""
    return struct.pack(f">{1 + values.ndim}I", 0x0800 + values.ndim, *values.shape) + values.tobytes()


def make_mnist(folder, count=5):
    folder.mkdir(exist_ok=True)
    for prefix, n in (("train", count), ("t10k", 2)):
        (folder / f"{prefix}-images-idx3-ubyte").write_bytes(idx(np.arange(n * 16, dtype=np.uint8).reshape(n, 4, 4)))
        (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(idx(np.arange(n, dtype=np.uint8)))
    return folder


def everything(part):
    return part.take(np.arange(len(part)))


# ---- folders ----

def test_cifar10_layout(tmp_path):
    source = load_images(make_cifar(tmp_path))
    pixels, labels = everything(source.train)
    assert pixels.shape == (4, 32, 32, 3) and pixels.dtype == np.uint8
    assert labels.tolist() == [1, 0, 2, 0] and labels.dtype == np.int64
    assert (pixels[2] == (20, 20, 30)).all() and (pixels[3] == (1, 2, 3)).all()  # red, green, blue last
    pixels, labels = everything(source.validation)
    assert labels.tolist() == [9] and (pixels[0] == (200, 100, 50)).all()
    assert source.classes == 10


def test_cifar10_rows_and_columns(tmp_path):
    make_cifar(tmp_path)
    planes = np.arange(3072) % 251
    (tmp_path / "test_batch.bin").write_bytes(bytes([3]) + planes.astype(np.uint8).tobytes())
    pixels, _ = everything(load_images(tmp_path).validation)
    for row, column, channel in [(0, 1, 0), (1, 0, 0), (5, 7, 1), (31, 30, 2)]:
        assert pixels[0, row, column, channel] == planes[channel * 1024 + row * 32 + column]


def test_arrays_stay_on_disk(tmp_path):
    source = load_images(make_arrays(tmp_path))
    assert isinstance(source.train.images, np.memmap) and isinstance(source.validation.images, np.memmap)
    pixels, labels = everything(source.train)
    assert type(pixels) is np.ndarray and (pixels[:, 0, 0, 0] // 10 == labels).all()
    assert source.classes == 4


def test_arrays_without_validation_are_split_at_random(tmp_path):
    source = load_images(make_arrays(tmp_path, count=200, labels=np.arange(200) // 20))
    train, validation = (everything(part)[0][:, 0, 0, 0] for part in (source.train, source.validation))
    assert (len(train), len(validation)) == (180, 20)
    assert sorted([*train, *validation]) == list(range(200))  # nothing twice, nothing lost
    assert len(set(validation // 20)) >= 6  # a contiguous tenth of a sorted array would be one class
    assert np.array_equal(source.validation.rows, load_images(tmp_path).validation.rows)


def test_arrays_with_validation(tmp_path):
    make_arrays(tmp_path)
    source = load_images(make_arrays(tmp_path, count=3, prefix="val_", labels=np.array([0, 6, 1], dtype=np.uint8)))
    assert (len(source.train), len(source.validation), source.classes) == (40, 3, 7)
    assert everything(source.validation)[1].tolist() == [0, 6, 1]


def test_mnist_layout(tmp_path):
    source = load_images(make_mnist(tmp_path))
    pixels, labels = everything(source.train)
    assert pixels.shape == (5, 4, 4, 3) and labels.tolist() == [0, 1, 2, 3, 4] and source.classes == 5
    assert (pixels == np.arange(80).reshape(5, 4, 4, 1)).all()
    assert source.train.images.strides[-1] == 0  # three channels, one of them in memory
    assert len(source.validation) == 2


@pytest.mark.parametrize("make, places", [(make_cifar, (0, -1)), (make_arrays, (-1,)), (make_mnist, (-1,))])
def test_the_hash_sees_labels_and_pixels(tmp_path, make, places):
    folder = make(tmp_path / "data")
    sha256 = load_images(folder).sha256
    assert load_images(make(tmp_path / "copy")).sha256 == sha256
    for file in folder.iterdir():
        for place in places:  # CIFAR-10's first byte is a label, its last a pixel
            content = bytearray(file.read_bytes())
            content[place] ^= 1
            good = file.read_bytes()
            file.write_bytes(content)
            assert load_images(folder).sha256 != sha256, (file.name, place)
            file.write_bytes(good)


def test_hash_does_not_depend_on_pieces(tmp_path):
    source = load_images(make_arrays(tmp_path, count=300, labels=zeros(300)))  # pieces of 256
    pixels = np.load(tmp_path / "images.npy")
    assert source.sha256 == hashlib.sha256(bytes(8 * 300) + pixels.tobytes()).hexdigest()


# ---- what is refused ----

def spoiled(make, name, content):
    """A function that makes a good folder and then replaces one file of it; None removes the file."""
    def spoil(folder):
        make(folder)
        if content is None:
            (folder / name).unlink()
        elif isinstance(content, bytes):
            (folder / name).write_bytes(content)
        else:
            np.save(folder / name, content)
    return spoil


def zeros(*shape, dtype=np.uint8):
    return np.zeros(shape, dtype)


BAD = {
    "missing": (lambda folder: None, "no such folder"),
    "a file": (lambda folder: folder.write_bytes(b"x"), "no such folder"),
    "nothing in it": (lambda folder: folder.mkdir(), "expected data_batch"),

    "cifar, cut short": (spoiled(make_cifar, "data_batch_2.bin", bytes(3072)), "data_batch_2.bin has 3072 bytes"),
    "cifar, label 10": (spoiled(make_cifar, "test_batch.bin", cifar_record(10, 0, 0, 0)), "run from 10 to 10"),
    "cifar, no test": (spoiled(make_cifar, "test_batch.bin", None), "test_batch.bin"),
    "cifar, empty": (spoiled(make_cifar, "test_batch.bin", b""), "0 to validate"),

    "arrays, no labels": (spoiled(make_arrays, "labels.npy", None), "labels.npy"),
    "arrays, lengths": (spoiled(make_arrays, "labels.npy", zeros(39)), "(39,); expected integers of shape (40,)"),
    "arrays, floats": (spoiled(make_arrays, "images.npy", zeros(40, 6, 6, 3, dtype=float)), "float64"),
    "arrays, channels first": (spoiled(make_arrays, "images.npy", zeros(40, 3, 6, 6)), "(40, 3, 6, 6)"),
    "arrays, grey": (spoiled(make_arrays, "images.npy", zeros(40, 6, 6)), "(40, 6, 6)"),
    "arrays, not square": (spoiled(make_arrays, "images.npy", zeros(40, 6, 8, 3)), "(40, 6, 8, 3)"),
    "arrays, float labels": (spoiled(make_arrays, "labels.npy", zeros(40, dtype=float)), "float64"),
    "arrays, one-hot labels": (spoiled(make_arrays, "labels.npy", zeros(40, 4)), "(40, 4)"),
    "arrays, negative label": (spoiled(make_arrays, "labels.npy", np.arange(40) - 1), "run from -1 to 38"),
    "arrays, huge label": (spoiled(make_arrays, "labels.npy", np.arange(40) * 10_000), "run from 0 to 390000"),
    "arrays, objects": (spoiled(make_arrays, "labels.npy", np.array([{}] * 40)), "labels.npy"),
    "arrays, not npy": (spoiled(make_arrays, "images.npy", b"PK not an array"), "images.npy"),
    "arrays, cut short": (lambda folder: os.truncate(make_arrays(folder) / "images.npy", 1000), "images.npy"),
    "arrays, empty": (lambda folder: make_arrays(folder, count=0), "expected"),
    "arrays, one image": (lambda folder: make_arrays(folder, count=1), "expected some of both"),
    "arrays, labels to validate": (spoiled(make_arrays, "val_labels.npy", zeros(2)), "val_images.npy"),
    "arrays, sizes": (lambda folder: make_arrays(make_arrays(folder), size=8, prefix="val_"), "(8, 8, 3)"),

    "idx, other magic": (spoiled(make_mnist, "train-labels-idx1-ubyte", idx(zeros(5, 1))), "0x00000801"),
    "idx, little-endian": (spoiled(make_mnist, "train-images-idx3-ubyte",
                                   struct.pack("<4I", 0x803, 1, 4, 4) + bytes(16)), "0x00000803"),
    "idx, cut short": (spoiled(make_mnist, "t10k-images-idx3-ubyte", idx(zeros(2, 4, 4))[:-1]), "31 values"),
    "idx, no header": (spoiled(make_mnist, "train-images-idx3-ubyte", b"\0\0\x08"), "0x00000803"),
    "idx, lengths": (spoiled(make_mnist, "train-labels-idx1-ubyte", idx(zeros(4))), "(4,)"),
    "idx, no test": (spoiled(make_mnist, "t10k-labels-idx1-ubyte", None), "t10k-labels-idx1-ubyte"),
    "idx, empty": (lambda folder: make_mnist(folder, count=0), "0 images to train on"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_data_is_named_in_one_line(tmp_path, name):
    make, expected = BAD[name]
    folder = tmp_path / "data"
    make(folder)
    with pytest.raises(UserError) as error:
        load_images(folder)
    assert f"--data {folder}" in str(error.value) and expected in str(error.value)
    assert "\n" not in str(error.value)


# ---- shapes ----

@pytest.fixture(scope="module")
def shapes():
    return load_images("shapes")


def test_shapes_source(shapes):
    assert shapes.classes == 10
    assert shapes.train.images.shape == (20_000, 32, 32, 3) and shapes.train.images.dtype == np.uint8
    for part, each in ((shapes.train, 2000), (shapes.validation, 200)):
        assert np.bincount(part.labels).tolist() == [each] * 10
    hashes = [{row.tobytes() for row in part.images} for part in (shapes.train, shapes.validation)]
    assert len(hashes[0] | hashes[1]) == 22_000  # no image twice, none in both parts


def test_shapes_are_deterministic(shapes):
    images, labels = draw_shapes(2_000, seed=1)
    assert np.array_equal(images, shapes.validation.images)
    assert np.array_equal(labels, shapes.validation.labels)
    assert not np.array_equal(draw_shapes(2_000, seed=2)[0], images)


@pytest.mark.parametrize("name", SHAPES)
def test_each_shape_has_area_2_within_its_extent(name):
    x, y = np.meshgrid(*[(np.arange(800) + 0.5) / 200 - 2] * 2)
    inside = SHAPES[name](x, y) < 0
    assert abs(inside.mean() * 16 - 2) < 0.03
    assert np.hypot(x, y)[inside].max() < EXTENT


def test_a_drawn_shape_covers_its_area():
    part = Part(*draw_shapes(500, seed=3))
    grey = part.images.astype(float).mean(axis=-1)
    border = np.concatenate([grey[:, 0], grey[:, -1], grey[:, :, 0], grey[:, :, -1]], axis=1)
    bright = grey > (border.max(axis=1) + 15)[:, None, None]
    area = bright.sum(axis=(1, 2))
    assert 50 < np.median(area) < 200  # 2 * (0.25 * 32)^2 = 128 on average
    assert not (bright[:, 0].any() or bright[:, -1].any())  # never cut off


def linear_accuracy(train, validation, steps=100):
    """Multinomial logistic regression on pairs (features, labels): its accuracy in percent on the second."""
    mean, std = train[0].mean(axis=0), train[0].std(axis=0)
    x, x_val = (torch.tensor((features - mean) / std, dtype=torch.float32) for features, _ in (train, validation))
    y, y_val = (torch.from_numpy(labels) for _, labels in (train, validation))
    weight = torch.zeros(x.shape[1], 10, requires_grad=True)
    optimizer = torch.optim.Adam([weight], lr=0.2 / x.shape[1] ** 0.5)
    for rows in torch.arange(steps * 500).remainder(len(x)).split(500):
        optimizer.zero_grad()
        F.cross_entropy(x[rows] @ weight, y[rows]).backward()
        optimizer.step()
    return 100 * ((x_val @ weight).argmax(1) == y_val).float().mean().item()


@pytest.mark.slow
def test_a_linear_model_cannot_tell_shapes(shapes):
    def pixels(part, count):
        return part.images[:count].reshape(count, -1).astype(np.float32), part.labels[:count]
    train, validation = pixels(shapes.train, 8_000), pixels(shapes.validation, 2_000)
    assert 18 < linear_accuracy(train, validation) < 40  # it sees how far shapes spread, but not what they are

    for features, labels in (train, validation):  # the same probe finds a class that 10 of the 1024 pixels tell
        features.reshape(-1, 1024, 3)[np.arange(len(labels)), labels] = 255
    assert linear_accuracy(train, validation) > 90


@pytest.mark.slow
def test_colours_do_not_tell_the_class(shapes):
    def colours(part):
        """Mean, spread and products of the channels over each image: (N, 12)."""
        values = part.images.reshape(len(part), -1, 3).astype(np.float32) / 255
        mean, std = values.mean(axis=1), values.std(axis=1)
        return np.concatenate([mean, std, mean ** 2, mean * std], axis=1), part.labels
    train, validation = colours(shapes.train), colours(shapes.validation)
    assert linear_accuracy(train, validation) < 14  # chance is 10, three standard errors of it 2

    for features, labels in (train, validation):
        features[:, :3] += 0.3 * (labels % 2)[:, None]  # odd classes brighter
    assert linear_accuracy(train, validation) > 16


# ---- batches ----

@pytest.fixture(scope="module")
def numbered():
    """Image i is filled with i."""
    def part(numbers):
        values = np.array(numbers, dtype=np.uint8)
        return Part(np.repeat(values, 48).reshape(-1, 4, 4, 3), values.astype(np.int64))
    return Images(ImageSource(part(range(100)), part(range(100, 150)), 150, "0"))


def test_train_batches_are_pure(numbered):
    pixels, labels = numbered.train_batch(seed=1, step=7, size=64)
    numbered.train_batch(seed=1, step=8, size=64)
    assert pixels.shape == (64, 4, 4, 3) and pixels.dtype == np.uint8 and labels.dtype == np.int64
    assert (pixels[:, 0, 0, 0] == labels).all()
    assert np.array_equal(labels, numbered.train_batch(1, 7, 64)[1])
    assert not np.array_equal(labels, numbered.train_batch(1, 8, 64)[1])
    assert not np.array_equal(labels, numbered.train_batch(2, 7, 64)[1])


def test_every_training_image_can_be_drawn(numbered):
    assert set(numbered.train_batch(0, 0, 5000)[1]) == set(range(100))


def test_validation_batches(numbered):
    labels = [labels.tolist() for _, labels in numbered.validation_batches(size=4, batches=3)]
    assert [len(batch) for batch in labels] == [4, 4, 4]
    flat = sum(labels, [])
    gaps = np.diff(flat)
    assert flat[0] == 100 and flat[-1] == 149 and gaps.min() >= 4 and gaps.max() <= 5
    assert labels == [labels.tolist() for _, labels in numbered.validation_batches(size=4, batches=3)]


def test_validation_ends_with_the_images(numbered):
    labels = [labels.tolist() for _, labels in numbered.validation_batches(size=20, batches=99)]
    assert [len(batch) for batch in labels] == [20, 20, 10] and sum(labels, []) == list(range(100, 150))


def test_batches_are_copies(tmp_path):
    data = Images(load_images(make_arrays(tmp_path)))
    pixels, labels = data.train_batch(0, 0, 8)
    pixels[:], labels[:] = 255, 255
    assert data.train_batch(0, 0, 8)[0].max() < 255 and data.train_batch(0, 0, 8)[1].max() < 255


def test_to_model(numbered):
    pixels = np.zeros((2, 4, 4, 3), dtype=np.uint8)
    pixels[1, 2, 3] = (255, 51, 0)
    (x,), labels = numbered.to_model(pixels, np.array([3, 1]))
    assert x.shape == (2, 3, 4, 4) and x.dtype == torch.float32
    assert torch.equal(x[1, :, 2, 3], torch.tensor([1.0, 0.2, 0.0])) and x.sum() == x[1, :, 2, 3].sum()
    assert labels.tolist() == [3, 1] and labels.dtype == torch.int64


def test_the_model_may_see_another_size(numbered):
    data = Images(numbered.source, image_size=8)
    (x,), _ = data.to_model(*data.train_batch(0, 0, 5))
    assert data.image_size == 8 and x.shape == (5, 3, 8, 8) and numbered.image_size == 4


def test_attributes(shapes):
    data = Images(shapes)
    assert (data.classes, data.image_size, data.sha256) == (10, 32, shapes.sha256)
