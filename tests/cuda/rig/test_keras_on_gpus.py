"""A parallel Keras model on some of the cards: whose memory it uses, and where its merged outputs are."""

from __future__ import annotations

import keras
import numpy as np
import pytest

from fastdp.keras.parallel_model import ParallelModel
from fastdp.options import Options

X = np.random.default_rng(0).normal(size=(10, 8)).astype("float32")
Y = np.random.default_rng(1).normal(size=(10, 1)).astype("float32")


def compiled(devices, **options):
    keras.utils.set_random_seed(1)
    model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4, "tanh"), keras.layers.Dense(1)])
    parallel = ParallelModel(model, devices, Options(timeout=30.0, **options))
    parallel.compile("adam", "mse", metrics=["mae"])
    return parallel


def test_only_the_listed_gpus_have_memory(cards):
    parallel = compiled(cards.on([3, 1]))
    parallel.fit(X, Y, batch_size=5, epochs=2, validation_data=(X, Y), verbose=0)
    parallel.predict(X, verbose=0)
    assert {one.card for one in cards.alive()} == {1, 3, None}  # None: pinned host memory


@pytest.mark.parametrize("cpu_merge", [True, False])
def test_merged_outputs_are_on_the_host_or_on_the_first_gpu_of_the_list(cards, runtime, cpu_merge):
    parallel = compiled(cards.on([2, 0]), cpu_merge=cpu_merge)
    outputs = parallel(X)
    found = runtime.cudart.pointerGetAttributes(outputs.data_ptr())
    assert found.type == (1 if cpu_merge else 2)  # pinned host memory, or a card's
    assert cpu_merge or found.device == 2
    np.testing.assert_allclose(outputs.detach().numpy(), parallel.template.predict(X, verbose=0), rtol=1e-5, atol=1e-6)
    del outputs
    logs = parallel.fit(X, Y, batch_size=5, verbose=0).history
    assert np.isfinite(logs["mae"]).all()
