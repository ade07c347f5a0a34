"""A snapshot of what a model's own step may change, used to roll back a step that must not count."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import keras
import torch
from keras.src.backend.common.global_state import get_global_attribute
from keras.src.optimizers.base_optimizer import BaseOptimizer
from keras.src.random.seed_generator import GLOBAL_SEED_GENERATOR
from torch.optim.optimizer import register_optimizer_step_pre_hook

from fastdp.patching import Patch


class _Thread(threading.local):
    """The rollback that copies the state of this thread's optimizers; None outside `watching`."""

    rollback: StepRollback | None = None


_thread = _Thread()


class StepRollback:
    """Copies of the variables of a model and of its optimizers, in host memory, taken before a step.

    Args:
        owners: the model whose step runs, and the model with the compile settings. Copied are their weights,
            statistics, seeds and metrics, and the optimizers among their attributes.

    Optimizers that only the step's code refers to are copied by `watching`, before they first act.
    """

    def __init__(self, owners: Sequence[keras.Model]) -> None:
        self._owners = owners
        self._values: dict[int, tuple[keras.Variable, torch.Tensor, torch.Tensor | None]] = {}
        self._torch: dict[int, tuple[torch.optim.Optimizer, dict[str, Any]]] = {}
        for owner in owners:
            self._keep([*owner.variables, *owner.metrics_variables])
            for optimizer in _optimizers(vars(owner)):
                self._keep(optimizer.variables)
        common = get_global_attribute(GLOBAL_SEED_GENERATOR)
        self._keep([common.state] if common is not None else [])

    @contextmanager
    def watching(self) -> Iterator[None]:
        """While the step runs on this thread, copy each optimizer's state before the optimizer first acts."""
        outer, thread = _thread.rollback, threading.get_ident()

        def keep_torch(optimizer: torch.optim.Optimizer, *_: Any) -> None:
            if threading.get_ident() == thread and id(optimizer) not in self._torch:
                state = optimizer.state_dict()
                self._torch[id(optimizer)] = optimizer, keras.tree.map_structure(_copied, state)

        hook = register_optimizer_step_pre_hook(keep_torch)
        try:
            with _patch:
                _thread.rollback = self
                yield
        finally:
            _thread.rollback = outer
            hook.remove()

    def restore(self) -> None:
        """Restore all copied values. Metrics that the step created are reset."""
        with torch.no_grad():
            for variable, value, gradient in self._values.values():
                variable._value.copy_(value)
                if variable._value.is_leaf:
                    variable._value.grad = gradient
        for optimizer, state in self._torch.values():
            optimizer.load_state_dict(state)
        for metric in [metric for owner in self._owners for metric in owner.metrics]:
            if any(id(v) not in self._values for v in metric.variables):
                metric.reset_state()

    def _keep(self, variables: Sequence[keras.Variable]) -> None:
        for variable in variables:
            tensor = variable._value  # None before it is initialized
            if id(variable) not in self._values and tensor is not None:
                gradient = tensor.grad if tensor.is_leaf else None
                self._values[id(variable)] = variable, tensor.detach().to("cpu", copy=True), gradient


def _keeping(original: Callable[..., Any]) -> Callable[..., Any]:
    """`apply` of Keras's optimizers that copies the optimizer's variables first on a watched thread."""

    def apply(optimizer: BaseOptimizer, grads: Any, trainable_variables: Any = None) -> Any:
        before = _thread.rollback
        if before is not None:
            if not optimizer.built and trainable_variables is not None:
                trainable_variables = list(trainable_variables)
                optimizer.build(trainable_variables)
            before._keep(optimizer.variables)
        return original(optimizer, grads, trainable_variables)

    return apply


_patch = Patch((owner, "apply", _keeping) for owner in (BaseOptimizer, keras.optimizers.LossScaleOptimizer))


def _optimizers(values: dict[str, Any]) -> list[BaseOptimizer]:
    """The Keras optimizers among these attributes and in the lists and dicts among them."""
    found = []
    for value in values.values():
        inside = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else [value]
        found += [one for one in inside if isinstance(one, BaseOptimizer)]
    return found


def _copied(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, torch.Tensor) else value
