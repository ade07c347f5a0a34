"""Finds functions of C libraries by name: those inside h5py and hdf5plugin that decode chunks."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from pathlib import Path
from typing import Any


def function(library: ctypes.CDLL, name: str, result: Any, *arguments: Any) -> Any:
    """A function of a library with the types of its result and arguments. Calls of it release Python's lock.

    Raises:
        AttributeError: the library has no such function.
    """
    found = getattr(library, name)
    found.restype, found.argtypes = result, arguments
    return found


@functools.cache
def plugin_folder() -> Path | None:
    """Where hdf5plugin keeps its libraries; None if it is not installed."""
    found = importlib.util.find_spec("hdf5plugin")
    return None if found is None or found.origin is None else Path(found.origin).parent / "plugins"


def plugin(name: str) -> ctypes.CDLL:
    """The library of a filter inside hdf5plugin.

    Raises:
        OSError: there is none.
    """
    found = sorted((plugin_folder() or Path()).glob(f"libh5{name}.*"))
    if not found:
        raise OSError(f"hdf5plugin has no library for {name}")
    return ctypes.CDLL(str(found[0]))
