"""Whether reading ahead leaves results as they are: what data refer to, and whether random generators move."""

from __future__ import annotations

import pickle
import random
import sys
import time
import types
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np

LOOKS = 8  # the first batches of which each is looked at
LOOK_SECONDS = 0.02  # and between later looks
MOST_OBJECTS = 4000
MOST_ENTRIES = 32  # of a container

# Classes whose objects change while a model trains, or belong to one thread.
_HELD = {
    "keras.src.backend.common.variables.Variable": "a variable of Keras",
    "keras.src.optimizers.base_optimizer.BaseOptimizer": "an optimizer",
    "torch.nn.parameter.Parameter": "a parameter",
    "torch.optim.optimizer.Optimizer": "an optimizer",
    "sqlite3.Connection": "a connection of sqlite3, which belongs to one thread",
    "sqlite3.Cursor": "a cursor of sqlite3, which belongs to one thread",
}
_MODELS = ("keras.src.layers.layer.Layer", "torch.nn.modules.module.Module")
_PLAIN = (str, bytes, bytearray, int, float, complex, bool, type(None), range, slice, np.ndarray, np.generic, np.dtype)
_LIBRARIES = frozenset({
    *sys.stdlib_module_names, "torch", "keras", "numpy", "fastdp", "h5py", "PIL", "tensorflow", "torchvision", "cv2",
    "pandas", "scipy", "grain", "datasets", "webdataset", "zarr", "jax", "sklearn", "_pytest", "pytest", "pyarrow",
})  # fmt: skip


class Guard:
    """Looks at the random generators of the process while data are read that may draw from them.

    Args:
        why: why nothing is to be read ahead; None where nothing speaks against it.
        passed: the first takes that give batches which were made before.
        more: reads further state that draws change, as bytes.

    Code that makes a batch in another thread draws while the caller's code does. So batches are read ahead only once
    two of them in a row have come without a change of any generator, by whomever, and until one changes. Where only
    one side draws, that is in time: the order of its draws is the same.
    """

    def __init__(self, why: str | None = None, passed: int = 0, more: Callable[[], bytes] = bytes) -> None:
        self.why = why
        self._more = more
        self._passed, self._calm = passed, False
        self._states: dict[str, bytes] | None = None
        self._looks, self._looked = 0, 0.0

    def begin(self) -> None:
        """An epoch begins: what came between two epochs, and what its first batch draws, is in order."""
        self._states = None

    def allows(self) -> bool:
        """Whether the next batches may be read ahead. Call it after each batch."""
        if self.why is not None:
            return False
        if self._passed:
            self._passed -= 1
            return False
        now = time.monotonic()
        if self._states is not None and self._looks >= LOOKS and now - self._looked < LOOK_SECONDS:
            return self._calm
        self._looked, self._looks = now, self._looks + 1
        states, before = _generators(), self._states
        states["Keras's"] = self._more()
        self._states = states
        if before is not None:
            moved = [name for name, state in states.items() if before.get(name, state) != state]
            if moved:
                self.why = f"{' and '.join(moved)} generator moves while batches are made, by data or by the loop"
                return False
            self._calm = True
        return self._calm


def _generators() -> dict[str, bytes]:
    """The states of the process's generators."""
    torch = sys.modules.get("torch")
    return {
        "Python's": pickle.dumps(random.getstate()),
        "NumPy's": pickle.dumps(np.random.get_state(legacy=False)),  # noqa: NPY002 - it is looked at, not used
        "torch's": torch.random.default_generator.get_state().numpy().tobytes() if torch is not None else b"",
    }


def why_not_ahead(data: Iterable[Any], others: Iterable[Any] = (), *, arrays: bool = False) -> str | None:
    """Why code of the user's in `data` must not run ahead of the loop; None where nothing is found.

    Args:
        data: data sets, generators, functions: all that is run to make batches.
        others: what else runs meanwhile: callbacks.
        arrays: whether arrays that both have count too.

    What they refer to is searched: attributes, variables of functions and generators, containers; not what is in
    libraries. What data do by other ways (a file, a server, `sys.modules`) is not found.
    """
    found: dict[int, Any] = {}
    for one in _reachable(data):
        held = _held(one)
        if held is not None:
            return f"its code refers to {held}"
        found[id(one)] = one
    shared = next((one for one in _reachable(others) if id(one) in found and _changes(one, arrays)), None)
    return f"a callback refers to its {type(shared).__name__} too" if shared is not None else None


def _held(one: Any) -> str | None:
    """What it is, if a model that trains may change it; None otherwise."""
    names = [f"{kind.__module__}.{kind.__qualname__}" for kind in type(one).__mro__]
    for name in names:
        if name in _HELD:
            return _HELD[name]
    if not any(name in _MODELS for name in names):
        return None
    # Layers that only compute, such as transforms of images, are no model.
    weights = one.weights if _MODELS[0] in names else next(iter(one.parameters()), None)
    return f"the model or layer {type(one).__name__}" if weights is not None and weights != [] else None


def _changes(one: Any, arrays: bool) -> bool:
    """Whether two who have it can tell each other something by it."""
    if isinstance(one, np.ndarray) or _is_tensor(one):
        return arrays
    if isinstance(one, (*_PLAIN, tuple, frozenset, type, types.ModuleType, types.FunctionType, types.CodeType)):
        return False
    return not _of_library(type(one).__module__) or isinstance(one, (list, dict, set, deque))


def _is_tensor(one: Any) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(one, torch.Tensor)


def _of_library(module: Any) -> bool:
    return isinstance(module, str) and module != "builtins" and module.partition(".")[0] in _LIBRARIES


def _reachable(roots: Iterable[Any]) -> Iterator[Any]:
    """The objects that these refer to, near ones first, each once."""
    waiting, known = deque(roots), {0}
    kept: list[Any] = []  # an object's number is its own for as long as it lives
    while waiting and len(kept) < MOST_OBJECTS:
        one = waiting.popleft()
        if id(one) in known:
            continue
        known.add(id(one))
        kept.append(one)
        yield one
        if _held(one) is None:
            waiting.extend(_referred(one))


def _referred(one: Any) -> Iterable[Any]:
    """What an object refers to."""
    if isinstance(one, (*_PLAIN, types.ModuleType)) or _is_tensor(one):
        return ()
    if isinstance(one, types.FunctionType):
        return () if _of_library(one.__module__) else _of_function(one)
    if isinstance(one, types.GeneratorType):
        frame = one.gi_frame
        return () if frame is None else [*frame.f_locals.values(), *_of_code(one.gi_code, frame.f_globals)]
    if isinstance(one, types.MethodType):
        return (one.__self__, one.__func__)
    if isinstance(one, partial):
        return (one.func, *one.args, *one.keywords.values())
    if isinstance(one, Mapping):
        return list(one.values())[:MOST_ENTRIES] if isinstance(one, dict) else ()
    if isinstance(one, (list, tuple, set, frozenset, deque)):
        return list(one)[:MOST_ENTRIES]
    if isinstance(one, type):
        return () if _of_library(one.__module__) else [value for kind in one.__mro__ for value in _of_class(kind)]
    return [*getattr(one, "__dict__", {}).values(), *_slots(one), type(one), *_iterated(one)]


def _iterated(one: Any) -> Iterable[Any]:
    """What iterators of Python's own (`map`, `zip`, `itertools`) iterate over."""
    if type(one).__module__ not in ("builtins", "itertools") or not hasattr(one, "__next__"):
        return ()
    made = one.__reduce__() if type(one) in (map, filter, zip, enumerate) else ()
    return [part for part in made if isinstance(part, tuple)]


def _slots(one: Any) -> Iterator[Any]:
    for kind in type(one).__mro__:
        names = getattr(kind, "__slots__", ())
        for name in (names,) if isinstance(names, str) else names:
            if hasattr(one, name):
                yield getattr(one, name)


def _of_class(kind: type) -> Iterator[Any]:
    """The functions and values in the body of a class."""
    if _of_library(kind.__module__) or kind is object:
        return
    for value in vars(kind).values():
        yield value.fget if isinstance(value, property) else getattr(value, "__func__", value)


def _of_function(function: types.FunctionType) -> Iterator[Any]:
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # not set yet
            continue
    yield from function.__defaults__ or ()
    yield from (function.__kwdefaults__ or {}).values()
    yield from _of_code(function.__code__, function.__globals__)


def _of_code(code: types.CodeType, names: Mapping[str, Any]) -> Iterator[Any]:
    """The globals that code uses, also by way of modules of the user's, and in functions inside of it."""
    modules = []
    for name in code.co_names:
        value = names.get(name)
        if isinstance(value, types.ModuleType):
            modules.append(value)
        elif value is not None:
            yield value
    for module in modules:
        if not _of_library(module.__name__):
            yield from (vars(module)[name] for name in code.co_names if name in vars(module))
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _of_code(constant, names)
