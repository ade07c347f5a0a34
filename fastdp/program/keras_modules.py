"""A torch module inside a Keras model (`TorchModuleWrapper`), run on a replica's parameters."""

from __future__ import annotations

import copy
import threading
import weakref
from collections.abc import Callable
from typing import Any

import keras
import torch

from fastdp.program.keras_replica import running

# By layer: the module's structure, once for each thread that runs replicas; `functional_call` swaps the parameters
# in the structure that it calls. The copies share the parameters themselves.
_structures: weakref.WeakKeyDictionary[Any, dict[int, torch.nn.Module]] = weakref.WeakKeyDictionary()


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
    copies = _structures.setdefault(layer, {})
    thread = threading.get_ident()
    if thread not in copies:
        copies[thread] = copy.deepcopy(layer.module, {id(p): p for p in layer.module.parameters()})
    return copies[thread]


def draws_at_random(module: torch.nn.Module) -> bool:
    """Whether a module of torch's own draws random numbers in training."""
    if isinstance(module, (torch.nn.modules.dropout._DropoutNd, torch.nn.RReLU)):
        return True
    return isinstance(module, (torch.nn.RNNBase, torch.nn.MultiheadAttention)) and module.dropout > 0
