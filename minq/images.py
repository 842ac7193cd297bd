"""Images as numbers, for the ViT: drawn by code, CIFAR-10, MNIST's files, or an array on disk.

The sister of data.py: batch `step` of a run is a pure function of (seed, step). Images are uint8
(N, H, W, 3) until `to_model` makes them float (B, 3, H, W).
"""
import hashlib
import math
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from minq.augment import centre_crop
from minq.download import CIFAR10, unpacked
from minq.errors import UserError, in_one_line
from minq.shapes import SHAPES, draw_shapes

CIFAR10_RECORD = 1 + 3 * 32 * 32  # bytes: the label, then all red values, all green, all blue
MOST_CLASSES = 2 ** 16            # where a file does not tell, a larger label is taken for an error
VALIDATION_SHARE = 0.1            # of an array that comes without validation images


# ---- sources ----

@dataclass
class Part:
    """Images (N, H, W, 3) uint8, in memory or on disk, and labels (N,) int64; only `rows` of them, unless None."""
    images: np.ndarray
    labels: np.ndarray
    rows: np.ndarray | None = None

    def __len__(self):
        return len(self.labels if self.rows is None else self.rows)

    def take(self, indices):
        """(images, labels) at `indices`, copied into memory."""
        rows = indices if self.rows is None else self.rows[indices]
        return np.array(self.images[rows]), self.labels[rows]


@dataclass
class ImageSource:
    """Labelled images to train on and to validate with; they never overlap."""
    train: Part
    validation: Part
    classes: int
    sha256: str


def load_images(source):
    """Open `--data`: a name in IMAGES, or a folder that `read_folder` knows. Else raises UserError."""
    try:
        train, validation, classes = IMAGES[source]() if source in IMAGES else read_folder(Path(source))
    except OSError as error:
        raise UserError(f"--data {source}: cannot be read: {error.strerror}: {error.filename}") from None
    if not len(train) or not len(validation):
        raise UserError(f"--data {source}: has {len(train)} images to train on and {len(validation)} "
                        "to validate with; expected some of both")
    if train.images.shape[1:] != validation.images.shape[1:]:
        raise UserError(f"--data {source}: images to train on have shape {train.images.shape[1:]}, those "
                        f"to validate with {validation.images.shape[1:]}; expected the same")
    return ImageSource(train, validation, classes, sha256_of(train, validation))


# A name for --data -> (Part to train on, Part to validate with, number of classes).
IMAGES = {
    "shapes": lambda: (Part(*draw_shapes(20_000, seed=0)), Part(*draw_shapes(2_000, seed=1)), len(SHAPES)),
    "cifar10": lambda: read_folder(unpacked(CIFAR10, "--data cifar10")),
}


def sha256_of(train, validation):
    """The hash of all labels and images; of an array beyond 1 GiB (ImageNet) a thousand images stand for all."""
    digest = hashlib.sha256()
    for part in (train, validation) if validation.rows is None else (train,):  # with rows, both hold the same array
        digest.update(part.labels)
        stride = 1 if part.images.nbytes < 2 ** 30 else max(1, len(part.images) // 1000)
        for start in range(0, len(part.images), 256 * stride):
            digest.update(np.ascontiguousarray(part.images[start:start + 256 * stride:stride]))
    return digest.hexdigest()


# ---- folders ----

def read_folder(folder):
    """(train, validation, classes) of a folder, whose layout shows in the names of its files."""
    if not folder.is_dir():
        raise UserError(f"--data {folder}: no such folder; built in: {', '.join(IMAGES)}")
    if any(folder.glob("data_batch_*.bin")):
        return read_cifar10(folder)
    if (folder / "images.npy").exists():
        return read_arrays(folder)
    if (folder / "train-images-idx3-ubyte").exists():
        return read_mnist(folder)
    raise UserError(f"--data {folder}: no images in it; expected data_batch_*.bin and test_batch.bin (CIFAR-10), "
                    "images.npy and labels.npy, or train-images-idx3-ubyte and its like (MNIST)")


def read_cifar10(folder):
    """CIFAR-10's binary layout: data_batch_*.bin to train on, test_batch.bin to validate with."""
    def part(paths):
        for path in paths:
            if path.stat().st_size % CIFAR10_RECORD:
                raise UserError(f"--data {folder}: {path.name} has {path.stat().st_size} bytes; "
                                f"expected records of {CIFAR10_RECORD}")
        records = np.concatenate([np.fromfile(path, dtype=np.uint8) for path in paths]).reshape(-1, CIFAR10_RECORD)
        images = records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)  # (N, 32, 32, 3)
        return checked_part(folder, images, records[:, 0], most_classes=10)

    return part(sorted(folder.glob("data_batch_*.bin"))), part([folder / "test_batch.bin"]), 10


def read_arrays(folder):
    """images.npy, uint8 (N, H, W, 3), which stays on disk, and labels.npy: the way for ImageNet at 224.

    val_images.npy and val_labels.npy are to validate with. Without them a tenth of the rows is,
    chosen at random and always the same, because such arrays are often sorted by class.
    """
    def part(prefix):
        try:
            with warnings.catch_warnings(action="ignore"):  # of sizes that overflow
                images, labels = (np.lib.format.open_memmap(folder / f"{prefix}{name}.npy", mode="r")
                                  for name in ("images", "labels"))
        except OSError:
            raise
        except Exception as error:  # NumPy reads a header as Python, and raises anything
            raise UserError(f"--data {folder}: {prefix}images.npy or {prefix}labels.npy is no array: {in_one_line(error)}") from None
        return checked_part(folder, images, labels, MOST_CLASSES)

    train = part("")
    if any(folder.glob("val_*.npy")):
        validation = part("val_")
    else:
        rows = np.random.default_rng(0).permutation(len(train))
        boundary = int(len(rows) * (1 - VALIDATION_SHARE))
        validation = Part(train.images, train.labels, np.sort(rows[boundary:]))
        train = Part(train.images, train.labels, np.sort(rows[:boundary]))
    return train, validation, largest_label(train, validation) + 1


def read_mnist(folder):
    """MNIST's layout (and Fashion-MNIST's), unpacked; its grey value serves as red, green and blue."""
    def part(prefix):
        grey = read_idx(folder, f"{prefix}-images-idx3-ubyte", dimensions=3)
        labels = read_idx(folder, f"{prefix}-labels-idx1-ubyte", dimensions=1)
        return checked_part(folder, np.broadcast_to(grey[..., None], (*grey.shape, 3)), labels, MOST_CLASSES)

    train, validation = part("train"), part("t10k")
    return train, validation, largest_label(train, validation) + 1


def read_idx(folder, name, dimensions):
    """A file of big-endian uint32 (0x0800 + the number of dimensions, the size of each), then uint8 values."""
    header, values = np.split(np.fromfile(folder / name, dtype=np.uint8), [4 + 4 * dimensions])
    if header.size != 4 + 4 * dimensions or header.view(">u4")[0] != 0x0800 + dimensions:
        raise UserError(f"--data {folder}: {name} does not start with {0x0800 + dimensions:#010x} and "
                        f"{dimensions} sizes; expected an unpacked IDX file")
    shape = header.view(">u4")[1:].tolist()
    if values.size != math.prod(shape):
        raise UserError(f"--data {folder}: {name} holds {values.size} values; its header says {shape}")
    return values.reshape(shape)


def checked_part(folder, images, labels, most_classes):
    """A Part, if images and labels are what its fields promise and the images are square."""
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or not 0 < images.shape[1] == images.shape[2]:
        raise UserError(f"--data {folder}: images are {images.dtype} of shape {images.shape}; "
                        "expected uint8 of shape (N, H, H, 3)")
    if labels.dtype.kind not in "iu" or labels.shape != (len(images),):
        raise UserError(f"--data {folder}: labels are {labels.dtype} of shape {labels.shape}; "
                        f"expected integers of shape ({len(images)},), one an image")
    part = Part(images, np.array(labels, dtype=np.int64))
    if len(part) and (part.labels.min() < 0 or part.labels.max() >= most_classes):
        raise UserError(f"--data {folder}: labels run from {part.labels.min()} to {part.labels.max()}; "
                        f"expected 0 to {most_classes - 1} at most")
    return part


def largest_label(train, validation):
    return int(max(train.labels.max(initial=0), validation.labels.max(initial=0)))


# ---- batches ----

def share(batches, rank, world):
    """The part of a sequence of batches that one of `world` processes evaluates: all, where there are too few."""
    return batches[rank::world] if len(batches) >= world else batches


def mapped_files(*arrays):
    """The files that arrays show as they are on the disk now, rather than as they were when they were opened."""
    return {array.filename for array in arrays if isinstance(array, np.memmap) and array.filename}


class Images:
    """Batches of labelled images, uint8; `to_model` makes them floats. The model itself normalizes them.

    `image_size` is what the model sees; images of another size are resized and cropped (C.3).
    """
    unit = "images"

    def __init__(self, source, image_size=None):
        self.source, self.classes, self.sha256 = source, source.classes, source.sha256
        self.image_size = image_size or source.train.images.shape[1]
        self.files = mapped_files(*(array for part in (source.train, source.validation) for array in (part.images, part.labels)))
        self.sizes = {"image_size": self.image_size, "classes": self.classes}  # as the model's config must have them

    def train_rows(self, seed, step, size):
        """Which images batch `step` holds, (size,), drawn at random: the same for the same (seed, step)."""
        return np.random.default_rng((seed, step)).integers(len(self.source.train), size=size)

    def train_batch(self, seed, step, size):
        """(images (size, H, W, 3), labels (size,)), as they are on disk."""
        return self.source.train.take(self.train_rows(seed, step, size))

    def train_images(self, rows):
        """The images (B, 3, H, W) and labels (B,) of some `train_rows`, to be augmented."""
        return self.to_float(*self.source.train.take(rows))

    def validation_batches(self, size, batches, rank=0, world=1):
        """Up to `batches` pairs (images, labels): always the same images, evenly spread, none twice."""
        available = len(self.source.validation)
        chosen = np.linspace(0, available - 1, min(available, size * batches)).astype(int)
        for i in share(range(0, len(chosen), size), rank, world):
            yield self.source.validation.take(chosen[i:i + size])

    @staticmethod
    def to_float(images, labels):
        """Arrays -> (images (B, 3, H, W) from 0 to 1, labels (B,)), floats and int64."""
        return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255, torch.from_numpy(labels)

    def to_model(self, images, labels):
        """Arrays -> ((images (B, 3, image_size, image_size),), labels (B,)), cropped as for evaluation."""
        images, labels = self.to_float(images, labels)
        return (centre_crop(images, self.image_size),), labels
