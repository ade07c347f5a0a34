"""Loads what is measured from the user's own file: `file.py:function`, and the function `make_batch` beside it."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

MODULE = "fastdp_bench_target"


def split(target: str) -> tuple[Path, str] | None:
    """The file and the function that "file.py:function" names; None for other targets."""
    path, colon, function = target.rpartition(":")
    return (Path(path), function) if colon and path.endswith(".py") else None


def load(path: Path) -> ModuleType:
    """Run the file as a module, with its own folder first on `sys.path`, as `python file.py` has it.

    Raises:
        ValueError: there is no such file.
    """
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    sys.path.insert(0, str(path.parent))
    spec = importlib.util.spec_from_file_location(MODULE, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[MODULE] = module  # classes that are pickled or registered find their module
    spec.loader.exec_module(module)
    return module


def function_of(module: ModuleType, path: Path, name: str) -> Any:
    """A function of the user's file.

    Raises:
        ValueError: the file has none of that name; the message lists those that it has.
    """
    found = getattr(module, name, None)
    if callable(found):
        return found
    known = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
    raise ValueError(f"{path} has no function {name!r}. It has: {', '.join(known) or 'none'}")


def batch_of(make_batch: Callable[[int], Any], rows: int) -> tuple[Any, Any]:
    """Inputs and targets of so many rows, from the user's `make_batch`.

    Raises:
        ValueError: it returns something else than a pair.
    """
    batch = make_batch(rows)
    if not isinstance(batch, tuple) or len(batch) != 2:
        raise ValueError(f"make_batch({rows}) must return a pair (inputs, targets). Received: {type(batch).__name__}")
    return batch
