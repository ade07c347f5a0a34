"""One torch optimizer per replica, all kept in step with the first, which is the user's."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch

OptimizerFactory = Callable[[list[torch.Tensor]], torch.optim.Optimizer]


class Optimizers:
    """The optimizers of all replicas.

    Args:
        factory: `factory(parameters)` makes an optimizer; called once per replica with equal parameters.

    The first optimizer is over the user's own parameters. Before each step the others copy its settings:
    learning rates and whatever else is assigned in its `param_groups`. They also copy its state after the user
    has loaded one, or after a step has failed half-way.

    Raises:
        TypeError: `factory` is not a function but, say, an optimizer.
    """

    def __init__(self, factory: OptimizerFactory) -> None:
        if not callable(factory):
            raise TypeError(
                "`optimizer_factory` must be a function that makes an optimizer from parameters, such as "
                "lambda parameters: torch.optim.SGD(parameters, lr=0.1), since each device has its own. "
                f"Received: an object of type {type(factory).__name__}"
            )
        self._factory = factory
        self._all: list[torch.optim.Optimizer] = []
        self._parameters: list[list[torch.Tensor]] = []
        self._state: Any = None
        self.suspect = False

    @property
    def first(self) -> torch.optim.Optimizer:
        """The user's optimizer."""
        return self._all[0]

    def are_torchs_own(self) -> bool:
        """Whether a step runs none of the user's code."""
        return all(type(optimizer).__module__.startswith("torch.optim") for optimizer in self._all)

    def add(self, parameters: Sequence[torch.Tensor]) -> torch.optim.Optimizer:
        """Make the next replica's optimizer.

        Raises:
            TypeError: `factory` does not return an optimizer.
            ValueError: the optimizer has other parameters, or needs a closure.
        """
        optimizer = self._factory(list(parameters))
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(
                "`optimizer_factory` must make an optimizer from parameters, such as "
                f"lambda parameters: torch.optim.SGD(parameters, lr=0.1). It returned: {optimizer!r} "
                f"(of type {type(optimizer).__name__})"
            )
        ours = {id(parameter) for parameter in parameters}
        if any(id(p) not in ours for group in optimizer.param_groups for p in group["params"]):
            raise ValueError(
                "`optimizer_factory` must make a new optimizer over the parameters that it is given, since every "
                "device has its own. The one it returned holds other parameters."
            )
        closure = inspect.signature(type(optimizer).step).parameters.get("closure")
        if closure is not None and closure.default is inspect.Parameter.empty:
            raise ValueError(
                f"`optimizer_factory` makes a {type(optimizer).__name__}, which evaluates the model several times per "
                "step by a closure. fastdp gives one gradient per step: use SGD, Adam, or another optimizer without a "
                "closure."
            )
        self._all.append(optimizer)
        self._parameters.append(list(parameters))
        self._state = self.first.state
        return optimizer

    def follow(self) -> None:
        """Copy the first optimizer's settings to the others. Called on the host thread, between steps."""
        first = self.first
        groups = [{k: v for k, v in group.items() if k != "params"} for group in first.param_groups]
        for rank, optimizer in enumerate(self._all[1:], start=1):
            for group in first.param_groups[len(optimizer.param_groups) :]:
                optimizer.add_param_group({**group, "params": self._translate(group["params"], rank)})
            for target, source in zip(optimizer.param_groups, groups, strict=True):
                target.update(copy.deepcopy(source))
        if self.suspect or first.state is not self._state:
            self._copy_state()
        self._state, self.suspect = first.state, False

    def _translate(self, parameters: Sequence[torch.Tensor], rank: int) -> list[torch.Tensor]:
        """Map the user's parameters to a replica's own.

        Raises:
            ValueError: the module does not have one of the parameters.
        """
        own = {id(a): b for a, b in zip(self._parameters[0], self._parameters[rank], strict=True)}
        if any(id(parameter) not in own for parameter in parameters):
            raise ValueError(
                "The optimizer's parameter groups hold a parameter that the module did not have when it was "
                "wrapped. Wrap the module again, and make the train step anew."
            )
        return [own[id(parameter)] for parameter in parameters]

    def _copy_state(self) -> None:
        """Copy the first optimizer's state to all others."""
        first = self.first
        for rank, optimizer in enumerate(self._all[1:], start=1):
            optimizer.state.clear()
            for parameter, value in first.state.items():
                (own,) = self._translate([parameter], rank)
                optimizer.state[own] = copy.deepcopy(value)


def check_sparse(optimizer: torch.optim.Optimizer) -> None:
    """Check that an optimizer gives the same with dense gradients as with the sparse ones that one device would have.

    Raises:
        NotImplementedError: it does not, or refuses sparse gradients.
    """
    if type(optimizer) not in (torch.optim.SGD, torch.optim.Adagrad):
        raise NotImplementedError(
            "The module has sparse gradients (sparse=True of an embedding), which several devices add up as dense "
            f"ones. A {type(optimizer).__name__} would update other rows than on one device. Make the embedding with "
            "sparse=False, use SGD or Adagrad, or gpus=[0]."
        )
