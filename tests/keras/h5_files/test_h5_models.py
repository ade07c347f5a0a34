"""load_model: an .h5 file comes back compiled, with its optimizer, and trains on as if it had never been saved."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import keras
import numpy as np
import pytest

import fastdp
from fastdp.utils import load_model, save_weights

layers = keras.layers
X = np.random.default_rng(0).normal(size=(21, 3)).astype("float32")
Y = X[:, :1] ** 2


@pytest.fixture(scope="module", autouse=True)
def virtual_devices() -> Iterator[None]:
    fastdp.set_virtual_devices(5)
    yield
    fastdp.set_virtual_devices(0)


def squares(y: Any, predicted: Any) -> Any:
    return keras.ops.mean(keras.ops.square(keras.ops.convert_to_tensor(y) - predicted), axis=-1)


def build() -> keras.Model:
    x = keras.Input((3,))
    return keras.Model(x, layers.Dense(1, name="last")(layers.Dense(4, activation="tanh", name="hidden")(x)))


def momentum() -> Any:
    return keras.optimizers.SGD(keras.optimizers.schedules.ExponentialDecay(0.1, 3, 0.9), momentum=0.9)


@pytest.mark.parametrize("optimizer", [lambda: keras.optimizers.Adam(0.05), lambda: "rmsprop", momentum])
@pytest.mark.parametrize(
    ("loss", "metrics"),
    [
        ("mse", ["mae"]),
        (keras.losses.MeanSquaredError, [keras.metrics.MeanAbsoluteError]),
        ({"last": "mse"}, {"last": ["mae"]}),
        (squares, [squares]),
    ],
    ids=["by name", "objects", "by output", "functions"],
)
def test_a_loaded_h5_model_trains_on_as_the_one_that_was_saved(
    optimizer: Callable[[], Any], loss: Any, metrics: Any, tmp_path: Path
) -> None:
    def made(value: Any) -> Any:
        return value() if callable(value) and value is not squares else value

    parallel = fastdp.wrap(build(), gpus=3)
    metrics = metrics if isinstance(metrics, dict) else list(map(made, metrics))
    parallel.compile(optimizer(), made(loss), metrics=metrics)
    parallel.fit(X, Y, batch_size=8, shuffle=False, verbose=0)
    parallel.save(tmp_path / "m.h5")
    loaded = load_model(tmp_path / "m.h5", {"squares": squares})
    parallel.reset_metrics()
    assert int(loaded.optimizer.iterations) == 3
    for _ in range(3):
        np.testing.assert_allclose(loaded.train_on_batch(X, Y), parallel.train_on_batch(X, Y), rtol=1e-5)
    for expected, found in zip(parallel.get_weights(), loaded.get_weights(), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("gpus", [1, 2, 5])
def test_a_loaded_h5_model_resumes_on_any_number_of_devices_with_the_same_losses(gpus: int, tmp_path: Path) -> None:
    whole = fastdp.wrap(build(), gpus=3)
    whole.compile(keras.optimizers.Adam(0.05), "mse")
    whole.fit(X, Y, batch_size=8, shuffle=False, verbose=0)
    whole.template.save(tmp_path / "m.h5")
    expected = whole.fit(X, Y, epochs=3, batch_size=8, shuffle=False, verbose=0).history["loss"]
    loaded = load_model(tmp_path / "m.h5")
    resumed = fastdp.wrap(loaded, gpus=gpus)
    resumed.compile(loaded.optimizer, loaded.loss)
    found = resumed.fit(X, Y, epochs=3, batch_size=8, shuffle=False, verbose=0).history["loss"]
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_keras_files_load_as_in_keras_and_compile_false_is_honoured(tmp_path: Path) -> None:
    model = build()
    model.compile("adam", "mse")
    model.train_on_batch(X, Y)
    for name in ("m.keras", "m.h5"):
        model.save(tmp_path / name)
        assert int(load_model(tmp_path / name).optimizer.iterations) == 1
        assert not load_model(tmp_path / name, compile=False).compiled


def test_a_file_without_settings_or_with_an_optimizer_that_does_not_fit_warns(tmp_path: Path) -> None:
    model = build()
    model.save(tmp_path / "m.h5")
    with pytest.warns(UserWarning, match="no compile settings"):
        load_model(tmp_path / "m.h5")
    model.compile("adam", "mse")
    model.train_on_batch(X, Y)
    model.save(tmp_path / "m.h5")
    with h5py.File(tmp_path / "m.h5", "a") as file:
        group = file["optimizer_weights"]
        group.attrs["weight_names"] = group.attrs["weight_names"][:-1]
    with pytest.warns(UserWarning, match="does not fit a Adam.*starts anew"):
        loaded = load_model(tmp_path / "m.h5")
    assert np.isfinite(loaded.train_on_batch(X, Y))


def test_wrong_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"existing file.*nowhere\.h5"):
        load_model(tmp_path / "nowhere.h5")
    save_weights(build(), tmp_path / "w.h5")
    with pytest.raises(ValueError, match=r"no model's configuration.*load_weights"):
        load_model(tmp_path / "w.h5")
    build().save(tmp_path / "m.h5")
    entry = {"class_name": "Lambda", "config": {"name": "lambda_1"}}
    inner = {"class_name": "Sequential", "config": {"name": "chain", "layers": [entry]}}
    with h5py.File(tmp_path / "m.h5", "a") as file:
        config = {"class_name": "Model", "config": {"name": "model_1", "layers": [entry, entry, inner]}}
        file.attrs["model_config"] = json.dumps(config)
    with pytest.raises(ValueError, match=r"parallel model of Keras 2.*fastdp convert m\.h5"):
        load_model(tmp_path / "m.h5")
