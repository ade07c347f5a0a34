"""Every random op of Keras gives each row what one device gives it, whatever the number of devices."""

from __future__ import annotations

import keras
import numpy as np
import pytest

import fastdp
from fastdp.comm.context import Context
from fastdp.program.keras.patches import replica_aware
from fastdp.program.keras.replica import ReplicaContext, replica_scope

ROWS = 10


@pytest.fixture(autouse=True)
def _devices():
    fastdp.set_virtual_devices(4)
    yield
    fastdp.set_virtual_devices(0)


class Drawing(keras.layers.Layer):
    """Replaces its inputs by draws."""

    def __init__(self, draw):
        super().__init__()
        self.draw = draw
        self.seeds = keras.random.SeedGenerator(3)

    def call(self, inputs):
        drawn = keras.ops.cast(self.draw(inputs, self.seeds), "float32")
        return keras.ops.reshape(drawn, (-1, 6)) + 0.0 * inputs


def shape(x):
    return keras.ops.shape(x)


DRAWS = {
    "normal": lambda x, seed: keras.random.normal(shape(x), seed=seed),
    "uniform": lambda x, seed: keras.random.uniform(shape(x), seed=seed),
    "randint": lambda x, seed: keras.random.randint(shape(x), 0, 99, seed=seed),
    "truncated_normal": lambda x, seed: keras.random.truncated_normal(shape(x), seed=seed),
    "dropout": lambda x, seed: keras.random.dropout(x, 0.5, seed=seed),
    "gamma": lambda x, seed: keras.random.gamma(shape(x), 0.7, seed=seed),
    "gamma by row": lambda x, seed: keras.random.gamma(shape(x), keras.ops.abs(x) + 0.5, seed=seed),
    "beta": lambda x, seed: keras.random.beta(shape(x), 0.7, 1.5, seed=seed),
    "binomial": lambda x, seed: keras.random.binomial(shape(x), 9.0, 0.4, seed=seed),
    "categorical": lambda x, seed: keras.random.categorical(x, 6, seed=seed),
    "shuffle": lambda x, seed: keras.random.shuffle(x, axis=1, seed=seed),
}


def forward(draw, gpus):
    model = keras.Sequential([keras.Input((6,)), Drawing(draw)])
    x = np.random.default_rng(0).normal(size=(ROWS, 6)).astype("float32")
    if gpus:
        model = fastdp.wrap(model, gpus=gpus)
    return model.predict(x, verbose=0, batch_size=ROWS)


@pytest.mark.parametrize("gpus", [1, 3, 4])
@pytest.mark.parametrize("name", DRAWS)
def test_each_row_is_drawn_as_by_plain_keras(name, gpus):
    expected = forward(DRAWS[name], 0)
    assert len(np.unique(expected, axis=0)) > ROWS // 2  # rows differ
    np.testing.assert_allclose(forward(DRAWS[name], gpus), expected, rtol=1e-6)


def test_shuffling_rows_between_devices_is_refused_with_a_remedy():
    draw = DRAWS["shuffle"]
    assert forward(draw, 2).shape == (ROWS, 6)
    with pytest.raises(ValueError, match=r"axis=0 would move rows between devices.*Shuffle the data instead"):
        forward(lambda x, seed: keras.random.shuffle(x, axis=0, seed=seed), 2)


@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16"])
def test_an_output_without_axes_is_the_mean_over_rows_in_any_dtype(policy):
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy)
    try:
        inputs = keras.Input((4,))
        outputs = keras.ops.mean(keras.layers.Dense(1, kernel_initializer="ones")(inputs))
        parallel = fastdp.wrap(keras.Model(inputs, outputs), gpus=2)
    finally:
        keras.config.set_dtype_policy(before)
    merged = parallel(np.array([[1.0] * 4, [1.0] * 4, [0.0] * 4], "float32"))
    assert float(merged.detach()) == pytest.approx(8.0 / 3.0, rel=1e-2)


def test_draws_of_numpy_s_generator_are_told_apart_by_their_place_in_the_code():
    replica = ReplicaContext(Context.alone([], None, 0, 1, 2))
    with replica_aware(), replica_scope(replica):
        for _ in range(2):
            np.random.rand(1)  # noqa: NPY002
        np.random.rand(1)  # noqa: NPY002
    places = list(replica.met.items())
    assert [count for _, count in places] == [2, 1]
    assert all("test_random_ops" in site[1][0][0].co_filename for site, _ in places)
