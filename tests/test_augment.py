"""Each augmentation against its definition: Pillow's, torchvision's and timm's, written out again here."""
import math
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from minq import augment as A

OFF = dict(crop_scale=None, flip=0, rand_layers=0, jitter=0, mixup=0, cutmix=0, label_smoothing=0)
NAMES = list(A.OPS)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def pictures(n=4, height=32, width=32, seed=0):
    """8-bit pictures with structure: a smooth part, noise, and different ranges."""
    coarse = torch.rand(n, 3, 4, 4, generator=seeded(seed))
    smooth = F.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 1)
    noisy = (0.15 + 0.6 * smooth + 0.1 * torch.rand(smooth.shape, generator=seeded(seed + 1))).clamp(0, 1)
    return (noisy * 255).round() / 255


def levels(x):
    return (x * 255).round().int()


def apply(name, x, signed):
    n = len(x)
    return A.apply_ops(x, torch.full((n,), NAMES.index(name)), torch.full((n,), float(signed)))


# ---- operations of RandAugment ----

def timm_on_pillow(name, image, magnitude, sign):
    """timm's operation at a magnitude of 0 to 10 on a PIL image, bilinear, grey fill."""
    from PIL import Image, ImageEnhance, ImageOps
    part = magnitude / 10

    def affine(*matrix):
        return image.transform(image.size, Image.AFFINE, matrix, resample=Image.BILINEAR, fillcolor=(128,) * 3)

    def solarize_add():
        table = [min(255, i + int(part * 110)) if i < 128 else i for i in range(256)]
        return image.point(table * 3)

    def posterize():  # newer Pillows refuse to keep 0 bits; older ones give black
        bits = 4 - int(part * 4)
        return ImageOps.posterize(image, bits) if bits else image.point([0] * 768)

    def enhance(kind):
        return kind(image).enhance(max(0.1, 1.0 + sign * part * 0.9))

    return {
        "AutoContrast": lambda: ImageOps.autocontrast(image),
        "Equalize": lambda: ImageOps.equalize(image),
        "Invert": lambda: ImageOps.invert(image),
        "Rotate": lambda: image.rotate(sign * part * 30, resample=Image.BILINEAR, fillcolor=(128,) * 3),
        "PosterizeIncreasing": posterize,
        "SolarizeIncreasing": lambda: ImageOps.solarize(image, 256 - int(part * 256)),
        "SolarizeAdd": solarize_add,
        "ColorIncreasing": lambda: enhance(ImageEnhance.Color),
        "ContrastIncreasing": lambda: enhance(ImageEnhance.Contrast),
        "BrightnessIncreasing": lambda: enhance(ImageEnhance.Brightness),
        "SharpnessIncreasing": lambda: enhance(ImageEnhance.Sharpness),
        "ShearX": lambda: affine(1, sign * part * 0.3, 0, 0, 1, 0),
        "ShearY": lambda: affine(1, 0, 0, sign * part * 0.3, 1, 0),
        "TranslateXRel": lambda: affine(1, 0, sign * part * 0.45 * image.size[0], 0, 1, 0),
        "TranslateYRel": lambda: affine(1, 0, 0, 0, 1, sign * part * 0.45 * image.size[1]),
    }[name]()


def to_pillow(image):
    from PIL import Image
    return Image.fromarray(levels(image).permute(1, 2, 0).byte().numpy())


def from_pillow(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("signed", [0.0, 0.31, -0.31, 0.9, -0.9, 1.0, -1.0])
def test_operation_equals_timm(name, signed):
    pytest.importorskip("PIL")
    x = pictures(6, 40, 40)
    expected = torch.stack([from_pillow(timm_on_pillow(name, to_pillow(image), abs(signed) * 10, np.sign(signed) or 1))
                            for image in x])
    assert (apply(name, x, signed) - expected).abs().max() < 1.5 / 255


def through_table(x, table):
    """Every level i becomes table(i)."""
    return torch.tensor([min(255, table(i)) for i in range(256)])[levels(x)] / 255


def test_operations_on_single_levels():
    """Independently of Pillow: what each of the 256 levels becomes."""
    x = pictures()
    tables = {"Invert": lambda i: 255 - i,
              "PosterizeIncreasing": lambda i: i & 0b10000000,  # int(0.9 * 4) = 3 of 4 bits go
              "SolarizeIncreasing": lambda i: i if i < 256 - 230 else 255 - i,
              "SolarizeAdd": lambda i: i + 99 if i < 128 else i}
    for name, table in tables.items():
        torch.testing.assert_close(apply(name, x, 0.9), through_table(x, table), atol=1e-6, rtol=0)
    assert torch.equal(A.posterize(x - 0.4 / 255, torch.full((4,), 3.0)), A.posterize(x, torch.full((4,), 3.0)))


def test_equalize_makes_levels_equally_frequent():
    gradient = (torch.arange(256).repeat(4, 1) / 255).view(1, 1, 32, 32) ** 2  # mostly dark
    flat = A.equalize(gradient.expand(1, 3, 32, 32))
    shares = torch.histc(flat, 4, 0, 1) / flat.numel()
    assert (shares - 0.25).abs().max() < 0.06
    assert torch.histc(gradient, 4, 0, 1).max() / gradient.numel() > 0.45


@pytest.mark.parametrize("operation", [A.equalize, A.auto_contrast])
def test_a_channel_of_one_level_stays(operation):
    """Also when arithmetic has left traces in its last bits."""
    x = 0.3 + 1e-6 * torch.rand(2, 3, 32, 32, generator=seeded())
    assert torch.equal(operation(x), x)


def test_auto_contrast_reaches_both_ends_in_each_channel():
    x = A.auto_contrast(pictures())
    assert torch.equal(x.amin(dim=(2, 3)), torch.zeros(4, 3)) and torch.equal(x.amax(dim=(2, 3)), torch.ones(4, 3))


def test_enhancements_at_0_and_1():
    x = pictures()
    luma = (x * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(dim=1, keepdim=True).expand_as(x)
    zero, one = torch.zeros(4), torch.ones(4)
    torch.testing.assert_close(A.brightness(x, zero), torch.zeros_like(x))
    torch.testing.assert_close(A.saturation(x, zero), luma)
    torch.testing.assert_close(A.contrast(x, zero), luma.mean(dim=(1, 2, 3), keepdim=True).expand_as(x))
    for enhance in (A.brightness, A.saturation, A.contrast, A.sharpness):
        assert torch.equal(enhance(x, one), x)
        assert 0 <= enhance(x, 1.9 * one).min() and enhance(x, 1.9 * one).max() <= 1


def test_smoothing_of_sharpness():
    smooth = A.sharpness(pictures(), torch.zeros(4))
    neighbours = pictures()[:, :, 4:7, 10:13].sum(dim=(2, 3)) + 4 * pictures()[:, :, 5, 11]
    torch.testing.assert_close(smooth[:, :, 5, 11], neighbours / 13)
    assert torch.equal(smooth[:, :, 0], pictures()[:, :, 0])


def test_geometry_in_whole_pixels():
    """A shift by pixels is a slice, by 90 degrees a rot90; what comes from outside is grey."""
    x, one = pictures(), torch.ones(4)
    shifted = A.warp(x, dx=2 * one * 5 / 32)
    torch.testing.assert_close(shifted[..., :-5], x[..., 5:])
    assert torch.equal(shifted[..., -5:], torch.full((4, 3, 32, 5), 128 / 255))
    torch.testing.assert_close(A.warp(x, dy=2 * one * -5 / 32)[..., 5:, :], x[..., :-5, :])
    torch.testing.assert_close(A.rotate(x, 90 * one), x.rot90(1, dims=(2, 3)), atol=1e-4, rtol=0)


# ---- RandAugment's draws ----

def test_rand_augment_draws(monkeypatch):
    """Any operation alike, half of the time none, magnitude 9 +- 0.5 up to 10, either sign."""
    drawn = []
    monkeypatch.setattr(A, "apply_ops", lambda images, op, signed: drawn.append((op, signed)) or images)
    n = 40_000
    A.rand_augment(torch.zeros(n, 1), 3, 9.0, A.Draws(0))
    assert len(drawn) == 3 and not torch.equal(drawn[0][0], drawn[1][0])
    op, signed = drawn[0]
    share = torch.bincount(op + 1, minlength=16) / n
    assert abs(share[0] - 0.5) < 0.01 and (share[1:] - 0.5 / 15).abs().max() < 0.005 and len(share) == 16
    reference = np.clip(np.random.default_rng(0).normal(9, 0.5, n), 0, 10) / 10
    q = [0.1, 0.5, 0.9, 1]
    assert np.allclose(np.quantile(signed.abs(), q), np.quantile(reference, q), atol=2e-3)
    assert abs(signed.sign().mean()) < 0.02
    for each in (op >= 0, op == 3):  # the sign is a coin of its own
        assert abs(signed[each].sign().mean()) < 0.1


def test_batched_operations_equal_one_image_at_a_time():
    n = 64
    x, op = pictures(n), torch.randint(-1, len(NAMES), (n,), generator=seeded())
    signed = 2 * torch.rand(n, generator=seeded(1)) - 1
    together = A.apply_ops(x, op, signed)
    alone = torch.cat([A.apply_ops(x[i:i + 1], op[i:i + 1], signed[i:i + 1]) for i in range(n)])
    torch.testing.assert_close(together, alone, atol=1e-6, rtol=0)
    assert torch.equal(together[op == -1], x[op == -1])
    changed = (together != x).flatten(1).any(dim=1)
    assert changed[op >= 0].float().mean() > 0.9


# ---- crop and flip ----

@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
def test_crop_equals_interpolate_and_pillow(mode):
    """Larger boxes are antialiased, smaller ones interpolated; every image has its own box."""
    x = pictures(3, 48, 64)
    x[2] = x[2].round()  # black and white, where bicubic interpolation overshoots
    boxes = torch.tensor([[0, 10, 30], [3, 0, 40], [48, 20, 9], [60, 64, 13]]).float()  # top, left, height, width
    y = A.crop_and_resize(x, boxes, 24, torch.full((3,), mode == "bicubic"))
    for image, resized, (top, left, height, width) in zip(x, y, boxes.T.int().tolist()):
        box = image[:, top:top + height, left:left + width]
        expected = F.interpolate(box[None], (24, 24), mode=mode, antialias=True)[0].clamp(0, 1)
        torch.testing.assert_close(resized, expected, atol=1e-5, rtol=0)

    Image = pytest.importorskip("PIL.Image")
    top, left, height, width = boxes[:, 1].int().tolist()
    box = to_pillow(x[1, :, top:top + height, left:left + width])
    expected = from_pillow(box.resize((24, 24), getattr(Image, mode.upper())))
    assert (y[1] - expected).abs().max() < 1.5 / 255


def test_interpolation_is_drawn_per_image():
    """With the box given, an image is resized in one of two ways, each half of the time."""
    same = pictures(1).expand(200, 3, 32, 32)
    y = A.random_resized_crop(same, 48, (1.0, 1.0), (1.0, 1.0), A.Draws(0))
    whole = (torch.zeros(1), torch.zeros(1), torch.full((1,), 32.0), torch.full((1,), 32.0))
    linear, cubic = (A.crop_and_resize(same[:1], whole, 48, torch.tensor([kind])) for kind in (False, True))
    is_cubic = (y == cubic).flatten(1).all(dim=1)
    assert torch.equal(is_cubic, ~(y == linear).flatten(1).all(dim=1)) and 70 < is_cubic.sum() < 130


def test_whole_crop_is_the_identity():
    x = pictures(16)
    assert torch.equal(A.random_resized_crop(x, 32, (1.0, 1.0), (1.0, 1.0), A.Draws(0)), x)


def test_batched_crop_equals_one_image_at_a_time():
    x = pictures(16)
    boxes = torch.stack(A.draw_boxes(16, 32, 32, (0.08, 1.0), (3 / 4, 4 / 3), A.Draws(0)))
    bicubic = torch.arange(16) % 2 == 0
    alone = [A.crop_and_resize(x[i:i + 1], boxes[:, i:i + 1], 32, bicubic[i:i + 1]) for i in range(16)]
    torch.testing.assert_close(A.crop_and_resize(x, boxes, 32, bicubic), torch.cat(alone), atol=1e-6, rtol=0)


def one_box(height, width, scale, ratio, rng):
    """torchvision's RandomResizedCrop.get_params, as its documentation words it."""
    for _ in range(10):
        area = height * width * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return rng.randint(0, height - h), rng.randint(0, width - w), h, w
    w, h = width, height
    if width / height < ratio[0]:
        h = round(width / ratio[0])
    elif width / height > ratio[1]:
        w = round(height * ratio[1])
    return (height - h) // 2, (width - w) // 2, h, w


@pytest.mark.parametrize("height, width", [(32, 32), (20, 102), (102, 20), (57, 40)])
def test_boxes_are_drawn_as_in_torchvision(height, width):
    n, rng, scale, ratio = 20_000, random.Random(0), (0.08, 1.0), (3 / 4, 4 / 3)
    ours = torch.stack(A.draw_boxes(n, height, width, scale, ratio, A.Draws(0))).double()
    theirs = torch.tensor([one_box(height, width, scale, ratio, rng) for _ in range(n)]).T.double()
    assert torch.equal(ours, ours.round()) and (ours[:2] >= 0).all()
    assert (ours[0] + ours[2] <= height).all() and (ours[1] + ours[3] <= width).all()
    q = torch.linspace(0.02, 0.98, 25).double()
    for what in (lambda t, l, h, w: h * w / (height * width), lambda t, l, h, w: (w / h).log(),
                 lambda t, l, h, w: (t + h / 2) / height, lambda t, l, h, w: (l + w / 2) / width):
        mine, reference = what(*ours), what(*theirs)
        distance = (torch.searchsorted(mine.sort().values, reference.quantile(q), right=True) / n
                    - torch.searchsorted(reference.sort().values, reference.quantile(q), right=True) / n)
        assert distance.abs().max() < 0.02  # Kolmogorov-Smirnov: chance reaches this once in 1500


def test_flip():
    x = pictures(400)
    y = A.random_flip(x, 0.25, A.Draws(0))
    flipped = (y == x.flip(-1)).flatten(1).all(dim=1)
    assert torch.equal(y[~flipped], x[~flipped]) and 60 < flipped.sum() < 140


def test_centre_crop():
    """32 / 0.875 = 36.57: the shorter side becomes 36, the longer keeps the shape, 32 x 32 stay."""
    x = pictures(2, 60, 90)
    resized = F.interpolate(x, (36, 54), mode="bicubic", antialias=True).clamp(0, 1)
    assert torch.equal(A.centre_crop(x, 32), resized[:, :, 2:34, 11:43])
    torch.testing.assert_close(A.centre_crop(x.mT, 32), A.centre_crop(x, 32).mT)
    assert torch.equal(A.centre_crop(x[..., :60], 60), x[..., :60])


# ---- colour jitter ----

def test_jitter_factors_are_uniform_per_image():
    """A grey image knows brightness alone: its level times a factor between 0.6 and 1.4."""
    x = torch.full((4000, 3, 2, 2), 0.5)
    factor = A.colour_jitter(x, 0.4, A.Draws(0))[:, 0, 0, 0] / 0.5
    assert np.allclose(np.quantile(factor, [0, 0.25, 0.5, 0.75, 1]), [0.6, 0.8, 1, 1.2, 1.4], atol=0.02)


def test_jitter_applies_all_three_in_random_order(monkeypatch):
    orders = set()
    for seed in range(40):
        order = []
        for name in ("brightness", "contrast", "saturation"):
            monkeypatch.setattr(A, name, lambda x, factor, name=name: order.append((name, factor)) or x)
        A.colour_jitter(torch.zeros(2, 3, 4, 4), 0.4, A.Draws(seed))
        assert len({factor[0].item() for _, factor in order}) == 3
        orders.add(tuple(name for name, _ in order))
    assert len(orders) == 6


# ---- Mixup, CutMix, targets ----

@pytest.mark.parametrize("alpha", [0.8, 1.0])
def test_beta(alpha):
    draws = [source.beta(alpha) for source in [A.Draws(0)] for _ in range(5000)]
    expected = np.random.default_rng(0).beta(alpha, alpha, 5000)
    q = np.linspace(0.05, 0.95, 7)
    assert np.allclose(np.quantile(draws, q), np.quantile(expected, q), atol=0.03)


def test_mixup_is_a_weighted_sum_with_the_neighbour():
    x = pictures(7)
    y, lam = A.mix(x, 0.8, 0, A.Draws(3))
    assert 0 < lam < 1
    for i, partner in enumerate((1, 0, 3, 2, 5, 4, 6)):
        torch.testing.assert_close(y[i], lam * x[i] + (1 - lam) * x[partner])


def test_cutmix_lambda_is_the_share_that_is_left():
    """Every pixel is one's own or the partner's; lambda counts one's own, also when the border cuts the box."""
    own, partner = torch.zeros(1, 3, 20, 30), torch.ones(1, 3, 20, 30)
    cut_short = 0
    for seed in range(200):
        wanted = seed / 200
        y, lam = A.cutmix(torch.cat((own, partner)), wanted, A.Draws(seed))
        assert y[0].mean().item() == pytest.approx(1 - lam) and torch.equal(y[1], 1 - y[0])
        rows, columns = y[0, 0].amax(dim=1).sum().item(), y[0, 0].amax(dim=0).sum().item()
        assert rows * columns == y[0, 0].sum().item()  # one rectangle
        full = [int(side * math.sqrt(1 - wanted)) // 2 * 2 for side in (20, 30)]
        assert rows <= full[0] and columns <= full[1]
        cut_short += [rows, columns] != full
    assert 40 < cut_short < 200


def test_cutmix_boxes_are_centred_anywhere():
    x = torch.cat((torch.zeros(1, 1, 8, 16), torch.ones(1, 1, 8, 16)))
    hits = sum(A.cutmix(x, 0.9, A.Draws(seed))[0][0, 0] for seed in range(2000)) / 2000
    middle = hits[1:-1, 2:-2]  # a 2 x 4 box covers an inner pixel with probability 2 * 4 / (8 * 16)
    assert (middle - 1 / 16).abs().max() < 0.025


def test_mix_tosses_a_coin(monkeypatch):
    alphas = []
    monkeypatch.setattr(A.Draws, "beta", lambda self, alpha: alphas.append(alpha) or 0.5)
    x = pictures(2)

    def was_cut(*settings):
        y, _ = A.mix(x, *settings)
        return bool(((y == x) | (y == x.flip(0))).all())

    cuts = [was_cut(0.8, 1.0, A.Draws(seed)) for seed in range(200)]
    assert 70 < sum(cuts) < 130
    assert alphas == [1.0 if cut else 0.8 for cut in cuts]
    assert all(was_cut(0, 1.0, A.Draws(seed)) and not was_cut(0.8, 0, A.Draws(seed)) for seed in range(20))


def test_soft_targets_equal_cross_entropys_label_smoothing():
    labels, logits = torch.tensor([3, 0, 9, 1]), torch.randn(4, 10, generator=seeded())
    smoothed = F.cross_entropy(logits, labels, label_smoothing=0.1)
    torch.testing.assert_close(F.cross_entropy(logits, A.soft_targets(labels, 10, 0.1)), smoothed)
    mixed = 0.3 * smoothed + 0.7 * F.cross_entropy(logits, labels[[1, 0, 3, 2]], label_smoothing=0.1)
    torch.testing.assert_close(F.cross_entropy(logits, A.soft_targets(labels, 10, 0.1, lam=0.3)), mixed)
    assert torch.equal(A.soft_targets(labels, 10), F.one_hot(labels, 10).float())


# ---- everything together ----

def run(seed=0, x=None, **settings):
    x = pictures(8) if x is None else x
    return A.augment(x, torch.arange(len(x)) % 10, 10, A.Draws(seed), **{"size": 32, **settings})


def test_a_batch_is_a_function_of_the_seed():
    state, x = torch.get_rng_state(), pictures(8)
    images, targets = run(1)
    assert torch.equal(torch.get_rng_state(), state)  # nothing else is random
    assert all(torch.equal(a, b) for a, b in zip((images, targets), run(1)))
    assert not torch.equal(images, run(2)[0])
    assert torch.equal(run(1, x=x)[0], images) and torch.equal(x, pictures(8))  # the input is left alone


def test_images_stay_in_range_and_targets_sum_to_one():
    for seed in range(20):
        images, targets = run(seed, x=pictures(7, 40, 48, seed))
        assert images.shape == (7, 3, 32, 32) and 0 <= images.min() and images.max() <= 1
        torch.testing.assert_close(targets.sum(dim=1), torch.ones(7))
        assert targets.min() >= 0.01 - 1e-6


def test_all_off_is_the_identity():
    images, targets = run(**OFF)
    assert torch.equal(images, pictures(8)) and torch.equal(targets, F.one_hot(torch.arange(8), 10).float())


@pytest.mark.parametrize("name, value", [("crop_scale", (0.3, 0.9)), ("flip", 1.0), ("rand_layers", 2), ("jitter", 0.4),
                                         ("mixup", 0.8), ("cutmix", 1.0), ("label_smoothing", 0.1)])
def test_each_piece_alone(name, value):
    images, targets = run(**OFF | {name: value})
    assert torch.equal(images, pictures(8)) == (name == "label_smoothing")
    hard = torch.equal(targets, F.one_hot(torch.arange(8), 10).float())
    assert hard == (name not in ("mixup", "cutmix", "label_smoothing"))


@pytest.mark.parametrize("settings", [
    dict(),
    dict(crop_scale=(0.5, 0.9), crop_ratio=(1.0, 1.1), flip=0.3, rand_layers=3, rand_magnitude=5.0, jitter=0.2,
         mixup=0.7, cutmix=0.6, label_smoothing=0.2)])
def test_order_and_settings(settings, monkeypatch):
    """The defaults are the paper's and timm's, and every setting reaches its piece."""
    calls = {}
    for name in ("random_resized_crop", "random_flip", "rand_augment", "colour_jitter", "mix", "soft_targets"):
        def piece(x, *args, name=name, real=getattr(A, name)):
            calls[name] = args
            return real(x, *args)
        monkeypatch.setattr(A, name, piece)
    run(**settings)
    s = dict(crop_scale=(0.08, 1.0), crop_ratio=(3 / 4, 4 / 3), flip=0.5, rand_layers=2, rand_magnitude=9.0, jitter=0.4,
             mixup=0.8, cutmix=1.0, label_smoothing=0.1) | settings
    assert [(name, args[:-1]) for name, args in calls.items()] == [
        ("random_resized_crop", (32, s["crop_scale"], s["crop_ratio"])), ("random_flip", (s["flip"],)),
        ("rand_augment", (s["rand_layers"], s["rand_magnitude"])), ("colour_jitter", (s["jitter"],)),
        ("mix", (s["mixup"], s["cutmix"])), ("soft_targets", (10, s["label_smoothing"]))]
