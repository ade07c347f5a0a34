"""What layers write to their own attributes, and variables of nobody: exact, or refused, or one device under `run`."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import keras
import numpy as np
import pytest
from own_step import OwnStep

import fastdp

pytestmark = pytest.mark.usefixtures("keras_float64")
layers, ops = keras.layers, keras.ops
rng = np.random.default_rng(0)
X, Y = rng.normal(size=(11, 3)), rng.normal(size=(11, 2))
TOLERANCE = 1e-6  # Keras multiplies matrices of float64 in float32


class Kept(keras.Model):
    """Keeps what it computes on the way, in the way that `how` says."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.first, self.last = how, layers.Dense(3, "tanh"), layers.Dense(2)
        self.code: Any = None
        self.calls, self.seen = 0, []

    def call(self, x: Any) -> Any:
        code = self.first(x)
        if self.how == "tensor":
            self.code = code
        elif self.how == "hidden":  # from whoever looks at the end of the call alone
            self.code = code
            code, self.code = 2.0 * self.code, None
        elif self.how == "rows":
            self.size = code.shape[0]
            code = ops.reshape(code, (self.size, 3))
        elif self.how == "counter":
            self.calls += 1
            code = code * min(1.0, self.calls / 5)
        elif self.how == "list":
            self.seen.append(ops.mean(code))
        elif self.how == "table":  # the same one whatever the rows are
            self.table = [0.5, 1.0, 2.0]
            code = code * ops.convert_to_tensor(self.table, dtype=code.dtype)
        return self.last(code)

    def left(self) -> list[Any]:
        return [self.calls, len(self.seen), getattr(self, "size", None)]


class UsedByLoss(Kept):
    """The loss looks at what call() has kept."""

    def compute_loss(self, x: Any = None, y: Any = None, y_pred: Any = None, *further: Any, **others: Any) -> Any:
        return ops.mean(ops.square(y - y_pred)) + 0.3 * ops.mean(ops.abs(self.code))


class UsedByStep(Kept, OwnStep):
    """A step of its own looks at what call() has kept."""

    def loss_of(self, x: Any, y: Any) -> Any:
        return super().loss_of(x, y) + 0.3 * ops.mean(ops.abs(self.code))


def made(kind: type[Kept], how: str) -> Kept:
    keras.utils.set_random_seed(2)
    model = kind(how)
    model(X[:1])
    return model


def trained(model: Any, kept: Kept) -> list[Any]:
    model.compile(keras.optimizers.Adam(0.05), None if isinstance(kept, UsedByLoss) else "mse")
    losses = model.fit(X, Y, batch_size=4, epochs=2, shuffle=False, verbose=0).history["loss"]
    return [losses, *kept.get_weights(), model.predict(X, batch_size=6, verbose=0)]


CASES = [(Kept, how) for how in ("tensor", "hidden", "rows", "counter", "list")]
CASES += [(UsedByLoss, "tensor"), (UsedByStep, "tensor")]


@pytest.mark.parametrize(("kind", "how"), CASES)
def test_what_call_writes_to_attributes_is_an_error_on_several_devices(kind: type[Kept], how: str) -> None:
    kept = made(kind, how)
    before, left = kept.get_weights(), kept.left()
    parallel = fastdp.wrap(kept, gpus=3)
    with (
        pytest.warns(UserWarning, match="writes the attribute") if kind is UsedByStep else nullcontext(),
        pytest.raises(ValueError, match=r"writes (its|the) attribute '(code|size|calls|seen)'.*") as caught,
    ):
        trained(parallel, kept)
    assert kind is UsedByStep or "add_weight" in str(caught.value)
    assert all(np.array_equal(a, b) for a, b in zip(before, kept.get_weights(), strict=True))
    # The trial has left nothing behind. Keras itself calls the model once, to build its metrics.
    assert all(after <= one + 1 for one, after in zip(left[:2], kept.left()[:2], strict=True))


@pytest.mark.filterwarnings("ignore:fastdp. ")
@pytest.mark.parametrize(
    ("kind", "how", "way"),
    [(*case, way) for case in CASES for way in ("run", "merge") if way == "run" or case[0] is not UsedByStep],
)
def test_such_a_model_runs_on_one_device_where_that_is_asked_for(kind: type[Kept], how: str, way: str) -> None:
    expected, plain = made(kind, how), made(kind, how)
    results = trained(expected, expected)
    if way == "run":
        fastdp.install(3)
        found = trained(plain, plain)
    else:
        found = trained(fastdp.wrap(plain, gpus=3, rows="merge"), plain)
    for one, other in zip(results, found, strict=True):
        np.testing.assert_allclose(other, one, rtol=TOLERANCE, atol=TOLERANCE)
    assert plain.left() == expected.left()


@pytest.mark.parametrize("gpus", [1, 2, 3, 8])
def test_what_every_call_writes_alike_is_no_obstacle(gpus: int) -> None:
    expected, model = made(Kept, "table"), made(Kept, "table")
    results = trained(expected, expected)
    parallel = fastdp.wrap(model, gpus=gpus)
    for one, other in zip(results, trained(parallel, model), strict=True):
        np.testing.assert_allclose(other, one, rtol=TOLERANCE, atol=TOLERANCE)
    assert all(entry["how"] != "one device" for entry in parallel.report())
