"""Images as numbers, for the ViT: drawn by code, CIFAR-10, or an array on disk.

The sister of data.py: batch `step` of a run is a pure function of (seed, step). Images are uint8
(N, H, W, 3) until `to_model` makes them float (B, 3, H, W).
"""
import hashlib
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from minq.augment import centre_crop
from minq.data import downloaded, spread
from minq.flags import UserError

CIFAR10 = ("https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
           "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd")


# ---- sources ----

class Part(NamedTuple):
    """Images (N, H, W, 3) uint8, in memory or on disk, and labels (N,), int64 once loaded."""
    images: np.ndarray
    labels: np.ndarray

    def take(self, indices):
        """(images, labels) at `indices`, copied into memory."""
        return np.array(self.images[indices]), self.labels[indices]


def load_images(source, image_size=None):
    """Images from `--data`: a name in IMAGES, or a folder that `read_folder` knows. Else
    UserError."""
    try:
        parts = IMAGES[source]() if source in IMAGES else read_folder(Path(source))
    except (OSError, ValueError) as error:
        raise UserError(f"--data {source}: {error}; built in: {', '.join(IMAGES)}") from None
    for images, labels in parts:
        square = images.shape[1:] == (*images.shape[1:2] * 2, 3) == parts[0].images.shape[1:]
        if images.dtype != np.uint8 or not square:
            raise UserError(f"--data {source}: images are {images.dtype} {images.shape}; expected "
                            "uint8 (N, H, H, 3), to validate with as to train on")
        counted = labels.dtype.kind in "iu" and labels.shape == images.shape[:1] and len(labels)
        if not counted or labels.min() < 0 or parts[0].labels.min() or labels.max() >= 2 ** 16:
            raise UserError(f"--data {source}: labels are {labels.dtype} {labels.shape}; expected "
                            "whole numbers, 0 among them, up to 65535, one per image")
    return Images(*(Part(x.images, np.array(x.labels, np.int64)) for x in parts), image_size)


# A name for --data -> (Part to train on, Part to validate with).
IMAGES = {
    "shapes": lambda: (Part(*draw_shapes(20_000, seed=0)), Part(*draw_shapes(2_000, seed=1))),
    "cifar10": lambda: read_folder(downloaded("cifar-10-batches-bin", *CIFAR10)),
}


def sha256_of(train, validation):
    """The hash of labels and images; beyond 1 GiB (ImageNet) a thousand images stand for all."""
    digest = hashlib.sha256()
    for part in (train, validation):
        digest.update(part.labels)
        stride = 1 if part.images.nbytes < 2 ** 30 else max(1, len(part.images) // 1000)
        for start in range(0, len(part.images), n := 256 * stride):
            digest.update(np.ascontiguousarray(part.images[start:start + n:stride]))
    return digest.hexdigest()


# ---- folders ----

def read_folder(folder):
    """[train, validation] of a folder: CIFAR-10's files; or arrays, the way for ImageNet, which
    stay on disk: images.npy, uint8 (N, H, W, 3), and labels.npy, val_images.npy, val_labels.npy."""
    if batches := sorted(folder.glob("data_batch_*.bin")):
        return read_cifar10(batches), read_cifar10([folder / "test_batch.bin"])
    return [Part(*(np.load(folder / f"{prefix}{x}.npy", "r") for x in ("images", "labels")))
            for prefix in ("", "val_")]


def read_cifar10(paths):
    """CIFAR-10's binary layout: records of a label, then all red values, green, blue."""
    records = np.concatenate([np.fromfile(path, np.uint8) for path in paths]).reshape(-1, 3073)
    return Part(records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), records[:, 0])


# ---- pictures drawn by code: an object of ten classes on a background that tells nothing ----

def radius(x, y):
    return np.sqrt(x * x + y * y)


def sides(x, y, n):
    """How far a point lies towards each side of a regular polygon: (n, ...). Their maximum draws
    the polygon."""
    angles = [2 * math.pi * k / n for k in range(n)]
    return np.stack([x * math.sin(angle) + y * math.cos(angle) for angle in angles])


# About the distance to the edge, negative inside. Each lies within EXTENT of its centre, and each
# has the area 2: how much there is of a colour must not tell the class.
EXTENT = 1.42
SHAPES = {
    "circle": lambda x, y: radius(x, y) - 0.8,
    "ring": lambda x, y: abs(radius(x, y) - 0.8) - 0.2,
    "crescent": lambda x, y: np.maximum(radius(x - 0.36, y) - 1.05, 0.84 - radius(x - 1.06, y)),
    "heart": lambda x, y: radius(x, y + 0.48 - 0.9 * np.sqrt(abs(x))) - 0.8,
    "triangle": lambda x, y: sides(x, y, 3).max(axis=0) - 0.62,
    "square": lambda x, y: sides(x, y, 4).max(axis=0) - 0.71,
    "star": lambda x, y: np.sort(sides(x, y, 5), axis=0)[-2] - 0.412,  # beyond one side at most
    "plus": lambda x, y: np.maximum(np.minimum(abs(x), abs(y)) - 0.29,
                                    np.maximum(abs(x), abs(y)) - 1.0),
    "bow tie": lambda x, y: np.maximum(0.71 * (abs(y) - abs(x)), abs(x) - 1.0),
    "arrow": lambda x, y: np.minimum(sides(x, y + 0.4, 3).max(axis=0) - 0.5,
                                     np.maximum(abs(x) - 0.3, abs(y - 0.65) - 0.6)),
}


def draw_shapes(count, seed, size=32):
    """Images (count, size, size, 3) uint8 and labels (count,), one shape each.

    Its place, size, tilt (up to 45 degrees) and colours are drawn at random. Pixels go only through
    float32 operations that every machine rounds alike, no sines among them, so that the images and
    their hash are the same everywhere.
    """
    rng = np.random.default_rng(seed)

    def uniform(low, high, *shape):
        return rng.uniform(low, high, shape).astype(np.float32)

    images = np.empty((count, size, size, 3), dtype=np.uint8)
    labels = rng.permutation(np.arange(count) % len(SHAPES))
    pixels = np.arange(size, dtype=np.float32) + 0.5 - size / 2  # seen from the image's centre
    for label, shape in enumerate(SHAPES.values()):
        rows = np.flatnonzero(labels == label)
        n = len(rows)
        unit = uniform(0.2 * size, 0.3 * size, n, 1, 1)  # in pixels
        centre_x, centre_y = uniform(-1, 1, 2, n, 1, 1) * (size / 2 - EXTENT * unit)
        angle = rng.uniform(-math.pi / 4, math.pi / 4, (n, 1, 1))
        cosine, sine = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
        x, y = pixels - centre_x, pixels[:, None] - centre_y  # (n, 1, W), (n, H, 1)
        x, y = (cosine * x + sine * y) / unit, (cosine * y - sine * x) / unit  # (n, H, W)
        inside = (0.5 - unit * shape(x, y)).clip(0, 1)  # the share of a pixel that is covered

        # Brighter than the background: with darker ones among them a small ViT learns much later.
        image = uniform(0.0, 0.45, n, 3, 1, 1) + uniform(0.3, 0.55, n, 3, 1, 1) * inside[:, None]
        light_x, light_y = uniform(-0.15, 0.15, 2, n, 1, 1)  # the slopes of its brightness
        light = (light_x * pixels + light_y * pixels[:, None]) / size  # (n, H, W)
        noise = 0.2 * (rng.random((n, 3, size, size), dtype=np.float32) - 0.5)
        image = (image + light[:, None] + noise).clip(0, 1)  # (n, 3, H, W)
        images[rows] = (255 * image + 0.5).transpose(0, 2, 3, 1)
    return images, labels


# ---- batches ----

class Images:
    """Batches of labelled images, uint8; `to_model` makes them floats; the model normalizes them.

    train, validation: two Parts that do not overlap. `image_size` is what the model sees; images of
    another size are resized and cropped (C.3).
    """

    def __init__(self, train, validation, image_size=None):
        self.train, self.validation, self.sha256 = train, validation, sha256_of(train, validation)
        self.classes = int(max(train.labels.max(), validation.labels.max())) + 1
        self.image_size = image_size or train.images.shape[1]
        self.sizes = {"image_size": self.image_size, "classes": self.classes}

    def train_rows(self, seed, step, size):
        """Which images batch `step` holds, (size,), drawn at random: a function of (seed, step)."""
        return np.random.default_rng((seed, step)).integers(len(self.train.labels), size=size)

    def train_batch(self, seed, step, size):
        """(images (size, H, W, 3), labels (size,)), as they are on disk."""
        return self.train.take(self.train_rows(seed, step, size))

    def validation_batches(self, size, batches, rank=0, world=1):
        """Up to `batches` pairs (images, labels): always the same images, none twice."""
        for _, chosen in spread(len(self.validation.labels), size, batches, rank, world):
            yield self.validation.take(chosen)

    def to_float(self, images, labels):
        """Arrays -> (images (B, 3, H, W) from 0 to 1, labels (B,)), floats and int64."""
        return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255, torch.from_numpy(labels)

    def to_model(self, images, labels):
        """Arrays -> ((images (B, 3, image_size, image_size),), labels (B,)), to evaluate on."""
        images, labels = self.to_float(images, labels)
        return (centre_crop(images, self.image_size),), labels
