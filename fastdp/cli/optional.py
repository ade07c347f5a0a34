"""Loads libraries that only some commands need, when such a command runs."""

from __future__ import annotations

import importlib
from types import ModuleType


class MissingLibraryError(ImportError):
    """A command needs a library that is not installed; the message says how to install it."""


def load(name: str, extra: str) -> ModuleType:
    """Import the module `name`, which fastdp's extra `extra` installs.

    Raises:
        MissingLibraryError: the library is not installed.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        library = name.split(".")[0]
        if error.name is None or error.name.split(".")[0] != library:
            raise
        raise MissingLibraryError(
            f"This command needs {library}, which is not installed. Install it with: pip install 'fastdp[{extra}]'"
        ) from error
