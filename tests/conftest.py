"""Every test runs with one thread, so that the suite takes as long on a busy machine as on an idle
one, and on the CPU, also where there is a GPU: runs are compared bit by bit."""
import os

# before torch starts; for the scripts that tests run, too
os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}

import pytest
import torch

from running import make_cifar, make_corpus, run, saved, small


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A file of text."""
    return str(make_corpus(tmp_path_factory.mktemp("data")))


@pytest.fixture(scope="session")
def cifar(tmp_path_factory):
    """Sixty random images in CIFAR-10's layout."""
    return make_cifar(tmp_path_factory.mktemp("cifar"))


@pytest.fixture(scope="session")
def runs(corpus, cifar, tmp_path_factory):
    """A tiny run of every family, one trained in eight bits, and an encoder without a head."""
    folder = tmp_path_factory.mktemp("runs")
    for name in ("bert", "opt", "vit"):
        run(*small(f"train_{name}.py", corpus, cifar), "--out", folder / name)
    run(*small("train_bert.py", corpus, cifar), "--fake-quant", "--attention", "gated",
        "--out", folder / "fake-quant")
    encoder = saved(folder / "bert")
    encoder["config"]["masked_head"] = False
    encoder["model"] = {name: x for name, x in encoder["model"].items() if "head." not in name}
    (folder / "encoder").mkdir()
    torch.save(encoder, folder / "encoder" / "checkpoint.pt")
    return folder
