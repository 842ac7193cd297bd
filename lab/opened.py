"""The runs that a command of lab/ names, opened: their data and attention may be lab's own."""
import lab.backcopy, lab.cures  # noqa: F401, runs with such data or attention open
from minq.runs import open_run
from minq.training import pick_device


def open_runs(args, family=None):
    """args: of flags.add_run_flags; family: which all must be of."""
    device = pick_device(args.device)
    return [open_run(name, device, args.data, family) for name in args.runs]
