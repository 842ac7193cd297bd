"""Two processes compute what one does: the same losses, the same evaluation, the same images."""
import json
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

from minq import augment as A
from minq.data import CausalText, load_text
from minq.images import Images, load_images
from running import ROOT, SMALL, SMALL_VIT, logged, run, saved

RECIPE = "--rand-augment 2 --jitter 0.4 --mixup 0.8 --cutmix 1 --crop-scale 0.3".split()
COMMANDS = {  # name -> (script, flags)
    "bert": ("train_bert.py", "--attention gated --gate mlp --fake-quant --batch-size 4 --accumulate 2".split()),
    "opt": ("train_opt.py", "--attention clipped --gamma -0.03".split()),
    "vit": ("train_vit.py", [*RECIPE, "--accumulate", "2"])}


def start_two(commands):
    """Each of (script, argv) in two processes; returns a function that waits for exit codes and output."""
    process = subprocess.Popen([sys.executable, "-m", "tests.two"], cwd=ROOT, text=True,
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdin.write(json.dumps([[script, [str(word) for word in argv], *rest] for script, argv, *rest in commands]))
    process.stdin.close()
    process.stdin = None

    def wait():
        out, err = process.communicate(timeout=600)
        assert process.returncode == 0, err
        return list(map(json.loads, out.splitlines()))
    return wait


def flat(x, name=""):
    """A nested record as {name: number}."""
    if isinstance(x, (dict, list)):
        items = x.items() if isinstance(x, dict) else enumerate(x)
        return {key: value for k, part in items for key, value in flat(part, f"{name}/{k}").items()}
    return {name: x}


def assert_same_log(a, b):
    """Losses to 1e-5; what is measured of activations, some of it fourth powers, to 1e-4."""
    a, b = logged(a), logged(b)
    assert len(a) == len(b) > 0
    for ours, theirs in zip(a, b):
        for name in ("loss", "val_loss"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5)
        assert flat(ours) == pytest.approx(flat(theirs), rel=1e-4, nan_ok=True)


def small(script, corpus, cifar):
    """Without dropout, whose masks are each process's own. Two of three validation batches are the first process's."""
    sizes = [*SMALL_VIT, "--data", cifar] if script == "train_vit.py" else [*SMALL, "--data", corpus]
    return [*sizes, "--dropout", "0", "--eval-batches", "3"]


@pytest.mark.slow
def test_two_processes_give_the_losses_of_one(corpus, cifar, tmp_path):
    wait = start_two([(script, [*small(script, corpus, cifar), *flags, "--out", tmp_path / f"two {name}"])
                      for name, (script, flags) in COMMANDS.items()])
    for name, (script, flags) in COMMANDS.items():
        run(script, *small(script, corpus, cifar), *flags, "--out", tmp_path / f"one {name}")
    for name, found in zip(COMMANDS, wait()):
        assert found["codes"] == [0, 0], found["output"]
        assert found["output"].count("next: python quantize.py") == 1  # the first process speaks for both
        assert_same_log(tmp_path / f"one {name}", tmp_path / f"two {name}")


@pytest.mark.slow
def test_two_compiled_processes_give_the_losses_of_one(corpus, tmp_path):
    command = [*SMALL, "--data", corpus, "--layers", "1", "--steps", "3"]
    wait = start_two([("train_bert.py", [*command, "--compile", "--out", tmp_path / "two"])])
    run("train_bert.py", *command, "--out", tmp_path / "one")
    (found,) = wait()
    assert found["codes"] == [0, 0], found["output"]
    assert_same_log(tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
def test_a_process_that_dies_ends_the_job_and_one_that_is_told_to_stop_stops_it(corpus, tmp_path):
    command = ["train_bert.py", [*SMALL, "--data", corpus, "--steps", "1000000", "--save-every", "1000000", "--out"]]
    dies, stops = start_two([(command[0], [*command[1], tmp_path / name], number) for name, number in
                             (("dies", signal.SIGKILL), ("stops", signal.SIGTERM))])()
    survivor, killed = dies["codes"]
    assert killed == -signal.SIGKILL and survivor not in (0, None) and dies["seconds"] < 60
    assert stops["codes"] == [143, 143], stops["output"]  # both at the same step, or the other would wait in vain
    step = saved(tmp_path / "stops")["step"]
    assert stops["output"].count(f"interrupted at step {step}, saved") == 1 and "Traceback" not in stops["output"]


# ---- the parts ----

@pytest.mark.parametrize("available, size, batches, world", [(100, 8, 5, 2), (100, 8, 99, 3), (20, 8, 9, 4), (5, 8, 3, 2)])
def test_processes_share_out_the_validation_batches(available, size, batches, world, tmp_path):
    """Together they evaluate each batch once; where there are fewer batches than processes, each evaluates all."""
    np.save(tmp_path / "images.npy", np.zeros((8, 4, 4, 3), dtype=np.uint8))
    np.save(tmp_path / "labels.npy", np.arange(8))
    np.save(tmp_path / "val_images.npy", np.zeros((available, 4, 4, 3), dtype=np.uint8))
    np.save(tmp_path / "val_labels.npy", np.arange(available))
    text = tmp_path / "text.txt"
    text.write_bytes(bytes(np.random.default_rng(0).integers(32, 127, available * 100).astype(np.uint8)))
    for data in (Images(load_images(tmp_path)), CausalText(load_text(text), 10)):
        whole = [labels.tolist() for _, labels in data.validation_batches(size, batches)]
        parts = [[labels.tolist() for _, labels in data.validation_batches(size, batches, rank, world)] for rank in range(world)]
        if len(whole) < world:
            assert parts == [whole] * world
        else:
            assert sorted(sum(parts, [])) == sorted(whole) and max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize("settings", [{}, dict(mixup=0.8, cutmix=0.0), dict(mixup=0.0, cutmix=1.0)])
@pytest.mark.parametrize("slices", [2, 4])
def test_what_augmentation_draws_does_not_depend_on_the_slicing(settings, slices):
    torch.manual_seed(0)
    images, labels = torch.rand(16, 3, 20, 20), torch.arange(16) % 10
    for seed in range(6):
        whole = A.augment(images, labels, 10, A.Draws(seed), size=16, **settings)
        parts = [A.augment(images[places], labels[places], 10, A.Draws(seed, "cpu", places, 16), size=16, **settings)
                 for places in np.split(np.arange(16), slices)]
        for one, many in zip(whole, map(torch.cat, zip(*parts))):
            torch.testing.assert_close(one, many, rtol=0, atol=1e-6)


def test_images_that_are_mixed_must_come_in_pairs(cifar, tmp_path):
    command = ["train_vit.py", *SMALL_VIT, "--data", cifar, "--batch-size", "7", "--out", tmp_path / "run"]
    _, err = run(*command, "--cutmix", "1", code=2)
    assert "--batch-size 7: --mixup and --cutmix mix the images of a process in pairs; expected a multiple of 2" in err
    assert not (tmp_path / "run").exists()
    run(*command, "--steps", "1")
