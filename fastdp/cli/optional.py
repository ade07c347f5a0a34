"""Loads libraries that only some commands need, when such a command runs; Keras on torch."""

from __future__ import annotations

import importlib
import os
import sys
from types import ModuleType


class MissingLibraryError(ImportError):
    """A command needs a library that is not installed; the message says how to install it."""


def load(name: str, extra: str) -> ModuleType:
    """Import the module `name`, which fastdp's extra `extra` installs.

    Raises:
        MissingLibraryError: the library, or one that it needs, is not installed.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        library = (error.name or "fastdp").split(".")[0]
        if library == "fastdp":
            raise
        raise MissingLibraryError(
            f"This command needs {library}, which is not installed. Install it with: pip install 'fastdp[{extra}]'"
        ) from error


def choose_torch(command: str) -> None:
    """Select Keras's torch backend before Keras is imported; tell if KERAS_BACKEND names another."""
    named = os.environ.get("KERAS_BACKEND", "torch")
    if named != "torch":
        print(f"fastdp {command}: Keras runs on torch here, and not on KERAS_BACKEND={named}.", file=sys.stderr)
    os.environ["KERAS_BACKEND"] = "torch"
