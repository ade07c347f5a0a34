"""Runs a torch module inside a Keras model (`TorchModuleWrapper`) on a replica's parameters."""

from __future__ import annotations

import copy
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import keras
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastdp.capture.watch import Watch
from fastdp.program.keras.capture.reach import reach_of
from fastdp.program.keras.replica import running
from fastdp.tensors.row_effects import NotByRowsError

REMEDY = "Use keras.layers for this part, or write the whole model as a torch.nn.Module and wrap that."

# By layer: one copy of the module's structure per thread that runs replicas, because `functional_call` swaps the
# parameters in the module that it calls. The copies share the parameters. They are rebuilt when the module changes.
_structures: weakref.WeakKeyDictionary[Any, tuple[Watch, dict[int, torch.nn.Module]]] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def call_of_replica(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `TorchModuleWrapper.call` to use the replica's values of the module's parameters."""

    def call(layer: Any, *args: Any, training: bool | None = None, **kwargs: Any) -> Any:
        state = running()
        if state is None or not keras.src.backend.in_stateless_scope():
            return original(layer, *args, training=training, **kwargs)
        module = _structure(layer)
        module.train(training is not False)
        variables = {id(variable._value): variable for variable in layer.variables}
        values = {name: variables[id(p)].value for name, p in layer.module.named_parameters()}
        with _watched(layer.name, module) if state.frozen_moments else nullcontext():
            return torch.func.functional_call(module, values, args, kwargs)

    return call


def _structure(layer: Any) -> torch.nn.Module:
    """This thread's copy of the layer's module, with the same parameters."""
    with _lock:
        known = _structures.get(layer)
        if known is None or known[0].changed():
            watch = Watch()
            reach_of(watch, layer.variables).walk(layer.module, layer.name)
            known = _structures[layer] = watch, {}
    copies, thread = known[1], threading.get_ident()
    if thread not in copies:
        copies[thread] = structure_of(layer.module)
    return copies[thread]


def structure_of(module: torch.nn.Module) -> torch.nn.Module:
    """A copy of a module that shares its parameters and the tensors that belong to autograd's graph."""
    shared = {id(p): p for p in module.parameters()}
    for inside in module.modules():
        shared |= {id(v): v for v in vars(inside).values() if isinstance(v, torch.Tensor) and not v.is_leaf}
    return copy.deepcopy(module, shared)


class _NoDraws(TorchDispatchMode):
    """Refuses operations that draw random numbers."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self._name = name

    def __torch_dispatch__(self, target: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation unless it draws random numbers."""
        if torch.Tag.nondeterministic_seeded in getattr(target, "tags", ()):
            raise NotByRowsError(
                f"The TorchModuleWrapper {self._name!r} holds a module that draws at random in its forward pass "
                f"({target}), from a generator of torch, which devices cannot share. {REMEDY}"
            )
        return target(*args, **(kwargs or {}))


@contextmanager
def _watched(name: str, module: torch.nn.Module) -> Iterator[None]:
    """While a trial runs a module's copy, check that it neither draws random numbers nor changes its state.

    Raises:
        NotByRowsError: the module does.
    """
    before = _state(module)
    with _NoDraws(name):
        yield
    after = _state(module)
    changed = [key for key in {**before, **after} if not _is_kept(before.get(key), after.get(key))]
    if changed:
        raise NotByRowsError(
            f"The TorchModuleWrapper {name!r} holds a module that changes its attribute {changed[0]!r} in its forward "
            f"pass. Neither Keras nor torch tracks it as state, so devices cannot share it. {REMEDY}"
        )


def _state(module: torch.nn.Module) -> dict[str, Any]:
    """All attributes of the modules inside except parameters, buffers and submodules, with containers copied."""
    found = {}
    for path, inside in module.named_modules():
        # The weight that `torch.nn.utils.weight_norm` computes from its parameters at each call.
        made = {getattr(hook, "name", "") for hook in inside._forward_pre_hooks.values()}
        for key, value in vars(inside).items():
            if key not in made and not (key.startswith("_") and key in vars(_PLAIN)):
                is_container = isinstance(value, (list, dict, set, bytearray))
                found[f"{path}.{key}".lstrip(".")] = copy.copy(value) if is_container else value
    return found


def _is_kept(before: Any, after: Any) -> bool:
    """Whether an attribute is unchanged."""
    plain = (int, float, str, bool, list, dict, set, bytearray)
    return before is after or (type(before) is type(after) and isinstance(before, plain) and before == after)


_PLAIN = torch.nn.Module()


def draws_at_random(module: torch.nn.Module) -> bool:
    """Whether one of torch's own modules draws random numbers in training."""
    if isinstance(module, (torch.nn.modules.dropout._DropoutNd, torch.nn.RReLU)):
        return True
    return isinstance(module, (torch.nn.RNNBase, torch.nn.MultiheadAttention)) and module.dropout > 0
