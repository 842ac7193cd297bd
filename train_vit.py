"""Train a ViT to classify images (paper, sec. 5 and C.3).

    python train_vit.py                                   a vanilla ViT on drawn shapes, in minutes
    python train_vit.py --attention gated --patch-layernorm
    python train_vit.py --data cifar10 --steps 4000       downloads CIFAR-10; or a folder with it
    torchrun --nproc-per-node 8 train_vit.py --preset paper --data imagenet/
"""
import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

import lab.cures, lab.muon, lab.repair  # noqa: F401, more choices for flags
from minq import flags
from minq.augment import PIECES, Draws, augment
from minq.fake_quant import fake_quantize_training
from minq.images import IMAGES, load_images
from minq.model import ViT, ViTConfig
from minq.runs import Run, resume
from minq.training import (OPTIMIZERS, autocast, compiled, cosine_schedule, parameter_groups,
                           pick_device, pick_precision, set_lr, start_processes, step_seed,
                           to_device)

# ---- recipes ----

PAPER = dict(  # C.3; where it names no strength, timm's
    layers=12, width=384, heads=6, image_size=224, patch_size=16, init_std=0.02,
    alpha=4.0, data="shapes", crop_scale=0.08, flip=0.5, rand_augment=2, rand_magnitude=9.0,
    jitter=0.4, mixup=0.8, cutmix=1.0, label_smoothing=0.1,
    epochs=300, batch_size=512, accumulate=1, lr=1e-3, weight_decay=0.03,
    seed=0, eval_every=2500, eval_batches=100, save_every=2500)

PRESETS = {
    "laptop": PAPER | dict(
        layers=4, width=128, heads=4, image_size=None, patch_size=8, init_std=0.05,
        alpha=1.0, epochs=None, steps=1800, batch_size=64,
        crop_scale=0.6, rand_augment=0, jitter=0.0, mixup=0.0, cutmix=0.0,
        eval_every=600, eval_batches=32, save_every=600),
    "paper": PAPER,
}


@flags.one_line_errors
def main(argv=None):
    # ---- arguments ----
    parser = flags.Parser(__doc__)
    flags.add_config_flags(parser, ViTConfig)
    add = parser.add_argument_group("images").add_argument
    add("--data", type=flags.source(IMAGES), help=f"{', '.join(IMAGES)}, or a folder: CIFAR-10's "
        "files, or images.npy, labels.npy, val_images.npy and val_labels.npy")
    add("--image-size", type=flags.positive, help="pixels per side; by default the data's own")
    add("--epochs", type=flags.positive, help="passes over the images, instead of --steps")
    for name, (kind, most, help) in PIECES.items():
        add(flags.option(name), type=flags.number(kind, low=0, high=most), help=help)
    flags.add_training_flags(parser, OPTIMIZERS)
    args, typed = flags.read_flags("vit", ViTConfig, parser, PRESETS, argv)
    lab.repair.take_sizes(args, typed, "vit")  # --from: that run's sizes and data
    checkpoint = resume(args, typed, "vit") if args.resume else None
    world = start_processes()
    device = pick_device(args.device)
    args.precision = pick_precision(args.precision, device)

    # ---- data ----
    data = load_images(args.data, args.image_size)
    batch_size = args.batch_size * args.accumulate
    if not checkpoint:
        if "steps" in typed and "epochs" in typed:
            raise flags.UserError(f"--steps {args.steps} and --epochs {args.epochs}: give one")
        if "steps" not in typed and args.epochs:
            args.steps = max(1, args.epochs * (len(data.train.labels) // batch_size))
        args.warmup = args.steps // 15 if args.warmup is None else args.warmup  # 20 of 300 epochs
    if args.batch_size // world % 2 and (args.mixup or args.cutmix):
        raise flags.UserError(f"--batch-size {args.batch_size}: --mixup needs pairs of images")

    # ---- model ----
    torch.manual_seed(args.seed)
    model = ViT(ViTConfig.of(args, image_size=data.image_size, classes=data.classes)).to(device)
    lab.repair.begin(args, model)  # --from: that run's weights

    # ---- optimizer ----
    groups = parameter_groups(model, args.weight_decay, args.decay_layernorm)
    optimizer = OPTIMIZERS[args.optimizer](model, groups, lr=args.lr, betas=(0.9, 0.999))
    scaler = torch.amp.GradScaler(device.type, enabled=args.precision == "fp16")

    # ---- as it is called in training: in eight bits (the blog), compiled, on many devices ----
    if args.fake_quant:
        fake_quantize_training(model, args.w_bits, args.a_bits, args.fake_quant_granularity)
    trained = compiled(model) if args.compile else model
    trained = DistributedDataParallel(trained) if world > 1 else trained

    # ---- loop: the run counts, resumes, evaluates, logs, saves and reports (minq/runs.py) ----
    run = Run(args, data, model, trained, optimizer, scaler, checkpoint)
    for step in run.steps():
        set_lr(optimizer, args.lr * cosine_schedule(step, args.warmup, args.steps))
        rows = data.train_rows(args.seed, step, batch_size)
        for rows_here, places in run.micro_batches(rows, np.arange(batch_size)):
            images, labels = to_device(data.to_float(*data.train.take(rows_here)), device)
            draws = Draws(step_seed(args.seed, step), device, places, batch_size)
            images, targets = augment(images, labels, data.classes, draws, data.image_size,
                                      **{name: getattr(args, name) for name in PIECES})
            with autocast(device, args.precision):
                logits = trained(images)  # (B, classes)
            loss = F.cross_entropy(logits.float(), targets, reduction="sum")
            loss = loss * (world / batch_size)  # DDP takes the mean over processes
            scaler.scale(loss).backward()
            run.step_loss += loss.detach()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip or torch.inf)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()


if __name__ == "__main__":
    main()
