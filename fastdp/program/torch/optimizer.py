"""The optimizers of a train step: the user's own, over the module's own parameters."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim import optimizer as torch_optimizer
from torch.utils._pytree import tree_leaves, tree_map_only

from fastdp.tensors.threads import end_share

OptimizerFactory = Callable[[list[torch.Tensor]], "Optimizer | Sequence[Optimizer]"]

_REMEDY = (
    "Give a function that makes an optimizer from parameters, such as lambda parameters: torch.optim.SGD(parameters, "
    "lr=0.1), an optimizer over the module's parameters, or a list of optimizers."
)


class Optimizers:
    """The optimizers that update a module, one after the other.

    Args:
        given: an optimizer, a list or tuple of several, or a function that makes one or several from the list of the
            module's parameters.

    There is one set for all devices: it updates the first device's weights, which are the module's own, and the other
    devices get them at the beginning of the next step. So whatever the user does to an optimizer counts.

    Attributes:
        all: the optimizers, in the order of their steps.

    Raises:
        TypeError: `given` is none of these.
    """

    def __init__(self, given: OptimizerFactory | Optimizer | Sequence[Optimizer]) -> None:
        if not isinstance(given, (Optimizer, list, tuple)) and not callable(given):
            raise TypeError(f"`optimizer` is {given!r} (of type {type(given).__name__}). {_REMEDY}")
        self._given: Any = given
        self._held: list[torch.Tensor] = []
        self._places: list[list[int]] = []  # their identities, by groups
        self.all: list[Optimizer] = []

    @property
    def only(self) -> Optimizer:
        """The optimizer.

        Raises:
            RuntimeError: there are several.
        """
        if len(self.all) > 1:
            raise RuntimeError(f"This train step has {len(self.all)} optimizers. They are in its `optimizers`.")
        return self.all[0]

    def make(self, parameters: Sequence[torch.Tensor]) -> None:
        """Make the optimizers over the module's parameters, which have moved to the first device.

        Raises:
            TypeError: there is no optimizer, or something that is none.
            ValueError: an optimizer has other parameters, or needs a closure.
        """
        made = self._given if isinstance(self._given, (Optimizer, list, tuple)) else self._given(list(parameters))
        found: list[Any] = list(made) if isinstance(made, (list, tuple)) else [made]
        for one in found:
            if not isinstance(one, Optimizer):
                raise TypeError(f"`optimizer` makes or holds {one!r} (of type {type(one).__name__}). {_REMEDY}")
            closure = inspect.signature(type(one).step).parameters.get("closure")
            if closure is not None and closure.default is inspect.Parameter.empty:
                raise ValueError(
                    f"`optimizer` has a {type(one).__name__}, which evaluates the model several times per step by a "
                    "closure. A train step gives one gradient: use SGD, Adam, or another optimizer without a closure, "
                    "or write the loop: model(x), loss.backward(), optimizer.step(closure)."
                )
        if not found:
            raise TypeError(f"`optimizer` makes or holds no optimizer. {_REMEDY}")
        self.all = self._given = found  # replicas that are made anew keep them
        self.check(parameters)
        for one in found:
            if one.state and any(parameter.is_cuda for parameter in self._held):  # the state has stayed on the host
                one.load_state_dict(one.state_dict())

    def check(self, parameters: Iterable[torch.Tensor]) -> None:
        """Check that the optimizers update parameters of the module only. Called before each step.

        Args:
            parameters: the module's own at present.

        Raises:
            ValueError: an optimizer has been given another parameter.
        """
        places = [[*map(id, group["params"])] for one in self.all for group in one.param_groups]
        if places == self._places:
            return
        held = [p for one in self.all for group in one.param_groups for p in group["params"]]
        known = {*map(id, parameters), *map(id, self._held)}
        if any(id(parameter) not in known for parameter in held):
            raise ValueError(
                "`optimizer` holds a parameter that the module does not have, and a train step computes no gradient "
                "for it. Make it a parameter of the module and wrap the module again; or write the loop: model(x), "
                "loss.backward(), optimizer.step()."
            )
        self._held, self._places = held, places

    def holds(self, parameter: torch.Tensor) -> bool:
        """Whether an optimizer updates this parameter."""
        return any(parameter is held for held in self._held)

    def updated(self, users: Sequence[torch.Tensor], bound: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """What they update: the user's parameters, or those that were in their places at first and share their memory.

        A parameter is replaced by `load_state_dict(assign=True)`, say, and optimizers go on with the one before.
        """
        return [user if user is first or self.holds(user) else first for user, first in zip(users, bound, strict=True)]

    def are_reliable(self) -> bool:
        """Whether a step runs none of the user's code."""
        for_all = [torch_optimizer._global_optimizer_pre_hooks, torch_optimizer._global_optimizer_post_hooks]
        if any(hook is not end_share for hooks in for_all for hook in hooks.values()):
            return False
        return all(_is_torchs_own(one) for one in self.all)

    @property
    def nbytes(self) -> int:
        """Bytes of all state."""
        return state_nbytes(kept for one in self.all for kept in one.state.values())

    def step(self) -> None:
        """Update the module's parameters by what they have as `grad`."""
        for one in self.all:
            one.step()

    @contextmanager
    def restored_on_failure(self) -> Iterator[None]:
        """Give the optimizers back what they keep if the block fails: their state, and their groups' settings.

        The weights are the engine's (`fastdp.engine.rollback`). Tensors of the state are copied.
        """
        states = [
            {key: tree_map_only(torch.Tensor, torch.clone, dict(kept)) for key, kept in one.state.items()}
            for one in self.all
        ]
        settings = [
            [{name: value for name, value in group.items() if name != "params"} for group in one.param_groups]
            for one in self.all
        ]
        try:
            yield
        except BaseException:
            for one, state, groups in zip(self.all, states, settings, strict=True):
                one.state.clear()
                one.state.update(state)
                for group, before in zip(one.param_groups, groups, strict=False):
                    group.update(before)
            raise

    # Files.

    def state_dict(self) -> list[dict[str, Any]]:
        """The optimizers' own state dicts, in their order."""
        return [one.state_dict() for one in self.all]

    def load_state_dict(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Load what `state_dict` has returned.

        Raises:
            ValueError: it is of another number of optimizers, or of optimizers over other parameters.
        """
        if len(states) != len(self.all):
            raise ValueError(
                f"`states` must have one state dict for each of the {len(self.all)} optimizers. Received: {len(states)}"
            )
        for one, state in zip(self.all, states, strict=True):
            one.load_state_dict(dict(state))


def state_nbytes(states: Iterable[Any]) -> int:
    """Bytes of the tensors in what optimizers keep for parameters."""
    leaves = [leaf for kept in states for leaf in tree_leaves(kept)]
    return sum(leaf.numel() * leaf.element_size() for leaf in leaves if isinstance(leaf, torch.Tensor))


def _is_torchs_own(one: Optimizer) -> bool:
    """Whether an optimizer of torch's own classes has no hooks, and a `step` that at most a scheduler has wrapped."""
    hooked = one._optimizer_step_pre_hooks or one._optimizer_step_post_hooks
    step = vars(one).get("step")
    scheduled = step is None or hasattr(step, "_wrapped_by_lr_sched")
    return f"{type(one).__module__}.".startswith("torch.optim.") and not hooked and scheduled
