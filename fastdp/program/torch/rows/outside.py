"""Refuses modules whose forward changes what all copies share: globals, class attributes, variables of closures."""

from __future__ import annotations

import contextvars
import copy
import pickle
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from fastdp.program.torch.following.contents import Contents
from fastdp.program.torch.following.guard import Guard
from fastdp.program.torch.following.merged import equal
from fastdp.program.torch.following.outside import LOSS, Outside
from fastdp.program.torch.following.writes import MISSING, Known, Place, Written, restore, writes_of
from fastdp.program.torch.module import slots_of
from fastdp.program.torch.rows.draws import CannotSplitError

Writes = dict[Place, Written]


class SharedState:
    """What the code of a module reaches outside of it, as it is now.

    Args:
        module: the user's own. Trials run copies of it, so what they change here is shared by all copies.
        loss_fn: a loss function that all copies share; None without one.

    Attributes:
        undid: whether something had to be given its value from before.
    """

    def __init__(self, module: nn.Module, loss_fn: Any = None) -> None:
        self._contents = Outside(module, [slot.tensor for slot in slots_of(module)], loss_fn)
        self._guard = Guard(self._contents)
        self._values = [tensor.detach().clone() for _, tensor in self._contents.tensors]
        self._stays: frozenset[Place] = frozenset()
        self.undid = False
        self._states = [pickle.dumps(one) for _, one in self._contents.host_generators]

    @property
    def thread_locals(self) -> Sequence[threading.local]:
        """Objects of `threading.local` that the code reaches."""
        return self._contents.thread_locals

    @property
    def context_variables(self) -> Sequence[contextvars.ContextVar[Any]]:
        """Context variables that the code reaches and that are no globals."""
        return self._contents.context_variables

    def check(self, run: Callable[[], object], others: Sequence[Callable[[], object]]) -> None:
        """Check that runs of the module change nothing that is shared, but for what all of them set to one value.

        Such a value may be kept from the first call on: a table of positions, a mask for each length in a dict. What
        differs for other rows, or in a second run, would be changed by several devices in no fixed order.

        Args:
            run: runs a copy of the module.
            others: run it on other rows.

        Raises:
            CannotSplitError: they change something; the message names it.
        """
        with self.undone(), self._large_are_read_only():
            run()
            first = self._writes()
            run()
            second = self._writes()
        for place in {**first, **second}:
            _check(place, first.get(place), second.get(place))
        for other in others:
            with self.undone():
                other()
                found = self._writes()
            for place in {**first, **found}:
                _check_other(place, first.get(place), found.get(place))
        self._stays = frozenset(first)

    @contextmanager
    def undone(self) -> Iterator[None]:
        """Hold this while copies of the module run. Afterwards everything has the value from before.

        After a check, what runs set to one value stays: devices need not set up in a race what is set up once.
        """
        try:
            yield
        finally:
            written = self._written()
            changed = {place: one for place, one in written.items() if place not in self._stays}
            restore(self._guard, changed)
            self.undid = self.undid or bool(changed)
            for known, name in self._contents.unset:
                known.pop(name, None)

    def _writes(self) -> Writes:
        """What was written since the state was noted.

        Raises:
            CannotSplitError: a generator was used.
        """
        for (name, generator), before in zip(self._contents.host_generators, self._states, strict=True):
            if pickle.dumps(generator) != before:
                _set_state(generator, pickle.loads(before))
                raise refused(name, "draws random numbers from")
        for known, name in self._contents.unset:
            if name in known:
                raise refused(name, "sets")
        return self._written()

    def _written(self) -> Writes:
        """What was written, also to tensors through `.data`, of which torch keeps no count."""
        found = writes_of(self._guard) if self._guard.wrote() else {}
        for (name, tensor), value in zip(self._contents.tensors, self._values, strict=True):
            if Place(name, "tensor") not in found and not equal(tensor, value):
                found[Place(name, "tensor")] = Written.of(tensor.detach(), self._guard, value)
        return {place: _kept(one) for place, one in found.items()}

    @contextmanager
    def _large_are_read_only(self) -> Iterator[None]:
        """Refuse writes to large tensors and arrays, which are not compared."""
        arrays = [(name, one) for name, one in self._contents.large if isinstance(one, np.ndarray)]
        memory = {_address(one): name for name, one in self._contents.large}
        locked = [(name, one) for name, one in arrays if one.flags.writeable]
        with ExitStack() as stack:
            if memory:
                stack.enter_context(_ReadOnly(memory))
            try:
                for _, array in locked:
                    array.setflags(write=False)
                yield
            except ValueError as error:
                if locked and "read-only" in str(error):
                    raise refused(locked[0][0], "changes") from error
                raise
            finally:
                for _, array in locked:
                    array.setflags(write=True)


class _ReadOnly(TorchDispatchMode):
    """Refuses operations that write to some memory. `names` are by address."""

    def __init__(self, names: Mapping[int, str]) -> None:
        super().__init__()
        self._names = names

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Called by torch for every operation."""
        kwargs = kwargs or {}
        if func._schema.is_mutable:
            for at, argument in enumerate(func._schema.arguments):
                if argument.alias_info is None or not argument.alias_info.is_write:
                    continue
                given = args[at] if at < len(args) else kwargs.get(argument.name)
                for one in pytree.tree_leaves(given):
                    name = self._names.get(_address(one)) if isinstance(one, torch.Tensor) else None
                    if name is not None:
                        raise refused(name, "changes")
        return func(*args, **kwargs)


def _address(value: torch.Tensor | np.ndarray) -> int:
    """Where the memory of a tensor or an array begins."""
    if isinstance(value, torch.Tensor):
        return value.untyped_storage().data_ptr()
    while isinstance(value.base, np.ndarray):
        value = value.base
    return value.ctypes.data


def _set_state(generator: Any, other: Any) -> None:
    """Give a generator of Python or NumPy the state of another one."""
    if isinstance(generator, np.random.Generator):
        generator.bit_generator.state = other.bit_generator.state
    elif isinstance(generator, np.random.RandomState):
        generator.set_state(other.get_state())
    else:
        generator.setstate(other.getstate())


def _kept(written: Written) -> Written:
    """What was written, which later writes in place do not change."""
    copies = [copy.copy(one) if isinstance(one, np.ndarray) else one for one in written.leaves]
    copies = [one.detach().clone() if isinstance(one, torch.Tensor) else one for one in copies]
    return Written(written.spec, copies, written.before)


def _check(place: Place, first: Written | None, second: Written | None) -> None:
    """Check that a second run on the same rows has written nothing else."""
    if first is None or second is None or not _agree(first, second, equal):
        raise refused(place.name)


def _check_other(place: Place, first: Written | None, other: Written | None) -> None:
    """Check that a run on other rows has written the same; it may have added other keys to a dict."""
    if first is not None and other is not None:
        if _agree(first, other, _alike):
            return
    elif place.kind == "value" and (first or other).before is MISSING:  # type: ignore[union-attr]
        return
    raise refused(place.name)


def _agree(first: Written, other: Written, same: Callable[[Any, Any], bool]) -> bool:
    return first.spec == other.spec and all(map(same, first.leaves, other.leaves))


def _alike(value: Any, other: Any) -> bool:
    """Whether two leaves are the same, or objects of one class, made in one run each."""
    if isinstance(value, Known) and isinstance(other, Known):
        return type(value.value) is type(other.value)
    return equal(value, other)


def refused(name: str, how: str = "changes") -> CannotSplitError:
    """The error for what forward changes and all copies share."""
    who = "the loss function" if name.startswith(LOSS) else "forward"
    return CannotSplitError(
        f"{who} {how} `{name}`, which lies outside of the module: a global, an attribute of a class, or a variable or "
        "object that methods use. All devices share it, and each would change it, in no fixed order. Keep it on the "
        "module (self), in a buffer if it is a tensor; or use gpus=[0]."
    )


class StepWatch:
    """Notices in each step what it changes and all copies share: later rows may do what those of trials have not.

    Args:
        module: the user's own.
        own: what each copy has of its own, whose changes are merged.
        loss_fn: a loss function that all copies share; None without one.
    """

    stays_in_process = True

    def __init__(self, module: nn.Module, own: Contents, loss_fn: Any = None) -> None:
        self._module, self._own, self._loss_fn = module, own, loss_fn
        self._guard = self._look()

    def _look(self) -> Guard:
        """A guard of what is shared now."""
        contents = Outside(self._module, [slot.tensor for slot in slots_of(self._module)], self._loss_fn)
        contents.leave_out(self._own)
        return Guard(contents)

    def begin(self) -> None:
        """Called before a step: take what there is now."""
        if not self._guard.wrote():
            return
        if self._guard.keeps_kinds():
            self._guard.record()
        else:  # the user has put something else there
            self._guard = self._look()

    def check(self) -> None:
        """Called after the passes of a step. Entries that were added to a dict or to an object stay: all make the same.

        Raises:
            ValueError: the step has changed something else, which has its value from before again.
        """
        if not self._guard.wrote():
            return
        written = writes_of(self._guard)
        changed = {at: one for at, one in written.items() if at.kind != "value" or one.before is not MISSING}
        restore(self._guard, changed)
        if changed:
            raise ValueError(str(refused(next(iter(changed)).name)))
