"""Models and training steps that nobody thought of, on several devices and on one, in float64."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import keras
import numpy as np
import pytest
import random_models
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from keras.src import backend
from keras.src.backend.common import dtypes

import fastdp

pytestmark = [
    # What Keras says of a mask that ends, and fastdp of a step that runs in another way than asked for, with the same
    # numbers: random models meet all of these.
    pytest.mark.filterwarnings("ignore:.*does not support masking:UserWarning"),
    pytest.mark.filterwarnings("ignore:fastdp runs .* eagerly:UserWarning"),
    pytest.mark.filterwarnings("ignore:fastdp. calls of .* run on one device:UserWarning"),
]

SIZES = (7, 4, 9, 1)  # rows of the batches
TOLERANCE = 1e-9


@contextmanager
def double_precision() -> Iterator[None]:
    """Keras in float64 throughout. By itself it computes means, among others, of float64 numbers in float32."""
    floatx, original = keras.config.floatx(), dtypes.result_type

    def result_type(*given: Any) -> str:
        names = [keras.backend.standardize_dtype(one) for one in given if one is not None]
        return "float64" if "float64" in names else original(*given)

    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
    dtypes.result_type = backend.result_type = result_type
    try:
        yield
    finally:
        dtypes.result_type = backend.result_type = original
        keras.config.set_floatx(floatx)
        keras.config.set_dtype_policy(floatx)


@pytest.fixture(autouse=True)
def _double_precision() -> Iterator[None]:
    with double_precision():
        yield


def numbers(
    make: Callable[[int], tuple[keras.Model, list[str]]], seed: int, gpus: int | None, **wrap: Any
) -> dict[str, np.ndarray]:
    """Everything that training leaves behind, by name. `gpus=None` is plain Keras."""
    keras.utils.clear_session(free_memory=False)
    keras.config.set_dtype_policy("float64")
    keras.utils.set_random_seed(seed)
    model, kinds = make(seed)
    own = isinstance(model, random_models.OwnStep)
    outputs = 1 if own else len(model.outputs)
    rng = np.random.default_rng(seed)
    trained = model if gpus is None else fastdp.wrap(model, gpus=gpus, check_replicas=True, **wrap)
    trained.compile(keras.optimizers.SGD(0.05, momentum=0.5), None if own else ["mse", "mae"][:outputs])
    found: dict[str, np.ndarray] = {}
    for step, rows in enumerate(SIZES):
        x, y = random_models.batch(kinds, outputs, rows, rng)
        logs = trained.train_on_batch(x, y, return_dict=True)
        found |= {f"step {step}: {name}": np.asarray(value, np.float64) for name, value in logs.items()}
    x, y = random_models.batch(kinds, outputs, 5, rng)
    for i, output in enumerate(keras.tree.flatten(trained.predict(x, batch_size=3, verbose=0))):
        found[f"prediction {i}"] = np.asarray(output, np.float64)
    if not own:
        logs = trained.evaluate(x, y, batch_size=3, verbose=0, return_dict=True)
        found |= {f"test: {name}": np.asarray(value, np.float64) for name, value in logs.items()}
    for i, variable in enumerate(model.variables):
        found[f"variable {i} {variable.name}"] = np.asarray(keras.ops.convert_to_numpy(variable), np.float64)
    found["drawn afterwards"] = keras.ops.convert_to_numpy(keras.random.uniform((2,)))
    return found


def assert_equal(one: dict[str, np.ndarray], many: dict[str, np.ndarray]) -> None:
    assert list(many) == list(one)
    for name, expected in one.items():
        scale = float(np.abs(expected).max()) if expected.size else 0.0
        np.testing.assert_allclose(many[name], expected, rtol=TOLERANCE, atol=TOLERANCE * scale + 1e-12, err_msg=name)


def is_finite(found: dict[str, np.ndarray]) -> bool:
    """Whether training has not diverged, as that of a random model may."""
    return all(np.isfinite(value).all() for value in found.values())


SLOW = settings(suppress_health_check=list(HealthCheck), print_blob=True)
SEEDS = st.integers(0, 10**6)
DEVICES = st.sampled_from([2, 3, 8])


@SLOW
@example(seed=5389, gpus=2, compile=None)  # BatchNormalization behind a mask: Keras divides by count + epsilon
@example(seed=4916, gpus=2, compile=None)  # a mean that is the same for all rows until the weights are trained
@given(seed=SEEDS, gpus=DEVICES, compile=st.sampled_from([None, None, "trace"]))
def test_a_random_graph_trains_as_on_one_device(seed: int, gpus: int, compile: str | None) -> None:
    one = numbers(random_models.functional, seed, None)
    assume(is_finite(one))
    many = numbers(random_models.functional, seed, gpus, compile=compile, sync_batch_norm=True)
    assert_equal(one, many)


@SLOW
@given(seed=SEEDS, gpus=DEVICES)
def test_random_calls_in_a_step_of_the_models_own_train_as_on_one_device(seed: int, gpus: int) -> None:
    one = numbers(random_models.own_step, seed, None)
    assume(is_finite(one))
    assert_equal(one, numbers(random_models.own_step, seed, gpus, sync_batch_norm=True))


class Tracked(keras.layers.Layer):
    """Keeps a running statistic of its inputs, and adds it to the loss if it is one that can be."""

    def __init__(self, statistic: Callable[[Any], Any], *, adds: bool) -> None:
        super().__init__()
        self.statistic, self.adds = statistic, adds

    def build(self, input_shape: Any) -> None:
        self.kept = self.add_weight(shape=(), initializer="zeros", trainable=False, name="kept")

    def call(self, inputs: Any, training: bool = False) -> Any:
        if training:
            now = self.statistic(inputs)
            self.kept.assign(now)
            if self.adds:
                self.add_loss(0.1 * now)
        return inputs


# Behind a normalization whose offset is zero: rounding errors, or the same number for each row.
STATISTICS = {
    "mean": keras.ops.mean,
    "sum": keras.ops.sum,
    "mean of squares": lambda x: keras.ops.mean(keras.ops.square(x)),
    "sum of squares": lambda x: keras.ops.sum(keras.ops.square(x)),
    "largest sum of a row": lambda x: keras.ops.max(keras.ops.sum(x, axis=-1)),
    "smallest norm of a row": lambda x: keras.ops.min(keras.ops.norm(x, axis=-1)),
}


@pytest.mark.parametrize("gpus", [2, 3])
@pytest.mark.parametrize("name", STATISTICS)
def test_a_statistic_that_the_first_weights_hide_is_that_of_one_device(name: str, gpus: int) -> None:
    adds = "row" not in name  # an extreme is no loss that devices can add up

    def model(seed: int) -> tuple[keras.Model, list[str]]:
        x = inputs = keras.Input((6,))
        x = keras.layers.LayerNormalization(epsilon=1e-12)(x)
        x = Tracked(STATISTICS[name], adds=adds)(x)
        return keras.Model(inputs, keras.layers.Dense(3)(x)), ["vector"]

    one = numbers(model, 0, None)
    assert is_finite(one)
    assert_equal(one, numbers(model, 0, gpus, compile=None))


@pytest.mark.parametrize("make", [random_models.functional, random_models.own_step])
def test_the_generators_use_all_of_their_parts(make: Any) -> None:
    """Else what looks like a proof of all parts is one of a few."""
    seen: set[str] = set()
    for seed in itertools.islice(itertools.count(), 150):
        model, _ = make(seed)
        seen |= {type(layer).__name__ for layer in model._flatten_layers()} | set(getattr(model, "pieces", ()))
    expected = {"Noise", "Statistics", "Gate", "Dropout", "BatchNormalization", "LSTM", "GRU", "Conv2D", "Embedding"}
    expected |= set(random_models.OwnStep.PIECES) if make is random_models.own_step else {"Concatenate", "Multiply"}
    assert expected <= seen, f"never made: {sorted(expected - seen)}"
