"""Temporal masks, several inputs and outputs, loss weights, and models of every build."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastdp import wrap

layers = keras.layers
REDUCTIONS = ["sum", "mean", "sum_over_batch_size", "mean_with_sample_weight"]
STEPS = 5


def words(rows: int, rng: np.random.Generator) -> np.ndarray:
    """Sequences of 1 to STEPS words, padded with zeros: sub-batches differ in how many entries count."""
    lengths = rng.integers(1, STEPS + 1, rows)
    tokens = rng.integers(1, 9, (rows, STEPS))
    return np.where(np.arange(STEPS) < lengths[:, None], tokens, 0).astype("int32")


def tagged(sizes: list[int], weights: str = "", seed: int = 0) -> list[dict[str, Any]]:
    rng = np.random.default_rng(seed)
    made = []
    for rows in sizes:
        batch = {"x": words(rows, rng), "y": rng.normal(size=(rows, STEPS, 2)).astype("float32")}
        if weights:
            shape = (rows,) if weights == "rows" else (rows, STEPS)
            batch["sample_weight"] = rng.choice([0.0, 1.0, 3.0], shape).astype("float32")
        made.append(batch)
    return made


def tagger(recurrent: str = "LSTM") -> keras.Model:
    """A value for each word; the mask reaches the loss."""
    return keras.Sequential(
        [
            keras.Input((STEPS,), dtype="int32"),
            layers.Embedding(9, 3, mask_zero=True),
            getattr(layers, recurrent)(4, return_sequences=True),
            layers.Dense(2),
        ]
    )


def sgd(loss: Callable[[], Any], **more: Any) -> Callable[[], dict[str, Any]]:
    return lambda: {"optimizer": keras.optimizers.SGD(0.05), "loss": loss(), **more}


@pytest.mark.parametrize("weights", ["", "steps"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_masked_steps_count_as_on_one_device(reduction: str, weights: str, equals_one_device: Any) -> None:
    made = sgd(lambda: keras.losses.MeanSquaredError(reduction), metrics=["mae"])
    equals_one_device(tagger, made, tagged([7, 2, 1], weights), gpus=3)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=12)
@given(
    recurrent=st.sampled_from(["LSTM", "GRU"]),
    reduction=st.sampled_from(REDUCTIONS),
    gpus=st.sampled_from([1, 2, 3, 5, 8]),
    rows=st.lists(st.integers(1, 33), min_size=1, max_size=2),
    weights=st.sampled_from(["", "steps"]),
)
def test_any_masked_batch_equals_one_device(
    recurrent: str, reduction: str, gpus: int, rows: list[int], weights: str, equals_one_device: Any
) -> None:
    made = sgd(lambda: keras.losses.MeanSquaredError(reduction))
    equals_one_device(lambda: tagger(recurrent), made, tagged(rows, weights), gpus=gpus)


@pytest.mark.parametrize("recurrent", ["LSTM", "GRU", "SimpleRNN"])
def test_masking_layer_before_a_recurrent_layer_equals_one_device(recurrent: str, equals_one_device: Any) -> None:
    def build() -> keras.Model:
        recur = getattr(layers, recurrent)(4)
        return keras.Sequential([keras.Input((STEPS, 2)), layers.Masking(), recur, layers.Dense(1)])

    rng = np.random.default_rng(0)
    x = rng.normal(size=(9, STEPS, 2)).astype("float32")
    x[[0, 4, 5], 2:] = 0.0
    x[1] = 0.0  # nothing but masked steps
    equals_one_device(build, sgd(lambda: "mse"), [{"x": x, "y": x[:, :1, 0]}] * 3, gpus=4)


def test_a_sub_batch_with_nothing_but_masked_steps_equals_one_device(equals_one_device: Any) -> None:
    batch = tagged([6])[0]
    batch["x"][2:4] = 0
    equals_one_device(tagger, sgd(lambda: "mse", metrics=["mae"]), [batch] * 2, gpus=3)


def test_a_batch_with_nothing_but_masked_steps_equals_one_device(equals_one_device: Any) -> None:
    batch = tagged([4])[0]
    batch["x"][:] = 0
    equals_one_device(tagger, sgd(lambda: "mse"), [batch] * 2, gpus=3)


@pytest.mark.parametrize("custom", [False, True])
def test_training_on_masked_steps_leaves_the_callers_sample_weights_alone(custom: bool) -> None:
    def own(y_true: Any, y_pred: Any) -> Any:
        return keras.ops.mean((y_true - y_pred) ** 2, axis=-1)

    batch = {name: keras.ops.convert_to_tensor(array) for name, array in tagged([6], "steps")[0].items()}
    before = {name: keras.ops.copy(tensor) for name, tensor in batch.items()}
    parallel = wrap(tagger(), gpus=2)
    parallel.compile("sgd", own if custom else "mse", weighted_metrics=["mae"])
    parallel.train_on_batch(**batch)
    for name, tensor in batch.items():
        assert bool(keras.ops.all(tensor == before[name])), name


def test_bidirectional_and_time_distributed_layers_equal_one_device(equals_one_device: Any) -> None:
    def build() -> keras.Model:
        x = keras.Input((STEPS,), dtype="int32")
        h = layers.Embedding(9, 3, mask_zero=True)(x)
        h = layers.Bidirectional(layers.GRU(3, return_sequences=True))(h)
        return keras.Model(x, layers.TimeDistributed(layers.Dense(2))(h))

    equals_one_device(build, sgd(lambda: "mse"), tagged([7, 3]), gpus=3)


def test_attention_over_masked_words_equals_one_device(equals_one_device: Any) -> None:
    def build() -> keras.Model:
        x = keras.Input((STEPS,), dtype="int32")
        h = layers.Embedding(9, 4, mask_zero=True)(x)
        h = layers.LayerNormalization()(h + layers.MultiHeadAttention(2, 2)(h, h))
        return keras.Model(x, layers.Dense(2)(h))

    equals_one_device(build, sgd(lambda: "mse"), tagged([7, 3]), gpus=3)


# Several inputs and outputs.


def two_by_two(nest: str) -> Callable[[], keras.Model]:
    def build() -> keras.Model:
        a, b = keras.Input((3,), name="a"), keras.Input((2,), name="b")
        h = layers.Dense(4, activation="tanh", name="h")(layers.Concatenate(name="both")([a, b]))
        u, v = layers.Dense(1, name="u")(h), layers.Dense(3, activation="softmax", name="v")(h)
        if nest == "dict":
            return keras.Model({"a": a, "b": b}, {"u": u, "v": v})
        return keras.Model([a, b], [u, v])

    return build


def two_by_two_batches(nest: str, sizes: list[int], weights: bool) -> list[dict[str, Any]]:
    rng = np.random.default_rng(1)
    made = []
    for n in sizes:
        x = {"a": rng.normal(size=(n, 3)).astype("float32"), "b": rng.normal(size=(n, 2)).astype("float32")}
        y = {"u": rng.normal(size=(n, 1)).astype("float32"), "v": rng.integers(0, 3, n).astype("int32")}
        w = {"u": rng.choice([0.0, 2.0], n).astype("float32"), "v": rng.uniform(size=n).astype("float32")}
        batch: dict[str, Any] = {"x": x, "y": y, "sample_weight": w} if weights else {"x": x, "y": y}
        if nest == "list":
            batch = {key: list(value.values()) for key, value in batch.items()}
        made.append(batch)
    return made


@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize("nest", ["dict", "list"])
def test_two_inputs_and_two_outputs_equal_one_device(nest: str, weights: bool, equals_one_device: Any) -> None:
    def made() -> dict[str, Any]:
        loss = {"u": keras.losses.MeanSquaredError(), "v": keras.losses.SparseCategoricalCrossentropy()}
        factors, metrics = {"u": 0.3, "v": 2.0}, {"u": ["mae"], "v": ["accuracy"]}
        if nest == "list":
            loss, factors, metrics = (list(d.values()) for d in (loss, factors, metrics))  # type: ignore[assignment]
        return {
            "optimizer": keras.optimizers.SGD(0.1),
            "loss": loss,
            "loss_weights": factors,
            "metrics": metrics,
            "weighted_metrics": metrics,
        }

    equals_one_device(two_by_two(nest), made, two_by_two_batches(nest, [7, 2, 1], weights), gpus=3)


def test_two_outputs_of_which_one_has_no_loss_equal_one_device(equals_one_device: Any) -> None:
    made = lambda: {"optimizer": "sgd", "loss": {"u": "mse", "v": None}}  # noqa: E731
    data = two_by_two_batches("dict", [7, 2], False)
    for batch in data:
        del batch["y"]["v"]

    def check_warnings() -> None:
        equals_one_device(two_by_two("dict"), made, data, gpus=3)

    with pytest.warns(UserWarning, match="Gradients do not exist for variables"):
        check_warnings()


def test_fit_of_two_outputs_with_history_keys_equals_one_device(equals_one_device: Any) -> None:
    made = lambda: {"optimizer": "sgd", "loss": ["mse", "sparse_categorical_crossentropy"]}  # noqa: E731
    data = two_by_two_batches("list", [11], False)[0]
    run = equals_one_device(two_by_two("list"), made, data=data, gpus=3, epochs=2, batch_size=4)
    assert set(run.logs[0]) == {"loss", "u_loss", "v_loss"}


def test_one_shared_and_one_custom_loss_on_two_outputs_equal_one_device(equals_one_device: Any) -> None:
    def whole(y_true: Any, y_pred: Any) -> Any:
        return keras.ops.var(y_pred - y_true)

    made = lambda: {"optimizer": "sgd", "loss": [whole, "sparse_categorical_crossentropy"]}  # noqa: E731
    equals_one_device(two_by_two("list"), made, two_by_two_batches("list", [7, 2], False), gpus=3)


def test_a_keras_loss_that_turns_out_to_give_a_scalar_beside_one_with_a_mask_equals_one_device(
    equals_one_device: Any,
) -> None:
    def build() -> keras.Model:
        x = keras.Input((STEPS,), dtype="int32")
        h = layers.LSTM(3, return_sequences=True)(layers.Embedding(9, 3, mask_zero=True)(x))
        return keras.Model(x, [layers.Dense(2)(h), keras.ops.mean(layers.Dense(1)(h), axis=(1, 2))])

    data = [{"x": b["x"], "y": [b["y"], b["y"][:, 0, 0]]} for b in tagged([7, 2])]
    equals_one_device(build, lambda: {"optimizer": "sgd", "loss": ["mse", "mse"]}, data, gpus=3)


# Models of every build.


class Subclassed(keras.Model):
    """Has no config to be rebuilt from."""

    def __init__(self, inner: keras.layers.Layer) -> None:
        super().__init__()
        self.inner = inner
        self.out = layers.Dense(1)

    def call(self, x: Any, training: bool = False) -> Any:
        return self.out(self.inner(x) * (1.5 if training else 1.0))


def subclassed() -> keras.Model:
    model = Subclassed(layers.Dense(4, activation="tanh"))
    model(np.zeros((1, 3), "float32"))
    return model


def nested() -> keras.Model:
    inner = keras.Sequential([keras.Input((3,)), layers.Dense(4, activation="tanh"), layers.Dense(2)])
    x = keras.Input((3,))
    return keras.Model(x, layers.Dense(1)(inner(x)))


def siamese() -> keras.Model:
    a, b, shared = keras.Input((3,)), keras.Input((3,)), layers.Dense(4, activation="tanh")
    return keras.Model([a, b], layers.Dense(1)(keras.ops.abs(shared(a) - shared(b))))


def convolutional() -> keras.Model:
    return keras.Sequential(
        [
            keras.Input((6, 6, 1)),
            layers.Conv2D(3, 3, activation="relu"),
            layers.MaxPooling2D(),
            layers.DepthwiseConv2D(2),
            layers.Flatten(),
            layers.Dense(1),
        ]
    )


@pytest.mark.parametrize(
    ("build", "shapes"),
    [(subclassed, [(3,)]), (nested, [(3,)]), (siamese, [(3,), (3,)]), (convolutional, [(6, 6, 1)])],
    ids=["subclassed", "nested", "siamese", "convolutional"],
)
def test_a_model_of_any_build_equals_one_device(build: Any, shapes: Any, equals_one_device: Any) -> None:
    rng = np.random.default_rng(2)
    data = []
    for n in (7, 2, 1):
        x = [rng.normal(size=(n, *shape)).astype("float32") for shape in shapes]
        data.append({"x": x if len(x) > 1 else x[0], "y": rng.normal(size=(n, 1)).astype("float32")})
    equals_one_device(build, sgd(lambda: "mse", metrics=["mae"]), data, gpus=3)


def test_embeddings_with_repeated_words_equal_one_device(equals_one_device: Any) -> None:
    def build() -> keras.Model:
        pooled = layers.GlobalAveragePooling1D()
        return keras.Sequential([keras.Input((STEPS,), dtype="int32"), layers.Embedding(9, 3), pooled, layers.Dense(1)])

    data = [{"x": b["x"], "y": b["y"][:, 0, :1]} for b in tagged([7, 2])]
    equals_one_device(build, sgd(lambda: "mse"), data, gpus=3)


def test_an_output_without_axes_is_the_mean_over_rows(equals_one_device: Any) -> None:
    class Mean(keras.Model):
        def __init__(self) -> None:
            super().__init__()
            self.inner = layers.Dense(1)

        def call(self, x: Any) -> Any:
            return keras.ops.mean(self.inner(x))

    model = Mean()
    x = np.random.default_rng(0).normal(size=(7, 3)).astype("float32")
    expected = float(keras.ops.convert_to_numpy(model(x)))
    assert float(wrap(model, gpus=3)(x).detach()) == pytest.approx(expected, rel=1e-6)


def test_the_call_of_a_parallel_model_equals_the_templates() -> None:
    model = siamese()
    x = [np.random.default_rng(i).normal(size=(7, 3)).astype("float32") for i in (0, 1)]
    parallel = wrap(model, gpus=3)
    for found in (parallel(x), parallel.predict_on_batch(x), parallel.predict(x, batch_size=4, verbose=0)):
        expected = keras.ops.convert_to_numpy(model(x))
        np.testing.assert_allclose(keras.ops.convert_to_numpy(found), expected, rtol=1e-6, atol=1e-7)


class ByOrder(keras.Model):
    """Takes its inputs as they are ordered in their dict, and orders its outputs itself: neither by name."""

    def __init__(self) -> None:
        super().__init__()
        self.out = layers.Dense(3)

    def call(self, inputs: Any) -> Any:
        y = self.out(keras.ops.concatenate(list(inputs.values()), axis=-1))
        return {"z": y[:, :1], "a": {"y": y[:, 1:2], "b": y[:, 2:]}}


@pytest.mark.parametrize(("how", "custom"), [("auto", False), ("trace", False), ("auto", True)])
def test_dicts_keep_the_order_that_their_user_wrote(how: str | None, custom: bool, equals_one_device: Any) -> None:
    class WithLoss(ByOrder):
        def compute_loss(self, x: Any = None, y: Any = None, y_pred: Any = None, *_: Any, **__: Any) -> Any:
            targets, outputs = (keras.ops.concatenate(_leaves(nest), axis=-1) for nest in (y, y_pred))
            return keras.ops.mean(keras.ops.square(targets - outputs) * keras.ops.arange(1.0, 4.0))

    def data(rows: int) -> dict[str, Any]:
        rng = np.random.default_rng(rows)
        numbers = [rng.normal(size=(rows, size)).astype("float32") for size in (2, 3, 1, 1, 1)]
        return {
            "x": {"q": numbers[0], "b": numbers[1]},
            "y": {"z": numbers[2], "a": {"y": numbers[3], "b": numbers[4]}},
        }

    def build() -> keras.Model:
        model = (WithLoss if custom else ByOrder)()
        model(data(1)["x"])
        return model

    loss = None if custom else {"z": "mse", "a": {"y": "mae", "b": "mse"}}
    equals_one_device(build, lambda: {"optimizer": "sgd", "loss": loss}, [data(8)] * 3, wrap={"compile": how})
    parallel, x = wrap(build(), gpus=3), data(5)["x"]
    for outputs in (parallel.predict(x, verbose=0), parallel(x), parallel.predict_on_batch(x)):
        assert [list(outputs), list(outputs["a"])] == [["z", "a"], ["y", "b"]]


def _leaves(nest: Any) -> list[Any]:
    """The values of nested dicts, in the order of the dicts."""
    return [leaf for value in nest.values() for leaf in (_leaves(value) if isinstance(value, dict) else [value])]


@pytest.mark.filterwarnings("ignore:.*does not support masking")  # which Keras says of every model
def test_a_mask_given_to_a_call_is_dealt_out_with_the_rows() -> None:
    inputs = keras.Input((STEPS, 2))
    model = keras.Model(inputs, layers.Dense(1)(layers.LSTM(3)(inputs)), name="masked")
    x = np.random.default_rng(0).normal(size=(7, STEPS, 2)).astype("float32")
    mask = keras.ops.convert_to_tensor(np.arange(STEPS) < np.arange(7)[:, None] % STEPS + 1)
    expected, unmasked = (keras.ops.convert_to_numpy(model(x, mask=given)) for given in (mask, None))
    assert not np.allclose(expected, unmasked)
    found = wrap(model, gpus=3)(x, mask=mask)  # a warning would be an error
    np.testing.assert_allclose(keras.ops.convert_to_numpy(found), expected, rtol=1e-6, atol=1e-7)


class Scaled(keras.Model):
    def __init__(self) -> None:
        super().__init__()
        self.out = layers.Dense(1)

    def call(self, x: Any, scale: float = 1.0) -> Any:
        return self.out(x) * scale


def test_arguments_of_a_models_own_reach_it_on_all_devices() -> None:
    model, x = Scaled(), np.random.default_rng(0).normal(size=(7, 3)).astype("float32")
    expected = keras.ops.convert_to_numpy(model(x, scale=3.0))
    found = wrap(model, gpus=3)(x, scale=3.0)
    np.testing.assert_allclose(keras.ops.convert_to_numpy(found), expected, rtol=1e-6)


def test_rows_that_are_all_equal_tell_nothing_so_such_a_call_runs_on_one_device_and_says_so() -> None:
    model, x = Scaled(), np.ones((7, 3), "float32")
    expected = keras.ops.convert_to_numpy(model(x, scale=3.0))
    parallel = wrap(model, gpus=3)
    with pytest.warns(UserWarning, match="on one device, as plain Keras: the rows of its arguments are all equal"):
        found = parallel(x, scale=3.0)
    np.testing.assert_allclose(keras.ops.convert_to_numpy(found), expected, rtol=1e-6)
