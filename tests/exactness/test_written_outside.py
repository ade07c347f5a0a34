"""What a layer's code writes outside of the layers, in place, or only in a later step: exact, or refused by name."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import keras
import numpy as np
import pytest
import torch

import fastdp

pytestmark = pytest.mark.usefixtures("keras_float64")
layers, ops = keras.layers, keras.ops
rng = np.random.default_rng(0)
X, Y = rng.normal(size=(11, 3)).clip(-2, 2), rng.normal(size=(11, 2))
LATE = X.copy()
LATE[9, 0] = 5.0  # in the last of three batches
TOLERANCE = 1e-6  # Keras multiplies matrices of float64 in float32
COUNT = 0
KEPT: dict[Any, Any] = {}


class Helper:
    """An object beside the model."""

    def __init__(self) -> None:
        self.calls, self.seen, self.code = 0, [], None
        self.total, self.array = torch.zeros((), dtype=torch.float64), np.zeros(1)
        self.variable = keras.Variable(1.0, trainable=False)

    def left(self) -> list[Any]:
        return [self.calls, len(self.seen), float(self.total), float(self.array[0]), float(self.variable.value)]


@pytest.fixture(autouse=True)
def _nothing_kept() -> None:
    global COUNT  # noqa: PLW0603
    COUNT = 0
    KEPT.clear()
    Outside.number = 0


class Outside(layers.Layer):
    """Writes in the way that `how` says, from the first step on; or, `late`, where a value is large."""

    number = 0

    def __init__(self, how: str, late: bool = False) -> None:
        super().__init__()
        self.how, self.late, self.box = how, late, SimpleNamespace(helper=Helper())

    def build(self, shape: Any) -> None:
        self.own = self.add_weight(shape=(), initializer="ones", trainable=False)

    def call(self, x: Any) -> Any:
        if self.late and float(ops.max(ops.abs(x))) < 4.0:
            return x * (1.0 + 0.1 * self.state())
        self.write(x)
        return x * (1.0 + 0.1 * self.state())

    def state(self) -> Any:
        helper = self.box.helper
        numbers = {"attribute": helper.calls, "list": len(helper.seen), "global": COUNT, "class": Outside.number}
        numbers |= {"tensor": helper.total.clone(), "array": float(helper.array[0]), "own": getattr(self, "hits", 0)}
        numbers |= {"variable": helper.variable.value.clone(), "in place": self.own.value.clone()}
        return numbers.get(self.how, 0.0)

    def write(self, x: Any) -> None:
        global COUNT  # noqa: PLW0603
        helper = self.box.helper
        if self.how == "attribute":
            helper.calls += 1
        elif self.how == "list":
            helper.seen.append(ops.mean(x))
        elif self.how == "global":
            COUNT += 1
        elif self.how == "class":
            Outside.number += 1
        elif self.how == "tensor":
            helper.total.add_(x.detach().sum())
        elif self.how == "array":
            helper.array += float(ops.sum(x))
        elif self.how == "variable":
            helper.variable.value.mul_(0.9)
        elif self.how == "in place":
            self.own.value.mul_(0.9)
        elif self.how == "own":
            self.hits = getattr(self, "hits", 0) + 1
        elif self.how == "rows":
            KEPT["code"] = x


WAYS = ("attribute", "list", "global", "class", "tensor", "array", "variable", "in place", "rows")


def made(how: str, late: bool = False) -> keras.Model:
    keras.utils.set_random_seed(2)
    return keras.Sequential([keras.Input((3,)), Outside(how, late), layers.Dense(2)])


def left(model: keras.Model) -> list[Any]:
    return [*model.layers[0].box.helper.left(), COUNT, Outside.number, getattr(model.layers[0], "hits", 0)]


def counts(found: list[Any]) -> list[int]:
    """What counts calls, of what is left."""
    return [found[0], found[1], found[5], found[6], found[7]]


def trained(model: Any, x: Any = X) -> list[Any]:
    model.compile(keras.optimizers.Adam(0.05), "mse")
    losses = model.fit(x, Y, batch_size=4, epochs=2, shuffle=False, verbose=0).history["loss"]
    return [losses, *model.get_weights(), model.predict(x, batch_size=6, verbose=0)]


@pytest.mark.parametrize("how", WAYS)
def test_what_code_writes_outside_of_layers_is_an_error_on_several_devices(how: str) -> None:
    template = made(how)
    before, there = template.get_weights(), left(template)
    parallel = fastdp.wrap(template, gpus=3)
    with pytest.raises(ValueError, match=r"(lies outside of its layers|is changed in place).*gpus=\[0\]"):
        trained(parallel)
    assert all(np.array_equal(a, b) for a, b in zip(before, template.get_weights(), strict=True))
    # The trial has left nothing behind. Keras itself calls the model once, to build its metrics.
    assert all(after <= one + 1 for one, after in zip(counts(there), counts(left(template)), strict=True))


@pytest.mark.filterwarnings("ignore:fastdp. ")
@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("late", [False, True])
def test_such_a_model_is_as_on_one_device_under_install(how: str, late: bool) -> None:
    global COUNT  # noqa: PLW0603
    x = LATE if late else X
    plain = made(how, late)
    expected, there = trained(plain, x), left(plain)
    COUNT = Outside.number = 0
    KEPT.clear()
    model = made(how, late)
    fastdp.install(3)
    for one, other in zip(trained(model, x), expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=TOLERANCE, atol=TOLERANCE)
    np.testing.assert_allclose(left(model), there, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("how", [*WAYS[:8], "own"])
def test_what_code_writes_only_in_a_later_step_is_an_error_there(how: str) -> None:
    template = made(how, late=True)
    parallel = fastdp.wrap(template, gpus=3)
    parallel.compile(keras.optimizers.Adam(0.05), "mse")
    parallel.train_on_batch(LATE[:4], Y[:4])  # so that batches of four rows are known
    before, there = template.get_weights(), left(template)
    with pytest.raises(ValueError, match=r"(outside of its layers|its attribute|in place).*gpus=\[0\]"):
        parallel.train_on_batch(LATE[7:], Y[7:])
    assert all(np.array_equal(a, b) for a, b in zip(before, template.get_weights(), strict=True))
    assert left(template) == there


class Table(layers.Layer):
    """Keeps a table for each length in a global, made when it is first needed."""

    def call(self, x: Any) -> Any:
        if x.shape[1] not in KEPT:
            KEPT[x.shape[1]] = np.arange(x.shape[1])
        return ops.mean(x + ops.convert_to_tensor(KEPT[x.shape[1]][:, None], dtype=x.dtype), 1)


@pytest.mark.parametrize("gpus", [2, 3, 8])
def test_a_table_that_all_calls_make_alike_is_no_obstacle_also_in_a_later_step(gpus: int) -> None:
    def run(count: int | None) -> list[Any]:
        KEPT.clear()
        keras.utils.set_random_seed(2)
        template = keras.Sequential([keras.Input((None, 3)), Table(), layers.Dense(2)])
        model = template if count is None else fastdp.wrap(template, gpus=count)
        model.compile(keras.optimizers.Adam(0.05), "mse")
        losses = []
        for length in (2, 5, 2, 7, 5):
            x = rng_of(length).normal(size=(9, length, 3))
            losses.append(model.train_on_batch(x, Y[:9]))
        return [losses, *template.get_weights()]

    for one, other in zip(run(gpus), run(None), strict=True):
        np.testing.assert_allclose(one, other, rtol=TOLERANCE, atol=TOLERANCE)


def rng_of(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


class FirstBatch(layers.Layer):
    """Takes scale and offset from the first batch, and notes by a flag that it has done so."""

    def __init__(self) -> None:
        super().__init__()
        self.is_ready = False

    def build(self, shape: Any) -> None:
        self.offset = self.add_weight(shape=(shape[-1],), initializer="zeros")

    def call(self, x: Any, training: bool = False) -> Any:
        if training and not self.is_ready:
            self.offset.assign(-ops.mean(x, 0))
            self.is_ready = True
        return x + self.offset


def test_a_flag_that_changes_what_the_next_call_does_is_an_error() -> None:
    keras.utils.set_random_seed(2)
    parallel = fastdp.wrap(keras.Sequential([keras.Input((3,)), FirstBatch(), layers.Dense(2)]), gpus=3)
    with pytest.raises(ValueError, match=r"writes its attribute 'is_ready'.*after which the next pass"):
        trained(parallel)


class Hinges(layers.Layer):
    """Two terms, each of which is zero until a later step."""

    def call(self, x: Any) -> Any:
        self.add_loss(ops.sum(ops.relu(x[:, 0] - 4.0)))
        self.add_loss(ops.sum(ops.relu(x[:, 1] - 4.0)))
        return x


@pytest.mark.parametrize("gpus", [2, 3])
def test_each_term_that_was_zero_is_asked_about_when_it_is_not(gpus: int) -> None:
    x = X.copy()
    x[5, 0], x[9, 1] = 6.0, 7.0

    def run(count: int | None) -> list[Any]:
        keras.utils.set_random_seed(2)
        template = keras.Sequential([keras.Input((3,)), layers.Dense(3, kernel_initializer="identity"), Hinges()])
        model = template if count is None else fastdp.wrap(template, gpus=count)
        return trained_with(model, x, template)

    for one, other in zip(run(gpus), run(None), strict=True):
        np.testing.assert_allclose(one, other, rtol=TOLERANCE, atol=TOLERANCE)


def trained_with(model: Any, x: Any, template: keras.Model) -> list[Any]:
    model.compile(keras.optimizers.SGD(0.01), "mse")
    y = np.zeros((len(x), 3))
    losses = model.fit(x, y, batch_size=4, epochs=1, shuffle=False, verbose=0).history["loss"]
    return [losses, *template.get_weights()]
