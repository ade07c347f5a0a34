"""Runs the calls of one module of a script on several devices, or as plain torch, and says why."""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as torch_module
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from fastdp.comm.batch import Batch
from fastdp.errors import ReplicaError
from fastdp.options import Options
from fastdp.program.torch.loop import LoopProgram
from fastdp.program.torch.rows.judge import FAILURES
from fastdp.program.torch.rows.plain import is_torchs_hook
from fastdp.runtime.queue import QueueDevice
from fastdp.tensors import pytree
from fastdp.torch.assignments import Assignments, KeepsValuesError, refused, watched
from fastdp.torch.checks import check_module
from fastdp.torch.parallel_module import TorchParallel
from fastdp.warn import warn_user

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_CHANCES = 3  # how often a module may assign attributes before its calls stay on one device
Call = Callable[..., Any]


class _CertainProgram(LoopProgram):
    """Runs only modules that could be tried, so that trials have told how outputs and buffers depend on the rows."""

    def judge(self, batch: Batch, *args: Any, **kwargs: Any) -> Batch:
        """As in `TorchProgram`.

        Raises:
            ValueError: also if the module could not be tried.
        """
        batch = super().judge(batch, *args, **kwargs)
        if batch.structure.judged is None and batch.structure.draws.tried:
            raise ValueError("it could not be tried on a few rows of its batch.")
        return batch


class _CertainParallel(TorchParallel):
    """A parallel module whose calls are exact, or refused."""

    _program_class = _CertainProgram


@dataclass(slots=True)
class _Kind:
    """What is known about calls in one mode. `quiet` says that forward keeps nothing, `counts` what it counts."""

    quiet: bool = False
    counts: Assignments | None = None
    chances: int = _CHANCES
    refused: str | None = None


@dataclass(slots=True)
class Tally:
    """How many calls of a module ran on all devices, on one, and on one with gradients; why they did not on all."""

    name: str
    parallel: int = 0
    plain: int = 0
    trained: int = 0
    reason: str | None = None

    def count_plain(self) -> None:
        """Count a call as plain torch."""
        self.plain += 1
        self.trained += torch.is_grad_enabled()


def plainly(original: Call, module: nn.Module, args: Any, kwargs: Any) -> Any:
    """A call as plain torch, with host tensors, of a module that fastdp may have moved to a GPU."""
    parameter = next(module.parameters(), None)
    if parameter is None or parameter.device.type == "cpu":
        return original(module, *args, **kwargs)
    given = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    if any(tensor.device.type != "cpu" for tensor in given):
        return original(module, *args, **kwargs)
    args, kwargs = pytree.tree_map_only(torch.Tensor, lambda x: x.to(parameter.device), (args, kwargs))
    return pytree.tree_map_only(torch.Tensor, lambda y: y.cpu(), original(module, *args, **kwargs))


class UnsplitModule:
    """A module whose calls are plain torch.

    Args:
        module: the script's own.
        reason: why.
        tally: counts the calls.
        aloud: warn at the first call with gradients.
    """

    def __init__(self, module: weakref.ref[nn.Module], reason: str, tally: Tally, *, aloud: bool) -> None:
        self.reason = tally.reason = reason
        self._module, self._tally, self._aloud = module, tally, aloud

    def call(self, original: Call, args: Any, kwargs: Any) -> Any:
        """One call of the module."""
        self._tally.count_plain()
        if self._aloud and torch.is_grad_enabled():
            self._aloud = False
            _warn(self._tally)
        module = self._module()
        assert module is not None
        return plainly(original, module, args, kwargs)


class ScriptModule:
    """A module that a script calls and trains.

    Args:
        module: the script's own.
        devices: two or more.
        options: as in `fastdp.wrap`.
        tally: counts the calls.

    The first calls of each kind (training, gradients) are plain torch: they show whether forward keeps values in
    attributes. Later calls run on all devices, with the results and gradients of plain torch. What cannot be split
    runs as plain torch, and one warning says why.
    """

    def __init__(self, module: nn.Module, devices: Sequence[QueueDevice], options: Options, tally: Tally) -> None:
        self.module = module
        self._tally = tally
        self._devices, self._options = devices, options
        self._parts = list(module.modules())
        self._parameters = _parameters(self._parts)
        self._parallel: TorchParallel | None = None
        self._kinds: dict[Any, _Kind] = {}
        self._said: set[str] = set()

    def call(self, original: Call, args: Any, kwargs: Any) -> Any:
        """One call of the module. `original` is `Module.__call__`.

        Raises:
            what the module itself raises.
        """
        kind = self._kinds.setdefault((self.module.training, torch.is_grad_enabled()), _Kind())
        reason = kind.refused or self._why_not_now(args, kwargs)
        if reason is not None:
            return self._plainly(original, args, kwargs, reason)
        if not kind.quiet:
            return self._watched(kind, original, args, kwargs)
        drawn = torch.get_rng_state()
        try:
            found = self._on_devices(kind, args, kwargs)
        except FAILURES as error:
            torch.set_rng_state(drawn)
            return self._after(error, kind, original, args, kwargs)
        self._tally.parallel += 1
        return found

    def _watched(self, kind: _Kind, original: Call, args: Any, kwargs: Any) -> Any:
        """A plain call that shows what forward assigns."""
        self._parts = list(self.module.modules())
        with watched(self._parts) as seen:
            found = plainly(original, self.module, args, kwargs)
        self._tally.count_plain()
        if seen.agrees_with(kind.counts):
            kind.quiet = True
        else:
            kind.chances -= 1
            if not kind.chances:
                kind.refused = _keeps(seen.first)
        kind.counts = seen
        if kind.refused is not None:
            self._say(kind.refused)
        return found

    def _on_devices(self, kind: _Kind, args: Any, kwargs: Any) -> Any:
        """A call on all devices."""
        assert kind.counts is not None
        with refused(kind.counts):
            if self._parallel is not None:
                try:
                    return self._parallel(*args, **kwargs)
                except FAILURES as error:
                    if _cause(error) is not error:  # it arose in the module
                        raise
                    self._parallel = None  # the module may have been changed, as by `module.double()`
            self._parallel = _CertainParallel(self.module, self._devices, self._options)
            return self._parallel(*args, **kwargs)

    def _after(self, error: BaseException, kind: _Kind, original: Call, args: Any, kwargs: Any) -> Any:
        """Run a call that failed on several devices as plain torch; if it fails there too, the script has the error."""
        cause = _cause(error)
        if isinstance(cause, KeepsValuesError):
            kind.quiet = False
            return self._watched(kind, original, args, kwargs)
        found = plainly(original, self.module, args, kwargs)
        self._tally.count_plain()
        kind.refused = str(cause)
        self._say(kind.refused)
        return found

    def _plainly(self, original: Call, args: Any, kwargs: Any, reason: str) -> Any:
        """A call as plain torch, for a reason."""
        self._tally.count_plain()
        self._say(reason)
        return plainly(original, self.module, args, kwargs)

    def _say(self, reason: str) -> None:
        """Warn once for each reason."""
        self._tally.reason = reason
        if reason not in self._said:
            self._said.add(reason)
            _warn(self._tally)

    def _why_not_now(self, args: Any, kwargs: Any) -> str | None:
        """Why a call cannot be split, as far as one sees before."""
        present = _parameters(self._parts)
        if len(present) != len(self._parameters) or any(map(operator.is_not, present, self._parameters)):
            return "its parameters are other ones than when it was first called (functional_call, or an exchange)."
        for part in self._parts:
            for name in _HOOKS:
                hooks = part.__dict__.get(name)
                if hooks and not all(map(is_torchs_hook, hooks.values())):
                    return "it has hooks, which would see the first rows only. Remove them while it trains."
        if torch_module._has_any_global_hook():
            return "there are hooks on all modules, which would see the first rows only."
        leaves = pytree.tree_leaves((args, kwargs))
        if not any(isinstance(leaf, torch.Tensor) and leaf.ndim for leaf in leaves):
            return "it was called with no tensors that have rows."
        return None


def _parameters(parts: Sequence[nn.Module]) -> list[torch.Tensor | None]:
    """The parameters in the tables of a module's parts."""
    return [parameter for part in parts for parameter in part._parameters.values()]


def why_never(module: nn.Module) -> str | None:
    """Why no call of a module can be split. None if some may."""
    for part in module.modules():
        reason = _why_part(part)
        if reason is not None:
            return reason
    try:
        check_module(module)
    except (TypeError, ValueError) as error:
        return str(error)
    return None


def is_lazy(module: nn.Module) -> bool:
    """Whether parameters or buffers have no shapes yet."""
    tensors = (*module.parameters(), *module.buffers())
    return any(isinstance(one, (UninitializedParameter, UninitializedBuffer)) for one in tensors)


def _why_part(part: nn.Module) -> str | None:
    """Why a module with this part cannot be split."""
    kind = type(part)
    if isinstance(part, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        return f"it is parallel already. Leave {kind.__name__} out: `fastdp run` does its work."
    if kind.__module__.startswith("torch._dynamo") or part._compiled_call_impl is not None:
        return "it is compiled. Leave torch.compile out."
    if kind.__module__.partition(".")[0] == "keras":
        return f"it has the Keras layer {kind.__name__} in it."
    for tensor in (*part._parameters.values(), *part._buffers.values()):
        if tensor is not None and tensor.device.type != "cpu":
            return (
                f"its parameters are on {tensor.device}, and fastdp takes modules from host memory to all devices. "
                "Leave .cuda() and .to(device) out for the module and its batches."
            )
    return None


def _keeps(name: str) -> str:
    return (
        f"forward keeps values in the attribute {name}, which would be those of the first rows only. Return them, or "
        "keep them in a registered buffer."
    )


def _warn(tally: Tally) -> None:
    """Warn that calls run on one device."""
    warn_user(f"fastdp: calls of the module {tally.name} run on one device, as plain torch: {tally.reason}")


def _cause(error: BaseException) -> BaseException:
    """What went wrong on a replica; the error itself if it arose elsewhere."""
    return error.__cause__ if isinstance(error, ReplicaError) and error.__cause__ is not None else error
