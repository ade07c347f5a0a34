"""One Keras peer: `keras_worker.py HOW MODEL STEPS`, with KERAS_BACKEND set by the driver.

HOW is fit, distribution (keras.distribution.DataParallel over 2 host devices), mirrored (tf.distribute's
MirroredStrategy over 2 logical CPUs), or fastdp-N (N virtual devices). A round is the time of one epoch of
Keras's `fit`, from its first batch to its last result.
"""

from __future__ import annotations

import contextlib
import importlib
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

if sys.argv[1] == "distribution":  # read when JAX is imported
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=2"

if os.environ.get("KERAS_BACKEND") != "tensorflow":  # Keras would import it if installed: slower, more threads
    sys.modules["tensorflow"] = None  # type: ignore[assignment]

import keras

sys.path.insert(0, str(Path(__file__).parents[2]))

from bench.frameworks.cases import CASES
from bench.frameworks.keras_models import BUILDERS
from fastdp.benchmark.request import Prepared, Round
from fastdp.benchmark.serve import serve

WARM_UP = 3


class Clock(keras.callbacks.Callback):  # type: ignore[misc]
    """The seconds of the last epoch."""

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Start."""
        self.began = time.perf_counter()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Stop once the loss is on the host; backends may still be computing it."""
        float(logs["loss"])
        self.seconds = time.perf_counter() - self.began


def scope(how: str) -> Any:
    """The context in which the model is built: a strategy's scope, or none."""
    if how == "mirrored":
        tf = importlib.import_module("tensorflow")
        cpu = tf.config.list_physical_devices("CPU")[0]
        tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
        return tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]).scope()
    if how == "distribution":
        devices = keras.distribution.list_devices("cpu")
        assert len(devices) == 2, devices
        keras.distribution.set_distribution(keras.distribution.DataParallel(devices=devices, auto_shard_dataset=False))
    return contextlib.nullcontext()


def runner(model: keras.Model, how: str) -> Any:
    """The model to compile and fit: `model` itself, or fastdp's parallel model of it."""
    if not how.startswith("fastdp-"):
        return model
    fastdp = importlib.import_module("fastdp")
    count = int(how.removeprefix("fastdp-"))
    fastdp.set_virtual_devices(count)
    # "auto" reaches the same steps after training a shape for long enough; here they are compiled at once.
    return fastdp.wrap(model, gpus=count, compile="inductor")


def prepare(how: str, name: str, steps: int) -> Prepared:
    """Build, compile and warm up; returns a function that trains one epoch and returns its seconds, and facts."""
    case = CASES[name]
    keras.utils.set_random_seed(0)
    with scope(how):
        model = BUILDERS[name]()
        trained = runner(model, how)
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        trained.compile(keras.optimizers.SGD(0.01, momentum=0.9), loss)
    clock = Clock()
    data = case.data(max(steps, WARM_UP))

    def fit(count: int) -> float:
        x, y = (array[: count * case.rows] for array in data)
        trained.fit(x, y, batch_size=case.rows, shuffle=False, verbose=0, callbacks=[clock])
        return clock.seconds

    fit(WARM_UP)
    if how.startswith("fastdp-"):
        trained.wait_compiled()
    fit(WARM_UP)
    parameters = sum(math.prod(variable.shape) for variable in model.trainable_variables)
    facts: dict[str, Any] = {"parameters": parameters}
    if how.startswith("fastdp-"):
        facts["steps_run"] = str(trained.report())
    return Prepared(lambda count: Round(count, fit(count)), facts)


if __name__ == "__main__":
    serve(lambda: prepare(sys.argv[1], sys.argv[2], int(sys.argv[3])))
