"""Mixed rows of an HDF5 file come in the same order after an interruption in the middle of an epoch."""

import h5py
import keras
import numpy as np
import pytest

import fastdp


@pytest.fixture(autouse=True)
def _two_devices():
    fastdp.set_virtual_devices(2)
    yield
    fastdp.set_virtual_devices(0)


class Stop(keras.callbacks.Callback):
    """Ends `fit` by an error behind a batch."""

    def __init__(self, at):
        super().__init__()
        self.left = at

    def on_train_batch_end(self, batch, logs=None):
        self.left -= 1
        if not self.left:
            raise RuntimeError("stopped")


def fit(path, folder, *callbacks):
    keras.utils.set_random_seed(2)
    model = fastdp.wrap(keras.Sequential([keras.Input((64,)), keras.layers.Dense(3)]), gpus=2, compile=None)
    model.compile(keras.optimizers.Adam(0.01), "mse")
    checkpoint = fastdp.callbacks.Checkpoint(folder, every_steps=3)
    options = {"batch_size": 16, "epochs": 3, "shuffle": "chunks", "verbose": 0}
    with fastdp.HDF5Matrix(path, "x") as x, h5py.File(path) as file:
        history = model.fit(x, file["y"], callbacks=[*callbacks, checkpoint], **options)
        assert model.report().inputs[0]["how"].startswith("by threads: 13 chunks")
    return model.template.get_weights(), history.history["loss"]


@pytest.mark.parametrize("at", [5, 17])
def test_a_fit_on_mixed_chunks_goes_on_in_mid_epoch_with_the_same_bits(tmp_path, at):
    path = tmp_path / "a.h5"
    generator = np.random.default_rng(0)
    with h5py.File(path, "w") as file:
        file.create_dataset("x", data=generator.normal(size=(200, 64)).astype("f4"), chunks=(16, 64), compression="lzf")
        file["y"] = generator.normal(size=(200, 3)).astype("f4")
    weights, losses = fit(path, tmp_path / "whole")
    with pytest.raises(RuntimeError, match="stopped"):
        fit(path, tmp_path / "run", Stop(at))
    resumed, later = fit(path, tmp_path / "run")
    for one, other in zip(weights, resumed, strict=True):
        np.testing.assert_array_equal(one, other)
    assert losses == later
