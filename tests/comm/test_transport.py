"""Gradients in 16 bits between devices: rounded once, added in float32 in a stated order, and rounded once more."""

from __future__ import annotations

import numpy as np
import pytest
from least_squares import line, rows

import fastdp
from fastdp.comm.host.reduction import sum_by_shards, sum_in_order
from fastdp.comm.transport import Transport, narrowed, sent, widened

# By dtype: the bound that docs/guide.md states, of the sum of magnitudes, and what numbers near zero add to it.
BOUNDS = {"bfloat16": (1 / 127, 0.0), "float16": (1 / 1023, 2.0**-25)}


@pytest.fixture(autouse=True)
def three_devices():
    fastdp.set_virtual_devices(3)
    yield
    fastdp.set_virtual_devices(0)


def vectors(count: int, dtype: str = "float32") -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [(rng.normal(size=1000) * 10.0 ** rng.integers(-9, 3, 1000)).astype(dtype) for _ in range(count)]


@pytest.mark.parametrize("sent_as", BOUNDS)
@pytest.mark.parametrize("add", [sum_in_order, sum_by_shards])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_error_is_within_the_bound_that_the_guide_states(sent_as, add, dtype):
    values = vectors(7, dtype)
    found = sent(add, Transport(sent_as))(values, dtype)
    share, near_zero = BOUNDS[sent_as]
    allowed = share * np.abs(values).sum(axis=0) + near_zero * 8
    wrong = np.abs(found.astype("f8") - np.sum(values, axis=0, dtype="f8"))
    assert found.dtype == dtype
    assert (wrong <= allowed).all()
    assert wrong.max() > 0


@pytest.mark.parametrize("sent_as", BOUNDS)
def test_the_sum_is_made_in_float32_in_rank_order(sent_as):
    values = vectors(3)
    a, b, c = (widened(narrowed(value, sent_as), sent_as) for value in values)
    expected = widened(narrowed((a + b) + c, sent_as), sent_as)
    np.testing.assert_array_equal(sent(sum_in_order, Transport(sent_as))(values, "float32"), expected)
    out = values[0]
    assert sent(sum_in_order, Transport(sent_as))(values, "float32", out) is out
    np.testing.assert_array_equal(out, expected)


def test_a_number_too_large_for_float16_is_an_error_or_infinite_under_loss_scaling():
    large, half = np.float32([7e4]), np.float32([5e4])
    for values in ([large, half], [half, half]):
        with pytest.raises(OverflowError, match=r'must stay within 65504.*Use grad_dtype="bfloat16"'):
            sent(sum_in_order, Transport("float16"))(values, "float32")
        assert np.isinf(sent(sum_in_order, Transport("float16", may_overflow=True))(values, "float32")).all()
    infinite = np.float32([np.inf])
    assert np.isinf(sent(sum_in_order, Transport("float16"))([infinite, half], "float32")).all()


def weights(count: int, **options) -> np.ndarray:
    program = line()
    engine = fastdp.DataParallel(program, count, timeout=20.0, **options)
    for seed in range(3):
        engine.train(rows(24, seed))
    return program.parameters["w"].copy()


@pytest.mark.parametrize("sent_as", BOUNDS)
@pytest.mark.parametrize("update", ["first", "each"])
def test_an_engine_sends_gradients_in_16_bits(sent_as, update):
    exact, found = weights(3, update=update), weights(3, update=update, grad_dtype=sent_as)
    assert 0 < np.abs(found - exact).max() < 0.02
    np.testing.assert_array_equal(found, weights(3, update=update, grad_dtype=sent_as))
    assert (weights(1, grad_dtype=sent_as) == weights(1)).all()  # nothing travels


def test_with_shards_the_devices_do_not_change_a_bit_of_rounded_gradients():
    alone = weights(1, shards=4, grad_dtype="bfloat16")
    np.testing.assert_array_equal(alone, weights(3, shards=4, grad_dtype="bfloat16"))
    assert (alone != weights(1, shards=4)).any()


def test_a_gradient_that_overflows_on_the_way_leaves_the_weights():
    program = line()
    engine = fastdp.DataParallel(program, 2, timeout=20.0, grad_dtype="float16")
    before = program.parameters["w"].copy()
    with pytest.raises(OverflowError, match="no replica's weights were changed"):
        engine.train([array * 1e4 for array in rows(24)])
    np.testing.assert_array_equal(program.parameters["w"], before)
