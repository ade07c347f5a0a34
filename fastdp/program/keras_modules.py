"""A torch module inside a Keras model (`TorchModuleWrapper`), run on a replica's parameters."""

from __future__ import annotations

import copy
import threading
import weakref
from collections.abc import Callable
from typing import Any

import keras
import torch

from fastdp.program.capture_reach import Reach
from fastdp.program.capture_watch import Watch
from fastdp.program.keras_replica import running

# By layer: the module's structure, once for each thread that runs replicas; `functional_call` swaps the parameters
# in the structure that it calls. The copies share the parameters themselves. They are made anew when the module is no
# longer what it was.
_structures: weakref.WeakKeyDictionary[Any, tuple[Watch, dict[int, torch.nn.Module]]] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def call_of_replica(original: Callable[..., Any]) -> Callable[..., Any]:
    """`TorchModuleWrapper.call` on the values that the replica's scope has for the module's parameters."""

    def call(layer: Any, *args: Any, training: bool | None = None, **kwargs: Any) -> Any:
        if running() is None or not keras.src.backend.in_stateless_scope():
            return original(layer, *args, training=training, **kwargs)
        module = _structure(layer)
        module.train(training is not False)
        variables = {id(variable._value): variable for variable in layer.variables}
        values = {name: variables[id(p)].value for name, p in layer.module.named_parameters()}
        return torch.func.functional_call(module, values, args, kwargs)

    return call


def _structure(layer: Any) -> torch.nn.Module:
    """This thread's copy of the layer's module, with the same parameters."""
    with _lock:
        known = _structures.get(layer)
        if known is None or known[0].changed():
            watch = Watch()
            Reach(watch, layer.variables, set()).walk(layer.module, layer.name)
            known = _structures[layer] = watch, {}
    copies, thread = known[1], threading.get_ident()
    if thread not in copies:
        copies[thread] = copy.deepcopy(layer.module, {id(p): p for p in layer.module.parameters()})
    return copies[thread]


def draws_at_random(module: torch.nn.Module) -> bool:
    """Whether a module of torch's own draws random numbers in training."""
    if isinstance(module, (torch.nn.modules.dropout._DropoutNd, torch.nn.RReLU)):
        return True
    return isinstance(module, (torch.nn.RNNBase, torch.nn.MultiheadAttention)) and module.dropout > 0
