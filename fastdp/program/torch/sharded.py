"""Sharded torch optimizers: each device steps whole parameters, and keeps the optimizer's state of these alone."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch.optim import Optimizer
from torch.utils._pytree import tree_map_only

from fastdp.program.torch.optimizer import state_nbytes
from fastdp.runtime.queue import QueueDevice
from fastdp.runtime.work_stealing import WorkStealing
from fastdp.tensors.thread_state import ThreadState

optim = torch.optim
# Of these the elements of a parameter do not look at each other either.
_ELEMENTWISE = (
    *(optim.SGD, optim.Adam, optim.AdamW, optim.Adamax, optim.NAdam, optim.RAdam, optim.RMSprop),
    *(optim.Adagrad, optim.Adadelta, optim.Rprop, optim.ASGD),
)
_BY_PARAMETER = (*_ELEMENTWISE, optim.Adafactor, optim.Muon, optim.SparseAdam)
# Types whose last elements torch's vectorized kernels round as all others: the number of threads changes no bit.
_ANY_THREADS = frozenset({torch.float32, torch.float64})
_NAMES = ", ".join(one.__name__ for one in _BY_PARAMETER)


class OptimizerShards:
    """Divides the steps of optimizers over devices, by whole parameters.

    Each parameter belongs to one device, such that all have about as many elements of parameters that are trained. A
    device steps its parameters by an optimizer of the same class and settings, whose state of a parameter is the dict
    that the user's optimizer has for it. So a state dict is whole at any time, and does not depend on the devices. A
    parameter's new values depend on no other parameter, so they are to the last bit those of one step of all.

    In host memory all devices work on the parameters themselves. A GPU gets the values and gradients of its parameters
    from the first one, and sends the new values back.
    """

    def __init__(self) -> None:
        self._devices: list[QueueDevice] = []  # one for each owner
        self._ranks: list[int] = []  # of replicas, by owner
        self._owners: list[int] = []  # by position of the parameter
        self._trained: list[tuple[bool, torch.Size]] = []
        self._lanes: dict[torch.device, Any] = {}

    # The devices.

    def begin_anew(self) -> None:
        """Forget all devices."""
        self._devices, self._ranks, self._trained = [], [], []

    def add(self, device: QueueDevice, rank: int) -> None:
        """A replica's device. Replicas that are shards of one device own parameters together."""
        card = device.part_of or device
        if all(card is not other for other in self._devices):
            self._devices.append(card)
            self._ranks.append(rank)
            self._trained = []

    def owners(self, parameters: Sequence[torch.Tensor]) -> list[int]:
        """The place of each parameter's owner among the devices: the largest parameters first, to who has least."""
        trained = [(parameter.requires_grad, parameter.shape) for parameter in parameters]
        if trained != self._trained:
            sizes = [shape.numel() if trains else 0 for trains, shape in trained]
            self._owners, loads = [0] * len(sizes), [0] * len(self._devices)
            for number in sorted(range(len(sizes)), key=lambda number: -sizes[number]):
                self._owners[number] = owner = loads.index(min(loads))
                loads[owner] += sizes[number]
            self._trained = trained
        return self._owners

    def nbytes(self, optimizers: Sequence[Optimizer], parameters: Sequence[torch.Tensor], rank: int) -> int:
        """Bytes of the state that is on a replica's device; 0 for one whose device has another replica before it."""
        places = {id(parameter): owner for parameter, owner in zip(parameters, self.owners(parameters), strict=True)}
        mine = [
            kept
            for one in optimizers
            for parameter, kept in one.state.items()
            if self._ranks[places.get(id(parameter), 0)] == rank
        ]
        return state_nbytes(mine)

    # What can be divided.

    @staticmethod
    def check(optimizers: Sequence[Optimizer], are_plain: bool) -> None:
        """Check that these optimizers update each parameter by itself. Before a step.

        Args:
            are_plain: no hooks run in their steps, and their steps are those of their classes.

        Raises:
            ValueError: one does not, or cannot be known to.
        """
        for one in optimizers:
            if type(one) not in _BY_PARAMETER:
                raise ValueError(
                    "`shard_optimizer` needs an optimizer that updates each parameter by itself, and "
                    f"{type(one).__module__}.{type(one).__qualname__} is not known to do so. Use one of torch.optim "
                    f"({_NAMES}), or leave `shard_optimizer` out."
                )
        if not are_plain:
            raise ValueError(
                "`shard_optimizer` steps the parameters of each device by themselves, and hooks on optimizer steps, or "
                "a `step` that was replaced, would see those of one device. Remove them, or leave `shard_optimizer` "
                "out."
            )

    @staticmethod
    def in_threads(optimizers: Sequence[Optimizer], parameters: Sequence[torch.Tensor]) -> bool:
        """Whether devices in host memory may step at the same time, with fewer threads each, and the same bits."""
        by_element = all(isinstance(one, _ELEMENTWISE) for one in optimizers)
        return by_element and _ANY_THREADS.issuperset(parameter.dtype for parameter in parameters)

    # Steps.

    @contextmanager
    def divide(
        self,
        optimizers: Sequence[Optimizer],
        parameters: Sequence[torch.Tensor],
        thread: ThreadState,
        share: WorkStealing | None,
    ) -> Iterator[None]:
        """While the block runs, a step of one of these optimizers is divided, whoever calls it.

        Args:
            parameters: those that may have a `grad`, which are all on the first device.
            thread: the user's, whose settings count on other threads.
            share: runs parts at the same time; None: one after the other.
        """
        with ExitStack() as stack:
            for one in optimizers if len(self._devices) > 1 else ():
                stack.callback(partial(_put_back, one, vars(one).get("step")))
                vars(one)["step"] = partial(self._step, one, one.step, parameters, thread, share)
            yield

    def _step(
        self,
        one: Optimizer,
        step: Callable[[], object],
        parameters: Sequence[torch.Tensor],
        thread: ThreadState,
        share: WorkStealing | None,
    ) -> None:
        """Step an optimizer on all devices: on the first one itself, so that what counts its steps does."""
        owners = self.owners(parameters)
        places = {id(parameter): owner for parameter, owner in zip(parameters, owners, strict=True)}
        parts: list[Callable[[], object]] = [partial(_step_own, one, step, _groups(one, places, 0))]
        made: list[tuple[Optimizer, dict[torch.Tensor, torch.Tensor]]] = []
        for owner, device in enumerate(self._devices[1:], 1):
            groups = _groups(one, places, owner)
            if any(parameter.grad is not None for group in groups for parameter in group["params"]):
                run = self._on_gpu if device.on_gpu else _on_host
                part = partial(run, one, groups, torch.device(device.torch_device), made)
                parts.append(partial(_as_here, thread, threading.get_ident(), part))
        if share is not None and len(parts) > 1:
            share(parts)
        else:
            for one_part in parts:
                one_part()
        if made:
            _take_over(one, made)

    def _on_gpu(
        self,
        one: Optimizer,
        groups: list[dict[str, Any]],
        device: torch.device,
        made: list[tuple[Optimizer, dict[torch.Tensor, torch.Tensor]]],
    ) -> None:
        """Step parameters of the first GPU on another one. Torch orders copies after the current streams of both GPUs.

        Copies live on a stream of their own: nothing of the replica there can be in their way.
        """
        lane = self._lanes.get(device) or self._lanes.setdefault(device, torch.cuda.Stream(device))
        with torch.cuda.device(device), torch.cuda.stream(lane):
            copies = {parameter: _copy(parameter, device) for group in groups for parameter in group["params"]}
            for kept in (one.state[parameter] for parameter in copies if parameter in one.state):
                kept.update({name: _moved(value, device) for name, value in kept.items()})
            for group in groups:
                group.update({name: _moved(value, device) for name, value in group.items() if name != "params"})
                group["params"] = [copies[parameter] for parameter in group["params"]]
            _on_host(one, groups, device, made, copies)
            for parameter, copy in copies.items():
                if copy.grad is not None:
                    parameter.copy_(copy)


def _on_host(
    one: Optimizer,
    groups: list[dict[str, Any]],
    device: torch.device,
    made: list[tuple[Optimizer, dict[torch.Tensor, torch.Tensor]]],
    copies: dict[torch.Tensor, torch.Tensor] | None = None,
) -> None:
    """Step the parameters of some groups by an optimizer as the given one, with its state of them."""
    own = copies or {parameter: parameter for group in groups for parameter in group["params"]}
    twin: Any = object.__new__(type(one))
    vars(twin).update({name: value for name, value in vars(one).items() if name != "step"})
    twin.param_groups = groups
    twin.state = defaultdict(dict, {own[user]: one.state[user] for user in own if user in one.state})
    made.append((twin, own))
    with torch.no_grad():
        type(one).step(twin)


def _as_here(thread: ThreadState, caller: int, part: Callable[[], object]) -> None:
    """Run a part with the user's settings, which the calling thread has already."""
    if threading.get_ident() == caller:
        part()
    else:
        thread.run(part)


def _step_own(one: Optimizer, step: Callable[[], object], groups: list[dict[str, Any]]) -> None:
    """Step the parameters of these groups by the user's optimizer."""
    before, one.param_groups = one.param_groups, groups
    try:
        for group in groups:
            for parameter in group["params"]:
                if parameter.is_cuda and parameter in one.state:  # another device may have had it before
                    kept = one.state[parameter]
                    kept.update({name: _moved(value, parameter.device) for name, value in kept.items()})
        step()
    finally:
        one.param_groups = before


def _groups(one: Optimizer, places: dict[int, int], owner: int) -> list[dict[str, Any]]:
    """The groups of an optimizer with the parameters of one owner. The first one has those without a gradient, too."""
    return [
        {**group, "params": [p for p in group["params"] if places.get(id(p), 0) == owner]} for group in one.param_groups
    ]


def _take_over(one: Optimizer, made: Sequence[tuple[Optimizer, dict[torch.Tensor, torch.Tensor]]]) -> None:
    """Give an optimizer the states that others have made, in the order in which it would have made them."""
    known = len(one.state)
    for twin, own in made:
        one.state.update({user: twin.state[copy] for user, copy in own.items() if copy in twin.state})
    if len(one.state) > known:
        order = [p for group in one.param_groups for p in group["params"] if p in one.state]
        states = {p: one.state[p] for p in order} | dict(one.state)
        one.state.clear()
        one.state.update(states)


def _put_back(one: Optimizer, step: Any) -> None:
    if step is None:
        vars(one).pop("step", None)
    else:
        vars(one)["step"] = step


def _copy(parameter: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A parameter of another GPU, with its gradient, on this one."""
    copy = torch.nn.Parameter(parameter.detach().to(device, non_blocking=True), parameter.requires_grad)
    copy.grad = None if parameter.grad is None else parameter.grad.to(device, non_blocking=True)
    return copy


def _moved(value: Any, device: torch.device) -> Any:
    """A value of an optimizer's state or settings with what lies on another GPU moved to this one."""
    return tree_map_only(torch.Tensor, lambda t: t.to(device) if t.is_cuda else t, value)
