"""Train an OPT by causal language modelling on bytes (paper, sec. 5 and C.2).

    python train_opt.py                                   a vanilla OPT, in minutes on a laptop
    python train_opt.py --attention gated --gate-init 0.25 --decay-layernorm
    python train_opt.py --data backcopy                   a task whose heads mostly do nothing
    python train_opt.py --sample 300                      text from the trained run
    torchrun --nproc-per-node 8 train_opt.py --preset paper --data tokens.bin --vocab-size 50272
"""
import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

import lab.backcopy, lab.cures, lab.muon, lab.repair  # noqa: F401, more choices for flags
from minq import flags
from minq.data import IGNORE, CausalText, load_text
from minq.fake_quant import fake_quantize_training
from minq.model import Opt, OptConfig
from minq.runs import Run, open_run, resume
from minq.training import (OPTIMIZERS, autocast, compiled, linear_schedule, parameter_groups,
                           pick_device, pick_precision, set_lr, start_processes, to_device)

# ---- recipes ----

PAPER = dict(  # C.2
    layers=12, width=768, heads=12, seq_len=512, dropout=0.1, init_std=0.006,
    alpha=4.0, data="stdlib",
    steps=125_000, batch_size=48, accumulate=4, lr=4e-4, warmup=2000, weight_decay=0.1,
    clip=1.0, seed=0, precision="fp16", eval_every=5000, eval_batches=64, save_every=5000)

PRESETS = {
    "laptop": PAPER | dict(
        layers=4, width=128, heads=4, seq_len=64, dropout=0.0, init_std=0.05,
        alpha=1.0, steps=1200, batch_size=32, accumulate=1, lr=2e-3, warmup=100,
        precision=None, eval_every=400, eval_batches=32, save_every=400),
    "paper": PAPER,
}


@flags.one_line_errors
def main(argv=None):
    # ---- arguments ----
    parser = flags.Parser(__doc__)
    flags.add_config_flags(parser, OptConfig)
    flags.add_text_flags(parser)
    parser.add_argument("--sample", type=flags.positive, metavar="N",
                        help="train nothing; print N tokens of text from the run in --out")
    flags.add_training_flags(parser, OPTIMIZERS)
    args, typed = flags.read_flags("opt", OptConfig, parser, PRESETS, argv)
    lab.repair.take_sizes(args, typed, "opt")  # --from: that run's sizes and data
    checkpoint = resume(args, typed, "opt") if args.resume else None
    world = start_processes()
    device = pick_device(args.device)
    args.precision = pick_precision(args.precision, device)
    if args.sample:
        return print(sample(args.out, args.sample, args.seed, device))

    # ---- data ----
    text = load_text(args.data, args.vocab_size, args.special_ids, args.documents)
    data = CausalText(text, args.seq_len)

    # ---- model ----
    torch.manual_seed(args.seed)
    model = Opt(OptConfig.of(args, vocab_size=text.vocab_size)).to(device)
    lab.repair.begin(args, model)  # --from: that run's weights

    # ---- optimizer ----
    groups = parameter_groups(model, args.weight_decay, args.decay_layernorm)
    optimizer = OPTIMIZERS[args.optimizer](model, groups, lr=args.lr, betas=(0.9, 0.95))
    scaler = torch.amp.GradScaler(device.type, enabled=args.precision == "fp16")

    # ---- as it is called in training: in eight bits (the blog), compiled, on many devices ----
    if args.fake_quant:
        fake_quantize_training(model, args.w_bits, args.a_bits, args.fake_quant_granularity)
    trained = compiled(model) if args.compile else model
    trained = DistributedDataParallel(trained) if world > 1 else trained

    # ---- loop: the run counts, resumes, evaluates, logs, saves and reports (minq/runs.py) ----
    run = Run(args, data, model, trained, optimizer, scaler, checkpoint)
    for step in run.steps():
        set_lr(optimizer, args.lr * linear_schedule(step, args.warmup, args.steps))
        tokens, labels = data.train_batch(args.seed, step, args.batch_size * args.accumulate)
        predictions = max(1, (labels != IGNORE).sum())  # the losses of micro-batches add up
        for batch in run.micro_batches(tokens, labels):
            inputs, targets = to_device(data.to_model(*batch), device)
            with autocast(device, args.precision):
                logits = trained(*inputs)  # (B, T, vocab), of each next token
            loss = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="sum")
            loss = loss * (world / predictions)  # DDP takes the mean over processes
            scaler.scale(loss).backward()
            run.step_loss += loss.detach()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()


@torch.no_grad()
def sample(folder, length, seed, device):
    """`length` tokens drawn from a run's model one by one, as text where they are bytes, else ids.

    The start token stays in the window, however long the text becomes: heads park there.
    """
    run = open_run(folder, device, family="opt")
    text, T, tokens = run.data.text, run.data.seq_len, []
    torch.manual_seed(seed)
    while len(tokens) < length:
        window = [text.cls, *tokens[max(0, len(tokens) - (T - 1)):]]
        logits = run.model(torch.tensor([window], device=device))[0, -1]
        logits[[text.pad, text.cls, text.sep, text.mask]] = -torch.inf
        tokens.append(torch.multinomial(logits.softmax(-1), 1).item())
    return bytes(tokens).decode(errors="replace") if text.is_bytes else " ".join(map(str, tokens))


if __name__ == "__main__":
    main()
