"""Train an OPT by causal language modelling on bytes (paper, sec. 5 and C.2).

    python train_opt.py                                   a vanilla OPT, in minutes on a laptop
    python train_opt.py --attention gated --gate-init 0.25 --decay-layernorm
    python train_opt.py --data backcopy                   a task whose heads must mostly do nothing
    python train_opt.py --sample 300                      text from the trained run
    torchrun --nproc-per-node 8 train_opt.py --preset paper --data tokens.bin --vocab-size 50272
"""
import time
from dataclasses import asdict
from itertools import starmap

import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from minq import flags
from minq.data import CausalText, load_text
from minq.errors import one_line_errors
from minq.model import Opt, OptConfig, from_checkpoint
from minq.outliers import watch
from minq.quant import fake_quantization_off, fake_quantize_training
from minq.training import (PATIENCE, Interrupt, Run, autocast, check_slices, evaluate, linear_schedule, load_checkpoint,
                           mean_over_processes, micro_batches, parameter_groups, pick_device, pick_precision,
                           require_finite, require_same_data, seed_step, show, start_processes, summary, to_device)

# ---- recipes ----

DEFAULTS = dict(
    attention="vanilla", alpha=4.0, zeta=1.0, gate="linear", gate_hidden=4, gate_init=0.5,
    layers=12, width=768, heads=12, seq_len=512, init_std=0.006,
    data="stdlib",
    steps=125_000, batch_size=48, accumulate=4, lr=4e-4, warmup=2000, weight_decay=0.1,
    decay_layernorm=False, clip=1.0, dropout=0.1, seed=0,
    precision="fp16", eval_every=5000, eval_batches=64, save_every=5000)

PRESETS = {
    "laptop": dict(alpha=1.0, layers=4, width=128, heads=4, seq_len=64, init_std=0.05,
                   steps=1200, batch_size=32, accumulate=1, lr=2e-3, warmup=100, dropout=0.0,
                   precision=None, eval_every=400, eval_batches=32, save_every=400),
    "paper": dict(),  # C.2
}


@one_line_errors
def main(argv=None):
    # ---- arguments ----
    parser = flags.Parser(__doc__)
    flags.add_attention_flags(parser)
    flags.add_size_flags(parser)
    parser.add_argument("--gamma-per-row", action="store_true", default=None, help="gamma = -alpha / (t + 1) in row t, which has t + 1 entries")
    parser.add_argument("--init-std", type=flags.number(float, above=0), help="standard deviation of initial weights")
    flags.add_text_flags(parser)
    flags.add_training_flags(parser)
    flags.add_fake_quant_flags(parser)
    flags.add_run_flags(parser)
    parser.add_argument("--sample", type=flags.positive, metavar="N", help="train nothing; print N tokens of text from the run in --out")
    args, typed = flags.read_flags(parser, DEFAULTS, PRESETS, argv)
    flags.settle_fake_quant(args, typed)
    flags.settle_attention(args, typed, args.seq_len)

    rank, world = start_processes()
    run = Run(args.out or flags.run_name("opt", args, typed))
    checkpoint = load_checkpoint(run.folder, "opt") if args.resume or args.sample else None
    if args.sample:
        return print(sample(from_checkpoint(checkpoint, run.folder), checkpoint["args"], args.sample, args.seed))
    if checkpoint:
        args = flags.resumed(checkpoint["args"], typed)
    device = pick_device(args.device)
    args.precision = pick_precision(args.precision, device)
    check_slices(args.batch_size, world)

    # ---- data ----
    text = load_text(args.data, args.vocab_size, args.special_ids)
    data = CausalText(text, args.seq_len)

    # ---- model ----
    torch.manual_seed(args.seed)
    config = OptConfig(
        layers=args.layers, width=args.width, heads=args.heads, ffn=4 * args.width, seq_len=args.seq_len,
        dropout=args.dropout, attention=args.attention, gamma=args.gamma, zeta=args.zeta,
        row_alpha=args.alpha if args.gamma_per_row else None, gate=args.gate,
        gate_hidden=args.gate_hidden, gate_init=args.gate_init, vocab_size=text.vocab_size, init_std=args.init_std)
    model = Opt(config).to(device)
    if args.fake_quant:
        fake_quantize_training(model, args.w_bits, args.a_bits, args.fake_quant_granularity)
    trained = torch.compile(model) if args.compile else model
    trained = DistributedDataParallel(trained) if world > 1 else trained

    # ---- optimizer ----
    groups = parameter_groups(model, args.weight_decay, args.decay_layernorm)
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), fused=True)
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
        run.save(family="opt", config=asdict(config), args=vars(args), data_sha256=text.sha256, step=step,
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
            predictions = labels.size  # in the global batch: the slices' losses add up to its mean
            step_loss = torch.zeros((), device=device)
            for i, batch in enumerate(micro_batches((tokens, labels), args.accumulate, rank, world)):
                trained.require_backward_grad_sync = i == args.accumulate - 1  # DDP: exchange gradients once a step
                inputs, targets = to_device(data.to_model(*batch), device)
                with autocast(device, args.precision):
                    logits = trained(*inputs)
                loss = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="sum") * (world / predictions)
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
        print(f"interrupted at step {step}, saved. Go on with: python train_opt.py --resume --out {run.folder}")
        raise SystemExit(130)
    print(f"{run.folder}: step {step}, {summary(run)}")
    print(f"next: python quantize.py {run.folder}")


@torch.no_grad()
def sample(model, args, length, seed):
    """`length` tokens drawn from the model one by one, as text (or as ids, for a .bin)."""
    text = load_text(args["data"], args["vocab_size"], args["special_ids"])
    torch.manual_seed(seed)
    tokens = [text.cls]
    model.eval()
    while len(tokens) <= length:
        logits = model(torch.tensor([tokens[-args["seq_len"]:]]))[0, -1]
        logits[[text.pad, text.cls, text.sep, text.mask]] = -torch.inf
        tokens.append(torch.multinomial(logits.softmax(-1), 1).item())
    is_text = args["vocab_size"] is None and args["data"] != "backcopy"
    return bytes(tokens[1:]).decode(errors="replace") if is_text else " ".join(map(str, tokens[1:]))


if __name__ == "__main__":
    main()
