"""Losses: every class, every reduction, weights and masks; the named traps each have a test of their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

REDUCTIONS = ["sum", "mean", "sum_over_batch_size", "mean_with_sample_weight"]
DEVICES = [1, 2, 3, 5, 8]
CLASSES = 4
# A loss class, the last activation that it wants, and the kind of its targets.
LOSSES: dict[str, tuple[str, str]] = {
    "BinaryCrossentropy": ("sigmoid", "binary"),
    "BinaryFocalCrossentropy": ("sigmoid", "binary"),
    "CategoricalCrossentropy": ("softmax", "one_hot"),
    "CategoricalFocalCrossentropy": ("softmax", "one_hot"),
    "CategoricalGeneralizedCrossEntropy": ("softmax", "label"),
    "CategoricalHinge": ("tanh", "one_hot"),
    "Circle": ("linear", "label"),
    "CosineSimilarity": ("linear", "real"),
    "Dice": ("sigmoid", "binary"),
    "Hinge": ("tanh", "sign"),
    "Huber": ("linear", "real"),
    "KLDivergence": ("softmax", "distribution"),
    "LogCosh": ("linear", "real"),
    "MeanAbsoluteError": ("linear", "real"),
    "MeanAbsolutePercentageError": ("linear", "real"),
    "MeanSquaredError": ("linear", "real"),
    "MeanSquaredLogarithmicError": ("softplus", "positive"),
    "Poisson": ("softplus", "positive"),
    "SparseCategoricalCrossentropy": ("softmax", "label"),
    "SquaredHinge": ("tanh", "sign"),
    "Tversky": ("sigmoid", "binary"),
}
NOT_BY_OUTPUT_ROWS = {"CTC", "Loss"}  # CTC has sequences for targets: a test of its own; Loss is the base class


def targets(kind: str, rows: int, rng: np.random.Generator) -> np.ndarray:
    labels = rng.integers(0, CLASSES, rows)
    real = rng.normal(size=(rows, CLASSES)).astype("float32")
    return {
        "binary": lambda: (real > 0).astype("float32"),
        "one_hot": lambda: np.eye(CLASSES, dtype="float32")[labels],
        "label": lambda: labels.astype("int32"),
        "real": lambda: real + 0.5 * np.sign(real),
        "sign": lambda: np.sign(real),
        "distribution": lambda: np.exp(real) / np.exp(real).sum(1, keepdims=True),
        "positive": lambda: np.abs(real) + 0.1,
    }[kind]()


def dense(activation: str = "linear", units: int = CLASSES, **options: Any) -> Callable[[], keras.Model]:
    def build() -> keras.Model:
        last = keras.layers.Dense(units, activation=activation)
        return keras.Sequential([keras.Input((3,)), keras.layers.Dense(5, activation="tanh", **options), last])

    return build


def sgd(loss: Any, **more: Any) -> Callable[[], dict[str, Any]]:
    return lambda: {"optimizer": keras.optimizers.SGD(0.05), "loss": loss() if callable(loss) else loss, **more}


def batches(sizes: list[int], kind: str = "real", weights: bool = False, seed: int = 0) -> list[dict[str, Any]]:
    rng = np.random.default_rng(seed)
    made = []
    for rows in sizes:
        batch = {"x": rng.normal(size=(rows, 3)).astype("float32"), "y": targets(kind, rows, rng)}
        if weights:
            batch["sample_weight"] = rng.choice([0.0, 0.5, 1.0, 3.0], rows).astype("float32")
        made.append(batch)
    return made


def learning_rate(loss: str, reduction: str) -> float:
    """Small where steps would be large, as by Circle's factor of 80: the reference itself stays tame."""
    large = reduction == "sum" or "Percentage" in loss
    return (1e-3 if large else 0.05) / (80.0 if loss == "Circle" else 1.0)


def test_every_loss_class_of_keras_is_in_the_list() -> None:
    classes = {n for n in dir(keras.losses) if isinstance(getattr(keras.losses, n), type)}
    assert classes == {*LOSSES, *NOT_BY_OUTPUT_ROWS}


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_and_reduction_equals_one_device(name: str, reduction: str, equals_one_device: Any) -> None:
    activation, kind = LOSSES[name]
    weighted = name not in ("Dice", "Tversky")  # Keras's own sum to a scalar, which weights only multiply
    data = batches([7, 2, 5], kind, weighted)
    loss = lambda: getattr(keras.losses, name)(reduction=reduction)  # noqa: E731
    rate = learning_rate(name, reduction)
    made = lambda: {"optimizer": keras.optimizers.SGD(rate), "loss": loss()}  # noqa: E731
    equals_one_device(dense(activation), made, data)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(data=st.data())
def test_any_loss_batch_size_device_count_and_weights_equal_one_device(data: Any, equals_one_device: Any) -> None:
    name = data.draw(st.sampled_from(sorted(LOSSES)), label="loss")
    reduction = data.draw(st.sampled_from(REDUCTIONS), label="reduction")
    gpus = data.draw(st.sampled_from(DEVICES), label="devices")
    sizes = data.draw(st.lists(st.integers(1, 4 * gpus + 1), min_size=1, max_size=3), label="rows")
    weights = data.draw(st.booleans(), label="weights")
    activation, kind = LOSSES[name]
    rate = learning_rate(name, reduction)
    equals_one_device(
        dense(activation),
        lambda: {
            "optimizer": keras.optimizers.SGD(rate),
            "loss": getattr(keras.losses, name)(reduction=reduction),
        },
        batches(sizes, kind, weights, data.draw(st.integers(0, 9), label="seed")),
        gpus=gpus,
    )


@pytest.mark.parametrize("gpus", DEVICES)
def test_fifty_steps_of_sgd_stay_within_1e_5(gpus: int, equals_one_device: Any) -> None:
    sizes = [1 + (7 * step) % (4 * gpus + 1) for step in range(50)]
    made = lambda: {"optimizer": keras.optimizers.SGD(0.05, momentum=0.9), "loss": "mse", "metrics": ["mae"]}  # noqa: E731
    equals_one_device(dense(), made, batches(sizes, weights=True), gpus=gpus)


@pytest.mark.parametrize("rows", [21, 16, 3, 1])
def test_fit_with_a_ragged_last_batch_equals_one_device(rows: int, equals_one_device: Any) -> None:
    data = batches([rows])[0]
    equals_one_device(dense(), sgd("mse", metrics=["mae"]), data=data, gpus=8, epochs=3, batch_size=10)


def test_sum_reduction_with_an_l2_regularizer_counts_the_regularizer_once(equals_one_device: Any) -> None:
    build = dense(kernel_regularizer=keras.regularizers.L2(0.3))
    made = lambda: {"optimizer": keras.optimizers.SGD(1e-2), "loss": keras.losses.MeanSquaredError("sum")}  # noqa: E731
    equals_one_device(build, made, batches([7, 2, 8]), gpus=5)


def test_mean_with_sample_weight_divides_by_the_global_weight(equals_one_device: Any) -> None:
    data = batches([9])
    data[0]["sample_weight"] = np.array([9, 0, 0, 1, 0, 0, 5, 2, 0], "float32")
    loss = lambda: keras.losses.MeanSquaredError("mean_with_sample_weight")  # noqa: E731
    equals_one_device(dense(), sgd(loss), data * 3, gpus=3)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_zero_weights_on_a_whole_sub_batch_equal_one_device(reduction: str, equals_one_device: Any) -> None:
    data = batches([6])
    data[0]["sample_weight"] = np.array([1, 2, 0, 0, 3, 4], "float32")  # the second of three devices
    equals_one_device(dense(), sgd(lambda: keras.losses.MeanSquaredError(reduction)), data * 3, gpus=3)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_zero_weights_on_all_rows_change_nothing(reduction: str, equals_one_device: Any) -> None:
    data = batches([6])
    data[0]["sample_weight"] = np.zeros(6, "float32")
    run = equals_one_device(dense(), sgd(lambda: keras.losses.MeanSquaredError(reduction)), data, gpus=3)
    assert run.logs[0]["loss"] == 0.0


@pytest.mark.parametrize("gpus", [2, 8])
def test_class_weights_in_fit_and_train_on_batch_equal_one_device(gpus: int, equals_one_device: Any) -> None:
    data = batches([11], "label")[0]
    made = sgd("sparse_categorical_crossentropy", metrics=["accuracy"], weighted_metrics=["accuracy"])
    weights = {0: 0.0, 1: 1.0, 2: 5.0, 3: 0.5}
    equals_one_device(dense("softmax"), made, data=data, gpus=gpus, class_weight=weights, epochs=2, batch_size=6)
    equals_one_device(dense("softmax"), made, [data] * 2, gpus=gpus, class_weight=weights)


def test_a_custom_function_that_returns_one_scalar_for_the_batch_equals_one_device(equals_one_device: Any) -> None:
    def spread(y_true: Any, y_pred: Any) -> Any:
        error = y_true - y_pred
        return keras.ops.sqrt(keras.ops.mean(error**2)) + keras.ops.var(y_pred)

    equals_one_device(dense(), sgd(lambda: spread), batches([7, 2, 1]), gpus=3)


def test_a_custom_per_sample_function_equals_one_device(equals_one_device: Any) -> None:
    def per_sample(y_true: Any, y_pred: Any) -> Any:
        return keras.ops.sum(keras.ops.abs(y_true - y_pred) ** 3, axis=-1)

    equals_one_device(dense(), sgd(lambda: per_sample), batches([7, 2, 1], weights=True), gpus=3)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_custom_loss_subclass_equals_one_device(reduction: str, equals_one_device: Any) -> None:
    class Pairwise(keras.losses.Loss):
        """Each row's loss depends on all rows of the batch."""

        def call(self, y_true: Any, y_pred: Any) -> Any:
            centered = y_pred - keras.ops.mean(y_pred, axis=0)
            return keras.ops.mean((y_true - centered) ** 2, axis=-1)

    equals_one_device(dense(), sgd(lambda: Pairwise(reduction=reduction)), batches([7, 2, 1], weights=True), gpus=3)


def test_a_loss_subclass_with_its_own_call_operator_equals_one_device(equals_one_device: Any) -> None:
    class Doubled(keras.losses.MeanSquaredError):
        def __call__(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> Any:
            return super().__call__(y_true, y_pred, sample_weight) ** 2

    equals_one_device(dense(), sgd(Doubled), batches([7, 2]), gpus=3)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("weights", [False, True])
def test_ignore_class_divides_by_the_rows_that_are_not_ignored(
    reduction: str, weights: bool, equals_one_device: Any
) -> None:
    data = batches([7, 4], "label", weights)
    data[0]["y"][:3] = 2  # the first device has nothing but ignored rows
    loss = lambda: keras.losses.SparseCategoricalCrossentropy(ignore_class=2, reduction=reduction)  # noqa: E731
    equals_one_device(dense("softmax"), sgd(loss), data, gpus=3)


@pytest.mark.parametrize("name", ["Dice", "Tversky"])
@pytest.mark.parametrize("axis", [None, (1,)])
def test_dice_and_tversky_see_the_whole_batch(name: str, axis: Any, equals_one_device: Any) -> None:
    loss = lambda: getattr(keras.losses, name)(axis=axis)  # noqa: E731
    equals_one_device(dense("sigmoid"), sgd(loss), batches([7, 2, 1], "binary"), gpus=3)


def test_cosine_similarity_over_the_rows_sees_the_whole_batch(equals_one_device: Any) -> None:
    equals_one_device(dense(), sgd(lambda: keras.losses.CosineSimilarity(axis=0)), batches([7, 3]), gpus=3)


def test_circle_loss_pairs_rows_of_different_devices(equals_one_device: Any) -> None:
    equals_one_device(dense(), sgd(keras.losses.Circle), batches([8, 5], "label"), gpus=4)


def test_ctc_equals_one_device(equals_one_device: Any) -> None:
    rng = np.random.default_rng(0)
    data = [
        {"x": rng.normal(size=(n, 6, 3)).astype("float32"), "y": rng.integers(1, CLASSES, (n, 2)).astype("int32")}
        for n in (5, 2)
    ]
    build = lambda: keras.Sequential([keras.Input((6, 3)), keras.layers.Dense(CLASSES)])  # noqa: E731
    equals_one_device(build, sgd(keras.losses.CTC), data, gpus=3)


@pytest.mark.parametrize("loss", ["mse", "binary_crossentropy"])
def test_outputs_of_rank_1_equal_one_device(loss: str, equals_one_device: Any) -> None:
    def build() -> keras.Model:
        x = keras.Input((3,))
        y = keras.layers.Flatten()(keras.layers.Dense(1, activation="sigmoid")(x))
        return keras.Model(x, keras.ops.squeeze(y, axis=-1))

    data = batches([7, 2, 1], weights=True)
    for batch in data:
        batch["y"] = (batch["y"][:, 0] > 0).astype("float32")
    equals_one_device(build, sgd(loss, metrics=["mae"]), data, gpus=3)


def test_targets_of_rank_1_against_outputs_of_rank_2_equal_one_device(equals_one_device: Any) -> None:
    data = batches([7, 2, 1], weights=True)
    for batch in data:
        batch["y"] = batch["y"][:, 0]
    equals_one_device(dense(units=1), sgd("mse", metrics=["mae"]), data, gpus=3)


@pytest.mark.parametrize("rows", [1, 2, 3, 7])
def test_fewer_rows_than_devices_equal_one_device(rows: int, equals_one_device: Any) -> None:
    equals_one_device(dense(), sgd("mse", metrics=["mae"]), batches([rows, 9, rows], weights=True), gpus=8)


def test_label_smoothing_and_logits_equal_one_device(equals_one_device: Any) -> None:
    loss = lambda: keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=0.2)  # noqa: E731
    equals_one_device(dense(), sgd(loss), batches([7, 2], "one_hot", weights=True), gpus=3)


def test_losses_by_name_and_by_function_equal_one_device(equals_one_device: Any) -> None:
    for loss in ("mean_squared_error", lambda: keras.losses.mean_absolute_error):
        equals_one_device(dense(), sgd(loss), batches([7, 2], weights=True), gpus=3)


def test_weights_per_output_column_equal_one_device(equals_one_device: Any) -> None:
    """Targets and weights with an axis more than the rows: each timestep has its own."""
    rng = np.random.default_rng(0)
    data = [
        {
            "x": rng.normal(size=(n, 4, 3)).astype("float32"),
            "y": rng.normal(size=(n, 4, 2)).astype("float32"),
            "sample_weight": rng.uniform(0, 2, (n, 4)).astype("float32"),
        }
        for n in (7, 2)
    ]
    build = lambda: keras.Sequential([keras.Input((4, 3)), keras.layers.Dense(2)])  # noqa: E731
    for reduction in REDUCTIONS:
        equals_one_device(build, sgd(lambda r=reduction: keras.losses.MeanSquaredError(r)), data, gpus=3)
