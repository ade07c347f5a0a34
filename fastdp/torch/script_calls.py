"""Runs the modules of a script that does not wrap them on several devices: the torch side of `fastdp run`.

A module is split where a script calls it as a whole and one of torch's optimizers has parameters of it. The script's
objects stay its own: only `Module.__call__` is replaced while this is installed. Where a call cannot be split exactly,
plain torch runs it, and one warning says why.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook
from torch.optim import Optimizer

from fastdp.options import Options
from fastdp.patching import Patch
from fastdp.runtime.queue import QueueDevice
from fastdp.torch.assignments import noticing
from fastdp.torch.parallel_module import TorchParallel
from fastdp.torch.script_modules import ScriptModule, Tally, UnsplitModule, is_lazy, why_never
from fastdp.torch.train_step import TrainStep

Call = Callable[..., Any]
_NOTHING = (
    "nothing ran on {} devices: no module that an optimizer of torch.optim trains was called in the main thread of "
    "this process. Call the module as a whole there, without torchrun, torch.distributed, spawned processes and other "
    "threads."
)


class Installed:
    """Splits the calls of a script's modules over devices.

    Args:
        devices: two or more, or the parts of devices that run shards.
        options: as in `fastdp.wrap`.

    Calls in other threads and processes than the one that made this object are plain torch, as are calls inside other
    modules, in backward, and under torch's modes and transforms.
    """

    def __init__(self, devices: Sequence[QueueDevice], options: Options) -> None:
        self._devices, self._options = list(devices), options
        self._count = len({device.part_of or device for device in devices})
        self._thread, self._process = threading.get_ident(), os.getpid()
        self._inside = False
        self._busy: list[Callable[[], bool]] = []
        self._optimizers: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        self._parts: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self._wrapped: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self._generation = 0  # counts what may change which modules are split
        self._unsplit: weakref.WeakKeyDictionary[nn.Module, tuple[int, UnsplitModule | None]]
        self._unsplit = weakref.WeakKeyDictionary()
        self._split: dict[int, ScriptModule] = {}  # by the identity of the module, which they keep
        self._tallies: list[Tally] = []
        self._has_wrapped = False

    def stay_out(self, busy: Callable[[], bool]) -> None:
        """Leave calls to plain torch while `busy()` is true."""
        self._busy.append(busy)

    # What the script does.

    def call(self, original: Call, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """A call of a module. `original` is `Module.__call__`."""
        if self._inside or threading.get_ident() != self._thread:
            return original(module, *args, **kwargs)
        self._inside = True
        try:
            if not self._nothing_around():
                return original(module, *args, **kwargs)
            found = self._split.get(id(module)) or self._found(module)
            return original(module, *args, **kwargs) if found is None else found.call(original, args, kwargs)
        finally:
            self._inside = False

    def parallel_call(self, original: Call, *args: Any, **kwargs: Any) -> Any:
        """A call of what the script has wrapped itself, with the calls of modules inside it."""
        if threading.get_ident() != self._thread:
            return original(*args, **kwargs)
        before, self._inside = self._inside, True
        try:
            return original(*args, **kwargs)
        finally:
            self._inside = before

    def optimizes(self, optimizer: Optimizer) -> None:
        """An optimizer got parameters."""
        self._optimizers.add(optimizer)
        self._generation += 1

    def wraps(self, module: nn.Module) -> None:
        """A module was wrapped. If the script did it, the script decides which calls are split."""
        if self._inside:
            return
        self._has_wrapped = True
        self._wrapped.update(module.modules())
        self._generation += 1
        for known in list(self._split.values()):
            if not self._wrapped.isdisjoint(known.module.modules()):
                del self._split[id(known.module)]

    def registers(self, owner: nn.Module, name: str, part: nn.Module | None) -> None:
        """A module became a part of another one."""
        if part is not None:
            self._parts.add(part)

    # Which modules are split.

    def _nothing_around(self) -> bool:
        """Whether nothing around a call looks at what happens inside it."""
        return not (
            torch._C._current_graph_task_id() != -1
            or torch._C._len_torch_function_stack()
            or torch._C._len_torch_dispatch_stack()
            or torch._C._functorch.peek_interpreter_stack() is not None
            or torch._C._get_tracing_state() is not None
            or torch._C._autograd._top_saved_tensors_default_hooks(False) is not None
            or any(busy() for busy in self._busy)
            or os.getpid() != self._process
        )

    def _found(self, module: nn.Module) -> ScriptModule | UnsplitModule | None:
        """What runs the calls of a module; None for those of which there is nothing to tell."""
        generation, known = self._unsplit.get(module, (-1, None))
        if generation == self._generation:
            return known
        trained = {id(parameter) for parameter in module.parameters() if parameter.requires_grad}
        found = None
        if trained and self._wrapped.isdisjoint(module.modules()) and not is_lazy(module):
            found = self._judged(module, trained, known)
        if isinstance(found, ScriptModule):
            self._generation += 1
        else:
            self._unsplit[module] = self._generation, found
        return found

    def _judged(
        self, module: nn.Module, trained: set[int], known: UnsplitModule | None
    ) -> ScriptModule | UnsplitModule | None:
        """What runs the calls of a module with these trained parameters. `known` is what has run them before."""
        reason, aloud = self._why_unsplit(module, trained), False
        if reason is None:
            reason, aloud = why_never(module), True
        if reason is not None and known is not None and known.reason == reason:
            return known
        tally = Tally(type(module).__name__)
        self._tallies.append(tally)
        if reason is not None:
            return UnsplitModule(weakref.ref(module), reason, tally, aloud=aloud)
        self._drop_finished()
        found = self._split[id(module)] = ScriptModule(module, self._devices, self._options, tally)
        return found

    def _why_unsplit(self, module: nn.Module, trained: set[int]) -> str | None:
        """Why the calls of a module are no business of this object; None if they are."""
        if trained.isdisjoint(self._in_optimizers()):
            return "no optimizer of torch.optim has its parameters."
        for known in list(self._split.values()):
            if trained.isdisjoint(map(id, known.module.parameters())):
                continue
            if known.module not in set(module.modules()):
                return f"it shares parameters with {type(known.module).__name__}, whose calls are split."
            del self._split[id(known.module)]  # a part of this one
        if module in self._parts and not list(module.children()):
            return "it is a single layer of a module that is not called as a whole. Call the module."
        return None

    def _in_optimizers(self) -> set[int]:
        """The identities of all parameters that optimizers have."""
        groups = [group for optimizer in self._optimizers for group in optimizer.param_groups]
        return {id(parameter) for group in groups for parameter in group["params"]}

    def _drop_finished(self) -> None:
        """Forget modules whose optimizers are gone."""
        optimized = self._in_optimizers()
        for known in list(self._split.values()):
            if optimized.isdisjoint(map(id, known.module.parameters())):
                del self._split[id(known.module)]

    def summary(self) -> list[str]:
        """What ran where, a line for each module that was trained; empty if the script has wrapped what it trains."""
        lines = self._counts()
        if not lines and not self._has_wrapped and not self._busy:
            return [_NOTHING.format(self._count)]
        return [_line(name, reason, ran, plain, self._count) for (name, reason), (ran, plain) in lines.items()]

    def counts(self) -> list[dict[str, Any]]:
        """The same for programs: the calls of each trained module on all devices and on one, and why not on all."""
        return [
            {"module": name, "calls_on_all_devices": parallel, "calls_on_one_device": plain, "reason": reason or None}
            for (name, reason), (parallel, plain) in self._counts().items()
        ]

    def _counts(self) -> dict[tuple[str, str], list[int]]:
        """Calls on all devices and on one, by the name of the module and the reason."""
        found: dict[tuple[str, str], list[int]] = {}
        for tally in self._tallies:
            if tally.parallel or tally.trained > 1:
                counts = found.setdefault((tally.name, tally.reason or ""), [0, 0])
                counts[0] += tally.parallel
                counts[1] += tally.plain
        return found


def _line(name: str, reason: str, parallel: int, plain: int, devices: int) -> str:
    """The summary of a module, or of several modules of a class."""
    parts = [f"{parallel} calls on {devices} device{'s' * (devices > 1)}"] if parallel else []
    parts += [f"{plain} {'' if parallel else 'calls '}on one device"] if plain else []
    return f"{name}: {', '.join(parts)}" + (f": {reason}" if reason else ".")


_installed: list[Installed] = []  # one, or none


def install(devices: Sequence[QueueDevice], options: Options) -> Installed:
    """Split the calls of a script's modules from now on. A second call replaces the first.

    Args:
        devices: two or more, or the parts of devices that run shards.
        options: as in `fastdp.wrap`.
    """
    uninstall()
    _patch.enter()
    found = Installed(devices, options)
    _installed.append(found)
    _handles.append(register_module_module_registration_hook(found.registers))
    return found


def uninstall() -> None:
    """Undo `install`. Does nothing if nothing is installed."""
    while _installed:
        _installed.pop()
        _handles.pop().remove()
        _patch.leave()


_handles: list[Any] = []


def _calling(original: Call) -> Call:
    """`Module.__call__` that may run on several devices."""

    def __call__(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or not _installed:
            return original(self, *args, **kwargs)
        return _installed[0].call(original, self, args, kwargs)

    return __call__


def _optimizing(original: Call) -> Call:
    """`Optimizer.add_param_group` that tells of the optimizer."""

    def add_param_group(self: Optimizer, param_group: dict[str, Any]) -> None:
        original(self, param_group)
        for installed in _installed:
            installed.optimizes(self)

    return add_param_group


def _wrapping(original: Call) -> Call:
    """`TorchParallel.__init__` that tells of the module."""

    def __init__(self: TorchParallel, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        for installed in _installed:
            installed.wraps(self.module)

    return __init__


def _calling_parallel(original: Call) -> Call:
    """A call of what the script has wrapped."""

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not _installed:
            return original(self, *args, **kwargs)
        return _installed[0].parallel_call(original, self, *args, **kwargs)

    return __call__


_patch = Patch(
    [
        (nn.Module, "__call__", _calling),
        (nn.Module, "__setattr__", noticing),
        (Optimizer, "add_param_group", _optimizing),
        (TorchParallel, "__init__", _wrapping),
        (TorchParallel, "__call__", _calling_parallel),
        (TrainStep, "__call__", _calling_parallel),
    ]
)
