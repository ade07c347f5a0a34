"""Outputs that are no tensors: as in plain Keras where all devices have the same, an error or a fallback elsewhere."""

from __future__ import annotations

import keras
import numpy as np
import pytest

import fastdp
from fastdp.program.keras.plain_outputs import check_same
from fastdp.tensors.row_effects import NotByRowsError

OBJECT = object()
SAME = {
    "none": lambda x: None,
    "int": lambda x: 3,
    "bool": lambda x: True,
    "nan": lambda x: float("nan"),
    "str": lambda x: "name",
    "numpy": lambda x: np.arange(3.0),
    "numpy scalar": lambda x: np.float32(2),
    "object": lambda x: OBJECT,
    "list": lambda x: [None, 1, "a", {"deep": None}],
}
BY_ROWS = {
    "rows": lambda x: int(x.shape[0]),
    "numpy rows": lambda x: np.zeros((x.shape[0], 2)),
    "values": lambda x: float(x.mean()),
    "tensor or none": lambda x: x if x.shape[0] > 1 else None,
}
X = np.random.default_rng(0).normal(size=(7, 4)).astype("float32")
Y = np.ones((7, 2), "float32")


@pytest.fixture(autouse=True)
def _devices():
    fastdp.set_virtual_devices(8)
    yield
    fastdp.uninstall()
    fastdp.set_virtual_devices(0)


class Model(keras.Model):
    """Gives a tensor and something else, and looks at its outputs in training."""

    def __init__(self, leaf):
        super().__init__(name="both")
        self.dense, self.leaf = keras.layers.Dense(2), leaf
        self.mae = keras.metrics.MeanAbsoluteError(name="mae")

    def call(self, x):
        return {"a": self.dense(x), "z": self.leaf(x)}

    def compute_metrics(self, x, y, y_pred, sample_weight=None):
        assert set(y_pred) == {"a", "z"}
        self.mae.update_state(y["a"], y_pred["a"])
        return self.get_metrics_result()


def made(leaf, gpus=None, kind=Model, **options):
    keras.utils.set_random_seed(0)
    model = kind(leaf)
    model(X)
    trained = fastdp.wrap(model, gpus=gpus, compile=None, **options) if gpus else model
    trained.compile(keras.optimizers.SGD(0.1), {"a": "mse"})
    return trained


def outcome(step):
    """What a step gives, or the class of its error."""
    try:
        return step()
    except (ValueError, TypeError, RuntimeError) as error:
        return type(error)


def assert_same(found, expected):
    if isinstance(expected, type):
        assert found is expected
        return
    for leaf, other in zip(keras.tree.flatten(found), keras.tree.flatten(expected), strict=True):
        assert type(leaf) is type(other)
        if isinstance(leaf, np.ndarray) and leaf.dtype.kind in "biufc":
            np.testing.assert_allclose(leaf, other, rtol=1e-5, atol=1e-6)
        elif isinstance(leaf, np.ndarray):
            assert leaf == other


@pytest.mark.parametrize("gpus", [2, 3, 8])
@pytest.mark.parametrize("name", SAME)
def test_leaves_that_are_the_same_everywhere_are_as_in_plain_keras(name, gpus):
    plain, parallel = made(SAME[name]), made(SAME[name], gpus)
    expected = plain.fit(X, {"a": Y}, batch_size=4, epochs=2, shuffle=False, verbose=0).history
    found = parallel.fit(X, {"a": Y}, batch_size=4, epochs=2, shuffle=False, verbose=0).history
    assert found.keys() == expected.keys()
    for key, values in expected.items():
        np.testing.assert_allclose(found[key], values, rtol=1e-5)
    for weight, other in zip(parallel.get_weights(), plain.get_weights(), strict=True):
        np.testing.assert_allclose(weight, other, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        parallel.evaluate(X, {"a": Y}, verbose=0), plain.evaluate(X, {"a": Y}, verbose=0), rtol=1e-5
    )
    assert_same(parallel.predict_on_batch(X), plain.predict_on_batch(X))
    assert_same(outcome(lambda: parallel.predict(X, 4, 0)), outcome(lambda: plain.predict(X, 4, 0)))
    leaves = keras.tree.flatten(parallel(X)["z"])
    for leaf, other in zip(leaves, keras.tree.flatten(SAME[name](X)), strict=True):
        assert type(leaf) is type(other)


@pytest.mark.parametrize("name", BY_ROWS)
def test_leaves_that_depend_on_the_rows_are_named_under_wrap_and_run_plain_under_install(name):
    plain = made(BY_ROWS[name])
    expected = [plain.train_on_batch(X, {"a": Y}) for _ in range(2)]
    parallel = made(BY_ROWS[name], 3)
    before = parallel.get_weights()
    with pytest.raises(NotByRowsError, match=r"outputs\['z'\] is not a tensor|tensors for some rows") as caught:
        parallel.train_on_batch(X, {"a": Y})
    assert "gpus=[0]" in str(caught.value)
    for weight, other in zip(parallel.get_weights(), before, strict=True):
        np.testing.assert_array_equal(weight, other)
    fastdp.install(gpus=3, compile=None)
    model = made(BY_ROWS[name])
    with pytest.warns(UserWarning, match="run on one device"):
        found = [model.train_on_batch(X, {"a": Y}) for _ in range(2)]
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_what_only_the_step_itself_tells_is_an_error_before_the_update():
    def after_the_trial(x):
        return x.shape[0] if x.shape[0] > 3 else 0

    parallel = made(after_the_trial, 2)  # 7 rows: 4 and 3
    before = parallel.get_weights()
    with pytest.raises(NotByRowsError, match=r"outputs\['z'\] is not a tensor but int 4.* int 0"):
        parallel.train_on_batch(X, {"a": Y})
    with pytest.raises(NotByRowsError, match=r"outputs\['z'\]"):
        parallel.predict_on_batch(X)
    for weight, other in zip(parallel.get_weights(), before, strict=True):
        np.testing.assert_array_equal(weight, other)
    parallel.train_on_batch(X[:4], {"a": Y[:4]})  # training goes on where they agree


def test_the_merged_loss_gets_them_too():
    class Own(Model):
        def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
            assert y_pred["z"] == [None, 2]
            return keras.ops.max((keras.ops.convert_to_tensor(y["a"]) - y_pred["a"]) ** 2) * y_pred["z"][1]

    plain, parallel = made(lambda x: [None, 2], kind=Own), made(lambda x: [None, 2], 3, kind=Own)
    for _ in range(2):
        np.testing.assert_allclose(parallel.train_on_batch(X, {"a": Y}), plain.train_on_batch(X, {"a": Y}), rtol=1e-5)
    for weight, other in zip(parallel.get_weights(), plain.get_weights(), strict=True):
        np.testing.assert_allclose(weight, other, rtol=1e-5, atol=1e-6)


def test_a_custom_step_gets_them_from_calls_on_all_devices():
    class Own(Model):
        def train_step(self, data):
            x, y, _ = keras.utils.unpack_x_y_sample_weight(data)
            outputs = self(x, training=True)
            assert outputs["z"] == "name"
            self.zero_grad()
            loss = keras.ops.mean((outputs["a"] - y["a"]) ** 2)
            loss.backward()
            self.optimizer.apply([v.value.grad for v in self.trainable_weights], self.trainable_weights)
            return {"loss": loss}

    plain, parallel = made(lambda x: "name", kind=Own), made(lambda x: "name", 3, kind=Own)
    expected = plain.fit(X, {"a": Y}, epochs=3, verbose=0).history["loss"]
    np.testing.assert_allclose(parallel.fit(X, {"a": Y}, epochs=3, verbose=0).history["loss"], expected, rtol=1e-5)


def test_captured_steps_know_none_and_leave_other_leaves_to_eager_ones():
    for leaf, how in ((lambda x: None, "traced"), (lambda x: 2, "eager")):
        keras.utils.set_random_seed(0)
        model = Model(leaf)
        model(X)
        parallel = fastdp.wrap(model, gpus=2, compile="trace")
        parallel.compile("sgd", {"a": "mse"})
        plain = made(leaf)
        plain.compile("sgd", {"a": "mse"})
        plain.set_weights(parallel.get_weights())

        def train(trained):
            return [trained.train_on_batch(X, {"a": Y}) for _ in range(3)]

        if how == "eager":
            with pytest.warns(UserWarning, match="not tensors"):
                found = train(parallel)
        else:
            found = train(parallel)
        np.testing.assert_allclose(found, train(plain), rtol=1e-5)
        assert {entry["how"] for entry in parallel.report()} == {how}


def test_values_are_compared_by_class_and_content():
    def same(*values):
        check_same([((0, value),) for value in values], {"a": 0})

    same(1.5, 1.5)
    same(np.array([1.0, np.nan]), np.array([1.0, np.nan]))
    for one, other in ((1, True), (1, 1.0), ("a", "b"), (object(), object()), (np.zeros(2), np.zeros(2, "float32"))):
        with pytest.raises(NotByRowsError, match=r"outputs\['a'\]"):
            same(one, other)
