"""Tells code of libraries from the user's, and what lies behind objects that only refer to others."""

from __future__ import annotations

import array
import collections
import concurrent.futures
import ctypes
import functools
import gc
import io
import logging
import operator
import sys
import sysconfig
import threading
import types
import weakref
from pathlib import Path
from typing import Any

import numpy as np

_NAMES = frozenset({"torch", "numpy", "fastdp"})
_VIEWS: tuple[type, ...] = (type({}.keys()), type({}.values()), type({}.items()))
_BOUND = (types.BuiltinMethodType, types.MethodWrapperType)
_BUFFERS = (bytearray, memoryview, array.array, ctypes._SimpleCData, ctypes.Array, ctypes.Structure, ctypes.Union)
# Objects that no step computes with, or that nobody can change.
UNREAD: tuple[type, ...] = (
    io.IOBase,
    logging.Logger,
    logging.Handler,
    threading.Thread,
    concurrent.futures.Executor,
    type(threading.Lock()),
    type(threading.RLock()),
    operator.itemgetter,
    operator.attrgetter,
    operator.methodcaller,
    np.ufunc,
    type(Ellipsis),
    type(NotImplemented),
    types.WrapperDescriptorType,
    types.MethodDescriptorType,
    types.ClassMethodDescriptorType,
    types.GetSetDescriptorType,
    types.MemberDescriptorType,
    type(vars(collections.namedtuple("_", "x"))["x"]),  # a field of a named tuple
)


def is_library(package: str) -> bool:
    """Whether a top-level module is torch's, NumPy's, fastdp's or the standard library's."""
    return package in _NAMES or is_standard(package)


@functools.cache
def is_standard(package: str) -> bool:
    """Whether a top-level module is the standard library's, and not one of the user's that has its name."""
    if package not in sys.stdlib_module_names:
        return False
    origin = getattr(getattr(sys.modules.get(package), "__spec__", None), "origin", None)
    if origin in (None, "built-in", "frozen"):
        return True
    standard = [Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "platstdlib")]
    file = Path(origin).resolve()
    return "site-packages" not in file.parts and any(file.is_relative_to(folder) for folder in standard)


def may_change(cls: type) -> bool:
    """Whether objects of a class of the standard library may change. Those with a hash by value do not."""
    return is_standard(str(cls.__module__).split(".")[0]) and not _is_by_value(cls)


def behind(value: Any) -> Any:
    """What an object refers to, if it is a weak reference, a view, a cache or a method of C's; else itself.

    None for what refers to nothing.
    """
    if type(value) in weakref.ProxyTypes:
        try:
            return value.__init__.__self__
        except ReferenceError:
            return None
    if isinstance(value, weakref.ref):
        return value()
    if isinstance(value, _VIEWS):
        view: Any = value
        return gc.get_referents(view.mapping)[0]
    if isinstance(value, types.MappingProxyType):
        return gc.get_referents(value)[0]
    if isinstance(value, functools._lru_cache_wrapper):
        return value.__wrapped__
    if isinstance(value, _BOUND):
        owner = value.__self__
        return None if isinstance(owner, (type, types.ModuleType)) else owner
    return value


def is_buffer(value: Any) -> bool:
    """Whether an object is plain memory that can be changed in place."""
    return isinstance(value, _BUFFERS)


def is_moved_by_reading(value: Any) -> bool:
    """Whether an object of a library is an iterator: reading from it changes it."""
    return hasattr(type(value), "__next__")


def is_opaque(value: Any) -> bool:
    """Whether an object keeps what it has where Python cannot see it, and may change."""
    cls = type(value)
    if isinstance(value, ctypes._Pointer):
        return True
    if cls.__module__ == "multiprocessing.synchronize":
        return cls.__name__ not in ("Lock", "RLock")
    if cls is object or hasattr(value, "__dict__") or _is_by_value(cls) or cls.__name__ == "SemLock":
        return False
    return not any("__slots__" in vars(base) for base in cls.__mro__)


def _is_by_value(cls: type) -> bool:
    """Whether a class has a hash of its own: by convention its objects do not change."""
    own_hash: Any = cls.__hash__
    return own_hash is not None and own_hash is not object.__hash__
