"""What the graders share: a comparison that knows common mistakes by their results."""
import torch


def check(what, got, expected, mistakes=None, tolerance=1e-5):
    """Pass where `got` equals `expected`; else fail, and name the mistake that gives what was got.

    what: the tested thing, in words. mistakes: what went wrong, in words -> its result.
    """
    __tracebackhide__ = True  # pytest then shows the line of the test
    assert got is not None, f"{what}: you returned nothing. Is there a return?"
    kind = type(got).__name__
    is_number = isinstance(got, (torch.Tensor, float, int))
    assert is_number, f"{what}: expected a tensor, you returned a {kind}"
    got, expected = numbers(got), numbers(expected)
    if same(got, expected, tolerance):
        return
    for words, wrong in (mistakes or {}).items():
        assert not same(got, numbers(wrong), tolerance), words
    shape, wanted = tuple(got.shape), tuple(expected.shape)
    assert shape == wanted, f"{what}: the shape is {wanted}, yours is {shape}"
    assert got.isfinite().all(), f"{what}: yours holds NaN or an infinite value"
    place = tuple(int(i) for i in torch.unravel_index((got - expected).abs().argmax(), wanted))
    at = f" at {place}" if place else ""
    raise AssertionError(f"{what}:{at} expected {expected[place]:.10g}, yours is {got[place]:.10g}")


def numbers(x):
    return torch.as_tensor(x).detach().double()


def same(a, b, tolerance):
    near = {"rtol": tolerance, "atol": tolerance, "equal_nan": True}
    return a.shape == b.shape and torch.allclose(a, b, **near)
