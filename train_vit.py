"""Train a ViT to classify images (paper, sec. 5 and C.3).

    python train_vit.py                                   a vanilla ViT on drawn shapes, in minutes on a laptop
    python train_vit.py --attention gated --patch-layernorm
    python train_vit.py --data cifar10 --steps 4000       downloads CIFAR-10; or a folder that holds it
    torchrun --nproc-per-node 8 train_vit.py --preset paper --data imagenet/
"""
import time
from dataclasses import asdict, replace
from itertools import starmap

import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from minq import flags
from minq.augment import augment
from minq.errors import one_line_errors
from minq.images import Images, load_images
from minq.model import ViT, ViTConfig
from minq.outliers import watch
from minq.quant import fake_quantization_off, fake_quantize_training
from minq.training import (PATIENCE, Interrupt, Run, autocast, check_slices, cosine_schedule, evaluate, load_checkpoint,
                           mean_over_processes, micro_batches, parameter_groups, pick_device, pick_precision,
                           require_finite, require_same_data, seed_step, show, start_processes, summary, to_device)

# ---- recipes ----

DEFAULTS = dict(
    attention="vanilla", alpha=4.0, zeta=1.0, gate="linear", gate_hidden=4, gate_init=0.5,
    layers=12, width=384, heads=6, image_size=224, patch_size=16, patch_layernorm=False, init_std=0.02,
    data="shapes", crop_scale=0.08, flip=0.5, rand_augment=2, rand_magnitude=9.0, jitter=0.4, mixup=0.8, cutmix=1.0,
    label_smoothing=0.1,
    epochs=300, batch_size=512, accumulate=1, lr=1e-3, weight_decay=0.03,
    decay_layernorm=False, dropout=0.0, seed=0,
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
    flags.add_attention_flags(parser)
    flags.add_size_flags(parser, seq_len=False)
    parser.add_argument("--image-size", type=flags.positive, help="pixels a side that the model sees; by default the data's own")
    parser.add_argument("--patch-size", type=flags.positive, help="pixels a side of a patch")
    parser.add_argument("--patch-layernorm", action="store_true", default=None, help="LayerNorm after the patch embedding (Table 6)")
    parser.add_argument("--init-std", type=flags.number(float, above=0), help="standard deviation of initial weights")
    parser.add_argument("--data", help="'shapes' (drawn by code), 'cifar10' (downloads), or a folder: CIFAR-10's or MNIST's files, or "
                                       "images.npy and labels.npy")
    recipe = parser.add_argument_group("augmentation (C.3); 0 switches a piece off")
    recipe.add_argument("--crop-scale", type=flags.number(float, low=0, high=1), help="smallest share of the area that a random crop keeps")
    recipe.add_argument("--flip", type=flags.number(float, low=0, high=1), help="probability of a horizontal flip")
    recipe.add_argument("--rand-augment", type=flags.number(int, low=0), help="RandAugment operations per image")
    recipe.add_argument("--rand-magnitude", type=flags.number(float, low=0, high=10), help="their magnitude, 0 to 10")
    recipe.add_argument("--jitter", type=flags.number(float, low=0, high=1), help="colour jitter: brightness, contrast, saturation")
    recipe.add_argument("--mixup", type=flags.number(float, low=0), help="alpha of Mixup's Beta distribution")
    recipe.add_argument("--cutmix", type=flags.number(float, low=0), help="alpha of CutMix's Beta distribution")
    recipe.add_argument("--label-smoothing", type=flags.number(float, low=0, below=1), help="epsilon")
    flags.add_training_flags(parser)
    parser.add_argument("--epochs", type=flags.positive, help="passes over the images, instead of --steps")
    flags.add_fake_quant_flags(parser)
    flags.add_run_flags(parser)
    args, typed = flags.read_flags(parser, DEFAULTS, PRESETS, argv)
    flags.settle_fake_quant(args, typed)

    rank, world = start_processes()
    run = Run(args.out or flags.run_name("vit", args, typed))
    checkpoint = load_checkpoint(run.folder, "vit") if args.resume else None
    if checkpoint:
        args = flags.resumed(checkpoint["args"], typed)
    device = pick_device(args.device)
    args.precision = pick_precision(args.precision, device)
    check_slices(args.batch_size, world)

    # ---- data ----
    data = Images(load_images(args.data), args.image_size)
    batch_size = args.batch_size * args.accumulate
    if not checkpoint:
        args.steps = flags.steps_of(args, typed, len(data.source.train) // batch_size)
        args.warmup = args.steps // 15 if args.warmup is None else args.warmup  # 20 of 300 epochs

    # ---- model ----
    torch.manual_seed(args.seed)
    config = ViTConfig(
        layers=args.layers, width=args.width, heads=args.heads, ffn=4 * args.width, dropout=args.dropout,
        image_size=data.image_size, patch_size=args.patch_size, classes=data.classes, patch_layernorm=args.patch_layernorm,
        init_std=args.init_std)
    if not checkpoint:
        flags.settle_attention(args, typed, config.seq_len)
    args.seq_len = config.seq_len
    config = replace(config, attention=args.attention, gamma=args.gamma, zeta=args.zeta, gate=args.gate,
                     gate_hidden=args.gate_hidden, gate_init=args.gate_init)
    model = ViT(config).to(device)
    if args.fake_quant:
        fake_quantize_training(model, args.w_bits, args.a_bits, args.fake_quant_granularity)
    trained = torch.compile(model) if args.compile else model
    trained = DistributedDataParallel(trained) if world > 1 else trained

    # ---- optimizer ----
    groups = parameter_groups(model, args.weight_decay, args.decay_layernorm)
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.999), fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=args.precision == "fp16")

    # ---- start or resume ----
    step, seconds, train_loss = 0, 0.0, torch.zeros(())
    if checkpoint:
        require_same_data(args.data, data.sha256, checkpoint)
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        scaler.load_state_dict(checkpoint["scaler"])
        step, seconds, train_loss = (checkpoint[name] for name in ("step", "seconds", "train_loss"))
    train_loss = train_loss.to(device)  # summed since the last evaluation
    bad_steps = torch.zeros((), dtype=torch.long, device=device)  # in a row, whose loss was not finite
    if rank == 0:
        run.forget_after(step) if checkpoint else run.start(args.overwrite)
    started = time.perf_counter() - seconds

    def save():
        run.save(family="vit", config=asdict(config), args=vars(args), data_sha256=data.sha256, step=step,
                 model=model.state_dict(), optimizer=optimizer.state_dict(), scaler=scaler.state_dict(),
                 train_loss=train_loss, seconds=time.perf_counter() - started)

    # ---- loop ----
    progress = tqdm(total=args.steps, initial=step, unit="step", disable=rank > 0)
    with Interrupt() as interrupt:
        while step < args.steps and not interrupt.raised:
            lr = args.lr * cosine_schedule(step, args.warmup, args.steps)
            for group in optimizer.param_groups:
                group["lr"] = lr
            seed_step(args.seed, step, rank)

            rows = data.train_rows(args.seed, step, batch_size)
            step_loss = torch.zeros((), device=device)
            for i, (slice_rows,) in enumerate(micro_batches((rows,), args.accumulate, rank, world)):
                trained.require_backward_grad_sync = i == args.accumulate - 1  # DDP: exchange gradients once a step
                images, labels = to_device(data.to_float(*data.source.train.take(slice_rows)), device)
                generator = torch.Generator(device).manual_seed(torch.initial_seed() + i)  # of this step, rank and slice
                images, targets = augment(
                    images, labels, data.classes, generator, size=data.image_size,
                    crop_scale=(args.crop_scale, 1.0) if args.crop_scale else None, flip=args.flip,
                    rand_layers=args.rand_augment, rand_magnitude=args.rand_magnitude, jitter=args.jitter,
                    mixup=args.mixup, cutmix=args.cutmix, label_smoothing=args.label_smoothing)
                with autocast(device, args.precision):
                    logits = trained(images)
                loss = F.cross_entropy(logits.float(), targets, reduction="sum") * (world / batch_size)
                scaler.scale(loss).backward()
                step_loss += loss.detach()
            scaler.unscale_(optimizer)
            if args.clip is not None:
                torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            step_loss = mean_over_processes(step_loss)
            train_loss += step_loss
            bad_steps = (bad_steps + 1) * ~step_loss.isfinite()
            step += 1

            progress.update()
            if step % 20 == 0:
                show(progress, step_loss, batch_size, "images")
                if bad_steps >= PATIENCE:
                    break
            if step % args.eval_every == 0 or step == args.steps:
                validation = lambda: starmap(data.to_model, data.validation_batches(args.batch_size, args.eval_batches))
                with watch(model, ("layer_input", "ffn_output", "layer_output")) as outliers:
                    scores = floating = evaluate(model, validation(), device)
                if args.fake_quant:
                    with fake_quantization_off(model):
                        floating = evaluate(model, validation(), device)
                if rank == 0:
                    run.log(step=step, loss=train_loss.item() / ((step - 1) % args.eval_every + 1), lr=lr,
                            val_loss=scores["loss"], accuracy=scores["accuracy"],
                            float_accuracy=floating["accuracy"], **outliers.mean)
                train_loss.zero_()
            if rank == 0 and (step % args.save_every == 0 or step == args.steps or interrupt.raised) and not bad_steps:
                save()
    progress.close()

    # ---- report ----
    require_finite(run, step, bad_steps)
    if rank > 0:
        return
    if step < args.steps:
        print(f"interrupted at step {step}, saved. Go on with: python train_vit.py --resume --out {run.folder}")
        raise SystemExit(130)
    print(f"{run.folder}: step {step}, {summary(run)}")
    print(f"next: python quantize.py {run.folder}")


if __name__ == "__main__":
    main()
