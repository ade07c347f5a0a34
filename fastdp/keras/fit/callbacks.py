"""Tells callbacks of a batch's end on the thread that trains."""

from __future__ import annotations

from typing import Any

import keras


class AtOnce(keras.callbacks.Callback):
    """Does nothing, but its presence keeps Keras from calling callbacks in another thread at the end of a batch.

    Keras uses that thread, for the history and the progress bar, if no callback has a hook for the end of a batch. On a
    CPU the thread takes a core from the running step (measured in docs/log.md).
    """

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Do nothing."""

    def on_test_batch_end(self, batch: int, logs: Any = None) -> None:
        """Do nothing."""

    def on_predict_batch_end(self, batch: int, logs: Any = None) -> None:
        """Do nothing."""


def at_once(callbacks: Any) -> Any:
    """The callbacks of `fit`, `evaluate` or `predict` with `AtOnce` added; a Keras `CallbackList` stays as it is."""
    if isinstance(callbacks, keras.callbacks.CallbackList):
        return callbacks
    return [*keras.tree.flatten(callbacks), AtOnce()] if callbacks else [AtOnce()]
