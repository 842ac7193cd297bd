"""Two processes compute what one does: the same losses, and the same evaluation."""
import json
import re
import signal

import pytest

from minq.data import spread
from running import SMALL, logged, run, saved, small, start

COMMANDS = {  # without dropout, whose masks are each process's own
    "bert": "train_bert.py --attention gated --gate mlp --fake-quant --batch-size 4 --accumulate 2",
    "opt": "train_opt.py --attention clipped --gamma -0.03",
    "compiled": "train_opt.py --layers 1 --steps 3 --compile",
    "vit": "train_vit.py --rand-augment 2 --jitter 0.4 --mixup 0.8 --cutmix 1 --crop-scale 0.3 "
           "--accumulate 2"}


def in_two(*commands):
    """Each of (script, argv[, signal]) in two processes: their exit codes and output."""
    words = [[script, [str(word) for word in argv], *rest] for script, argv, *rest in commands]
    process = start("-m", "tests.two")
    out, err = process.communicate(json.dumps(words), timeout=600)
    assert process.returncode == 0, err
    return list(map(json.loads, out.splitlines()))


def numbers(folder):
    log = (folder / "metrics.jsonl").read_text()
    return [float(x) for x in re.findall(r"-?\d[\d.e+-]*|NaN", log)]


@pytest.mark.slow
def test_two_processes_give_the_losses_of_one(corpus, cifar, tmp_path):
    """Losses to 1e-5; what is measured of activations, some of it fourth powers, to 1e-4. Two of
    three validation batches are the first process's."""
    commands = []
    for name, command in COMMANDS.items():
        script, *flags = command.split()
        _, *words = [*small(script, corpus, cifar), *flags, "--eval-batches", 3, "--out"]
        run(script, *[word for word in words if word != "--compile"], tmp_path / f"one {name}")
        commands.append((script, [*words, tmp_path / f"two {name}"]))
    for name, found in zip(COMMANDS, in_two(*commands)):
        assert found["codes"] == [0, 0], found["output"]
        assert found["output"].count("next: python quantize.py") == 1  # one speaks for both
        one, two = tmp_path / f"one {name}", tmp_path / f"two {name}"
        assert logged(two)[-1]["loss"] == pytest.approx(logged(one)[-1]["loss"], rel=1e-5)
        assert numbers(two) == pytest.approx(numbers(one), rel=1e-4, nan_ok=True)


@pytest.mark.slow
def test_torchrun_starts_two_processes(corpus, tmp_path):
    torchrun = "-m torch.distributed.run --standalone --nproc-per-node 2 train_bert.py".split()
    process = start(*torchrun, *SMALL, "--data", corpus, "--out", tmp_path / "run")
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0 and out.count("next: python quantize.py") == 1, err


@pytest.mark.slow
def test_a_process_that_dies_ends_the_job_and_one_that_is_told_to_stop_stops_it(corpus, tmp_path):
    endless = [*SMALL, "--data", corpus, "--steps", 10 ** 6, "--save-every", 10 ** 6, "--out"]
    dies, stops = in_two(*(("train_bert.py", [*endless, tmp_path / name], number) for name, number
                           in (("dies", signal.SIGKILL), ("stops", signal.SIGTERM))))
    survivor, killed = dies["codes"]
    assert killed == -signal.SIGKILL and survivor > 0 and dies["seconds"] < 60
    assert stops["codes"] == [143, 143], stops["output"]  # at the same step, or one waits in vain
    step, output = saved(tmp_path / "stops")["step"], stops["output"]
    assert output.count(f"interrupted at step {step}, saved") == 1 and "Traceback" not in output


@pytest.mark.parametrize("available, size, batches, world", [
    (100, 8, 5, 2), (100, 8, 99, 3), (20, 8, 9, 4), (5, 8, 3, 2)])
def test_processes_share_out_the_validation_batches(available, size, batches, world):
    """Together they evaluate each batch once, or each evaluates all where there are too few."""
    whole, *parts = [[chosen.tolist() for _, chosen in spread(available, size, batches, *place)]
                     for place in ((), *((rank, world) for rank in range(world)))]
    if len(whole) < world:
        assert parts == [whole] * world
    else:
        assert sorted(sum(parts, [])) == sorted(whole)
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
