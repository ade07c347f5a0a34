"""What goes wrong says so: the class, what was expected, what came; weights stay, and the next call works."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
import pytest

import fastdp

layers = keras.layers


@pytest.fixture(scope="module", autouse=True)
def four_virtual_devices() -> Iterator[None]:
    """Four virtual devices, and none afterwards."""
    fastdp.set_virtual_devices(4)
    yield
    fastdp.set_virtual_devices(0)


def build(*middle: keras.layers.Layer) -> keras.Model:
    return keras.Sequential([keras.Input((3,)), layers.Dense(4), *middle, layers.Dense(1)])


def compiled(model: keras.Model, **options: Any) -> fastdp.ParallelModel:
    parallel = fastdp.wrap(model, gpus=4, **options)
    parallel.compile("sgd", "mse")
    return parallel


def rows_of(n: int, width: int = 3) -> np.ndarray:
    return np.random.default_rng(n).normal(size=(n, width)).astype("float32")


def assert_works(parallel: Any) -> None:
    """A step trains: finite loss, other weights."""
    before = parallel.get_weights()
    assert np.isfinite(parallel.train_on_batch(rows_of(9), rows_of(9, 1)))
    assert any(not np.array_equal(a, b) for a, b in zip(before, parallel.get_weights(), strict=True))


def unchanged(before: list[np.ndarray], model: Any) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(before, model.get_weights(), strict=True))


def test_a_wrong_input_shape_names_both_shapes_and_the_next_call_works() -> None:
    parallel = compiled(build())
    assert_works(parallel)
    before = parallel.get_weights()
    with pytest.raises(ValueError, match=r"expected.*3.*found shape|incompatible"):
        parallel.train_on_batch(rows_of(8, 5), rows_of(8, 1))
    with pytest.raises(ValueError, match=r"incompatible|expected"):
        parallel.predict(rows_of(8, 5), verbose=0)
    assert unchanged(before, parallel)
    assert_works(parallel)


def test_arrays_of_unequal_length_are_a_value_error() -> None:
    parallel = compiled(build())
    assert_works(parallel)
    with pytest.raises(ValueError, match="same number of rows"):
        parallel.train_on_batch(rows_of(8), rows_of(7, 1))
    assert_works(parallel)


def test_strings_for_numbers_are_a_standard_error() -> None:
    parallel = compiled(build())
    with pytest.raises((TypeError, ValueError), match=r"dtype|numpy\.str_|type"):
        parallel.train_on_batch(np.array([["a", "b", "c"]] * 8), rows_of(8, 1))
    assert_works(parallel)


def test_an_unbuilt_model_says_how_to_build_it() -> None:
    with pytest.raises(ValueError, match=r"is not built.*model\.build"):
        fastdp.wrap(keras.Sequential([layers.Dense(1)]), gpus=2)


@pytest.mark.parametrize("thing", [None, 3, "model", layers.Input((3,))])
def test_an_unknown_object_is_a_type_error_that_shows_it(thing: Any) -> None:
    with pytest.raises(TypeError, match=r"`model` must be a keras\.Model"):
        fastdp.wrap(thing, gpus=2)


def test_a_layer_that_is_no_model_is_a_type_error() -> None:
    with pytest.raises(TypeError, match=r"`model` must be a keras\.Model"):
        fastdp.wrap(layers.Dense(1), gpus=2)


def test_a_parallel_model_cannot_be_wrapped_again() -> None:
    parallel = fastdp.wrap(build(), gpus=2)
    for wrapper in (fastdp.wrap, fastdp.multi_gpu_model):
        with pytest.raises(ValueError, match=r"parallel already.*model\.template"):
            wrapper(parallel, gpus=2)


def test_another_backend_is_an_error_that_says_how_to_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build()
    monkeypatch.setattr(keras.backend, "backend", lambda: "jax")
    for wrapper in (fastdp.wrap, fastdp.multi_gpu_model):
        with pytest.raises(RuntimeError, match="KERAS_BACKEND=torch"):
            wrapper(model, gpus=2)


def test_a_fixed_batch_size_is_a_value_error_that_names_the_input() -> None:
    """keras-team/keras #8397."""
    x = keras.Input(batch_shape=(8, 3), name="eight")
    with pytest.raises(ValueError, match=r"'eight'.*fixed batch size of 8"):
        fastdp.wrap(keras.Model(x, layers.Dense(1)(x)), gpus=2)


@pytest.mark.parametrize("recurrent", ["LSTM", "GRU", "SimpleRNN"])
def test_a_stateful_rnn_is_a_value_error_that_names_the_layer(recurrent: str) -> None:
    """keras-team/keras #9178 #12835."""
    layer = getattr(layers, recurrent)(4, stateful=True, name="memory")
    model = keras.Sequential([layer])
    model.build((8, 5, 3))
    with pytest.raises(ValueError, match=r"'memory' is stateful|fixed batch size"):
        fastdp.wrap(model, gpus=2)


@pytest.mark.parametrize("step", ["train_step", "test_step"])
def test_a_step_that_does_nothing_on_the_devices_is_an_error_that_says_so(step: str) -> None:
    def own(self: Any, data: Any) -> Any:
        return {}

    cls = type("Own", (keras.Model,), {step: own})
    x = keras.Input((3,))
    parallel = fastdp.wrap(cls(x, layers.Dense(1)(x)), gpus=2)
    assert parallel.predict(rows_of(5), verbose=0).shape == (5, 1)
    parallel.compile("sgd", "mse")
    run = parallel.train_on_batch if step == "train_step" else parallel.test_on_batch
    with pytest.raises(ValueError, match=rf"{step}\(\) of the model .* calls no layer of the model that can be split"):
        run(rows_of(5), rows_of(5)[:, :1])


class Faulty(layers.Layer):
    """Fails on the device that it is told to."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error
        self.where = ""

    def call(self, x: Any) -> Any:
        if self.where and threading.current_thread().name.endswith(self.where):
            raise self.error
        return x


@pytest.mark.parametrize("error", [ValueError("odd"), KeyError("k"), ZeroDivisionError("zero"), MemoryError("full")])
def test_a_failure_in_one_replica_names_device_and_rows_and_changes_no_weight(error: Exception) -> None:
    layer = Faulty(error)
    parallel = compiled(build(layer), check_replicas=True)
    assert_works(parallel)
    before = parallel.get_weights()
    layer.where = "virtual:2"
    for call in (
        lambda: parallel.train_on_batch(rows_of(9), rows_of(9, 1)),
        lambda: parallel.predict_on_batch(rows_of(9)),
    ):
        with pytest.raises(type(error), match=r"virtual:2 \(rows 5 to 7 of the batch's 9\)") as caught:
            call()
        assert isinstance(caught.value, fastdp.ReplicaError)
        assert caught.value.device == "virtual:2"
        assert caught.value.rows == (5, 7)
        assert unchanged(before, parallel)
    layer.where = ""
    assert_works(parallel)


def test_two_threads_that_fit_one_model_get_an_error_or_wait_and_none_hangs() -> None:
    inside, leave = threading.Event(), threading.Event()

    class Slow(layers.Layer):
        def call(self, x: Any) -> Any:
            if threading.current_thread().name.startswith("fastdp") and self.wait:
                inside.set()
                assert leave.wait(60)
            return x

    layer = Slow()
    layer.wait = False
    parallel = compiled(build(layer))
    assert_works(parallel)
    layer.wait = True
    first = threading.Thread(target=lambda: parallel.train_on_batch(rows_of(8), rows_of(8, 1)))
    first.start()
    try:
        assert inside.wait(60)
        with pytest.raises(RuntimeError, match="already running a step in another thread"):
            parallel.train_on_batch(rows_of(8), rows_of(8, 1))
    finally:
        layer.wait = False
        leave.set()
        first.join(60)
    assert not first.is_alive()
    assert_works(parallel)


def test_an_empty_batch_is_an_error_and_the_next_call_works() -> None:
    parallel = compiled(build())
    with pytest.raises(ValueError, match="at least one row"):
        parallel.train_on_batch(rows_of(0), rows_of(0, 1))
    assert_works(parallel)


def test_fit_before_compile_is_keras_own_error() -> None:
    with pytest.raises(ValueError, match="compile"):
        fastdp.wrap(build(), gpus=2).fit(rows_of(8), rows_of(8, 1), verbose=0)


def test_setting_the_layers_is_an_error_that_says_what_to_do() -> None:
    with pytest.raises(AttributeError, match="change the template"):
        fastdp.wrap(build(), gpus=2).layers = []


def test_a_collective_in_a_layer_on_several_devices_is_an_error_that_says_where_collectives_work():
    class Gathers(keras.layers.Layer):
        def call(self, x):
            return x - fastdp.replica.all_reduce(x.mean(0), "mean")

    model = keras.Sequential([keras.Input((3,)), Gathers(), keras.layers.Dense(1)])
    x = np.random.default_rng(0).normal(size=(6, 3)).astype("float32")
    with pytest.raises(NotImplementedError, match=r"fastdp\.replica works in torch modules"):
        fastdp.wrap(model, gpus=2).predict(x, verbose=0)
