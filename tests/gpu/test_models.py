"""Keras models and torch modules on 1, 2, 4 and 8 virtual GPUs equal plain Keras and torch on the same card."""

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
def keras_checks():
    keras = pytest.importorskip("keras", reason="Keras is not installed: make gpu-check WHEELS=folder")
    import model_checks

    yield model_checks
    keras.backend.clear_session()
    gc.collect()


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("name", ["mlp", "cnn", "recurrent", "attention"])
def test_a_keras_model_equals_plain_keras_on_this_card(gpus, keras_checks, name, count, record_property):
    record_property("largest_difference", keras_checks.a_keras_model_equals_plain_keras(gpus(count), name))


@pytest.mark.parametrize("count", COUNTS)
def test_adam_on_every_gpu_equals_plain_keras(gpus, keras_checks, count, record_property):
    record_property("largest_difference", keras_checks.a_keras_model_equals_plain_keras(gpus(count), "mlp", "adam"))


@pytest.mark.parametrize("count", COUNTS)
def test_batches_of_fewer_rows_than_devices(gpus, keras_checks, count):
    keras_checks.a_keras_model_equals_plain_keras(gpus(count), "mlp", batch_size=3)


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize(("name", "sharded"), [("mlp", False), ("cnn", False), ("mlp", True)])
def test_a_data_set_on_the_gpus_equals_arrays(gpus, keras_checks, name, sharded, count):
    keras_checks.a_data_set_on_the_devices_equals_arrays(gpus(count), name, sharded=sharded)


@pytest.mark.parametrize("count", [2, 3])
def test_layers_placed_on_another_gpu_equal_plain_keras(gpus, keras_checks, count):
    """On one card both are streams of it; with two cards tensors go from one to the other."""
    keras_checks.a_placed_model_equals_plain_keras(gpus(count), [(0, count - 1)])


@pytest.mark.parametrize("count", COUNTS)
def test_a_torch_module_equals_plain_torch_on_this_card(gpus, count, record_property):
    found = torch_checks.a_torch_module_equals_plain_torch(gpus(count), torch_checks.PLACE)
    record_property("largest_difference", found)


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_recorded_steps_equal_traced_and_eager_ones(gpus, keras_checks, name, count, record_property):
    told = keras_checks.recorded_steps_equal_traced_and_eager_ones(gpus(count), name)
    for key in ("operations", "segments", "record_seconds", "graph_nbytes"):
        record_property(key, [entry[key] for entry in told])
