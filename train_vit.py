"""Train a ViT to classify images (paper, sec. 5 and C.3).

    python train_vit.py                                   a vanilla ViT on drawn shapes, in minutes on a laptop
    python train_vit.py --attention gated --patch-layernorm
    python train_vit.py --data cifar10 --steps 4000       downloads CIFAR-10; or a folder that holds it
    torchrun --nproc-per-node 8 train_vit.py --preset paper --data imagenet/
"""
import numpy as np
import torch
import torch.nn.functional as F

from minq import flags
from minq.augment import Draws, augment
from minq.errors import UserError, one_line_errors
from minq.images import IMAGES, Images, load_images
from minq.model import ViT, ViTConfig
from minq.runs import Run
from minq.training import (OPTIMIZERS, autocast, cosine_schedule, parameter_groups, pick_device, pick_precision,
                           set_lr, start_processes, step_seed, to_device)

# ---- recipes ----

DEFAULTS = dict(
    attention="vanilla", alpha=4.0,
    layers=12, width=384, heads=6, image_size=224, patch_size=16, patch_layernorm=False, init_std=0.02,
    data="shapes", crop_scale=0.08, flip=0.5, rand_augment=2, rand_magnitude=9.0, jitter=0.4, mixup=0.8, cutmix=1.0,
    label_smoothing=0.1,
    epochs=300, batch_size=512, accumulate=1, lr=1e-3, weight_decay=0.03,
    decay_layernorm=False, dropout=0.0, seed=0, optimizer="adamw",
    eval_every=2500, eval_batches=100, save_every=2500)

PRESETS = {
    "laptop": dict(alpha=1.0, layers=4, width=128, heads=4, image_size=None, patch_size=8, init_std=0.05,
                   crop_scale=0.6, rand_augment=0, jitter=0.0, mixup=0.0, cutmix=0.0,
                   epochs=None, steps=1800, batch_size=64,
                   eval_every=600, eval_batches=32, save_every=600),
    "paper": dict(),  # C.3; where it names no strength, timm's
}


@one_line_errors
def main(argv=None):
    # ---- arguments ----
    parser = flags.Parser(__doc__)
    flags.add_shared_flags(parser)
    parser.add_argument("--data", type=flags.place, help=f"{', '.join(IMAGES)}, or a folder: CIFAR-10's or MNIST's files, or images.npy and labels.npy")
    parser.add_argument("--epochs", type=flags.positive, help="passes over the images, instead of --steps")
    parser.add_argument("--image-size", type=flags.positive, help="pixels a side that the model sees; by default the data's own")
    parser.add_argument("--patch-size", type=flags.positive, help="pixels a side of a patch")
    parser.add_argument("--patch-layernorm", action="store_true", default=None, help="LayerNorm after the patch embedding (Table 6)")
    recipe = parser.add_argument_group("augmentation (C.3); 0 switches a piece off")
    recipe.add_argument("--crop-scale", type=flags.number(float, low=0, high=1), help="smallest share of the area that a random crop keeps")
    recipe.add_argument("--flip", type=flags.number(float, low=0, high=1), help="probability of a horizontal flip")
    recipe.add_argument("--rand-augment", type=flags.number(int, low=0, high=100), help="RandAugment operations per image")
    recipe.add_argument("--rand-magnitude", type=flags.number(float, low=0, high=10), help="their magnitude, 0 to 10")
    recipe.add_argument("--jitter", type=flags.number(float, low=0, high=1), help="colour jitter: brightness, contrast, saturation")
    recipe.add_argument("--mixup", type=flags.number(float, low=0), help="alpha of Mixup's Beta distribution")
    recipe.add_argument("--cutmix", type=flags.number(float, low=0), help="alpha of CutMix's Beta distribution")
    recipe.add_argument("--label-smoothing", type=flags.number(float, low=0, below=1), help="epsilon")
    args, typed, checkpoint = flags.read_flags("vit", parser, DEFAULTS, PRESETS, argv)
    start_processes()
    device = pick_device(args.device)
    args.precision = pick_precision(args.precision, device)

    # ---- data ----
    data = Images(load_images(args.data), args.image_size)
    batch_size = args.batch_size * args.accumulate
    if not checkpoint:
        args.steps = flags.steps_of(args, typed, len(data.source.train) // batch_size)
        args.warmup = args.steps // 15 if args.warmup is None else args.warmup  # 20 of 300 epochs

    # ---- model ----
    torch.manual_seed(args.seed)
    config = ViTConfig.of(args, image_size=data.image_size, classes=data.classes)
    model = ViT(config).to(device)

    # ---- optimizer ----
    groups = parameter_groups(model, args.weight_decay, args.decay_layernorm)
    optimizer = OPTIMIZERS[args.optimizer](model, groups, lr=args.lr, betas=(0.9, 0.999))
    scaler = torch.amp.GradScaler(device.type, enabled=args.precision == "fp16")

    # ---- loop: the run counts, resumes, evaluates, logs, saves and reports (minq/runs.py) ----
    run = Run(args, data, model, optimizer, scaler, checkpoint)
    if args.batch_size // run.world % 2 and (args.mixup or args.cutmix):
        raise UserError(f"--batch-size {args.batch_size}: --mixup and --cutmix mix the images of a process in pairs; "
                        f"expected a multiple of {2 * run.world}")
    for step in run.steps():
        set_lr(optimizer, args.lr * cosine_schedule(step, args.warmup, args.steps))
        rows = data.train_rows(args.seed, step, batch_size)
        for slice_rows, places in run.slices(rows, np.arange(batch_size)):
            images, labels = to_device(data.train_images(slice_rows), device)
            draws = Draws(step_seed(args.seed, step), device, places, batch_size)
            images, targets = augment(
                images, labels, data.classes, draws, size=data.image_size,
                crop_scale=(args.crop_scale, 1.0) if args.crop_scale else None, flip=args.flip,
                rand_layers=args.rand_augment, rand_magnitude=args.rand_magnitude, jitter=args.jitter,
                mixup=args.mixup, cutmix=args.cutmix, label_smoothing=args.label_smoothing)
            with autocast(device, args.precision):
                logits = run.trained(images)  # (B, classes)
            loss = F.cross_entropy(logits.float(), targets, reduction="sum")
            loss = loss * (run.world / batch_size)  # DDP takes the mean over processes
            scaler.scale(loss).backward()
            run.step_loss += loss.detach()
        scaler.unscale_(optimizer)
        if args.clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()


if __name__ == "__main__":
    main()
