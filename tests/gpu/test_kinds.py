"""Eager, traced, compiled and recorded steps give the same losses on this card, with 1, 2, 4 and 8 virtual GPUs."""

from __future__ import annotations

import gc
import importlib

import pytest

pytest.importorskip("torch")
torch_checks = importlib.import_module("torch_checks")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch_checks.PLACE, reason="this torch is built without CUDA, or finds no GPU"),
]

COUNTS = [1, 2, 4, 8]


@pytest.fixture
def checks():
    keras = pytest.importorskip("keras", reason="Keras is not installed: make gpu-check WHEELS=folder")
    import kinds_checks

    yield kinds_checks
    keras.backend.clear_session()
    gc.collect()


@pytest.mark.parametrize("kind", ["eager", "traced", "graph", "step graph"])
@pytest.mark.parametrize("name", ["mlp", "cnn", "attention"])
@pytest.mark.parametrize("count", COUNTS)
def test_captured_steps_give_the_losses_of_eager_ones(gpus, checks, count, name, kind, record_property):
    record_property(
        "largest_difference", checks.a_kind_of_steps_gives_the_losses_of_eager_ones(gpus(count), name, kind)
    )


@pytest.mark.parametrize("way", ["kernels", "nccl"])
@pytest.mark.parametrize("name", ["mlp", "cnn"])
@pytest.mark.parametrize("count", COUNTS[1:])
def test_whole_steps_give_the_losses_of_those_in_buckets(gpus, checks, count, name, way, record_property):
    devices = gpus(count)
    if way == "nccl" and len({device.ordinal for device in devices}) < count:
        pytest.skip(f"NCCL wants a card for each of {count} ranks")
    found = checks.whole_steps_give_the_losses_of_those_in_buckets(devices, name, way)
    record_property("largest_difference", found)


@pytest.mark.parametrize("kind", ["compiled", "compiled graph"])
@pytest.mark.parametrize("count", COUNTS)
def test_compiled_steps_give_the_losses_of_eager_ones(gpus, checks, count, kind, record_property):
    record_property(
        "largest_difference", checks.a_kind_of_steps_gives_the_losses_of_eager_ones(gpus(count), "cnn", kind)
    )
