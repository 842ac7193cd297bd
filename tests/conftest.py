"""Every test runs with one thread, so that the suite takes as long on a busy machine as on an idle
one, and on the CPU, also where there is a GPU: runs are compared bit by bit."""
import os

# before torch starts; for the scripts that tests run, too
os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}

import pytest

from running import make_cifar, make_corpus


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A file of text."""
    return str(make_corpus(tmp_path_factory.mktemp("data")))


@pytest.fixture(scope="session")
def cifar(tmp_path_factory):
    """Sixty random images in CIFAR-10's layout."""
    return make_cifar(tmp_path_factory.mktemp("cifar"))
