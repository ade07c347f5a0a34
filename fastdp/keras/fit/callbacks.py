"""Tells callbacks of a batch's end on the thread that trains, and closes their files after an error."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import keras

from fastdp.comm.processes import leads
from fastdp.patching import Patch


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


class WritesFiles(keras.callbacks.Callback):
    """A callback with something to close.

    `fit` of a parallel model closes it at its end and after an error. Plain Keras tells callbacks of no error: then it
    is closed by the next `fit`, by `with`, by `close()`, or when the callback is gone. What has been written by then
    is in the files in any case. A copy, such as tuners make for each trial, has the same arguments and begins anew.
    """

    writes_alone = True  # of several processes, process 0 does
    _arguments: Mapping[str, Any]  # those of the constructor, by name

    def __reduce__(self) -> tuple[Any, ...]:
        return functools.partial(type(self), **self._arguments), ()

    def close(self) -> None:
        """Close what is open. Another `fit` opens it again. May be called any number of times."""
        raise NotImplementedError

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def close_files(callbacks: Any) -> None:
    """Close the files of the callbacks of a `fit` that has failed."""
    found = callbacks.callbacks if isinstance(callbacks, keras.callbacks.CallbackList) else callbacks
    for callback in keras.tree.flatten(found) if found else []:
        if isinstance(callback, WritesFiles):
            callback.close()


def quiet_elsewhere() -> None:
    """In processes other than 0: no progress bars, and callbacks and `model.save` write no files. For good."""
    if not leads() and not _quiet:
        _quiet.append(Patch(_by_process()))
        _quiet[0].__enter__()


_quiet: list[Patch] = []
_WRITERS = (keras.callbacks.ModelCheckpoint, keras.callbacks.CSVLogger, keras.callbacks.TensorBoard)
_HOOKS = [name for name in dir(keras.callbacks.Callback) if name.startswith("on_")]


def _by_process() -> Iterator[tuple[Any, str, Callable[[Any], Any]]]:
    """The owner, name and replacement of what writes or prints."""
    yield keras.callbacks.CallbackList, "__init__", _without_writers
    for name in ("save", "save_weights", "export"):
        yield keras.Model, name, _by_process_0
    yield keras.callbacks.BackupAndRestore, "_save_model", _by_process_0
    yield keras.callbacks.BackupAndRestore, "on_train_end", _by_process_0


def _without_writers(original: Callable[..., None]) -> Callable[..., None]:
    """A list of callbacks without a progress bar, whose writers do nothing."""

    @functools.wraps(original)
    def init(self: Any, callbacks: Any = None, *args: Any, **kwargs: Any) -> None:
        for callback in keras.tree.flatten(callbacks) if callbacks else ():
            if isinstance(callback, _WRITERS) or getattr(callback, "writes_alone", False):
                for name in _HOOKS:
                    setattr(callback, name, _nothing)
        add_history, *rest = args or (kwargs.pop("add_history", False),)
        kwargs["add_progbar"] = False
        original(self, callbacks, add_history, **kwargs, **dict(zip(("model",), rest[1:], strict=False)))

    return init


def _by_process_0(original: Callable[..., Any]) -> Callable[..., Any]:
    return functools.wraps(original)(_nothing)


def _nothing(*args: Any, **kwargs: Any) -> None:
    """Process 0 does it."""
