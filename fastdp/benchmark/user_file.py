"""Loads what is measured from the user's own file: `file.py:function`, and the function `make_batch` beside it."""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from fastdp.benchmark.request import FRAMEWORKS

MODULE = "fastdp_bench_target"


def split(target: str) -> tuple[Path, str] | None:
    """The file and the function that "file.py:function" names; None for other targets."""
    path, colon, function = target.rpartition(":")
    return (Path(path), function) if colon and path.endswith(".py") else None


def make(path: Path, name: str) -> tuple[Any, Any]:
    """What a function of the user's file returns, and the function `make_batch` beside it; None without one.

    Instead of a function, the name may be that of a model.

    Raises:
        ValueError: there is no such file or function, it needs arguments, or it ends the process.
    """
    with _going_on(path):
        module = _load(path)
        found = _named(module, path, name)
        made = found if framework_of(found) is not None else _call(found, path, name)
    return made, getattr(module, "make_batch", None)


def framework_of(model: Any) -> str | None:
    """What a model is made of, by the classes that it comes from; None for what is no model."""
    libraries = {cls.__module__.split(".")[0] for cls in type(model).__mro__}
    return next((one for one in FRAMEWORKS if one in libraries), None)  # Keras's layers are torch modules too


def _load(path: Path) -> ModuleType:
    """Run the file as a module, as `python file.py` has it: with its folder on `sys.path`, and without arguments."""
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    sys.path.insert(0, str(path.parent))
    sys.argv = [str(path)]
    spec = importlib.util.spec_from_file_location(MODULE, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[MODULE] = module  # classes that are pickled or registered find their module
    spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def _going_on(path: Path) -> Iterator[None]:
    """Tell of a script that ends the process, which would say nothing."""
    try:
        yield
    except SystemExit as error:
        raise ValueError(
            f"{path.name} ends the process by sys.exit({'' if error.code is None else repr(error.code)}) while its "
            'model is made. Put what a script does behind `if __name__ == "__main__":`. The file is run without '
            "arguments: those of argparse need defaults."
        ) from error


def _named(module: ModuleType, path: Path, name: str) -> Any:
    """A function, a class or a model of the user's file."""
    found = getattr(module, name, None)
    if callable(found):
        return found
    known = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
    raise ValueError(f"{path} has no function {name!r}. It has: {', '.join(known) or 'none'}")


def _call(function: Callable[..., Any], path: Path, name: str) -> Any:
    """Call a function without arguments, or tell which it needs."""
    try:
        needed = [
            one.name
            for one in inspect.signature(function).parameters.values()
            if one.default is one.empty and one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)
        ]
    except (TypeError, ValueError):  # a function of C, without a signature
        needed = []
    if needed:
        raise ValueError(
            f"{path.name}:{name} is called without arguments, and needs {', '.join(needed)}. Give them defaults, or "
            f"write a function beside it that calls it: def bench_model(): return {name}(...)"
        )
    return function()


def batch_of(make_batch: Callable[[int], Any], rows: int) -> tuple[Any, Any]:
    """Inputs and targets of so many rows, from the user's `make_batch`.

    Raises:
        ValueError: it takes no number of rows, it returns something else than a pair, or other rows: rates would be
            those of batches that nobody trained on.
    """
    try:
        inspect.signature(make_batch).bind(rows)
    except TypeError as error:
        raise ValueError(f"make_batch is called with the number of rows, make_batch({rows}): {error}") from error
    except ValueError:  # a function of C, without a signature
        pass
    batch = make_batch(rows)
    if not isinstance(batch, tuple) or len(batch) != 2:
        received = f"a tuple of {len(batch)}" if isinstance(batch, tuple) else type(batch).__name__
        raise ValueError(f"make_batch({rows}) must return a pair (inputs, targets). Received: {received}")
    shapes = list(_shapes(batch))
    if shapes and not any(rows in shape for shape in shapes):
        raise ValueError(
            f"make_batch({rows}) must return arrays of {rows} rows. Received the shapes: "
            f"{', '.join(map(str, shapes[:4]))}"
        )
    return batch


def _shapes(value: Any) -> Iterator[tuple[int, ...]]:
    """The shapes of the arrays in a nest of tuples, lists and dicts."""
    if isinstance(value, dict | tuple | list):
        for one in value.values() if isinstance(value, dict) else value:
            yield from _shapes(one)
    elif getattr(value, "ndim", 0):
        yield tuple(value.shape)
