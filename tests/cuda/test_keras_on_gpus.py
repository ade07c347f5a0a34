"""A parallel Keras model on the simulated CUDA: which GPUs it touches, and where its merged outputs are."""

from __future__ import annotations

import keras
import numpy as np
import pytest

from fastdp.keras.parallel_model import ParallelModel
from fastdp.options import Options

LIMIT = 30.0
X = np.random.default_rng(0).normal(size=(10, 8)).astype("float32")
Y = np.random.default_rng(1).normal(size=(10, 1)).astype("float32")


@pytest.fixture
def start(gpus):
    """`start(count, ordinals, ...)`: a simulated CUDA of so many GPUs, and devices on some of them."""

    def started(count, ordinals, **options):
        box = gpus(count, **options)
        box.made += [box.device.CudaDevice(ordinal, ordinal) for ordinal in ordinals]
        return box

    return started


def compiled(box, **options):
    keras.utils.set_random_seed(1)
    model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4, "tanh"), keras.layers.Dense(1)])
    parallel = ParallelModel(model, box.made, Options(timeout=LIMIT, **options))
    parallel.compile("adam", "mse", metrics=["mae"])
    return parallel


def test_only_the_listed_gpus_get_a_context_and_memory(start):
    box = start(4, [3, 1], contexts_on=[1, 3])
    parallel = compiled(box)
    parallel.fit(X, Y, batch_size=5, epochs=2, validation_data=(X, Y), verbose=0)
    parallel.predict(X, verbose=0)
    assert box.sim.contexts == {1, 3}
    assert {one.device for one in box.sim.memory.alive()} == {1, 3, None}  # None: pinned host memory


@pytest.mark.parametrize("cpu_merge", [True, False])
def test_merged_outputs_are_on_the_host_or_on_the_first_gpu_of_the_list(start, cpu_merge):
    box = start(3, [2, 0])
    parallel = compiled(box, cpu_merge=cpu_merge)
    outputs = parallel(X)
    found = box.sim.memory.find((outputs.data_ptr(), 4), "the outputs")
    assert found.device == (None if cpu_merge else 2)
    np.testing.assert_allclose(outputs.detach().numpy(), parallel.template.predict(X, verbose=0), rtol=1e-5, atol=1e-6)
    del outputs
    logs = parallel.fit(X, Y, batch_size=5, verbose=0).history
    assert np.isfinite(logs["mae"]).all()
