"""Pictures drawn by code: one object of ten classes on a background that tells nothing."""
import math

import numpy as np


def radius(x, y):
    return np.sqrt(x * x + y * y)


def sides(x, y, n):
    """How far a point lies towards each side of a regular polygon: (n, ...). Their maximum draws the polygon."""
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
    "star": lambda x, y: np.sort(sides(x, y, 5), axis=0)[-2] - 0.412,  # a point may lie beyond one side
    "plus": lambda x, y: np.maximum(np.minimum(abs(x), abs(y)) - 0.29, np.maximum(abs(x), abs(y)) - 1.0),
    "bow tie": lambda x, y: np.maximum(0.71 * (abs(y) - abs(x)), abs(x) - 1.0),
    "arrow": lambda x, y: np.minimum(sides(x, y + 0.4, 3).max(axis=0) - 0.5,
                                     np.maximum(abs(x) - 0.3, abs(y - 0.65) - 0.6)),
}


def draw_shapes(count, seed, size=32):
    """Images (count, size, size, 3) uint8 and labels (count,), one shape each.

    Its place, size, tilt (up to 45 degrees) and colours are drawn at random.

    Pixels go only through float32 operations that every machine rounds alike, no sines among
    them, so that the images and their hash are the same everywhere.
    """
    rng = np.random.default_rng(seed)

    def uniform(low, high, *shape):
        return rng.uniform(low, high, shape).astype(np.float32)

    images = np.empty((count, size, size, 3), dtype=np.uint8)
    labels = rng.permutation(np.arange(count) % len(SHAPES))
    pixels = np.arange(size, dtype=np.float32) + 0.5 - size / 2  # seen from the centre of the image
    for label, shape in enumerate(SHAPES.values()):
        rows = np.flatnonzero(labels == label)
        n = len(rows)
        unit = uniform(0.2 * size, 0.3 * size, n, 1, 1)  # in pixels
        centre_x, centre_y = uniform(-1, 1, 2, n, 1, 1) * (size / 2 - EXTENT * unit)
        angle = rng.uniform(-math.pi / 4, math.pi / 4, (n, 1, 1))
        cosine, sine = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
        x, y = pixels - centre_x, pixels[:, None] - centre_y  # (n, 1, W), (n, H, 1)
        x, y = (cosine * x + sine * y) / unit, (cosine * y - sine * x) / unit  # (n, H, W)
        inside = (0.5 - unit * shape(x, y)).clip(0, 1)  # the share of a pixel that the shape covers, (n, H, W)

        # Brighter than the background: with darker ones among them a small ViT stays at chance much longer.
        background = uniform(0.0, 0.45, n, 3, 1, 1)
        contrast = uniform(0.3, 0.55, n, 3, 1, 1)
        light = (uniform(-0.15, 0.15, n, 1, 1) * pixels + uniform(-0.15, 0.15, n, 1, 1) * pixels[:, None]) / size
        noise = 0.2 * (rng.random((n, 3, size, size), dtype=np.float32) - 0.5)
        image = background + contrast * inside[:, None] + light[:, None] + noise  # (n, 3, H, W)
        images[rows] = (255 * image.clip(0, 1) + 0.5).transpose(0, 2, 3, 1)
    return images, labels
