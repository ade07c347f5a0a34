"""The proof that N devices equal one: train the same model by plain Keras and by fastdp, and compare everything."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import keras
import numpy as np
import pytest

import fastdp

FLOAT32 = 1e-5

# A sum of terms of order one may cancel to almost nothing; its rounding error does not.
ROUNDING = 1e-6


@dataclass
class Run:
    """What a run left behind, as arrays by name: `logs` of each step or epoch, then everything at the end."""

    model: keras.Model
    trained: keras.Model
    logs: list[dict[str, float]] = field(default_factory=list)
    arrays: dict[str, np.ndarray] = field(default_factory=dict)


@dataclass
class Twins:
    """One recipe, run twice: `one` by plain Keras, `many` by fastdp.

    Args:
        build: makes the model; called after seeding, once for each run.
        settings: makes the arguments of `compile`; called once for each run.
    """

    build: Callable[[], keras.Model]
    settings: Callable[[], dict[str, Any]]
    seed: int = 3
    wrap: dict[str, Any] = field(default_factory=dict)

    def make(self, gpus: Any) -> Run:
        """A compiled model; `gpus=None` is plain Keras."""
        policy = keras.config.dtype_policy()
        keras.utils.clear_session(free_memory=False)  # names start afresh, but so does the dtype policy
        keras.config.set_dtype_policy(policy)
        keras.utils.set_random_seed(self.seed)
        model = self.build()
        trained = model if gpus is None else fastdp.wrap(model, gpus=gpus, check_replicas=True, **self.wrap)
        trained.compile(**self.settings())
        return Run(model, trained)

    def by_batches(self, gpus: Any, batches: Sequence[dict[str, Any]], **options: Any) -> Run:
        """Train by `train_on_batch`; the running metrics after each batch are the logs."""
        run = self.make(gpus)
        for batch in batches:
            run.logs.append(run.trained.train_on_batch(**batch, **options, return_dict=True))
        return self._finish(run, batches[-1])

    def by_fit(self, gpus: Any, data: dict[str, Any], **options: Any) -> Run:
        """Train by `fit(shuffle=False)`; the epochs' logs are the logs."""
        run = self.make(gpus)
        made = {"shuffle": False, "verbose": 0, **{k: v() if k == "callbacks" else v for k, v in options.items()}}
        history = run.trained.fit(**data, **made).history
        run.logs = [dict(zip(history, values, strict=True)) for values in zip(*history.values(), strict=True)]
        return self._finish(run, {k: v for k, v in data.items() if k in ("x", "y", "sample_weight")})

    def _finish(self, run: Run, batch: dict[str, Any]) -> Run:
        """Collect weights, optimizer variables, predictions, and the results of a test."""
        batch = {k: v for k, v in batch.items() if k in ("x", "y", "sample_weight")}
        for i, weight in enumerate(run.model.variables):
            run.arrays[f"weight {i} {weight.path}"] = _floats(weight)
        for i, slot in enumerate(run.trained.optimizer.variables):
            run.arrays[f"optimizer {i} {slot.path}"] = _floats(slot)
        outputs = run.trained.predict(batch["x"], batch_size=5, verbose=0)
        for i, output in enumerate(keras.tree.flatten(outputs)):
            run.arrays[f"prediction {i}"] = np.asarray(output, np.float64)
        run.logs.append(run.trained.evaluate(**batch, batch_size=7, verbose=0, return_dict=True))
        return run


def _floats(variable: keras.Variable) -> np.ndarray:
    return keras.ops.convert_to_numpy(keras.ops.cast(variable, "float32")).astype(np.float64)


def assert_same(one: Run, many: Run, tolerance: float = FLOAT32) -> None:
    """Both runs have the same logs and arrays, within `tolerance` of each array's largest element."""
    assert [list(logs) for logs in many.logs] == [list(logs) for logs in one.logs]
    for step, (expected, found) in enumerate(zip(one.logs, many.logs, strict=True)):
        for key, value in expected.items():
            scale = float(np.abs(value).max())
            np.testing.assert_allclose(
                found[key], value, rtol=tolerance, atol=tolerance * scale + ROUNDING, err_msg=f"{key} at {step}"
            )
    assert [name.split()[:2] for name in many.arrays] == [name.split()[:2] for name in one.arrays]
    for (name, value), found in zip(one.arrays.items(), many.arrays.values(), strict=True):
        assert np.isfinite(value).all(), f"the reference's own {name} is not finite: {value}"
        scale = float(np.abs(value).max()) if value.size else 0.0
        # A bias whose gradient cancels out (before a normalization) is all rounding, of products of order one.
        np.testing.assert_allclose(found, value, rtol=0, atol=tolerance * scale + min(1e-7, tolerance), err_msg=name)


@pytest.fixture(scope="module", autouse=True)
def eight_virtual_devices() -> Iterator[None]:
    """Eight virtual devices for each file's tests, and none afterwards."""
    fastdp.set_virtual_devices(8)
    yield
    fastdp.set_virtual_devices(0)


@pytest.fixture(autouse=True)
def default_dtype_policy() -> Iterator[None]:
    """Leave the global dtype policy as it was."""
    before = keras.config.dtype_policy()
    yield
    keras.config.set_dtype_policy(before)


@pytest.fixture
def keras_float64() -> Iterator[None]:
    """Everything in float64; afterwards nothing is installed."""
    before = keras.config.floatx()
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
    yield
    fastdp.uninstall()
    keras.config.set_floatx(before)
    keras.config.set_dtype_policy(before)


@pytest.fixture(scope="session")
def twins() -> type[Twins]:
    """The class of recipes."""
    return Twins


@pytest.fixture(scope="session")
def same() -> Callable[..., None]:
    """The comparison of two runs."""
    return assert_same


@pytest.fixture(scope="session")
def equals_one_device() -> Callable[..., Run]:
    """Train both by batches, or by fit where `data` is given, and compare; gives fastdp's run."""

    def check(
        build: Callable[[], keras.Model],
        settings: Callable[[], dict[str, Any]],
        batches: Sequence[dict[str, Any]] = (),
        *,
        gpus: Any = 3,
        tolerance: float = FLOAT32,
        data: dict[str, Any] | None = None,
        wrap: dict[str, Any] | None = None,
        **options: Any,
    ) -> Run:
        recipe = Twins(build, settings, wrap=wrap or {})
        if data is not None:
            one, many = (recipe.by_fit(devices, data, **options) for devices in (None, gpus))
        else:
            one, many = (recipe.by_batches(devices, batches, **options) for devices in (None, gpus))
        assert_same(one, many, tolerance)
        return many

    return check
