"""Finds what a module holds besides parameters and buffers, also in what its functions keep."""

from __future__ import annotations

import collections
import dis
import functools
import itertools
import types
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.distributions import Distribution
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.hooks import RemovableHandle

from fastdp.capture.code_names import names_in_code
from fastdp.capture.libraries import UNREAD, is_buffer, may_change
from fastdp.capture.reach import Rules
from fastdp.program.torch.following.holders import Holder, Slots
from fastdp.program.torch.reach import GLOBAL_HOOKS, HOOKS, TABLES
from fastdp.tensors import pytree

ATOMS = frozenset((type(None), bool, int, float, complex, str, bytes))
_SEQUENCES = (list, collections.deque, set)
_FROZEN = (tuple, frozenset)
_OF_TORCH = (Distribution, LRScheduler)
_PLAIN_CONTAINERS = (list, tuple, dict, set, frozenset)
_DEPTH = 8
MADE_BY_TORCH = frozenset(vars(nn.Module())) - {"training"}
_MOST = 20_000
SMALL_NBYTES = 1 << 26  # larger tensors outside of a module are shared by its copies: data sets
_rules = Rules()


class Contents:
    """What can be reached from a module.

    Args:
        module: the module.
        given: its parameters and buffers, which are not looked into.

    Attributes:
        parts: the parts of the module.
        given: its parameters and buffers.
        holders: what holds values, in the order of the walk.
        tables: the tables of parameters, buffers and parts of all parts.
        hooks: the tables of hooks of all parts, and torch's of hooks on all modules.
        tensors: the tensors besides parameters and buffers that belong to the module, by name.
        shared: tensors and other values outside of the module, which its functions use and its copies share; and the
            module's generators.
        arrays: NumPy arrays that belong to the module, by name.
        own_attributes: dicts that are their own attributes (`self.__dict__ = self`).
        functions: functions that copies need copies of, since they keep something that can be changed.
        refused: what cannot be followed, since all copies would share it; empty if everything can.
        unfollowed: what cannot be followed, since nobody can compare it with what it was.
        global_names: the names of globals that copies of functions have of their own, by the identity of the globals.

    Raises:
        ValueError: too much is reached to be compared at each step.
    """

    def __init__(self, module: nn.Module, given: Iterable[torch.Tensor]) -> None:
        self._begin(module, given)
        self.walk(module, "", inside=True)
        self._global_hooks()
        for known, names in self.global_names.values():
            self.holders.append(Holder(known.get("__name__", ""), known, sorted(names), known, partial=True))
        make_unique(self.holders)

    def _begin(self, module: nn.Module, given: Iterable[torch.Tensor]) -> None:
        """Begin without anything but the parts of the module."""
        self.given = list(given)
        self._given = {id(tensor): tensor for tensor in self.given}
        self._seen: dict[int, Any] = {}
        self.parts = list(module.modules())
        self._part_names = {id(part): name for name, part in module.named_modules()}
        self.holders: list[Holder] = []
        self.tables: list[dict[Any, Any]] = []
        self.hooks: list[dict[Any, Any]] = []
        self.tensors: list[tuple[str, torch.Tensor]] = []
        self.shared: list[Any] = []
        self.arrays: list[tuple[str, np.ndarray]] = []
        self.own_attributes: list[Any] = []
        self.functions: list[Any] = []
        self.refused = self.unfollowed = ""
        self.global_names: dict[int, tuple[dict[str, Any], set[str]]] = {}

    def has(self, value: Any) -> bool:
        """Whether the walk has met an object that is not plain."""
        return id(value) in self._seen

    def walk(self, value: Any, name: str, *, inside: bool) -> None:
        """Look into a value. `inside`: it belongs to the module, and is not merely used by a function in it."""
        if type(value) in ATOMS or id(value) in self._seen or id(value) in self._given:
            return
        self._seen[id(value)] = value
        if len(self._seen) > _MOST:
            raise ValueError(
                f"The module holds more than {_MOST} values besides its parameters and buffers, as far as "
                f"`{name}`. The copies of it on other devices must follow all of them at each step. Keep data out of "
                "its attributes, and out of what its hooks and functions use."
            )
        inside = inside or id(value) in self._part_names
        if isinstance(value, torch.Tensor):
            copied = inside or value.numel() * value.element_size() <= SMALL_NBYTES
            self.tensors.append((name, value)) if copied else self.shared.append(value)
        elif isinstance(value, np.ndarray):
            copied = inside or value.nbytes <= SMALL_NBYTES
            self.arrays.append((name, value)) if copied else self.shared.append(value)
        elif isinstance(value, torch.Generator):
            self.shared.append(value)
        elif isinstance(value, nn.Module):
            self._module(value, name, inside)
        elif isinstance(value, (types.MethodType, types.FunctionType, functools.partial)):
            self._function(value, name, inside)
        elif isinstance(value, (dict, *_SEQUENCES, *_FROZEN)):
            self._container(value, name, inside)
        elif isinstance(value, Optimizer):  # a module may keep its own, and read its rate
            self.holders.append(Holder(name, vars(value), ["param_groups"], value, partial=True))
            self.walk(value.param_groups, f"{name}.param_groups", inside=inside)
        elif is_buffer(value) and inside:
            self.unfollowed = self.unfollowed or f"`{name}`, an object of class {type(value).__name__}"
        elif isinstance(value, (type, types.ModuleType)):
            return
        elif _has_attributes(value):
            if hasattr(value, "__dict__"):
                self._attributes(value, name, list(vars(value)), inside)
            slots = Slots(value)
            if slots:
                self.holders.append(Holder(name, slots, list(slots), value))
                for key in slots:
                    self.walk(slots[key], f"{name}.{key}" if name else key, inside=inside)
        elif not inside and not isinstance(value, RemovableHandle):  # a hook may remove itself
            self.shared.append(value)

    @property
    def generators(self) -> list[torch.Generator]:
        """The module's own generators, which its copies share."""
        return [value for value in self.shared if isinstance(value, torch.Generator)]

    def copied(self, copies: dict[int, Any]) -> Contents:
        """The contents of a copy, in the same order. `copies` are by the identity of what is copied."""
        other = object.__new__(Contents)
        other.holders = []
        for one in self.holders:
            table, owner = one.twin(copies), copies.get(id(one.owner), one.owner)
            is_own = table is not None
            keys = [key for key in one.keys if key in table] if is_own and isinstance(table, dict) else ()
            other.holders.append(Holder(one.name, table if is_own else one.table, keys, owner, one.partial, not is_own))
        other.tables, other.hooks = [], []
        other.given = [copies.get(id(tensor), tensor) for tensor in self.given]
        other.tensors = [(name, copies[id(tensor)]) for name, tensor in self.tensors]
        other.arrays = [(name, copies.get(id(array), array)) for name, array in self.arrays]
        return other

    def retarget(self, name: str, value: Any) -> None:
        """Note the containers in a value that forward has put in place of another, under the names of a walk."""
        if isinstance(value, (dict, *_SEQUENCES)):
            self._hold(Holder(name, value, list(value) if isinstance(value, dict) else (), value))
        if isinstance(value, dict):
            for key, one in value.items():
                self.retarget(f"{name}[{key!r}]", one)
        elif isinstance(value, (list, tuple, collections.deque)):
            for i, one in enumerate(value):
                self.retarget(f"{name}[{i}]", one)
        elif pytree.is_record(value) and hasattr(value, "__dict__") and all(h.owner is not value for h in self.holders):
            self._hold(Holder(name, vars(value), list(vars(value)), value))
            for key, one in vars(value).items():
                self.retarget(f"{name}.{key}", one)

    def _hold(self, holder: Holder) -> None:
        """Note a holder, in the place of the one of its name if there is one."""
        known = next((one for one in self.holders if one.name == holder.name), None)
        if known is None:
            self.holders.append(holder)
        else:
            known.table, known.owner, known.keys = holder.table, holder.owner, holder.keys

    def look_again(self) -> None:
        """Find the keys that the known holders have now, and no other holders."""
        for holder in self.holders:
            if isinstance(holder.table, dict) and not holder.partial:
                made = MADE_BY_TORCH if isinstance(holder.owner, nn.Module) else ()
                holder.keys = [key for key in holder.table if key not in made]

    def _global_hooks(self) -> None:
        """Torch's hooks on all modules: one function for all copies."""
        for hooks in GLOBAL_HOOKS:
            self.hooks.append(hooks)
            for hook in hooks.values():
                before = len(self.holders), len(self.functions)
                self.walk(hook, "a global hook", inside=False)
                kept = self.holders[before[0] :]
                if kept:
                    self.refused = (
                        f"{kept[0].name or 'the module'}, which a global hook of torch.nn.modules.module keeps"
                    )
                del self.functions[before[1] :]

    def _module(self, module: nn.Module, name: str, inside: bool) -> None:
        """Attributes, tables and hooks of a part, or of another module that is reached."""
        name = self._part_names.get(id(module), name)
        if not inside and not self._leads_back(module):
            self.shared.append(module)
            return
        tables = [vars(module)[key] for key in TABLES]
        hooks = [vars(module)[key] for key in HOOKS if isinstance(vars(module).get(key), dict)]
        self.tables += tables
        self.hooks += hooks
        keys = [key for key in vars(module) if key not in MADE_BY_TORCH]
        self._attributes(module, name, keys, inside)
        for table in hooks:
            for hook in table.values():
                self.walk(hook, f"a hook of {name or 'the module'}", inside=inside)
        for table in tables:
            for key, value in table.items():
                self.walk(value, f"{name}.{key}" if name else key, inside=inside)

    def _leads_back(self, outside: nn.Module) -> bool:
        """Whether a module that is no part of this one shares parts or tensors with it."""
        names, given = self._part_names, self._given
        return any(id(part) in names for part in outside.modules()) or any(id(p) in given for p in outside.parameters())

    def _attributes(self, owner: Any, name: str, keys: list[str], inside: bool) -> None:
        attributes = vars(owner)
        self.holders.append(Holder(name, attributes, keys, owner))
        for key in keys:
            value = attributes[key]
            self.walk(value, f"{name}.{key}" if name else key, inside=inside)

    def _container(self, container: Any, name: str, inside: bool) -> None:
        if is_own(type(container)) and hasattr(container, "__dict__"):
            if vars(container) is container:
                self.own_attributes.append(container)
            else:
                self._attributes(container, name, list(vars(container)), inside)
        if isinstance(container, dict):
            held = dict(
                dict.items(container)
            )  # what it holds: a class of its own may make items when it is asked for them
            self.holders.append(Holder(name, container, list(held), container))
            for key, value in held.items():
                self.walk(value, f"{name}[{key!r}]", inside=inside)
            return
        if isinstance(container, _SEQUENCES):
            self.holders.append(Holder(name, container, (), container))
        for i, value in enumerate(list(container)):
            self.walk(value, f"{name}[{i}]", inside=inside)

    def _function(self, function: Any, name: str, inside: bool) -> None:
        """What a function keeps: what it is bound to, its closure, its defaults, and globals that can be changed."""
        if isinstance(function, functools.partial):
            for i, value in enumerate((function.func, *function.args, *function.keywords.values())):
                self.walk(value, f"{name}({i})", inside=inside)
            return
        if isinstance(function, types.MethodType):
            self.walk(function.__self__, name, inside=False)
            if function.__func__ is not getattr(type(function.__self__), function.__name__, None):
                self.walk(function.__func__, name, inside=inside)
                self.functions.append(function)
            return
        if not is_own(function):
            return
        self.functions.append(function)
        where = function.__qualname__
        for key, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            if id(cell) not in self._seen:
                self._seen[id(cell)] = cell
                self.holders.append(Holder(f"variable {key} of {where}()", cell, (), cell))
                if not is_empty(cell):
                    self.walk(cell.cell_contents, f"{key} of {where}()", inside=False)
        if vars(function):
            self._attributes(function, f"{where}()", list(vars(function)), False)
        for value in (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()):
            self.walk(value, f"a default of {where}()", inside=False)
        self._globals(function)

    def _globals(self, function: types.FunctionType) -> None:
        """The globals that a function names, if their values can be changed or the function assigns them."""
        known = function.__globals__
        stored = set(stored_names(function.__code__))
        _, kept = self.global_names.setdefault(id(known), (known, set()))
        for key in sorted(set(names_in_code(function.__code__)) & known.keys()):
            value = known[key]
            if key not in stored and (type(value) in ATOMS or not self._is_changeable(value)):
                continue
            kept.add(key)
            self.walk(value, key, inside=False)

    def _is_changeable(self, value: Any) -> bool:
        """Whether a copy of a function needs its own value of a global."""
        if isinstance(value, nn.Module):
            return id(value) in self._part_names or self._leads_back(value)
        if isinstance(value, (type, types.ModuleType)):
            return False
        if isinstance(value, (types.FunctionType, types.MethodType)):
            return is_own(value)
        kinds = (dict, *_SEQUENCES, *_FROZEN, functools.partial, torch.Tensor, np.ndarray)
        return isinstance(value, kinds) or (_has_attributes(value) and not isinstance(value, UNREAD))


def make_unique(holders: list[Holder]) -> None:
    """Number the holders that have one name, such as closures of functions that one function has made."""
    counts: collections.Counter[str] = collections.Counter()
    for holder in holders:
        counts[holder.name] += 1
        if counts[holder.name] > 1:
            holder.name = f"{holder.name} #{counts[holder.name]}"


def is_plain(value: Any, depth: int = 0) -> bool:
    """Whether a value consists of numbers, strings and the like, also in containers, and can be compared by value."""
    if type(value) in ATOMS:
        return True
    if type(value) not in _PLAIN_CONTAINERS or depth > _DEPTH:
        return False
    inside = itertools.chain(value.keys(), value.values()) if type(value) is dict else value
    return all(is_plain(one, depth + 1) for one in inside)


def is_own(thing: Any) -> bool:
    """Whether a class or a function is the user's, or belongs to a library without rules."""
    return _rules.is_own(thing) or (isinstance(thing, types.FunctionType) and thing.__module__ is None)


def is_empty(cell: types.CellType) -> bool:
    """Whether the cell of a closure has no value yet."""
    return cell == types.CellType()


def _has_attributes(value: Any) -> bool:
    """Whether to look into the attributes of an object. Weak sets keep nothing of their own."""
    if isinstance(value, (weakref.WeakSet, weakref.WeakValueDictionary)):
        return False
    return is_own(type(value)) or may_change(type(value)) or isinstance(value, _OF_TORCH) or _is_parallel(value)


def _is_parallel(value: Any) -> bool:
    """Whether a value is fastdp's own and stands for a module."""
    return type(value).__module__.startswith("fastdp.") and isinstance(
        getattr(value, "__dict__", {}).get("module"), nn.Module
    )


_STORING = (dis.opmap["STORE_GLOBAL"], dis.opmap["DELETE_GLOBAL"])


def stored_names(code: types.CodeType) -> Iterator[str]:
    """The names of the globals that a function and the functions nested in it assign or delete."""
    operations = code.co_code[::2]  # most assign none, and `dis` is slow
    for one in dis.get_instructions(code) if any(operation in operations for operation in _STORING) else ():
        if one.opcode in _STORING:
            yield one.argval
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from stored_names(constant)
