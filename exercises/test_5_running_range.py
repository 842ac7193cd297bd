"""Grades exercise_5_running_range.py: the formula in a loop over Python numbers."""
import torch

from exercises.grading import check

# (2, 3) each; the first is neither the widest nor the narrowest, minima are not minus the maxima
BATCHES = [torch.tensor(batch) for batch in (
    [[-2.0, 0.5, 1.0], [3.0, -1.0, 0.0]], [[-5.0, 1.0, 0.0], [2.0, 1.0, 0.5]],
    [[-1.0, 0.0, 0.5], [8.0, 0.1, 0.2]], [[0.5, 1.0, 2.0], [1.5, 0.7, 0.6]])]
LOWS, HIGHS = (-2.0, -5.0, -1.0, 0.5), (3.0, 2.0, 8.0, 2.0)


def average(values, momentum, start=None):
    """The running average, as a number: from the first value on, or from `start`."""
    now = values[0] if start is None else momentum * start + (1 - momentum) * values[0]
    for value in values[1:]:
        now = momentum * now + (1 - momentum) * value
    return now


def after(solution, batches, **options):
    running = solution.RunningRange(**options)
    for batch in batches:
        running.update(batch.clone())
    return running


def test_a_new_range_is_empty(solution):
    first = solution.RunningRange()
    empty = first.low is None and first.high is None
    assert empty, "low and high must be None before the first batch"
    first.update(BATCHES[0].clone())
    second = solution.RunningRange()
    assert second.low is None and second.high is None, "your ranges share one low: keep it in self"


def test_the_first_batch_sets_the_range(solution):
    running = after(solution, BATCHES[:1])
    mistake = "you averaged the first batch with 0: it would take dozens to reach its size"
    largest = "you made the range symmetric: low and high are the values' minimum and maximum"
    check("low after the first batch", running.low, -2.0, {mistake: -0.2, largest: -3.0})
    check("high after the first batch", running.high, 3.0, {mistake: 0.3})


def test_later_batches_pull_it(solution):
    running = after(solution, BATCHES)
    for name, got, values, extreme, other in (
            ("low", running.low, LOWS, min(LOWS), HIGHS),
            ("high", running.high, HIGHS, max(HIGHS), LOWS)):
        whole = 0.9 * (0.9 * (0.9 * values[0] + values[1]) + values[2]) + values[3]
        check(f"{name} after four batches", got, average(values, 0.9), {
            "you mixed up the weights: 0.9 belongs to the old value, 0.1 to the new batch":
                average(values, 0.1),
            "you kept the extremes of all batches: one strange batch would then decide": extreme,
            "you kept the last batch only": values[-1],
            "you kept the first batch only": values[0],
            "you took the mean over all batches: the running average forgets old ones":
                sum(values) / len(values),
            "you started from 0: the first batch sets the range": average(values, 0.9, start=0.0),
            "you added the new batch whole: it counts 1 - momentum": whole,
            "you pulled high with the minimum, or low with the maximum":
                average((values[0], *other[1:]), 0.9)})


def test_the_momentum_is_the_one_given(solution):
    running = after(solution, BATCHES, momentum=0.5)
    written = "you wrote 0.9 into update: use self.momentum"
    check("low with momentum 0.5", running.low, average(LOWS, 0.5), {written: average(LOWS, 0.9)})
    check("high with momentum 0.5", running.high, average(HIGHS, 0.5),
          {written: average(HIGHS, 0.9)})


def test_the_range_need_not_contain_0(solution):
    running = after(solution, [torch.tensor([2.0, 4.0])])
    check("low of values from 2 to 4", running.low, 2.0, {
        "you stretched the range to contain 0: that is the quantizer's business (exercise 1)": 0.0})
    running = after(solution, [torch.tensor([-4.0, -2.0])])
    check("high of values from -4 to -2", running.high, -2.0, {
        "you stretched the range to contain 0: that is the quantizer's business (exercise 1)": 0.0})
