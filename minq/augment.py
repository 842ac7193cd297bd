"""The image augmentation of the ViT recipe (paper, C.3), as timm defines it, batched on tensors.

    images, targets = augment(images, labels, classes, Draws(seed), size=224)

The paper names the pieces; where it gives no strength, the defaults are those of timm's ViT
recipes. Pieces, in timm's order: random resized crop, flip, RandAugment, colour jitter, Mixup or
CutMix, label smoothing. (timm drops the jitter when RandAugment is on. The paper lists both, so
both are applied.)

Images are floats in [0, 1], (B, 3, H, W), and nothing rounds them to 8 bits between two pieces, as
PIL does. Randomness comes from `draws` alone; they are made on the device of the images.
"""
import math
from functools import partial

import torch
import torch.nn.functional as F


PIECES = {  # name of a strength -> (type, most, help); 0 switches a piece off
    "crop_scale": (float, 1, "smallest share of the area that a random crop keeps"),
    "flip": (float, 1, "probability of a horizontal flip"),
    "rand_augment": (int, 100, "RandAugment operations per image"),
    "rand_magnitude": (float, 10, "their magnitude, 0 to 10"),
    "jitter": (float, 1, "colour jitter: brightness, contrast, saturation"),
    "mixup": (float, None, "alpha of Mixup's Beta distribution"),
    "cutmix": (float, None, "alpha of CutMix's Beta distribution"),
    "label_smoothing": (float, 1, "epsilon"),
}


def augment(images, labels, classes, draws, size, crop_scale=0.08, flip=0.5, rand_augment=2,
            rand_magnitude=9.0, jitter=0.4, mixup=0.8, cutmix=1.0, label_smoothing=0.1):
    """A training batch: images (B, 3, H, W), labels (B,) -> images (B, 3, size, size) and soft
    targets (B, classes). 0 switches a piece off; without `crop_scale`, the smallest share of the
    area that a crop keeps, images are cropped as for evaluation.
    """
    images = (random_resized_crop(images, size, (crop_scale, 1.0), (3 / 4, 4 / 3), draws)
              if crop_scale else centre_crop(images, size))
    images = torch.where(per_image(draws.each(len(images)) < flip), images.flip(-1), images)
    images = randomly_augmented(images, rand_augment, rand_magnitude, draws)
    images = colour_jitter(images, jitter, draws)
    images, lam = mix(images, mixup, cutmix, draws)
    return images, soft_targets(labels, classes, label_smoothing, lam)


class Draws:
    """The random numbers of a batch, a function of `seed`: one for the batch, or one per image.

    A slice of a batch says what `places` of how many, `size`, it holds: all numbers are drawn for
    the whole and the slice gets its own, so that they do not depend on how a batch is sliced.
    """

    def __init__(self, seed, device="cpu", places=slice(None), size=None):
        self.places, self.size = places, size
        self.source = {"generator": torch.Generator(device).manual_seed(seed), "device": device}

    def one(self):
        return torch.rand((), **self.source).item()

    def each(self, n, *shape, kind=torch.rand):
        """(n, *shape): numbers of each image, from 0 to 1, or of another `kind`."""
        return kind((self.size or n, *shape), **self.source)[self.places]

    def beta(self, alpha):
        """One draw from Beta(alpha, alpha), as the share of one of two gamma draws."""
        shape = torch.full((2,), alpha, dtype=torch.float64, device=self.source["device"])
        a, b = torch._standard_gamma(shape, generator=self.source["generator"]).tolist()
        return a / (a + b)


def per_image(values):
    """(B,) -> (B, 1, 1, 1)"""
    return values[:, None, None, None]


# ---- crop ----

def random_resized_crop(images, size, scale, ratio, draws):
    """Cut a random box out of each image and resize it to size x size, bilinear or bicubic."""
    boxes = draw_boxes(len(images), *images.shape[-2:], scale, ratio, draws)
    return crop_and_resize(images, boxes, size, bicubic=draws.each(len(images)) < 0.5)


def draw_boxes(n, height, width, scale, ratio, draws):
    """n boxes (top, left, height, width), each (n,), drawn as torchvision's RandomResizedCrop does.

    A try is an area, uniform between the two of `scale` (as a share of the image), and a ratio
    width / height, log-uniform between the two of `ratio`. The first that fits is put anywhere in
    the image. If none of ten fits, the largest central box whose ratio is allowed is taken.
    """
    tries = 10
    area = height * width * (scale[0] + (scale[1] - scale[0]) * draws.each(n, tries))
    low, high = math.log(ratio[0]), math.log(ratio[1])
    aspect = (low + (high - low) * draws.each(n, tries)).exp()
    w, h = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()  # (n, tries)
    fits = (0 < w) & (w <= width) & (0 < h) & (h <= height)

    # The central box is one try more, which always fits.
    w = F.pad(w, (0, 1), value=min(width, round(height * ratio[1])))
    h = F.pad(h, (0, 1), value=min(height, round(width / ratio[0])))
    first = F.pad(fits, (0, 1), value=True).int().argmax(dim=1, keepdim=True)
    w, h, central = w.gather(1, first)[:, 0], h.gather(1, first)[:, 0], first[:, 0] == tries
    top, left = (torch.where(central, (room / 2).floor(), (draws.each(n) * (room + 1)).floor())
                 for room in (height - h, width - w))
    return top, left, h, w


def crop_and_resize(images, boxes, size, bicubic):
    """(B, 3, H, W) -> (B, 3, size, size): the box of each image, resized as PIL does (antialiased).

    Resizing is linear and separable, so it is a product with one matrix on either side, and every
    image of a batch can have its own. (grid_sample would not antialias.)
    """
    top, left, height, width = boxes
    rows = resize_matrix(top, height, images.shape[-2], size, bicubic)[:, None]
    columns = resize_matrix(left, width, images.shape[-1], size, bicubic)[:, None]
    return (rows @ images @ columns.mT).clamp_(0.0, 1.0)  # bicubic overshoots


def resize_matrix(start, length, full, size, bicubic):
    """(B, size, full): what each of `full` pixels gives to each of `size`, which span
    [start, start + length).

    start, length, bicubic: (B,). The filter, a triangle or a cubic (a = -1/2, as in PIL), is
    stretched when pixels get fewer, so that each of them counts.
    """
    start, length, bicubic = (x[:, None, None] for x in (start, length, bicubic))
    scale = length / size
    row, pixel = (torch.arange(n, device=start.device) + 0.5 for n in (size, full))
    centre = start + row[:, None] * scale  # (B, size, 1)
    t = ((pixel - centre) / scale.clamp(min=1.0)).abs().clamp(max=2.0)
    cubic = torch.where(t < 1, (1.5 * t - 2.5) * t * t + 1, ((-0.5 * t + 2.5) * t - 4) * t + 2)
    weight = torch.where(bicubic, cubic, (1 - t).clamp(min=0.0))
    weight = weight * ((start < pixel) & (pixel < start + length))
    return weight / weight.sum(dim=-1, keepdim=True)


def centre_crop(images, size):
    """For evaluation: resize the shorter side to size / 0.875 (bicubic), cut out the centre.

    Images that are size x size already stay as they are: CIFAR's have no margin to lose.
    """
    H, W = images.shape[-2:]
    if (H, W) == (size, size):
        return images
    shorter = int(size / 0.875)
    H, W = int(shorter * H / min(H, W)), int(shorter * W / min(H, W))
    images = F.interpolate(images, (H, W), mode="bicubic", antialias=True).clamp(0.0, 1.0)
    top, left = round((H - size) / 2), round((W - size) / 2)
    return images[..., top:top + size, left:left + size]


# ---- colour: x (n, 3, H, W), one argument per image (n, 1, 1, 1) -> (n, 3, H, W) ----

def grey(x):
    """(n, 3, H, W) -> (n, 1, H, W): luma (ITU-R 601)."""
    r, g, b = x.split(1, dim=1)
    return 0.299 * r + 0.587 * g + 0.114 * b


def smooth(x):
    """PIL's SMOOTH: a 3 x 3 mean in which the middle counts 5 times; it leaves the border."""
    kernel, x = x.new_tensor([[1, 1, 1], [1, 5, 1], [1, 1, 1]]) / 13, x.clone()
    x[..., 1:-1, 1:-1] = F.conv2d(x, kernel.expand(3, 1, 3, 3), groups=3)
    return x


WITHOUT = {
    "brightness": lambda x: x.new_zeros(1),
    "contrast": lambda x: grey(x).mean(dim=(1, 2, 3), keepdim=True),
    "saturation": grey,
    "sharpness": smooth,
}


def enhance(x, what, factor):
    """0: the image without brightness, contrast ..., 1: x itself, beyond 1: x exaggerated."""
    return torch.lerp(WITHOUT[what](x), x, factor).clamp_(0.0, 1.0)


def auto_contrast(x):
    """Stretch each channel to [0, 1], unless it is all one level (but for the last bits)."""
    low, high = x.amin(dim=(2, 3), keepdim=True), x.amax(dim=(2, 3), keepdim=True)
    return torch.where(high - low > 0.5 / 255, (x - low) / (high - low), x)


def equalize(x):
    """Make the 256 levels of each channel equally frequent, in PIL's integer arithmetic."""
    levels = (x * 255).round().long().flatten(2)  # (n, 3, H * W)
    count = torch.zeros(*levels.shape[:2], 256, dtype=torch.long, device=x.device)
    count.scatter_add_(2, levels, torch.ones_like(levels))
    brightest = count.gather(2, levels.amax(dim=2, keepdim=True))
    step = (levels.shape[2] - brightest) // 255  # pixels per new level, the brightest left out
    below = count.cumsum(dim=2) - count
    table = ((step // 2 + below) // step.clamp(min=1)).clamp(max=255)
    return torch.where(step[..., None] > 0, table.gather(2, levels).view_as(x) / 255, x)


def posterize(x, step):
    """Of 256 levels keep each `step`-th."""
    return ((x * 255).round() / step).floor() * step / 255


def colour_jitter(images, strength, draws):
    """Brightness, contrast and saturation, in random order, by a factor in 1 +- strength each."""
    for i in torch.randperm(3, **draws.source).tolist() if strength else ():
        factor = 1 + strength * (2 * per_image(draws.each(len(images))) - 1)
        images = enhance(images, ("brightness", "contrast", "saturation")[i], factor)
    return images


# ---- geometry: x (n, 3, S, S), arguments (n, 1, 1, 1) or one number -> (n, 3, S, S) ----

def warp(x, xx=1.0, xy=0.0, dx=0.0, yx=0.0, yy=1.0, dy=0.0):
    """The output's (x, y) shows the input's (xx x + xy y + dx, yx x + yy y + dy), in [-1, 1].

    Outside the input it is grey, 128 of 255 (timm: the mean of the data). Bilinear (timm: bilinear
    or bicubic at random).
    """
    zero = x.new_zeros(len(x), 1, 1, 1)
    matrix = torch.stack([zero + a for a in (xx, xy, dx, yx, yy, dy)], dim=1).view(-1, 2, 3)
    grid = F.affine_grid(matrix, x.shape, align_corners=False)  # (n, S, S, 2)
    outside = (grid.abs() > 1).any(dim=-1).unsqueeze(1)
    warped = F.grid_sample(x, grid, padding_mode="border", align_corners=False)
    return warped.masked_fill_(outside, 128 / 255)


def rotate(x, degrees):
    """Counter-clockwise around the centre."""
    cos, sin = degrees.deg2rad().cos(), degrees.deg2rad().sin()
    return warp(x, xx=cos, xy=-sin, yx=sin, yy=cos)


# ---- RandAugment (timm's rand-m9-mstd0.5-inc1) ----

# m: magnitude / 10, in [0, 1]; s: m or -m, as a coin decides. "Increasing": a higher magnitude
# changes more. Levels are of 255. The image is 2 wide and high; a shear leaves its first row or
# column, y = -1 or x = -1, where it is.
OPS = {
    "AutoContrast": lambda x, m, s: auto_contrast(x),
    "Equalize": lambda x, m, s: equalize(x),
    "Invert": lambda x, m, s: 1 - x,
    "Rotate": lambda x, m, s: rotate(x, 30 * s),
    "PosterizeIncreasing": lambda x, m, s: posterize(x, 2 ** (4 + (4 * m).floor())),
    "SolarizeIncreasing": lambda x, m, s: torch.where(
        x < (256 - (256 * m).floor()) / 255, x, 1 - x),
    "SolarizeAdd": lambda x, m, s: torch.where(
        x < 128 / 255, (x + (110 * m).floor() / 255).clamp(max=1.0), x),
    "ColorIncreasing": lambda x, m, s: enhance(x, "saturation", 1 + 0.9 * s),
    "ContrastIncreasing": lambda x, m, s: enhance(x, "contrast", 1 + 0.9 * s),
    "BrightnessIncreasing": lambda x, m, s: enhance(x, "brightness", 1 + 0.9 * s),
    "SharpnessIncreasing": lambda x, m, s: enhance(x, "sharpness", 1 + 0.9 * s),
    "ShearX": lambda x, m, s: warp(x, xy=0.3 * s, dx=0.3 * s),
    "ShearY": lambda x, m, s: warp(x, yx=0.3 * s, dy=0.3 * s),
    "TranslateXRel": lambda x, m, s: warp(x, dx=2 * 0.45 * s),
    "TranslateYRel": lambda x, m, s: warp(x, dy=2 * 0.45 * s),
}


def randomly_augmented(images, layers, magnitude, draws):
    """`layers` times: each image draws an operation and, with probability 1/2, undergoes it.

    The magnitude gets Gaussian noise of standard deviation 0.5 and stays within [0, 10].
    """
    B = len(images)
    for _ in range(layers):
        op = draws.each(B, kind=partial(torch.randint, len(OPS)))
        op[draws.each(B) < 0.5] = -1
        m = ((magnitude + 0.5 * draws.each(B, kind=torch.randn)) / 10).clamp(0.0, 1.0)
        images = apply_ops(images, op, torch.where(draws.each(B) < 0.5, m, -m))
    return images


def apply_ops(images, op, signed):
    """Image i undergoes operation op[i] of OPS (-1: none) at magnitude 10 * |signed[i]|."""
    images = images.clone()
    for k, function in enumerate(OPS.values()):
        if len(chosen := (op == k).nonzero()[:, 0]):
            s = per_image(signed[chosen])
            images[chosen] = function(images[chosen], s.abs(), s)
    return images


# ---- Mixup, CutMix, label smoothing ----

def neighbours(x):
    """Each row's partner: 0 and 1 change places, 2 and 3, and so on; a last odd one is its own.
    (timm turns the batch around. But then a slice of a batch would lack its partners.)
    """
    return x[(torch.arange(len(x), device=x.device) ^ 1).clamp(max=len(x) - 1)]


def mix(images, mixup_alpha, cutmix_alpha, draws):
    """Mixup or CutMix (a coin decides per batch) with each image's neighbour -> images, lambda.

    lambda ~ Beta(alpha, alpha) is the share that an image keeps of itself, 1 if both alphas are 0.
    """
    if not mixup_alpha and not cutmix_alpha:
        return images, 1.0
    cuts = draws.one() < 0.5 if mixup_alpha and cutmix_alpha else not mixup_alpha
    lam = draws.beta(cutmix_alpha if cuts else mixup_alpha)
    if cuts:
        return cutmix(images, lam, draws)
    return lam * images + (1 - lam) * neighbours(images), lam


def cutmix(images, lam, draws):
    """Paste a box of the partner's over each image -> images, the share that is left of each.

    The box has 1 - lam of the area, but its centre is anywhere: part of it may lie outside.
    """
    H, W = images.shape[-2:]
    half_h, half_w = (int(side * math.sqrt(1 - lam)) // 2 for side in (H, W))
    y, x = (int(draws.one() * side) for side in (H, W))
    box = (..., slice(max(y - half_h, 0), y + half_h), slice(max(x - half_w, 0), x + half_w))
    mixed = images.clone()
    mixed[box] = neighbours(images)[box]
    return mixed, 1 - mixed[0, 0][box].numel() / (H * W)


def soft_targets(labels, classes, smoothing=0.0, lam=1.0):
    """(B,) -> (B, classes): smoothing / classes everywhere, the rest on the label; lam of that,
    the rest the partner's."""
    off = smoothing / classes
    y = torch.full((len(labels), classes), off, device=labels.device)
    y.scatter_(1, labels[:, None], 1 - smoothing + off)
    return lam * y + (1 - lam) * neighbours(y)
