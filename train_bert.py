"""Train a BERT by masked language modelling on bytes (paper, sec. 5 and C.1).

    python train_bert.py                                  a vanilla BERT, in minutes on a laptop
    python train_bert.py --attention clipped --gamma -0.03
    python train_bert.py --attention gated --gate mlp
    torchrun --nproc-per-node 8 train_bert.py --preset paper --data tokens.bin --vocab-size 30522
"""
import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

import lab.backcopy, lab.cures, lab.muon, lab.repair  # noqa: F401, more choices for flags
from minq import flags
from minq.data import IGNORE, MaskedText, load_text
from minq.fake_quant import fake_quantize_training
from minq.model import Bert, BertConfig
from minq.runs import Run, resume
from minq.training import (OPTIMIZERS, autocast, compiled, linear_schedule, parameter_groups,
                           pick_device, pick_precision, set_lr, start_processes, to_device)

# ---- recipes ----

PAPER = dict(  # C.1
    layers=12, width=768, heads=12, seq_len=128, dropout=0.1, init_std=0.02, positions="normal",
    alpha=4.0, data="stdlib", mask_prob=0.15,
    steps=1_000_000, batch_size=256, accumulate=1, lr=1e-4, warmup=10_000, weight_decay=0.01,
    clip=1.0, seed=0, precision="fp16", eval_every=10_000, eval_batches=64, save_every=10_000)

PRESETS = {
    "laptop": PAPER | dict(
        layers=4, width=128, heads=4, seq_len=64, dropout=0.0, init_std=0.05, positions="sinusoid",
        alpha=1.0, steps=2400, batch_size=16, lr=1.5e-3, warmup=200,
        precision=None, eval_every=400, eval_batches=64, save_every=400),
    "paper": PAPER,
    "bert-6l": PAPER | dict(layers=6, steps=500_000, batch_size=128),  # sec. 5.2, 5.3
    "blog": PAPER | dict(batch_size=128, alpha=None, gamma=-0.025, gate="mlp", gate_hidden=16),
}


@flags.one_line_errors
def main(argv=None):
    # ---- arguments ----
    parser = flags.Parser(__doc__)
    flags.add_config_flags(parser, BertConfig)
    flags.add_text_flags(parser)
    parser.add_argument("--mask-prob", type=flags.fraction, help="share of tokens to predict")
    flags.add_training_flags(parser, OPTIMIZERS)
    args, typed = flags.read_flags("bert", BertConfig, parser, PRESETS, argv)
    lab.repair.take_sizes(args, typed, "bert")  # --from: that run's sizes and data
    checkpoint = resume(args, typed, "bert") if args.resume else None
    world = start_processes()
    device = pick_device(args.device)
    args.precision = pick_precision(args.precision, device)

    # ---- data ----
    text = load_text(args.data, args.vocab_size, args.special_ids, args.documents)
    data = MaskedText(text, args.seq_len, args.mask_prob)

    # ---- model ----
    torch.manual_seed(args.seed)
    model = Bert(BertConfig.of(args, vocab_size=text.vocab_size)).to(device)
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
        set_lr(optimizer, args.lr * linear_schedule(step, args.warmup, args.steps))
        tokens, labels = data.train_batch(args.seed, step, args.batch_size * args.accumulate)
        predictions = max(1, (labels != IGNORE).sum())  # the losses of micro-batches add up
        for batch in run.micro_batches(tokens, labels):
            inputs, targets = to_device(data.to_model(*batch), device)
            with autocast(device, args.precision):
                logits = trained(*inputs)  # (N, vocab), at the masked positions
            loss = F.cross_entropy(logits.float(), targets, reduction="sum")
            loss = loss * (world / predictions)  # DDP takes the mean over processes
            scaler.scale(loss).backward()
            run.step_loss += loss.detach()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()


if __name__ == "__main__":
    main()
