"""Keras's `fit` as a measured way: batches that are ready, and a clock from the first batch to the last result."""

from __future__ import annotations

import importlib
import itertools
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import keras

from fastdp.benchmark.data import Batches
from fastdp.benchmark.request import Request, Round
from fastdp.benchmark.target import Target


def choose_arithmetic(request: Request) -> None:
    """Let float32 be float32 on every backend: all of them use TF32 on GPUs in places, unless told otherwise."""
    if request.precision != "float32" or request.kind != "gpu":
        return
    backend = keras.backend.backend()
    library: Any = importlib.import_module(backend)
    if backend == "jax":
        library.config.update("jax_default_matmul_precision", "highest")
    elif backend == "tensorflow":
        library.config.experimental.enable_tensor_float_32_execution(False)
    else:
        library.backends.cuda.matmul.allow_tf32 = library.backends.cudnn.allow_tf32 = False


class Clock(keras.callbacks.Callback):
    """The seconds of the last epoch, from its first batch until its loss is on the host and `finish` has returned."""

    def __init__(self, finish: Callable[[], None]) -> None:
        super().__init__()
        self._finish = finish
        self._began = self.seconds = self.loss = 0.0

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Start."""
        self._began = time.perf_counter()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Stop. Backends may still be computing when Keras calls this."""
        self.loss = float(logs["loss"])
        self._finish()
        self.seconds = time.perf_counter() - self._began


class Fit:
    """Trains a compiled Keras model by `fit`, so many steps at a time.

    Args:
        model: a compiled Keras model, or a parallel one.
        batches: its global batches. `fit` gets them as they are, by a generator (on TensorFlow by a tf.data.Dataset).
        finish: waits until the devices are done.

    Attributes:
        loss: the mean loss of the latest round.
        trained: steps so far.
        step_seconds: the time per step of each round.
    """

    def __init__(self, model: Any, batches: Batches, finish: Callable[[], None] = lambda: None) -> None:
        self._model, self._batches, self._clock, self.trained = model, batches, Clock(finish), 0
        self._cycle = _cycle(batches) if keras.backend.backend() == "tensorflow" else None
        self.step_seconds: list[float] = []

    @property
    def loss(self) -> float:
        """The mean loss of the latest round."""
        return self._clock.loss

    def train(self, steps: int) -> Round:
        """Train `steps` steps in one epoch of `fit`."""
        data = self._cycle if self._cycle is not None else self._next(steps)
        self._model.fit(data, steps_per_epoch=steps, epochs=1, shuffle=False, verbose=0, callbacks=[self._clock])
        self.trained += steps
        self.step_seconds.append(self._clock.seconds / steps)
        return Round(steps, self._clock.seconds)

    def _next(self, steps: int) -> Iterator[Any]:
        """The next batches."""
        for number in range(self.trained, self.trained + steps):
            yield fed(self._batches(number))


def fed(batch: tuple[Any, Any]) -> tuple[Any, ...]:
    """A batch as `fit` takes it: without targets where the model adds its loss itself."""
    inputs, targets = batch
    return (inputs,) if targets is None or (isinstance(targets, tuple) and not targets) else (inputs, targets)


MOST_IN_A_CYCLE = 64


def _cycle(batches: Batches) -> Any:
    """The batches as a tf.data.Dataset: those that come again and again, or a generator's where they do not.

    TensorFlow copies each array of a generator; a data set of tensors it does not.
    """
    tensorflow: Any = importlib.import_module("tensorflow")
    found = [fed(batches(0))]
    for number in range(1, MOST_IN_A_CYCLE):
        batch = fed(batches(number))
        if keras.tree.flatten(batch)[0] is keras.tree.flatten(found[0])[0]:
            dataset = tensorflow.data.Dataset.from_tensors(found[0])
            for one in found[1:]:
                dataset = dataset.concatenate(tensorflow.data.Dataset.from_tensors(one))
            return dataset.repeat().prefetch(tensorflow.data.AUTOTUNE)
        found.append(batch)
    signature = keras.tree.map_structure(lambda array: tensorflow.TensorSpec(array.shape, array.dtype), found[0])
    every = lambda: (fed(batches(number)) for number in itertools.count())  # noqa: E731
    return tensorflow.data.Dataset.from_generator(every, output_signature=signature).prefetch(tensorflow.data.AUTOTUNE)


def facts_of(target: Target, first_step_seconds: float) -> dict[str, Any]:
    """The facts about a Keras model."""
    parameters = sum(math.prod(variable.shape) for variable in target.model.trainable_variables)
    return {**target.facts, "parameters": parameters, "first_step_seconds": first_step_seconds}
