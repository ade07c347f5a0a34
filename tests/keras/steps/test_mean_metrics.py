"""Means that are updated through the memory of their variables have the bits of Keras's own operations."""

from __future__ import annotations

import warnings

import keras
import numpy as np
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

import fastdp  # noqa: F401 - chooses Keras's backend
from fastdp.keras.steps.mean_metrics import MeanMetrics

VALUES = st.lists(st.tuples(st.floats(width=64), st.integers(0, 1 << 26)), max_size=6)


def bits(metric, result):
    values = [metric.total.value, metric.count.value, torch.as_tensor(result, dtype=torch.float32)]
    return [value.detach().numpy().tobytes() for value in values]


@hypothesis_settings(max_examples=200, deadline=None)
@given(VALUES)
def test_a_mean_has_the_bits_of_float32_arithmetic(values):
    means, ours, keras_own = MeanMetrics(), keras.metrics.Mean(), keras.metrics.Mean()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # NumPy's, of numbers that float32 cannot hold
        for value, rows in values:
            means.add(ours, value, rows)
            keras_own.total.value.add_(float(np.float32(value) * np.float32(rows)))
            keras_own.count.value.add_(float(np.float32(rows)))
    one, other = bits(ours, means.result(ours)), bits(keras_own, keras_own.result())
    assert all(a == b or all(np.isnan(np.frombuffer(c, "f4")) for c in (a, b)) for a, b in zip(one, other, strict=True))


def test_memory_that_has_moved_is_followed():
    means, mean = MeanMetrics(), keras.metrics.Mean()
    means.add(mean, 2.0, 4)
    mean.total.value.data = torch.tensor(100.0)
    means.add(mean, 1.0, 1)
    assert float(mean.total.value) == 101
    mean.reset_state()
    assert means.result(mean) == 0
    means.add(mean, 3.0, 2)
    assert means.result(mean) == float(mean.result()) == 3


def test_metrics_that_are_no_plain_means_are_updated_and_read_by_keras():
    class Own(keras.metrics.Mean):
        def result(self):
            return keras.ops.convert_to_tensor(7.0)

    own, half, accuracy = Own(), keras.metrics.Mean(dtype="float64"), keras.metrics.BinaryAccuracy()
    means = MeanMetrics()
    for metric in (own, half):
        means.add(metric, 0.1, 3)
        assert float(metric.count.value) == 3
    accuracy.update_state([1, 0, 1], [0.9, 0.8, 0.7])
    assert float(means.result(own)) == 7
    assert float(means.result(half)) == float(half.result())
    assert means.result(accuracy) == float(accuracy.result())
