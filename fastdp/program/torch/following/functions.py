"""Makes copies of functions for a copy of a module, so that what they keep of the module is the copy's own."""

from __future__ import annotations

import copy
import types
from typing import Any

from fastdp.program.torch.following.contents import Contents, is_empty

_OF_A_FILE = ("__builtins__", "__name__", "__package__", "__spec__", "__file__", "__doc__")


class CopiedGlobals(dict[str, Any]):
    """The globals of copied functions: some of their own, and for all other names those of the module of Python."""

    def __init__(self, known: dict[str, Any]) -> None:
        super().__init__({name: known[name] for name in _OF_A_FILE if name in known})
        self._known = known

    def __missing__(self, name: str) -> Any:
        return self._known[name]


def copy_functions(contents: Contents, memo: dict[int, Any]) -> None:
    """Begin copies of a module's functions, for `copy.deepcopy` with this memo. `fill_functions` ends them."""
    for known, names in contents.global_names.values():
        if names:
            memo[id(known)] = CopiedGlobals(known)
    for function in contents.functions:
        if isinstance(function, types.FunctionType):
            memo[id(function)] = _begun(function, memo)


def fill_functions(contents: Contents, memo: dict[int, Any]) -> None:
    """Give copies of functions what they keep: copies of what the functions keep."""
    for function in contents.functions:
        if isinstance(function, types.FunctionType):
            own = memo[id(function)]
            own.__defaults__ = copy.deepcopy(function.__defaults__, memo)
            own.__kwdefaults__ = copy.deepcopy(function.__kwdefaults__, memo)
            for cell, other in zip(function.__closure__ or (), own.__closure__ or (), strict=True):
                if other is not cell and is_empty(other) and not is_empty(cell):
                    other.cell_contents = copy.deepcopy(cell.cell_contents, memo)
    for known, names in contents.global_names.values():
        for name in names & known.keys():
            memo[id(known)][name] = copy.deepcopy(known[name], memo)
    for holder in contents.holders:
        _rebind(holder.twin(memo), memo)
    for table in contents.hooks:
        if id(table) in memo:
            _rebind(memo[id(table)], memo)


def _begun(function: types.FunctionType, memo: dict[int, Any]) -> types.FunctionType:
    """A copy of a function without what it keeps. Functions that share a variable go on to share it."""
    cells = [
        cell if _has_class(cell) else memo.setdefault(id(cell), types.CellType()) for cell in function.__closure__ or ()
    ]
    known = memo.get(id(function.__globals__), function.__globals__)
    own = types.FunctionType(function.__code__, known, function.__name__, None, tuple(cells))
    own.__module__, own.__qualname__, own.__doc__ = function.__module__, function.__qualname__, function.__doc__
    own.__dict__.update(function.__dict__)
    return own


def _has_class(cell: types.CellType) -> bool:
    """Whether the cell of a closure has a class, which copies share: `__class__` of a method."""
    return not is_empty(cell) and isinstance(cell.cell_contents, type)


def _rebind(table: Any, memo: dict[int, Any]) -> None:
    """Exchange the functions of bound methods, which `copy.deepcopy` leaves as they are."""
    if isinstance(table, dict):
        places: Any = list(table.items())
    elif isinstance(table, list):
        places = list(enumerate(table))
    elif isinstance(table, types.CellType) and not is_empty(table):
        places = [("cell_contents", table.cell_contents)]
    else:
        return
    for key, value in places:
        if isinstance(value, types.MethodType) and id(value.__func__) in memo:
            bound = types.MethodType(memo[id(value.__func__)], value.__self__)
            if isinstance(table, types.CellType):
                table.cell_contents = bound
            else:
                table[key] = bound
