"""Model code that runs again in backward: `keras.remat`, `keras.RematScope`, `torch.utils.checkpoint`.

A checkpoint discards the activations of its part of the model, and backward runs the part again. By then the replica's
forward pass is over: its scope has been left, its generators have advanced, its statistics are recorded. So fastdp
saves the replica's state where a part begins. The part runs again from that state, on whichever thread backward runs,
with the same variables, the same draws and the values that other replicas sent in forward, without a new exchange.
Whatever it records, assigns or adds the second time is dropped, so everything counts once.

Plain Keras advances a layer's seed again, so that a seeded dropout drops other units in backward than in forward, and
updates the statistics of BatchNormalization twice. Here the gradient is that of the forward pass.

`torch.autograd.grad` cannot differentiate the reentrant kind of checkpoint. A replica uses the non-reentrant kind
instead, with the same values and gradients.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import keras
import torch
from keras.src.backend.common import global_state
from torch.utils import checkpoint

from fastdp.capture.pure_step import Draws
from fastdp.comm.rendezvous import Rendezvous
from fastdp.program.keras.replica import ReplicaContext, keras_device, replica_scope, running
from fastdp.program.keras.variables import Mapping, ReplicaScope


class _Part:
    """A part of a model that a checkpoint runs in forward and again in backward.

    Args:
        function: the function that the checkpoint runs.
        run: the replica at the beginning of the part.
        scope: the replica's scope at that time.
    """

    def __init__(self, function: Callable[..., Any], run: ReplicaContext, scope: ReplicaScope) -> None:
        self._function = function
        self._run = replace(
            run,
            moments=[],
            masks=dict(run.masks),
            met=Counter(run.met),
            generators=run.generators.copy(),
            placed=None,
            parts=[],
        )
        run.parts.append(self)
        self._scope = scope.twin()
        self._keras = _keras_state()
        self._given: list[Any] = []
        self._outcomes: list[torch.Tensor] = []

    @contextmanager
    def noting(self, run: ReplicaContext) -> Iterator[None]:
        """During the first run of the part, record what replicas exchange and the draws of a captured step."""
        context, draws, meeting = run.context, run.draws, run.context.rendezvous
        context.rendezvous = _Noting(meeting, self._given)
        if draws is not None:
            run.draws = _NotingDraws(draws, self._outcomes)
        try:
            yield
        finally:
            context.rendezvous, run.draws = meeting, draws

    def keep(self, variable: keras.Variable, value: torch.Tensor, kept: torch.Tensor) -> None:
        """Use `kept` in the second run for a variable that had `value` when the part began."""
        if self._scope.state_mapping.get(id(variable)) is value:
            self._scope.state_mapping[id(variable)] = kept

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the part again."""
        again = replace(
            self._run,
            context=replace(self._run.context, rendezvous=_Given(self._given)),
            moments=[],
            masks=dict(self._run.masks),
            met=Counter(self._run.met),
            generators=self._run.generators.copy(),
            parts=[],
            draws=None if self._run.draws is None else _GivenDraws(self._outcomes),
        )
        with ExitStack() as stack:
            stack.enter_context(_with_keras_state(self._keras))
            stack.enter_context(keras_device(again.context.device))
            stack.enter_context(replica_scope(again))
            stack.enter_context(self._scope.twin())
            return self._function(*args, **kwargs)


class _Noting(Rendezvous):
    """Delegates to another rendezvous and records its results."""

    def __init__(self, inner: Rendezvous, noted: list[Any]) -> None:
        self._inner, self._noted = inner, noted

    def exchange(self, rank: int, value: Any, place: object) -> list[Any]:
        """The values of all replicas."""
        self._noted.append(self._inner.exchange(rank, value, place))
        return self._noted[-1]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


class _Given(Rendezvous):
    """Returns the recorded exchanges in the same order."""

    def __init__(self, noted: Sequence[Any]) -> None:
        self._noted = iter(noted)

    def exchange(self, rank: int, value: Any, place: object) -> list[Any]:
        """The values of all replicas in forward."""
        return next(self._noted)


class _NotingDraws:
    """Delegates draws to another object and records their outcomes."""

    def __init__(self, inner: Draws, noted: list[torch.Tensor]) -> None:
        self._inner, self._noted = inner, noted

    def take(self, draw: Callable[[], torch.Tensor]) -> torch.Tensor:
        """The outcome of a draw."""
        self._noted.append(self._inner.take(draw))
        return self._noted[-1]


class _GivenDraws:
    """Returns the recorded outcomes in the same order."""

    def __init__(self, noted: Sequence[torch.Tensor]) -> None:
        self._noted = iter(noted)

    def take(self, draw: Callable[[], torch.Tensor]) -> torch.Tensor:
        """The outcome of the same draw in forward."""
        return next(self._noted)


def keep_values(run: ReplicaContext, scope: ReplicaScope, mapping: Mapping) -> None:
    """Give the parts of a forward pass copies of the assigned variables, whose memory changes before backward."""
    if run.parts:
        for i, _ in scope.assigned(mapping):
            variable, value = mapping[i]
            kept = value.detach().clone().requires_grad_(value.requires_grad)
            for part in run.parts:
                part.keep(variable, value, kept)


def _keras_state() -> dict[str, Any]:
    """Keras's state of this thread: the training mode of the calling layer, the autocast scope, and more."""
    state = dict(vars(global_state.GLOBAL_STATE_TRACKER))
    if state.get("current_call_ctx") is not None:  # Keras changes it in place
        state["current_call_ctx"] = copy.copy(state["current_call_ctx"])
    return state


@contextmanager
def _with_keras_state(state: dict[str, Any]) -> Iterator[None]:
    """Set Keras's state of this thread to an earlier one."""
    mine = vars(global_state.GLOBAL_STATE_TRACKER)
    before = dict(mine)
    mine.update(state)
    try:
        yield
    finally:
        mine.clear()
        mine.update(before)


def _part(function: Callable[..., Any]) -> tuple[_Part, ReplicaContext] | None:
    """The part that begins here; None if this thread runs no replica."""
    run, scope = running(), global_state.get_global_attribute("stateless_scope")
    if run is None or not isinstance(scope, ReplicaScope):
        return None
    return _Part(function, run, scope), run


def checkpoint_of_replica(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap the generator behind non-reentrant checkpoints. The part's forward run lasts until it is resumed."""

    def generator(function: Callable[..., Any], preserve: bool, *args: Any, **kwargs: Any) -> Iterator[None]:
        found = _part(function)
        if found is None:
            yield from original(function, preserve, *args, **kwargs)
            return
        part, run = found
        # The replica has its own copies of torch's generators, so the shared ones need not be saved and restored.
        with part.noting(run):
            yield from original(part, False, *args, **kwargs)

    return generator


class CheckpointOfReplica:
    """Replaces torch's `CheckpointFunction`, the reentrant kind."""

    def __init__(self, original: Any) -> None:
        self._original = original

    def __getattr__(self, name: str) -> Any:
        return getattr(self._original, name)

    def apply(self, function: Callable[..., Any], preserve: bool, *args: Any) -> Any:
        """Run the part. As in torch, it is differentiated only if one of its arguments is."""
        if running() is None:
            return self._original.apply(function, preserve, *args)
        if not any(isinstance(value, torch.Tensor) and value.requires_grad for value in args):
            with torch.no_grad():
                return function(*args)
        return checkpoint.checkpoint(function, *args, use_reentrant=False, preserve_rng_state=preserve)
