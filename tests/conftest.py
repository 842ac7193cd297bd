"""Every test runs with one thread, so that the suite takes as long on a busy machine as on an idle one, and on the CPU,
also where there is a GPU: runs are compared bit by bit."""
import os
import threading

os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}  # before torch starts; also for the scripts that tests run

import numpy as np
import pytest

from serving import Server


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A file of text."""
    path = tmp_path_factory.mktemp("data") / "corpus.txt"
    path.write_text("the quick brown fox jumps over the lazy dog. " * 500)
    return str(path)


@pytest.fixture(scope="session")
def cifar(tmp_path_factory):
    """Sixty random images in CIFAR-10's layout."""
    folder = tmp_path_factory.mktemp("cifar")
    records = np.random.default_rng(0).integers(0, 256, (60, 3073), dtype=np.uint8)
    records[:, 0] %= 10
    records[:40].tofile(folder / "data_batch_1.bin")
    records[40:].tofile(folder / "test_batch.bin")
    return folder


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A web server in place of the Hub, and a cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "*")
    with Server() as found:
        threading.Thread(target=found.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        monkeypatch.setenv("HF_ENDPOINT", found.url)
        yield found
        found.go_on.set()
        found.shutdown()
