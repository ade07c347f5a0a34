"""Finds out whether a loss function reads what forward sets on the module or elsewhere."""

from __future__ import annotations

import re
import types
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

from fastdp.program.torch.following.contents import Contents, is_own
from fastdp.program.torch.following.guard import Guard
from fastdp.program.torch.following.writes import Place

_CALLS = ("forward", "__call__", "__init__")


class _Reached(Contents):
    """What can be reached from a function, as far as the parts of a module."""

    def __init__(self, function: Any, module: nn.Module) -> None:
        self.own_parts: list[nn.Module] = []
        self.names: set[str] = set()
        self._begin(module, module.parameters())
        self.walk(function, "", inside=False)
        for one in self.functions:
            self.names.update(_names(getattr(one, "__func__", one).__code__))

    def _module(self, module: nn.Module, name: str, inside: bool) -> None:
        if id(module) in self._part_names:
            self.own_parts.append(module)
        else:
            super()._module(module, name, inside)

    def _leads_back(self, outside: nn.Module) -> bool:
        return True

    def _attributes(self, owner: Any, name: str, keys: list[str], inside: bool) -> None:
        for _, function in _methods(type(owner)):
            self.names.update(_names(function.__code__))
        super()._attributes(owner, name, keys, inside)


def read_by(function: Any, module: nn.Module, guard: Guard, places: Iterable[Place]) -> Place | None:
    """The first of these places that a function reads, as far as its code tells; None if it reads none.

    Args:
        function: a loss function, or a module that computes the loss.
        module, guard: the user's module, and what it holds.
        places: where forward writes.
    """
    reached = _Reached(function, module)
    parts = {id(part) for found in reached.own_parts for part in found.modules()}
    names = _with_methods(reached.names, [part for part in module.modules() if id(part) in parts])
    paths = sorted((name for name, _ in module.named_modules() if name), key=len, reverse=True)
    for place in places:
        holder = guard.by_name.get(place.holder)
        if holder is not None and reached.has(holder.table):
            return place
        if holder is not None and isinstance(holder.owner, nn.Module):
            if id(holder.owner) in parts and place.key in names:
                return place
            continue
        if holder is not None and holder.partial:
            if id(holder.table) in reached.global_names and place.key in names:
                return place
            continue
        prefix = next((path for path in paths if place.holder.startswith(f"{path}.")), "")
        if parts and names & set(re.findall(r"[A-Za-z_]\w*", place.holder[len(prefix) :])):
            return place
    return None


def _with_methods(names: set[str], parts: Iterable[nn.Module]) -> set[str]:
    """Names in some code, and in the methods of these parts that it names."""
    methods = {name: function for part in parts for name, function in _methods(type(part)) if name not in _CALLS}
    found, known = set(names), set[str]()
    while new := (found - known) & methods.keys():
        known |= new
        for name in new:
            found.update(_names(methods[name].__code__))
    return found


def _methods(cls: type) -> Iterator[tuple[str, types.FunctionType]]:
    """The methods and properties of the user's own classes."""
    for one in cls.__mro__:
        for name, value in vars(one).items() if is_own(one) else ():
            function = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
            if isinstance(function, types.FunctionType):
                yield name, function


def _names(code: types.CodeType) -> Iterator[str]:
    """The names and strings in a function and the functions nested in it."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, str):
            yield constant
        elif isinstance(constant, types.CodeType):
            yield from _names(constant)
