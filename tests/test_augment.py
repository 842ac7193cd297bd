"""Each augmentation against its definition: Pillow's, torchvision's and timm's, written out again
here."""
import itertools
import math
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from torch.testing import assert_close

from minq import augment as A

OFF = dict(crop_scale=0, flip=0, rand_augment=0, jitter=0, mixup=0, cutmix=0, label_smoothing=0)


def pictures(n=4, height=32, width=32, seed=0):
    """8-bit pictures with structure: a smooth part, noise, and different ranges."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(n, 3, 4, 4, generator=generator)
    smooth = F.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 1)
    noise = torch.rand(smooth.shape, generator=generator)
    return (255 * (0.15 + 0.6 * smooth + 0.1 * noise)).round() / 255


# ---- operations of RandAugment ----

def timm_on_pillow(name, image, m, s):
    """timm's operation at a magnitude m, 0 to 1, with a sign: s; bilinear, grey fill."""
    from PIL import Image, ImageEnhance, ImageOps
    grey, (width, height), bits = (128,) * 3, image.size, 4 - int(m * 4)
    affine = lambda *matrix: image.transform(image.size, Image.AFFINE, matrix,
                                             resample=Image.BILINEAR, fillcolor=grey)
    brighter = [min(255, i + int(m * 110)) if i < 128 else i for i in range(256)]
    if hasattr(ImageEnhance, kind := name.removesuffix("Increasing")):
        return getattr(ImageEnhance, kind)(image).enhance(max(0.1, 1.0 + 0.9 * s))
    if name == "PosterizeIncreasing" and bits == 0:  # newer Pillows refuse, older ones give black
        return image.point([0] * 768)
    return {
        "AutoContrast": lambda: ImageOps.autocontrast(image),
        "Equalize": lambda: ImageOps.equalize(image),
        "Invert": lambda: ImageOps.invert(image),
        "Rotate": lambda: image.rotate(s * 30, resample=Image.BILINEAR, fillcolor=grey),
        "PosterizeIncreasing": lambda: ImageOps.posterize(image, bits),
        "SolarizeIncreasing": lambda: ImageOps.solarize(image, 256 - int(m * 256)),
        "SolarizeAdd": lambda: image.point(brighter * 3),
        "ShearX": lambda: affine(1, s * 0.3, 0, 0, 1, 0),
        "ShearY": lambda: affine(1, 0, 0, s * 0.3, 1, 0),
        "TranslateXRel": lambda: affine(1, 0, s * 0.45 * width, 0, 1, 0),
        "TranslateYRel": lambda: affine(1, 0, 0, 0, 1, s * 0.45 * height)}[name]()


def to_pillow(image):
    Image = pytest.importorskip("PIL.Image")
    return Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy())


def from_pillow(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


def test_operations_equal_timms():
    """In one batch, in which each image has an operation and a magnitude of its own; -1 is none."""
    signs = (0.0, 0.31, -0.31, 0.9, -0.9, 1.0, -1.0)
    cases = [(k, s) for k in range(-1, len(A.OPS)) for s in signs]
    x, (op, signed) = pictures(len(cases), 40, 40), map(torch.tensor, zip(*cases))
    for image, changed, (k, s) in zip(x, A.apply_ops(x, op, signed), cases):
        name, expected = [*A.OPS, None][k], to_pillow(image)
        expected = timm_on_pillow(name, expected, abs(s), s) if name else expected
        assert (changed - from_pillow(expected)).abs().max() < (1.5 / 255 if name else 1e-6), name


def test_a_channel_of_one_level_stays():
    """Also when arithmetic has left traces in its last bits."""
    x = 0.3 + 1e-6 * torch.rand(2, 3, 32, 32)
    assert torch.equal(A.equalize(x), x) and torch.equal(A.auto_contrast(x), x)


def test_the_draws_of_rand_augment(monkeypatch):
    """Any operation alike, half of the time none, magnitude 9 +- 0.5 up to 10, either sign."""
    drawn, n = [], 40_000
    monkeypatch.setattr(A, "apply_ops", lambda x, op, signed: drawn.append((op, signed)) or x)
    A.randomly_augmented(torch.zeros(n, 1), 3, 9.0, A.Draws(0))
    op, signed = drawn[0]
    assert len(drawn) == 3 and not torch.equal(op, drawn[1][0])
    expected = torch.tensor([0.5] + [0.5 / 15] * 15)
    assert_close(torch.bincount(op + 1) / n, expected, atol=0.005, rtol=0.02)
    clipped = np.random.default_rng(0).normal(0.9, 0.05, n).clip(0, 1)
    assert stats.ks_2samp(signed.abs(), clipped).statistic < 0.02
    for each in (op > -2, op >= 0, op == 3):  # the sign is a coin of its own
        assert abs(signed[each].sign().mean()) < 0.1


# ---- crop and flip ----

def test_a_crop_equals_interpolate_and_pillow():
    """Larger boxes are antialiased, smaller ones interpolated; every image has its own."""
    x = pictures(6, 48, 64)
    x[4:] = x[4:].round()  # black and white, where bicubic interpolation overshoots
    boxes = torch.tensor([[0, 10, 30], [3, 0, 40], [48, 20, 9], [60, 64, 13]]).float()
    boxes, bicubic = boxes.repeat_interleave(2, dim=1), torch.arange(6) % 2 == 1
    resized = A.crop_and_resize(x, boxes, 24, bicubic)
    for i, (top, left, height, width) in enumerate(boxes.T.int().tolist()):
        box, mode = x[i, :, top:top + height, left:left + width], ("bilinear", "bicubic")[i % 2]
        expected = F.interpolate(box[None], (24, 24), mode=mode, antialias=True)[0].clamp(0, 1)
        assert_close(resized[i], expected, atol=1e-5, rtol=0)
        pillow = to_pillow(box).resize((24, 24), {"bilinear": 2, "bicubic": 3}[mode])
        assert i >= 4 or (resized[i] - from_pillow(pillow)).abs().max() < 1.5 / 255


def test_interpolation_is_drawn_per_image():
    """With the box given, an image is resized in one of two ways, each half of the time."""
    same, box = pictures(1).expand(200, 3, 32, 32), torch.tensor([[0.0], [0], [32], [32]])
    crop = lambda size: A.random_resized_crop(same, size, (1.0, 1.0), (1.0, 1.0), A.Draws(0))
    linear, cubic = ((crop(48) == A.crop_and_resize(same[:1], box, 48, torch.tensor([kind])))
                     .flatten(1).all(dim=1) for kind in (False, True))
    assert torch.equal(cubic, ~linear) and 70 < cubic.sum() < 130 and torch.equal(crop(32), same)


def one_box(height, width, rng):
    """torchvision's RandomResizedCrop.get_params, as its documentation words it."""
    for _ in range(10):
        area = height * width * rng.uniform(0.08, 1.0)
        aspect = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return rng.randint(0, height - h), rng.randint(0, width - w), h, w
    w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
    return (height - h) // 2, (width - w) // 2, h, w


@pytest.mark.parametrize("height, width", [(32, 32), (20, 102), (102, 20), (57, 40)])
def test_boxes_are_drawn_as_in_torchvision(height, width):
    n, rng = 20_000, random.Random(0)
    ours = torch.stack(A.draw_boxes(n, height, width, (0.08, 1.0), (3 / 4, 4 / 3), A.Draws(0)))
    theirs = torch.tensor([one_box(height, width, rng) for _ in range(n)]).T
    assert torch.equal(ours, ours.round()) and (ours[:2] >= 0).all()
    assert (ours[0] + ours[2] <= height).all() and (ours[1] + ours[3] <= width).all()
    measures = lambda t, l, h, w: (h * w, w / h, t + h / 2, l + w / 2)
    for mine, other in zip(measures(*ours), measures(*theirs)):  # chance reaches this in 1 of 1500
        assert stats.ks_2samp(mine, other, method="asymp").statistic < 0.02


def test_flip():
    x = pictures(400)
    off = dict.fromkeys(("crop_scale", "rand_augment", "jitter", "mixup", "cutmix"), 0)
    y, _ = A.augment(x, torch.zeros(400).long(), 2, A.Draws(0), x.shape[-1], flip=0.25, **off)
    flipped = (y == x.flip(-1)).flatten(1).all(dim=1)
    assert torch.equal(y[~flipped], x[~flipped]) and 60 < flipped.sum() < 140


def test_centre_crop():
    """32 / 0.875 = 36.57: the shorter side becomes 36, the longer keeps the shape, 32 x 32 stay."""
    x = pictures(2, 60, 90)
    resized = F.interpolate(x, (36, 54), mode="bicubic", antialias=True).clamp(0, 1)
    assert torch.equal(A.centre_crop(x, 32), resized[:, :, 2:34, 11:43])
    assert_close(A.centre_crop(x.mT, 32), A.centre_crop(x, 32).mT)
    assert torch.equal(A.centre_crop(x[..., :60], 60), x[..., :60])


# ---- colour jitter ----

def test_jitter_applies_three_factors_per_image_in_random_order(monkeypatch):
    """A grey image knows brightness alone: its level times a factor between 0.6 and 1.4."""
    factors = A.colour_jitter(torch.full((4000, 3, 2, 2), 0.5), 0.4, A.Draws(0))[:, 0, 0, 0] / 0.5
    assert stats.kstest(factors, stats.uniform(0.6, 0.8).cdf).statistic < 0.03
    orders = set()
    for seed in range(40):
        order = {}
        piece = lambda x, name, factor: order.update({name: factor[0].item()}) or x
        monkeypatch.setattr(A, "enhance", piece)
        A.colour_jitter(torch.zeros(2, 3, 4, 4), 0.4, A.Draws(seed))
        assert len(set(order.values())) == 3
        orders.add(tuple(order))
    assert orders == set(itertools.permutations(("brightness", "contrast", "saturation")))


# ---- Mixup, CutMix, targets ----

@pytest.mark.parametrize("alpha", [0.8, 1.0])
def test_mixup_is_a_weighted_sum_with_the_neighbour(alpha):
    x, draws, shares = pictures(7), A.Draws(3), []
    for _ in range(2000):
        y, lam = A.mix(x[:, :, :2, :2], alpha, 0, draws)
        shares.append(lam)
    assert_close(y, lam * x[..., :2, :2] + (1 - lam) * x[[1, 0, 3, 2, 5, 4, 6], :, :2, :2])
    assert stats.kstest(shares, stats.beta(alpha, alpha).cdf).statistic < 0.04


def test_cutmix_lambda_is_the_share_that_is_left():
    """Each pixel is one's own or the partner's; lambda counts one's own, also when the border cuts
    the box, whose centre is anywhere."""
    x, cut_short = torch.stack((torch.zeros(3, 20, 30), torch.ones(3, 20, 30))), 0
    for seed in range(200):
        y, lam = A.cutmix(x, seed / 200, A.Draws(seed))
        assert y[0].mean().item() == pytest.approx(1 - lam) and torch.equal(y[1], 1 - y[0])
        rows, columns = (y[0, 0].amax(dim=dim).sum().item() for dim in (1, 0))
        full = [int(side * math.sqrt(1 - seed / 200)) // 2 * 2 for side in (20, 30)]
        assert rows * columns == y[0, 0].sum().item() and rows <= full[0] and columns <= full[1]
        cut_short += [rows, columns] != full
    assert 40 < cut_short < 200
    hits = sum(A.cutmix(x[..., :8, :16], 0.9, A.Draws(seed))[0][0, 0] for seed in range(2000))
    middle = hits[1:-1, 2:-2]  # a 2 x 4 box covers an inner pixel with probability 2 * 4 / (8 * 16)
    assert (middle / 2000 - 1 / 16).abs().max() < 0.025


def test_mix_tosses_a_coin(monkeypatch):
    alphas, x = [], pictures(2)
    monkeypatch.setattr(A.Draws, "beta", lambda self, alpha: alphas.append(alpha) or 0.5)

    def cuts(*strengths):
        mixed = [A.mix(x, *strengths, A.Draws(seed))[0] for seed in range(200)]
        return [bool(((y == x) | (y == x.flip(0))).all()) for y in mixed]

    both = cuts(0.8, 1.0)
    assert 70 < sum(both) < 130 and alphas == [1.0 if cut else 0.8 for cut in both]
    assert all(cuts(0, 1.0)) and not any(cuts(0.8, 0))


def test_soft_targets_equal_cross_entropys_label_smoothing():
    labels, logits = torch.tensor([3, 0, 9, 1]), torch.randn(4, 10)
    loss = lambda labels: F.cross_entropy(logits, labels, label_smoothing=0.1)
    ours = lambda *mixed: F.cross_entropy(logits, A.soft_targets(labels, 10, 0.1, *mixed))
    assert_close(ours(), loss(labels))
    assert_close(ours(0.3), 0.3 * loss(labels) + 0.7 * loss(labels[[1, 0, 3, 2]]))
    assert torch.equal(A.soft_targets(labels, 10), torch.eye(10)[labels])


# ---- everything together ----

def run(x, seed=0, **settings):
    return A.augment(x, torch.arange(len(x)), 10, A.Draws(seed), 32, **settings)


def test_a_batch_is_a_function_of_the_seed_and_slices_are_its_parts():
    state = torch.get_rng_state()
    for seed in range(20):
        images, targets = run(x := pictures(8, 40, 48, seed), seed)
        assert images.shape == (8, 3, 32, 32) and 0 <= images.min() and images.max() <= 1
        assert_close(targets.sum(dim=1), torch.ones(8))
        for rows in (slice(0, 4), slice(4, 8)):
            draws = A.Draws(seed, "cpu", np.arange(8)[rows], 8)
            part = A.augment(x[rows], torch.arange(8)[rows], 10, draws, 32)
            assert_close(part, (images[rows], targets[rows]))
        assert not torch.equal(images, run(x, seed + 1)[0])
        assert torch.equal(x, pictures(8, 40, 48, seed))
    assert torch.equal(torch.get_rng_state(), state)  # nothing else is random


@pytest.mark.parametrize("piece", [{}, dict(crop_scale=0.3), dict(flip=1.0), dict(rand_augment=2),
                                   dict(jitter=0.4), dict(mixup=0.8), dict(cutmix=1.0),
                                   dict(label_smoothing=0.1)], ids=str)
def test_each_piece_alone(piece):
    images, targets = run(pictures(8), **OFF | piece)
    assert torch.equal(images, pictures(8)) == (not piece.keys() - {"label_smoothing"})
    hard = torch.equal(targets, torch.eye(10)[:8])
    assert hard == (not piece.keys() & {"mixup", "cutmix", "label_smoothing"})


@pytest.mark.parametrize("settings", [
    {}, dict(crop_scale=0.5, flip=0.3, rand_augment=3, rand_magnitude=5.0, jitter=0.2, mixup=0.7,
             cutmix=0.6, label_smoothing=0.2)])
def test_order_and_settings(settings, monkeypatch):
    """The defaults are the paper's and timm's, and every setting reaches its piece."""
    calls, s = [], dict(crop_scale=0.08, flip=0.5, rand_augment=2, rand_magnitude=9.0, jitter=0.4,
                        mixup=0.8, cutmix=1.0, label_smoothing=0.1) | settings
    for name in ("random_resized_crop", "randomly_augmented", "colour_jitter", "mix",
                 "soft_targets"):
        piece = lambda x, *a, real=getattr(A, name): calls.append(a[:-1]) or real(x, *a)
        monkeypatch.setattr(A, name, piece)
    run(pictures(8), **settings)
    assert calls == [(32, (s["crop_scale"], 1.0), (3 / 4, 4 / 3)),
                     (s["rand_augment"], s["rand_magnitude"]), (s["jitter"],),
                     (s["mixup"], s["cutmix"]), (10, s["label_smoothing"])]