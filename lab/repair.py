"""Repair a trained model: go on from its weights, with a cure put in, or in eight bits.

    python train_bert.py --from zoo/bert-long-vanilla --attention gated --steps 5000
    python -m lab.repair runs/all-MiniLM-L6-v2 --steps 5000               towards what it was

`--from` (in the training scripts): a gate starts as the identity. Its last weights are 0, so that
it multiplies by pi_init = p whatever its input, and the output projection is divided by p. A
learned sink starts at -8, where it takes next to nothing. Clipped softmax, softmax1 and others have
no setting that is the plain softmax: how far off they begin is printed.

`python -m lab.repair`: quantization-aware distillation. The student is a copy of the model, or of a
variant, with every weight and activation on a static grid per tensor, as a chip would run it. The
teacher is the model itself: with h its layers' outputs and x the student's, the loss is

    sum over layers of log (|x - h|^2 / |h|^2)

which is minus each layer's SQNR, so that all layers count alike, however far off they are. Rounding
passes gradients straight through: those of a rounded weight move the weight in floating point that
it is rounded from. Both ends of an activation's range are learned (LSQ, arXiv 1902.08153):

    x_quantized = low + s * clip(round((x - low) / s); 0, 2^b - 1),  s = (high - low) / (2^b - 1)

What is clipped draws the ends out, and what is rounded draws them in. They move fast: where
outliers stand, most of a range is not worth its noise, and the other weights then adapt to what
clipping took. Weights' ranges are those of least squared error, and stay.
"""
from dataclasses import replace

import torch
import torch.nn as nn
from tqdm import tqdm

from lab.damage import last_states, scores, signal_to_noise
from lab.opened import open_runs
from lab.remove import limits, removed
from lab.tables import write_json
from minq import flags
from minq.flags import UserError, config_flags, option
from minq.outliers import listening
from minq.quant import ActivationQuantizer, fake_quantize, grid, quantize_model
from minq.runs import open_run
from minq.training import autocast, linear_schedule, pick_precision, set_lr, to_device

OF_DATA = {"data", "vocab_size", "special_ids", "documents", "image_size"}
FREE = {"attention", "dropout", "init_std", "fused"}  # of the Config: no weights depend on them


# ---- --from, in the training scripts ----

def take_sizes(args, typed, family):
    """--from: the settings in `args` that weights depend on become those of the run there; so does
    its data, unless --data is typed. UserError where a typed one differs."""
    if args.resume or not (folder := getattr(args, "from")):
        return
    run = open_run(folder, torch.device("cpu"), typed.get("data"), family)
    sizes = {f.name for f in config_flags(run.model.config_class) if not f.metadata["needs"]}
    saved = run.checkpoint["args"] | vars(run.model.config)
    saved |= {"vocab_size": run.checkpoint["args"].get("vocab_size")}  # typed for a .bin only
    for name in (sizes | OF_DATA) - FREE & saved.keys():
        if typed.get(name, saved[name]) != saved[name]:
            raise UserError(f"{option(name)} {typed[name]}: the run --from has {saved[name]}")
        setattr(args, name, saved[name])


@torch.no_grad()
def begin(args, model):
    """--from: give `model` the weights of the run there, and its own attention a start that is as
    near to plain softmax as it can be. Prints how near."""
    if args.resume or not (folder := getattr(args, "from")):
        return
    run = open_run(folder, next(model.parameters()).device, args.data)
    for size in run.data.sizes:
        if (has := getattr(model.config, size)) != (needed := getattr(run.model.config, size)):
            raise UserError(f"--data {args.data}: {size} {has}; the run --from has {needed}")
    continue_from(run.model, model)
    moved = zip(last_states(run, model.eval(), 1), last_states(run, run.model, 1))
    print(f"--from: begins at {signal_to_noise(moved):.1f} dB (SQNR; inf: states are equal)")
    model.train()


@torch.no_grad()
def continue_from(trained, model):
    """Give `model` the weights of a trained one; make a new gate the identity, and a new sink
    small."""
    model.load_state_dict(trained.state_dict(), strict=False)
    changed = model.config.attention != trained.config.attention
    for attention in (block.attention for block in model.layers if changed):
        H, d_head, width = attention.heads, attention.d_head, attention.proj.in_features
        if hasattr(attention.softmax, "sink"):
            attention.softmax.sink.fill_(-8.0)
        if attention.gate is not None:
            [p for name, p in attention.gate.named_parameters() if "weight" in name][-1].zero_()
            x = attention.proj.weight  # of any input the gate now makes the same
            pi = attention.gate(x.new_zeros(1, 1, width), x.new_zeros(1, H, 1, d_head))
            x /= pi.view(H, -1).expand(H, d_head).flatten()  # pi: (1, H, 1) or (1, H, 1, n)


# ---- python -m lab.repair ----

class LearnedQuantizer(nn.Module):
    """A calibrated ActivationQuantizer whose range is learned from now on."""

    def __init__(self, tap):
        super().__init__()
        self.range = torch.stack((tap.range.low.clamp(max=0.0), tap.range.high.clamp(min=0.0)))
        self.grid = grid(tap.n_bits, False)
        self.logs = nn.Parameter(torch.zeros_like(self.range))  # / 200: of low's and high's factors

    def forward(self, x):
        low, high = (self.range * (200 * self.logs).exp()).split(1)  # never change sign
        scale = (high - low) / self.grid[1]
        self.out = torch._fake_quantize_learnable_per_tensor_affine(
            x.float(), scale, -low / scale, *self.grid, 1.0)
        return self.out


def student_of(run, args):
    """A quantized copy of the run's model or of its variant, and {module: its weight, not rounded}.
    Embeddings are rounded once: training them takes 30% more time, and brings 0.1 dB."""
    model, floats = run.model, {}
    if args.attention:
        model = type(model)(replace(model.config, attention=args.attention)).to(run.device)
        continue_from(run.model, model)
    if args.clamp:
        known = limits(model, run.calibration_inputs(0, args.batches), "ffn_output", args.clamp)
        model = removed(model, "ffn_output", known, None, "start")
    student = quantize_model(model, args.bits, args.bits, "mse")
    run.calibrate(student, 0, args.batches)
    for name, module in list(student.named_modules()):
        if isinstance(module, ActivationQuantizer):
            student.set_submodule(name, LearnedQuantizer(module))
        elif isinstance(module, nn.Embedding):
            module.requires_grad_(False)
        elif hasattr(module, "weight_grid"):
            floats[module] = model.get_submodule(name).weight.detach().clone()
    return student, floats


def loss_of(student, teacher, inputs):
    wanted = []
    with torch.no_grad(), listening(teacher, ("layer_output",), lambda *x: wanted.append(x[-1])):
        teacher(*inputs)
    student(*inputs)
    found = [block.layer_output_tap.out for block in student.layers]
    return sum(((x - h).square().sum() / h.square().sum()).log() for x, h in zip(found, wanted))


def train(run, student, floats, args):
    """Train, and return the scores on the way: a list of {step, minutes, metric, sqnr}."""
    states, found = list(last_states(run, run.model, args.eval_batches)), []
    optimizer = torch.optim.Adam(student.parameters(), betas=(0.9, 0.99))
    for step in (progress := tqdm(range(args.steps + 1), unit="step")):
        for module, w in floats.items():
            groups = w.view(len(module.weight_grid[0]), -1)
            module.weight.data = fake_quantize(groups, *module.weight_grid).view_as(w)
        if step % max(1, args.steps // 20) == 0 or step == args.steps:
            found.append({"step": step, "minutes": progress.format_dict["elapsed"] / 60}
                         | scores(run, student, states, args.eval_batches))
            progress.write("step {step}: {metric:.4g}, SQNR {sqnr:.1f} dB".format(**found[-1]))
        arrays = run.data.train_batch(args.seed, step, args.batch_size)
        inputs = to_device(run.data.to_model(*arrays)[0], run.device)
        with autocast(run.device, pick_precision(None, run.device)):
            loss = loss_of(student, run.model, inputs)
        loss.backward()
        for module, w in floats.items():  # which the rounded one's gradient moves
            module.weight.data = w
        set_lr(optimizer, args.lr * linear_schedule(step, 20, args.steps + 1))
        optimizer.step()
        optimizer.zero_grad()
    return found


@flags.one_line_errors
def main(argv=None):
    parser = flags.Parser(__doc__)
    flags.add_run_flags(parser, seeds=None)
    add = parser.add_argument
    add("--attention", choices=("gated",), help="with gates, which start as the identity")
    add("--clamp", type=flags.above_0, metavar="SIGMA", help="of ffn_output: [CLS] stays within")
    add("--bits", type=flags.bits, default=8, help="of weights and activations")
    add("--steps", type=flags.positive, default=500, help="optimizer steps")
    add("--batch-size", type=flags.positive, default=4, help="sequences per step")
    add("--lr", type=flags.above_0, default=2e-4, help="peak rate; of ranges' logarithms 200 x")
    add("--seed", type=flags.number(int, low=0), default=0, help="of the batches")
    args, found = parser.parse_args(argv), []
    for run in open_runs(args):
        curve = train(run, *student_of(run, args), args)
        found.append(vars(args) | {"run": run.name, "curve": curve, "json": None})
        write_json(args.json, found)


if __name__ == "__main__":
    main()
