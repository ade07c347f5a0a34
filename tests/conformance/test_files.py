"""Files are the template's: they load in a Python where fastdp cannot be imported, optimizer and all."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import keras
import numpy as np
import pytest
from warm_python import WarmPython

import fastdp

layers = keras.layers
# Loads a model without fastdp, goes on training, and keeps the losses and the weights.
PLAIN = """
import sys
from pathlib import Path


class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "fastdp":
            raise ModuleNotFoundError(f"blocked: {name}")
        return None


sys.meta_path.insert(0, Blocker())
assert not [name for name in sys.modules if name.startswith("fastdp")]
import keras
import numpy as np

what, path, result = sys.argv[1:]
data = np.load(Path(result).with_name("data.npz"))
if what == "weights":
    model = keras.Sequential(
        [keras.Input((3,)), keras.layers.Dense(4, activation="tanh"), keras.layers.Dense(1)]
    )
    model.load_weights(path)
    losses = []
elif what == "predict only":
    model = keras.models.load_model(path)
    losses = []
else:
    model = keras.models.load_model(path)
    losses = [model.train_on_batch(data["x"], data["y"]) for _ in range(3)]
np.savez(result, *model.get_weights(), losses=np.asarray(losses))
"""


def build() -> keras.Model:
    return keras.Sequential([keras.Input((3,)), layers.Dense(4, activation="tanh"), layers.Dense(1)])


def data(n: int = 22) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.normal(size=(n, 3)).astype("float32"), rng.normal(size=(n, 1)).astype("float32")


def trained(callbacks: Any = (), epochs: int = 2) -> fastdp.ParallelModel:
    keras.utils.set_random_seed(2)
    parallel = fastdp.multi_gpu_model(build(), gpus=3)
    # As an object: Keras 3.15 itself cannot load the loss name "mse" from an .h5 file.
    parallel.compile(keras.optimizers.SGD(0.1, momentum=0.9), keras.losses.MeanSquaredError())
    x, y = data()
    parallel.fit(x, y, epochs=epochs, batch_size=8, shuffle=False, verbose=0, callbacks=list(callbacks))
    return parallel


InPlainKeras = Callable[[str, Path, Path], dict[str, np.ndarray]]


@pytest.fixture(scope="module")
def in_plain_keras(tmp_path_factory: pytest.TempPathFactory) -> Iterator[InPlainKeras]:
    """What a process without fastdp makes of a file: three more losses, then the weights."""
    environment = {**os.environ, "KERAS_BACKEND": "torch"}
    python = WarmPython(["keras"], environment, tmp_path_factory.mktemp("plain"))

    def load(what: str, path: Path, folder: Path) -> dict[str, np.ndarray]:
        x, y = data()
        np.savez(folder / "data.npz", x=x, y=y)
        result = folder / "result.npz"
        done = python.run(["-c", PLAIN, what, str(path), str(result)], environment, 120)
        assert done.returncode == 0, done.stderr
        return dict(np.load(result))

    yield load
    python.close()


def assert_continues(found: dict[str, np.ndarray], parallel: keras.Model) -> None:
    """The plain process's next losses and weights are those of the uninterrupted run."""
    x, y = data()
    losses = [parallel.train_on_batch(x, y) for _ in range(3)]
    # Each of Keras's returned losses is the running mean since the metrics were reset.
    np.testing.assert_allclose(found["losses"], losses, rtol=1e-5)
    for i, weight in enumerate(parallel.get_weights()):
        np.testing.assert_allclose(found[f"arr_{i}"], weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("by", ["template", "parallel"])
def test_an_h5_file_holds_weights_and_optimizer_without_fastdp(
    by: str, tmp_path: Path, in_plain_keras: InPlainKeras
) -> None:
    """keras-team/keras #8446 #9197. Keras 3.15 trains on from no .h5 file, its own neither (its loader builds the
    optimizer for no variables): the weights are loaded, and the optimizer's are looked up in the file."""
    parallel = trained()
    path = tmp_path / "m.h5"
    (parallel if by == "parallel" else parallel.template).save(path)
    found = in_plain_keras("predict only", path, tmp_path)
    for i, weight in enumerate(parallel.get_weights()):
        np.testing.assert_array_equal(found[f"arr_{i}"], weight)
    slots: dict[str, np.ndarray] = {}

    def keep(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset):
            slots[name] = item[()]

    with h5py.File(path) as file:
        file["optimizer_weights"].visititems(keep)
    expected = {slot.path: keras.ops.convert_to_numpy(slot) for slot in parallel.optimizer.variables}
    assert len(slots) == len(expected) == 6
    for name, value in expected.items():
        (same,) = [slot for path, slot in slots.items() if path.endswith(name)]
        np.testing.assert_array_equal(same, value)


@pytest.mark.parametrize("by", ["template", "parallel"])
def test_a_saved_model_goes_on_training_without_fastdp(by: str, tmp_path: Path, in_plain_keras: InPlainKeras) -> None:
    """keras-team/keras #8764 #9548 #8446 #8463 #11253 #9197."""
    parallel = trained()
    path = tmp_path / "m.keras"
    (parallel if by == "parallel" else parallel.template).save(path)
    parallel.reset_metrics()
    assert_continues(in_plain_keras("model", path, tmp_path), parallel)


def test_saved_weights_load_without_fastdp(tmp_path: Path, in_plain_keras: InPlainKeras) -> None:
    parallel = trained()
    parallel.save_weights(tmp_path / "m.weights.h5")
    found = in_plain_keras("weights", tmp_path / "m.weights.h5", tmp_path)
    for i, weight in enumerate(parallel.get_weights()):
        np.testing.assert_array_equal(found[f"arr_{i}"], weight)


@pytest.mark.parametrize("best", [False, True])
def test_model_checkpoint_of_full_models_loads_without_fastdp(
    best: bool, tmp_path: Path, in_plain_keras: InPlainKeras
) -> None:
    """keras-team/keras #8446 #8463."""
    path = tmp_path / "checkpoint.keras"
    callback = keras.callbacks.ModelCheckpoint(path, monitor="loss", save_best_only=best)
    parallel = trained([callback])
    parallel.reset_metrics()
    assert_continues(in_plain_keras("model", path, tmp_path), parallel)


def test_model_checkpoint_of_the_best_weights_keeps_the_best_epoch(tmp_path: Path) -> None:
    path = tmp_path / "best.weights.h5"
    callback = keras.callbacks.ModelCheckpoint(
        path, monitor="loss", mode="max", save_best_only=True, save_weights_only=True
    )
    parallel = trained([callback], epochs=3)
    losses = parallel.history.history["loss"]
    assert losses[0] == max(losses), "the first epoch was to be the largest"
    first = trained(epochs=1)
    other = build()
    other.load_weights(path)
    for a, b in zip(other.get_weights(), first.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


class Stop(keras.callbacks.Callback):
    """Breaks off at the beginning of an epoch, as a killed process would."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at = at

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        if epoch == self.at:
            raise KeyboardInterrupt


@pytest.mark.parametrize("gpus", [2, 5])
def test_backup_and_restore_resumes_on_another_device_count(gpus: int, tmp_path: Path) -> None:
    whole = trained(epochs=4)
    with pytest.raises(KeyboardInterrupt):
        trained([keras.callbacks.BackupAndRestore(tmp_path), Stop(2)], epochs=4)
    resumed = fastdp.multi_gpu_model(build(), gpus=gpus)
    resumed.compile(keras.optimizers.SGD(0.1, momentum=0.9), "mse")
    x, y = data()
    history = resumed.fit(
        x,
        y,
        epochs=4,
        batch_size=8,
        shuffle=False,
        verbose=0,
        callbacks=[keras.callbacks.BackupAndRestore(tmp_path)],
    )
    assert history.epoch == [2, 3]
    for a, b in zip(whole.get_weights(), resumed.get_weights(), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("gpus", [2, 5])
def test_a_saved_model_resumes_with_its_optimizer_on_another_device_count(gpus: int, tmp_path: Path) -> None:
    parallel = trained()
    parallel.save(tmp_path / "m.keras")
    loaded = keras.models.load_model(tmp_path / "m.keras")
    resumed = fastdp.multi_gpu_model(loaded, gpus=gpus)
    resumed.compile(loaded.optimizer, loaded.loss)
    x, y = data()
    for _ in range(3):
        assert resumed.train_on_batch(x, y) > 0
        parallel.train_on_batch(x, y)
    for a, b in zip(parallel.get_weights(), resumed.get_weights(), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-6)
    assert int(resumed.optimizer.iterations) == int(parallel.optimizer.iterations)


def test_load_weights_reaches_all_replicas(tmp_path: Path) -> None:
    """keras-team/keras #9548."""
    parallel = trained()
    parallel.save_weights(tmp_path / "m.weights.h5")
    x, _ = data()
    expected = parallel.predict(x, verbose=0)
    parallel.set_weights([w * 0 for w in parallel.get_weights()])
    assert not parallel.predict(x, verbose=0).any()
    parallel.load_weights(tmp_path / "m.weights.h5")
    np.testing.assert_array_equal(parallel.predict(x, verbose=0), expected)


def test_a_file_does_not_depend_on_the_number_of_devices(tmp_path: Path) -> None:
    sizes = set()
    for gpus in (2, 8):
        model = build()
        parallel = fastdp.multi_gpu_model(model, gpus=gpus)
        parallel.compile("adam", "mse")
        parallel.train_on_batch(*data())
        parallel.save(tmp_path / f"{gpus}.keras")
        loaded = keras.models.load_model(tmp_path / f"{gpus}.keras")
        sizes.add(tuple(w.shape for w in (*loaded.variables, *loaded.optimizer.variables)))
    assert len(sizes) == 1
