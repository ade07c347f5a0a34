"""Tells callbacks of a batch's end on the thread that trains."""

from __future__ import annotations

from typing import Any

import keras


class AtOnce(keras.callbacks.Callback):
    """Does nothing, and by being there keeps Keras from telling callbacks of a batch's end in another thread.

    Keras does so where no callback asks to be told, for the history and the progress bar alone. On the host's cores
    that thread takes one from the step that runs (figures in docs/log.md).
    """

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Nothing."""

    def on_test_batch_end(self, batch: int, logs: Any = None) -> None:
        """Nothing."""

    def on_predict_batch_end(self, batch: int, logs: Any = None) -> None:
        """Nothing."""


def at_once(callbacks: Any) -> Any:
    """The callbacks of a `fit`, `evaluate` or `predict` with `AtOnce` among them; a list of Keras's own stays."""
    if isinstance(callbacks, keras.callbacks.CallbackList):
        return callbacks
    return [*keras.tree.flatten(callbacks), AtOnce()] if callbacks else [AtOnce()]
