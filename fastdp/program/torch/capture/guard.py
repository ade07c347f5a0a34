"""Lists what a trace of a torch module's step has read, and what of the user's code a replay would leave out."""

from __future__ import annotations

import builtins
import logging
import types
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from fastdp.capture.code_names import names_in_code
from fastdp.capture.watch import Watch
from fastdp.errors import NotCapturable
from fastdp.program.torch.module import Slot
from fastdp.program.torch.parameter_hooks import has_node_hooks
from fastdp.program.torch.reach import HOOKS, TorchRules, reach_of

PARAMETER_HOOKS = ("_backward_hooks", "_post_accumulate_grad_hooks")
_EFFECTS = (print, open, input, breakpoint, warnings.warn)
_READS_FILES = ("read_text", "read_bytes", "open")
_MODULES = ("time", "logging", "warnings", "sys", "os", "wandb", "tensorboard", "tqdm")


def watch_pass(
    watch: Watch,
    module: nn.Module,
    slots: Sequence[Slot],
    loss_fn: Any = None,
    of_parameters: Sequence[str] = ("requires_grad", *PARAMETER_HOOKS),
) -> None:
    """Add everything that a pass reads besides its variables and its batch: a training step, or forward alone.

    Args:
        watch: gets it.
        module, slots, loss_fn: what runs.
        of_parameters: the attributes of parameters that count.

    Raises:
        NotCapturable: it uses tensors outside of the module that have a gradient, or are too large to be compared, or
            something that may change unseen.
    """
    reach = reach_of(watch, [slot.tensor for slot in slots])
    reach.walk(module, "module")
    if loss_fn is not None:
        reach.walk(loss_fn, "loss_fn")
    for function in _functions(module, loss_fn):
        for name in names_in_code(function.__code__):
            if name in _READS_FILES and function.__globals__.get(name, open) is open:
                raise NotCapturable(f"{name} in {function.__qualname__}(): what is in a file may change")
    for slot in slots:
        if slot.is_parameter:
            for name in of_parameters:
                watch.attribute_of_many(slot.tensor, name, f"{slot.name}.{name}")
    parameters = [slot.tensor for slot in slots if slot.is_parameter]
    what = "hooks on autograd's nodes of parameters"
    watch.answer(lambda: has_node_hooks(parameters), what, mark=lambda: RemovableHandle.next_id)
    for tensor, name in watch.tensors:
        if tensor.requires_grad:
            raise NotCapturable(f"{name}, a tensor that is no parameter of the module and gets a gradient")
    if watch.by_version:
        tensor, name = watch.by_version[0]
        nbytes = tensor.numel() * tensor.element_size()
        raise NotCapturable(
            f"{name}, a tensor of {nbytes} bytes that is no parameter or buffer, so writes to it may go unnoticed. "
            "Register it by register_buffer"
        )


def refuse_hooks(slots: Sequence[Slot]) -> None:
    """Refuse hooks on parameters, which no replay would run.

    Raises:
        NotCapturable: there is one.
    """
    for slot in slots:
        if slot.is_parameter and any(getattr(slot.tensor, hooks) for hooks in PARAMETER_HOOKS):
            raise NotCapturable(f"a hook on the parameter `{slot.name}`")
    if has_node_hooks(slot.tensor for slot in slots if slot.is_parameter):
        raise NotCapturable("a hook on the node of autograd's graph that accumulates the gradient of a parameter")


def side_effect(module: nn.Module, loss_fn: Any = None) -> str:
    """A call in the user's code that a replay would leave out (`print`, a clock, a file), in words; empty if none."""
    for function in _functions(module, loss_fn):
        for name in names_in_code(function.__code__):
            value = function.__globals__.get(name, getattr(builtins, name, None))
            home = value if isinstance(value, types.ModuleType) else None
            of_module = home.__name__ if home is not None else str(getattr(value, "__module__", ""))
            if value in _EFFECTS or isinstance(value, logging.Logger) or of_module.split(".")[0] in _MODULES:
                return f"{name} in {function.__qualname__}()"
    return ""


def _functions(module: nn.Module, loss_fn: Any) -> Iterator[types.FunctionType]:
    """The user's functions that a step reaches by name from `forward`, hooks and the loss."""
    is_own = TorchRules().is_own
    seen: set[types.FunctionType] = set()
    waiting: list[tuple[Any, Any]] = [(loss_fn if not isinstance(loss_fn, nn.Module) else None, None)]
    parts = [*module.modules(), *(loss_fn.modules() if isinstance(loss_fn, nn.Module) else ())]
    for part in parts:
        waiting.append((part.forward, part))
        waiting += [(hook, None) for name in HOOKS[:-1] for hook in getattr(part, name).values()]
    while waiting:
        found, owner = waiting.pop()
        function = found.__func__ if isinstance(found, types.MethodType) else found
        if not isinstance(function, types.FunctionType) or function in seen or not is_own(function):
            continue
        seen.add(function)
        yield function
        for name in names_in_code(function.__code__):
            waiting.append((function.__globals__.get(name), None))
            if owner is not None:
                waiting.append((getattr(type(owner), name, None), owner))
