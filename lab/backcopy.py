"""Bigram-Backcopy, a task whose heads mostly have nothing to do: --data backcopy.

    python train_opt.py --data backcopy --layers 3 --heads 1

Symbols are the most frequent bytes of the standard library, 0 the most frequent, and follow its
bigrams; but after a trigger, one of the most frequent symbols, comes a copy of the symbol before it
(Guo et al., "Active-Dormant Attention Heads", arXiv 2410.13835). A head that copies is needed after
a trigger and must do nothing everywhere else.
"""
import numpy as np

from minq.flags import TEXTS

SYMBOLS, TRIGGERS = 64, 3


def bigram_backcopy(chains=16_384, length=256, seed=0):
    """Chains of `length` symbols behind each other, uint8."""
    from minq.data import stdlib_files  # imported here: quantize.py may need no text
    source = np.frombuffer(b"\n".join(stdlib_files()), dtype=np.uint8)
    by_frequency = np.argsort(-np.bincount(source, minlength=256), kind="stable")
    symbols = np.argsort(by_frequency).astype(np.uint8)[source]  # each byte's rank
    symbols = symbols[symbols < SYMBOLS].astype(np.int64)
    pairs = np.bincount(symbols[:-1] * SYMBOLS + symbols[1:], minlength=SYMBOLS ** 2)
    cumulative = pairs.reshape(SYMBOLS, -1).cumsum(axis=1)
    cumulative = cumulative / cumulative[:, -1:]

    rng = np.random.default_rng(seed)
    chain = np.empty((length, chains), dtype=np.uint8)
    chain[0] = rng.integers(SYMBOLS, size=chains)
    for t in range(1, length):  # all chains take a step at once
        chain[t] = (cumulative[chain[t - 1]] < rng.random((chains, 1))).sum(axis=1)
        if t > 1:
            chain[t] = np.where(chain[t - 1] < TRIGGERS, chain[t - 2], chain[t])
    return chain.T.reshape(-1)


TEXTS["backcopy"] = lambda: ([bigram_backcopy()], SYMBOLS)
