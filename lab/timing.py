"""Time as ratios: alternatives take turns, because machines drift, and each is compared with
another in the same turn."""
import statistics
import time

import torch


def in_turns(functions, rounds, device):
    """name -> seconds of each round; the functions take turns, after one untimed call each."""
    seconds = {name: [] for name in functions}
    for i in range(rounds + 1):
        for name, function in functions.items():
            started = time.perf_counter()
            function()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if i > 0:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def report(title, seconds):
    """Print each alternative's median time, and the median and the range over rounds of its ratio
    to the first one's in the same round."""
    print(f"\n{title}")
    first = next(iter(seconds.values()))
    for name, values in seconds.items():
        ratios = sorted(value / base for value, base in zip(values, first))
        print(f"  {name:42s} {1e3 * statistics.median(values):9.1f} ms   "
              f"{statistics.median(ratios):5.2f}x  ({ratios[0]:.2f}-{ratios[-1]:.2f})")
