"""Runs several steps for one call from Keras's loop: `steps_per_execution`, or all where no callback looks.

Keras's `fit` calls its train function with the batches of one execution, and callbacks before and after it. Where no
callback looks at batches, nothing of Keras happens between two executions: the train function takes the further batches
of the epoch from Keras's own iterator and runs their steps too, without going back.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import islice
from typing import Any

import keras
from keras.src.backend.torch.trainer import TorchEpochIterator
from keras.src.trainers.data_adapters.array_data_adapter import ArrayDataAdapter
from keras.src.utils.python_utils import is_default

from fastdp.keras.fit.callbacks import AtOnce
from fastdp.patching import Patch
from fastdp.program.keras.augmented import AugmentedModel

# Seconds until what another thread has changed is looked for, where no code of the user's runs in this one.
LOOK_SECONDS = 0.02
# Hooks of callbacks for each batch of training.
_HOOKS = ("on_batch_begin", "on_batch_end", "on_train_batch_begin", "on_train_batch_end")


def looks_at_batches(callbacks: Any, verbose: Any) -> bool:
    """Whether a callback has a hook for batches of training, or there is a progress bar.

    Args:
        callbacks: as `fit` gets them.
        verbose: as `fit` gets it.
    """
    if isinstance(callbacks, keras.callbacks.CallbackList):
        callbacks = callbacks.callbacks
    elif verbose not in (0, 2):
        return True
    every = keras.tree.flatten(callbacks) if callbacks else []
    return any(
        type(callback) is not AtOnce and not all(is_default(getattr(callback, name)) for name in _HOOKS)
        for callback in every
    )


class Executions:
    """The executions of one `fit`.

    Args:
        epochs: Keras's iterator over its epochs; None where no `fit` runs.
        looked_at: whether a callback looks at batches.

    `go_on` says whether one call may run several executions.
    """

    def __init__(self, epochs: Any, *, looked_at: bool) -> None:
        self._epochs: Callable[[], Any] = weakref.ref(epochs) if epochs is not None else lambda: None
        # With `verbose=2`, Keras learns an unknown number of batches from the last one that callbacks are told of.
        self.go_on = not looked_at and epochs is not None and epochs.num_batches is not None

    def quiet(self, runs_no_other_code: bool) -> Callable[[], bool]:
        """A function that says, between two steps, whether nothing but fastdp and Keras has run since the last one.

        Then nothing can have changed what a step reads of Python, but for other threads and handlers of signals, which
        come at no certain step: it says no every `LOOK_SECONDS`, so that their changes count soon.

        Args:
            runs_no_other_code: whether no other code runs in steps.
        """
        epochs = self._epochs()
        if not runs_no_other_code or not isinstance(getattr(epochs, "data_adapter", None), ArrayDataAdapter):
            return lambda: False
        looked = time.perf_counter()

        def is_quiet() -> bool:
            nonlocal looked
            now = time.perf_counter()
            if now - looked < LOOK_SECONDS:
                return True
            looked = now
            return False

        return is_quiet

    def rest(self, data: list[Any], goes_on: Callable[[], bool]) -> Iterator[tuple[Any, Any]]:
        """The batches of an execution but the first, then those of the epoch's further executions.

        Args:
            data: the batches of the execution.
            goes_on: asked before each further execution.

        Yields:
            A batch, and the one after it if it is there already. What the data set raises is raised here.
        """
        yield from zip(data[1:], [*data[2:], None], strict=False)
        epochs = self._epochs()
        one_by_one = epochs is not None and epochs.steps_per_execution == 1 and type(epochs) is TorchEpochIterator
        while epochs is not None and goes_on():
            try:
                batches = [_next_batch(epochs)] if one_by_one else next(epochs)[2]
            except StopIteration:
                epochs._epoch_iterator = iter(())  # Keras asks once more, and must not ask the data set again
                return
            yield from zip(batches, [*batches[1:], None], strict=True)


def _next_batch(epochs: TorchEpochIterator) -> Any:
    """What `next(epochs)` gives for one step per execution, without a context for each batch."""
    _, _, iterator = next(epochs._epoch_iterator)
    try:
        return next(iterator)
    except StopIteration:
        with epochs.catch_stop_iteration():
            raise
    raise StopIteration


@contextmanager
def one_batch_at_a_time(epochs: Any) -> Iterator[None]:
    """Let Keras take no more than one batch, by which it builds the model: others of a generator would be lost."""
    several = epochs.steps_per_execution if epochs is not None else 1
    if several > 1:
        epochs.steps_per_execution = 1
    try:
        yield
    finally:
        if several > 1:
            epochs.steps_per_execution = several


def stages_built(model: AugmentedModel | None, epochs: Any, batch: Any) -> Any:
    """Build layers in front of a model before Keras does so, by tensors without values: the batch for Keras, if any.

    Args:
        model: the model with the layers; None without any.
        epochs: Keras's iterator over epochs, which is reset afterwards; None if there is a batch.
        batch: the batch, or None.
    """
    if model is None or model.stages_built:
        return batch
    if batch is None:
        _, _, batches = next(iter(epochs))
        batch = batches[0] if isinstance(batches, (list, tuple)) else next(batches)
    model.build_stages(batch)
    return batch


def joined(outputs: list[Any]) -> Any:
    """The outputs of the batches of one execution as those of one batch."""
    if len(outputs) == 1:
        return outputs[0]
    return keras.tree.map_structure(lambda *parts: keras.ops.concatenate(parts, 0), *outputs)


def several_steps(steps_per_execution: int) -> AbstractContextManager[None]:
    """A context in which Keras's iterator over epochs gives several batches per execution, as on its other backends.

    On torch, where Keras refuses several steps per execution, that iterator would warn of too few data where the last
    execution of an epoch has fewer batches.
    """
    return _patch if steps_per_execution > 1 else nullcontext()


def _next_execution(original: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """`EpochIterator.__next__`, whose last execution may have fewer batches."""

    def __next__(self: Any) -> Any:
        if self.steps_per_execution == 1:
            return original(self)
        begin, end, iterator = next(self._epoch_iterator)
        batches = list(islice(iterator, self.steps_per_execution))
        if not batches:
            with self.catch_stop_iteration():
                raise StopIteration
            raise StopIteration
        return begin, end, batches

    return __next__


_patch = Patch([(TorchEpochIterator, "__next__", _next_execution)])
