"""Metrics of captured steps are updated by a graph with the bits of Keras's own update."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import keras
import numpy as np
import pytest
import torch
from keras.src.trainers.compile_utils import CompileMetrics

import fastdp
from fastdp.keras.steps.captured_metrics import CapturedMetrics, are_kerass

metrics = keras.metrics


def own(y: Any, y_pred: Any) -> Any:
    return keras.ops.mean(keras.ops.abs(y - y_pred), -1)


class Doubled(metrics.MeanSquaredError):
    def update_state(self, y: Any, y_pred: Any, sample_weight: Any = None) -> None:
        super().update_state(y, 2 * y_pred, sample_weight)


def batch(rows: int, *, weighted: bool = False, classes: bool = True) -> tuple[Any, Any, Any]:
    rng = np.random.default_rng(rows)
    y = rng.integers(0, 4, rows).astype("int32") if classes else rng.random((rows, 4), "float32")
    weights = torch.from_numpy(rng.random(rows, "float32")) if weighted else None
    return torch.from_numpy(y), torch.from_numpy(rng.random((rows, 4), "float32")), weights


def counted(compiled: CompileMetrics) -> list[int]:
    """Counts the updates by Keras."""
    calls, update = [], compiled.update_state
    compiled.update_state = lambda *given: calls.append(1) or update(*given)
    return calls


def pair(make: Any, first: Any) -> list[CompileMetrics]:
    """The same metrics twice, built for such a batch."""
    made = [CompileMetrics(*make()) for _ in range(2)]
    for compiled in made:
        compiled.build(*first[:2])
    return made


def assert_same(mine: CompileMetrics, theirs: CompileMetrics) -> None:
    values = [[keras.ops.convert_to_numpy(v) for v in one.variables] for one in (mine, theirs)]
    assert len(values[0]) > 0
    for a, b in zip(*values, strict=True):
        np.testing.assert_array_equal(a, b)


CLASSES: dict[str, Any] = {
    "accuracy": lambda: (["accuracy"], None),
    "top": lambda: ([metrics.SparseTopKCategoricalAccuracy(2), "sparse_categorical_crossentropy"], None),
    "weighted": lambda: (["accuracy"], ["accuracy"]),
}
NUMBERS: dict[str, Any] = {
    "errors": lambda: (["mse", metrics.MeanAbsoluteError(dtype="float64")], [metrics.CosineSimilarity()]),
}


@pytest.mark.parametrize("name", [*CLASSES, *NUMBERS])
def test_a_graph_has_the_bits_of_kerass_update(name: str) -> None:
    make, about = {**CLASSES, **NUMBERS}[name], {"weighted": name in ("weighted", "errors"), "classes": name in CLASSES}
    mine, theirs = pair(make, batch(6, **about))
    captured, calls = CapturedMetrics(nullcontext), counted(mine)
    for rows in (6, 6, 5, 6, 5):
        captured.update(mine, *batch(rows, **about))
        theirs.update_state(*batch(rows, **about))
    assert_same(mine, theirs)
    assert len(calls) == 2  # one trace for each number of rows
    for compiled in (mine, theirs):
        compiled.reset_state()
    captured.update(mine, *batch(6, **about))
    theirs.update_state(*batch(6, **about))
    assert_same(mine, theirs)


def test_a_setting_that_changes_counts_from_the_next_batch() -> None:
    make = CLASSES["top"]
    mine, theirs = pair(make, batch(6))
    captured = CapturedMetrics(nullcontext)
    for k in (2, 2, 1, 3):
        for compiled in (mine, theirs):
            compiled.metrics[0]._fn_kwargs["k"] = k
        captured.update(mine, *batch(6))
        theirs.update_state(*batch(6))
        assert_same(mine, theirs)


@pytest.mark.parametrize("metric", [own, Doubled(), metrics.MeanMetricWrapper(own), metrics.RootMeanSquaredError()])
def test_other_metrics_are_left_to_keras(metric: Any) -> None:
    mine, theirs = pair(lambda: ([metric], None), batch(6, classes=False))
    captured, calls = CapturedMetrics(nullcontext), counted(mine)
    for _ in range(3):
        captured.update(mine, *batch(6, classes=False))
    assert len(calls) == 3
    assert are_kerass(theirs) is isinstance(metric, metrics.RootMeanSquaredError)


def test_masked_outputs_are_left_to_keras() -> None:
    mine, theirs = pair(CLASSES["accuracy"], batch(6))
    captured, calls = CapturedMetrics(nullcontext), counted(mine)
    for _ in range(2):
        for update in (lambda *given: captured.update(mine, *given), theirs.update_state):
            y, y_pred, _ = batch(6)
            y_pred._keras_mask = torch.arange(6) < 4
            update(y, y_pred, None)
    assert_same(mine, theirs)
    assert len(calls) == 2


@pytest.fixture
def one_device() -> Iterator[None]:
    fastdp.set_virtual_devices(1)
    yield
    fastdp.set_virtual_devices(0)


@pytest.mark.usefixtures("one_device")
def test_fit_tells_what_plain_keras_tells_and_keras_updates_only_while_it_is_traced() -> None:
    x, (y, _, _) = np.random.default_rng(0).random((22, 3), "float32"), batch(22)

    def told(compile: str | None) -> tuple[dict[str, list[float]], Any]:
        keras.utils.set_random_seed(1)
        template = keras.Sequential([keras.Input((3,)), keras.layers.Dense(4, activation="softmax")])
        model = template if compile is None else fastdp.wrap(template, gpus=1, compile=compile)
        model.compile("sgd", "sparse_categorical_crossentropy", metrics=["accuracy"])
        model.train_on_batch(x[:4], y[:4].numpy())  # builds the metrics
        counts = counted(model._compile_metrics)
        return model.fit(x, y.numpy(), batch_size=4, epochs=2, verbose=0, shuffle=False).history, (model, counts)

    expected, _ = told(None)
    found, (model, calls) = told("trace")
    assert found["accuracy"] == expected["accuracy"]
    np.testing.assert_allclose(found["loss"], expected["loss"], rtol=1e-6)
    assert len(calls) <= 4  # the first step of each of two shapes, and two traces
    assert model._steps.runs_no_other_code()
