"""Every public layer of Keras on three devices equals one device, or is refused: what docs/layers.md says."""

from __future__ import annotations

import random

import keras
import layer_cases as cases
import numpy as np
import pytest

import fastdp

# Of Keras and torch alone: a scalar draw of `beta`, transposed.
pytestmark = pytest.mark.filterwarnings("ignore:.*Tensor.T is deprecated on 0-D tensors:UserWarning")

ROWS, STEPS = 7, 2


@pytest.fixture(scope="module", autouse=True)
def _devices():
    fastdp.set_virtual_devices(3)
    yield
    fastdp.set_virtual_devices(0)


def _names(kind):
    return [name for name, case in cases.CASES.items() if kind(case)]


def _arrays(model):
    return [np.array(keras.ops.convert_to_numpy(v), np.float64) for v in model.variables]


def trained(case, gpus):
    """Losses of two steps, variables before and after, and predictions."""
    model = case.model()
    random.seed(3)
    before = _arrays(model)
    runner = fastdp.wrap(model, gpus=gpus, check_replicas=True, **case.wrap) if gpus else model
    runner.compile(keras.optimizers.SGD(0.05), "mse")
    losses = [float(runner.train_on_batch(*case.batch(ROWS, step))) for step in range(STEPS)]
    return losses, before, _arrays(model), runner.predict(case.batch(ROWS)[0], verbose=0), model.variables


@pytest.mark.parametrize("name", _names(lambda case: not case.refused and not case.missing))
def test_two_steps_on_three_devices_equal_one_device(name):
    case = cases.CASES[name]
    losses, before, after, predicted, variables = trained(case, case.against)
    found_losses, found_before, found_after, found_predicted, _ = trained(case, 3)
    tolerance = case.tolerance
    np.testing.assert_allclose(found_losses, losses, rtol=tolerance)
    # A gradient that is zero but for rounding (the bias of attention's keys) is as exact as the largest allows.
    rounding = 1e-7 * max(float(np.abs(new - old).max()) for old, new in zip(before, after, strict=True) if new.size)
    for variable, old, other, new, found in zip(variables, before, found_before, after, found_after, strict=True):
        np.testing.assert_array_equal(other, old, err_msg=f"{variable.path} differs from the start")
        moved = float(np.abs(new - old).max()) if new.size else 0.0
        size = float(np.abs(new).max()) if new.size else 0.0
        np.testing.assert_allclose(
            found, new, rtol=0, atol=tolerance * moved + 3e-7 * size + rounding, err_msg=variable.path
        )
    assert any((new != old).any() for old, new in zip(before, after, strict=True))
    np.testing.assert_allclose(found_predicted, predicted, rtol=tolerance, atol=tolerance * np.abs(predicted).max())


@pytest.mark.parametrize("name", _names(lambda case: case.refused))
def test_what_cannot_be_split_is_refused_when_wrapping(name):
    case = cases.CASES[name]
    with pytest.raises(ValueError, match=f"(?s){case.refused}"):
        fastdp.wrap(case.model(), gpus=3)


@pytest.mark.parametrize("name", _names(lambda case: case.missing))
def test_what_keras_on_torch_lacks_cannot_be_made(name):
    with pytest.raises((ImportError, RuntimeError, ValueError, NotImplementedError)):
        cases.CASES[name].model()


def test_every_public_layer_has_a_case():
    public = set(cases.public_layers())
    assert public - {cases.of_layer(name) for name in cases.CASES} == set()
    assert {cases.of_layer(name) for name in cases.CASES} - public == set()


def test_the_page_of_layers_is_the_list():
    assert cases.PAGE.read_text(encoding="utf-8") == cases.page(), "run: make layers"


def test_a_layer_that_adds_in_place_leaves_the_users_batch_alone():
    model = keras.Sequential([keras.Input((4, 4, 3)), keras.layers.RandomBrightness(0.4, (0, 1), seed=5)])
    x = np.full((ROWS, 4, 4, 3), 0.5, "float32")
    parallel = fastdp.wrap(model, gpus=3)
    parallel.compile(loss="mse")
    with pytest.warns(UserWarning, match="does not have any trainable weights"):
        parallel.train_on_batch(x, x)
    np.testing.assert_array_equal(x, 0.5)


class Rolling(keras.layers.Layer):
    """Noise of shapes whose first axis is or is not made of rows: `per_row` entries for each, or `fixed` entries."""

    def __init__(self, per_row=0, fixed=0):
        super().__init__()
        self.per_row, self.fixed = per_row, fixed
        self.seeds = keras.random.SeedGenerator(3)

    def call(self, inputs):
        rows, width = inputs.shape
        first = rows * self.per_row or self.fixed
        drawn = keras.random.normal((first, width // (self.per_row or 1)), seed=self.seeds)
        return inputs + (keras.ops.reshape(drawn, (rows, width)) if self.per_row else keras.ops.sum(drawn, 0))


@pytest.mark.parametrize("shape", [{"fixed": 1}, {"fixed": 2}, {"fixed": 3}, {"per_row": 1}, {"per_row": 2}], ids=str)
def test_noise_is_of_rows_only_where_its_shape_follows_the_rows(shape):
    x, y = np.ones((ROWS, 4), "float32"), np.ones((ROWS, 1), "float32")
    losses = []
    for gpus in (0, 3):
        keras.utils.set_random_seed(1)
        model = keras.Sequential([keras.Input((4,)), Rolling(**shape), keras.layers.Dense(1)])
        runner = fastdp.wrap(model, gpus=gpus) if gpus else model
        runner.compile("sgd", "mse")
        losses.append([float(runner.train_on_batch(x, y)) for _ in range(2)])
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)


def test_dropout_of_rows_times_heads_draws_for_each_row():
    class Heads(keras.layers.Layer):
        def __init__(self):
            super().__init__()
            self.dropout = keras.layers.Dropout(0.5, seed=4)

        def call(self, inputs, training=None):
            return keras.ops.reshape(self.dropout(keras.ops.reshape(inputs, (-1, 4)), training=training), (-1, 8))

    x, y = np.ones((ROWS, 8), "float32"), np.ones((ROWS, 1), "float32")
    losses = []
    for gpus in (0, 3):
        keras.utils.set_random_seed(1)
        model = keras.Sequential([keras.Input((8,)), Heads(), keras.layers.Dense(1)])
        runner = fastdp.wrap(model, gpus=gpus) if gpus else model
        runner.compile("sgd", "mse")
        losses.append([float(runner.train_on_batch(x, y)) for _ in range(2)])
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)
