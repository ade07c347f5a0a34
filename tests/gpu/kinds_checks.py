"""Eager, traced, compiled and recorded steps of a model held to each other; the devices come from the caller."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
import pytest
from model_checks import KERAS_MODELS, LIMIT, keras_data, several_buckets
from torch_checks import full_precision

from fastdp.comm import algorithm
from fastdp.keras.parallel_model import ParallelModel
from fastdp.options import Options

# What the report calls the steps of each kind, and the argument `compile` that asks for them.
KINDS = {
    "eager": ("eager", None),
    "traced": ("traced", "trace"),
    "compiled": ("compiled", "inductor"),
    "graph": ("graph", "trace"),
    "step graph": ("step graph", "trace"),
    "compiled graph": ("graph", "inductor"),
}
# TorchInductor adds up in another order than ATen.
TOLERANCE = {"eager": 0.0, "traced": 1e-5, "graph": 1e-5, "step graph": 1e-5, "compiled": 1e-4, "compiled graph": 1e-4}
ROWS, BATCH = 32, 16
COMPILE_SECONDS = 240.0


def options_of(kind: str) -> dict[str, Any]:
    """The arguments of ParallelModel for a kind of steps."""
    graph = "step" if kind == "step graph" else "bucket" if "graph" in kind else None
    return {"compile": KINDS[kind][1], "graph": graph}


def a_kind_of_steps_gives_the_losses_of_eager_ones(devices: list, name: str, kind: str) -> float:
    """Six epochs of two batches, the last three once all is compiled. Returns the largest difference of a loss."""
    expected, eager_weights = _trained(devices, name, "eager")
    losses, weights = _trained(devices, name, kind)
    np.testing.assert_allclose(losses, expected, rtol=TOLERANCE[kind], err_msg=kind)
    for ours, theirs in zip(weights, eager_weights, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-5, err_msg=kind)
    return float(np.abs(np.array(losses) - np.array(expected)).max())


@contextlib.contextmanager
def reduced_by(way: str) -> Iterator[None]:
    """While it lasts small buckets are reduced as large ones are, if the way is "nccl"."""
    with pytest.MonkeyPatch.context() as patch:
        for limit in ("ONE_SHOT_NBYTES", "TWO_SHOT_NBYTES") if way == "nccl" else ():
            patch.setattr(algorithm, limit, -1)
        yield


def whole_steps_give_the_losses_of_those_in_buckets(devices: list, name: str, way: str) -> float:
    """On the same devices, with several buckets, by kernels over peer memory or by NCCL, which wants a card for each.

    Returns the largest difference of a loss.
    """
    with several_buckets(), reduced_by(way):
        losses, weights = _trained(devices, name, "step graph")
        expected, others = _trained(devices, name, "graph")
    np.testing.assert_allclose(losses, expected, rtol=1e-6)
    for ours, theirs in zip(weights, others, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
    return float(np.abs(np.array(losses) - np.array(expected)).max())


def _trained(devices: list, name: str, kind: str) -> tuple[list[float], list[np.ndarray]]:
    """The losses of the epochs and the weights at the end; steps must be of this kind by then."""
    x, y, _ = keras_data(name, ROWS)
    with full_precision():
        keras.utils.set_random_seed(3)
        options = Options(timeout=LIMIT, check_replicas=True, **options_of(kind))
        model = ParallelModel(KERAS_MODELS[name](), devices, options)
        # Not Adam: the bias of a convolution before BatchNormalization has a gradient of rounding errors alone.
        model.compile(
            keras.optimizers.SGD(0.05, momentum=0.9), keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        )
        how: dict[str, Any] = {"batch_size": BATCH, "epochs": 3, "shuffle": False, "verbose": 0}
        losses = model.fit(x, y, **how).history["loss"]
        model.wait_compiled(COMPILE_SECONDS)
        losses += model.fit(x, y, **how).history["loss"]
        told = list(model.report())
        assert {entry["how"] for entry in told} == {KINDS[kind][0]}, told
        return losses, [np.array(weight) for weight in model.get_weights()]
