"""Train a BERT by masked language modelling on bytes (paper, sec. 5 and C.1).

    python train_bert.py                                  a vanilla BERT, in minutes on a laptop
    python train_bert.py --attention clipped --gamma -0.03
    python train_bert.py --attention gated --gate mlp
    torchrun --nproc-per-node 8 train_bert.py --preset paper --data tokens.bin --vocab-size 30522
"""
import time
from dataclasses import asdict
from itertools import starmap

import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from minq import flags
from minq.data import IGNORE, MaskedText, load_text
from minq.errors import one_line_errors
from minq.model import Bert, BertConfig
from minq.outliers import watch
from minq.quant import fake_quantization_off, fake_quantize_training
from minq.training import (PATIENCE, Interrupt, Run, autocast, check_slices, evaluate, linear_schedule, load_checkpoint,
                           mean_over_processes, micro_batches, parameter_groups, pick_device, pick_precision,
                           require_finite, require_same_data, seed_step, show, start_processes, summary, to_device)

# ---- recipes ----

DEFAULTS = dict(
    attention="vanilla", alpha=4.0, zeta=1.0, gate="linear", gate_hidden=4, gate_init=0.5,
    layers=12, width=768, heads=12, seq_len=128, init_std=0.02, positions="normal",
    data="stdlib", mask_prob=0.15,
    steps=1_000_000, batch_size=256, accumulate=1, lr=1e-4, warmup=10_000, weight_decay=0.01,
    decay_layernorm=False, clip=1.0, dropout=0.1, seed=0,
    precision="fp16", eval_every=10_000, eval_batches=64, save_every=10_000)

PRESETS = {
    "laptop": dict(alpha=1.0, layers=4, width=128, heads=4, seq_len=64, init_std=0.05, positions="sinusoid",
                   steps=2400, batch_size=16, lr=1.5e-3, warmup=200, dropout=0.0,
                   precision=None, eval_every=400, eval_batches=64, save_every=400),
    "paper": dict(),  # C.1
    "bert-6l": dict(layers=6, steps=500_000, batch_size=128),  # sec. 5.2, 5.3
    "blog": dict(batch_size=128, alpha=None, gamma=-0.025, gate="mlp", gate_hidden=16),  # the blog's Table 1
}


@one_line_errors
def main(argv=None):
    # ---- arguments ----
    parser = flags.Parser(__doc__)
    flags.add_attention_flags(parser)
    flags.add_size_flags(parser)
    parser.add_argument("--init-std", type=flags.number(float, above=0), help="standard deviation of initial weights")
    parser.add_argument("--positions", choices=("normal", "sinusoid"), help="how the learned position table starts")
    flags.add_text_flags(parser)
    parser.add_argument("--mask-prob", type=flags.number(float, above=0, below=1), help="share of tokens to predict")
    flags.add_training_flags(parser)
    flags.add_fake_quant_flags(parser)
    flags.add_run_flags(parser)
    args, typed = flags.read_flags(parser, DEFAULTS, PRESETS, argv)
    flags.settle_fake_quant(args, typed)
    flags.settle_attention(args, typed, args.seq_len)

    rank, world = start_processes()
    run = Run(args.out or flags.run_name("bert", args, typed))
    checkpoint = load_checkpoint(run.folder, "bert") if args.resume else None
    if checkpoint:
        args = flags.resumed(checkpoint["args"], typed)
    device = pick_device(args.device)
    args.precision = pick_precision(args.precision, device)
    check_slices(args.batch_size, world)

    # ---- data ----
    text = load_text(args.data, args.vocab_size, args.special_ids)
    data = MaskedText(text, args.seq_len, args.mask_prob)

    # ---- model ----
    torch.manual_seed(args.seed)
    config = BertConfig(
        layers=args.layers, width=args.width, heads=args.heads, ffn=4 * args.width, seq_len=args.seq_len,
        dropout=args.dropout, attention=args.attention, gamma=args.gamma, zeta=args.zeta, gate=args.gate,
        gate_hidden=args.gate_hidden, gate_init=args.gate_init, vocab_size=text.vocab_size, init_std=args.init_std,
        positions=args.positions)
    model = Bert(config).to(device)
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
        require_same_data(args.data, text.sha256, checkpoint)
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
        run.save(family="bert", config=asdict(config), args=vars(args), data_sha256=text.sha256, step=step,
                 model=model.state_dict(), optimizer=optimizer.state_dict(), scaler=scaler.state_dict(),
                 train_loss=train_loss, seconds=time.perf_counter() - started)

    # ---- loop ----
    progress = tqdm(total=args.steps, initial=step, unit="step", disable=rank > 0)
    with Interrupt() as interrupt:
        while step < args.steps and not interrupt.raised:
            lr = args.lr * linear_schedule(step, args.warmup, args.steps)
            for group in optimizer.param_groups:
                group["lr"] = lr
            seed_step(args.seed, step, rank)

            tokens, labels = data.train_batch(args.seed, step, args.batch_size * args.accumulate)
            predictions = (labels != IGNORE).sum()  # in the global batch: the slices' losses add up to its mean
            step_loss = torch.zeros((), device=device)
            for i, batch in enumerate(micro_batches((tokens, labels), args.accumulate, rank, world)):
                trained.require_backward_grad_sync = i == args.accumulate - 1  # DDP: exchange gradients once a step
                inputs, targets = to_device(data.to_model(*batch), device)
                with autocast(device, args.precision):
                    logits = trained(*inputs)
                loss = F.cross_entropy(logits.float(), targets, reduction="sum") * (world / predictions)
                scaler.scale(loss).backward()
                step_loss += loss.detach()
            scaler.unscale_(optimizer)
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
                show(progress, step_loss, tokens.size, "tokens")
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
                            val_loss=scores["loss"], perplexity=scores["perplexity"],
                            float_perplexity=floating["perplexity"], **outliers.mean)
                train_loss.zero_()
            if rank == 0 and (step % args.save_every == 0 or step == args.steps or interrupt.raised) and not bad_steps:
                save()
    progress.close()

    # ---- report ----
    require_finite(run, step, bad_steps)
    if rank > 0:
        return
    if step < args.steps:
        print(f"interrupted at step {step}, saved. Go on with: python train_bert.py --resume --out {run.folder}")
        raise SystemExit(130)
    print(f"{run.folder}: step {step}, {summary(run)}")
    print(f"next: python quantize.py {run.folder}")


if __name__ == "__main__":
    main()
