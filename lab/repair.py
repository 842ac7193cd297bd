"""Repair a trained model: go on from its weights, with a cure put in, or in eight bits.

    python train_bert.py --from zoo/bert-long-vanilla --attention gated --steps 5000
    python -m lab.repair runs/all-MiniLM-L6-v2 --steps 1000               towards what it was

`--from` (in the training scripts): a gate starts as the identity. Its last weights are 0, so that
it multiplies by pi_init = p whatever its input, and the output projection is divided by p. A
learned sink starts at -8, where it takes next to nothing. Clipped softmax, softmax1 and others have
no setting that is the plain softmax: how far off they begin is printed.

`python -m lab.repair`: quantization-aware training. Every weight and activation is on a static grid
per tensor, as a chip would run it. Rounding passes gradients straight through: those of a rounded
weight move the weight in floating point that it is rounded from. The scales of activations are
learned, too (LSQ, arXiv 1902.08153): with y = x / s + z

    x_quantized = (clip(y + stop_gradient(round(y) - y); 0, 2^b - 1) - z) * s

A model that predicts is trained on its own task. An encoder without a head is trained towards what
it was: the squared error of each layer's output over its signal, summed over layers.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

from lab.damage import last_hidden, last_states, scores, signal_to_noise
from lab.opened import open_runs
from lab.tables import write_json
from minq import flags
from minq.flags import UserError, config_flags, option
from minq.outliers import listening
from minq.quant import ActivationQuantizer, affine_parameters, fake_quantize, grid, quantize_model
from minq.runs import open_run
from minq.training import linear_schedule, set_lr, to_device

OF_DATA = {"data", "vocab_size", "special_ids", "documents", "image_size"}
FREE = {"attention", "dropout", "init_std", "fused"}  # of the Config: no weights depend on them


# ---- --from, in the training scripts ----

def take_sizes(args, typed, family):
    """--from: the settings in `args` that weights depend on become those of the run there; so does
    its data, unless --data is typed. UserError where a typed one differs."""
    folder = getattr(args, "from")
    if not folder or args.resume:
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
    folder = getattr(args, "from")
    if not folder or args.resume:
        return
    device = next(model.parameters()).device
    run = open_run(folder, device, args.data)
    for size in run.data.sizes:
        if (has := getattr(model.config, size)) != (needed := getattr(run.model.config, size)):
            raise UserError(f"--data {args.data}: {size} {has}; the run --from has {needed}")
    continue_from(run.model, model)
    inputs = to_device(next(run.validation(1))[0], device)
    moved = [(last_hidden(model.eval(), inputs), last_hidden(run.model, inputs))]
    model.train()
    print(f"from {folder}: begins at {signal_to_noise(moved):.1f} dB (SQNR of the last hidden "
          "states beside its own; inf: they are equal)")


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
            weights = [p for name, p in attention.gate.named_parameters() if "weight" in name]
            weights[-1].zero_()
            x = attention.proj.weight  # of any input the gate now makes the same
            pi = attention.gate(x.new_zeros(1, 1, width), x.new_zeros(1, H, 1, d_head))
            x /= pi.view(H, -1).expand(H, d_head).flatten()  # pi: (1, H, 1) or (1, H, 1, n)


# ---- python -m lab.repair ----

class LearnedQuantizer(nn.Module):
    """A calibrated ActivationQuantizer whose scale is learned from now on."""

    def __init__(self, tap):
        super().__init__()
        scale, self.zero_point = affine_parameters(tap.range.low, tap.range.high, tap.n_bits)
        self.grid = grid(tap.n_bits, False)
        self.tenth = nn.Parameter(scale.log() / 10)  # so log s moves ten times as far as weights

    def forward(self, x):
        scale = (10 * self.tenth).exp()  # stays above 0
        y = x / scale + self.zero_point
        y = y + (y.round() - y).detach()
        self.out = (y.clamp(*self.grid) - self.zero_point) * scale
        return self.out


def student_of(run, args):
    """A quantized copy of the run's model, with its own weights, not rounded yet."""
    student = quantize_model(run.model, args.bits, args.bits, "mse")
    run.calibrate(student, 0, args.batches)
    for name, module in list(student.named_modules()):
        if isinstance(module, ActivationQuantizer):
            student.set_submodule(name, LearnedQuantizer(module))
        elif hasattr(module, "weight_grid"):
            module.weight.data = run.model.get_submodule(name).weight.detach().clone()
    return student


def loss_of(student, teacher, inputs, targets):
    predicted = student(*inputs)
    if teacher.metric != "sqnr":
        return F.cross_entropy(predicted.flatten(0, -2), targets.flatten())
    wanted = []
    hear = lambda tap, layer, x: wanted.append(x)
    with torch.no_grad(), listening(teacher, ("layer_output",), hear):
        teacher(*inputs)
    moved = [block.layer_output_tap.out for block in student.layers]
    return sum((x - h).square().sum() / h.square().sum() for x, h in zip(moved, wanted))


def train(run, student, args):
    """Train, and return the scores on the way: a list of {step, metric, sqnr}."""
    states, found = list(last_states(run, run.model, args.eval_batches)), []
    rounded = [module for module in student.modules() if hasattr(module, "weight_grid")]
    weights = [p for name, p in student.named_parameters() if not name.endswith("tenth")]
    optimizer = torch.optim.Adam(student.parameters(), betas=(0.9, 0.99))
    for step in (progress := tqdm(range(args.steps + 1), unit="step")):
        floats = [module.weight.data for module in rounded]
        for module, w in zip(rounded, floats):
            groups = w.view(len(module.weight_grid[0]), -1)
            module.weight.data = fake_quantize(groups, *module.weight_grid).view_as(w)
        if step % 50 == 0 or step == args.steps:
            found.append({"step": step} | scores(run, student, states, args.eval_batches))
            progress.write("step {step}: {metric:.4g}, SQNR {sqnr:.1f} dB".format(**found[-1]))
        arrays = run.data.train_batch(args.seed, step, run.checkpoint["args"]["batch_size"])
        batch = to_device(run.data.to_model(*arrays), run.device)
        loss_of(student, run.model, *batch).backward()
        for module, w in zip(rounded, floats):  # which the rounded one's gradient moves
            module.weight.data = w
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        set_lr(optimizer, args.lr * linear_schedule(step, 20, args.steps + 1))
        optimizer.step()
        optimizer.zero_grad()
    return found


@flags.one_line_errors
def main(argv=None):
    parser = flags.Parser(__doc__)
    flags.add_run_flags(parser, seeds=None)
    add = parser.add_argument
    add("--bits", type=flags.bits, default=8, help="of weights and activations")
    add("--steps", type=flags.positive, default=500, help="optimizer steps")
    add("--lr", type=flags.above_0, default=3e-4, help="peak rate; of the scales' logarithms 10 x")
    add("--seed", type=flags.number(int, low=0), default=0, help="of the batches")
    args, found = parser.parse_args(argv), []
    for run in open_runs(args):
        found.append({"run": run.name, "curve": train(run, student_of(run, args), args)})
        write_json(args.json, found)


if __name__ == "__main__":
    main()
