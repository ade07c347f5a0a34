"""Model code that runs again in backward: `keras.remat`, `keras.RematScope`, `torch.utils.checkpoint`.

A checkpoint forgets what its part of the model has computed, and backward runs the part again. By then the replica's
forward pass is over: its scope is left, its generators have moved on, its statistics are noted. So the state of the
replica is noted where a part begins, and the part runs again from it, on whatever thread backward runs: with the same
variables, the same draws, and what other replicas gave in forward in place of new meetings. What it records, assigns
and adds then is dropped: it counts once.

Plain Keras moves a layer's seed again, so that a seeded dropout drops other units in backward than in forward, and
moves the statistics of BatchNormalization twice. Here the gradient is that of the forward pass.

The reentrant kind of checkpoint cannot be differentiated by `torch.autograd.grad`; in a replica it is the other kind,
with the same values and gradients.
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

from fastdp.comm.rendezvous import Rendezvous
from fastdp.program.keras.replica import Draws, ReplicaContext, keras_device, replica_scope, running
from fastdp.program.keras.variables import Mapping, ReplicaScope


class _Part:
    """A part of a model that a checkpoint runs, and runs again.

    Args:
        function: what the checkpoint runs.
        run: the replica, at the beginning of the part.
        scope: the replica's scope then.
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
        """While the part runs for the first time: note what replicas exchange, and the draws of a captured step."""
        context, draws, meeting = run.context, run.draws, run.context.rendezvous
        context.rendezvous = _Noting(meeting, self._given)
        if draws is not None:
            run.draws = _NotingDraws(draws, self._outcomes)
        try:
            yield
        finally:
            context.rendezvous, run.draws = meeting, draws

    def keep(self, variable: keras.Variable, value: torch.Tensor, kept: torch.Tensor) -> None:
        """Use `kept` for a variable that had `value` when the part began."""
        if self._scope.state_mapping.get(id(variable)) is value:
            self._scope.state_mapping[id(variable)] = kept

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run it again."""
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
    """Meets as another one does, and notes what it gave."""

    def __init__(self, inner: Rendezvous, noted: list[Any]) -> None:
        self._inner, self._noted = inner, noted

    def exchange(self, rank: int, value: Any) -> list[Any]:
        """Everyone's values."""
        self._noted.append(self._inner.exchange(rank, value))
        return self._noted[-1]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


class _Given(Rendezvous):
    """Gives what was exchanged before, in the same order."""

    def __init__(self, noted: Sequence[Any]) -> None:
        self._noted = iter(noted)

    def exchange(self, rank: int, value: Any) -> list[Any]:
        """Everyone's values of then."""
        return next(self._noted)


class _NotingDraws:
    """Decides about draws as another one does, and notes their outcomes."""

    def __init__(self, inner: Draws, noted: list[torch.Tensor]) -> None:
        self._inner, self._noted = inner, noted

    def take(self, draw: Callable[[], torch.Tensor]) -> torch.Tensor:
        """The outcome of a draw."""
        self._noted.append(self._inner.take(draw))
        return self._noted[-1]


class _GivenDraws:
    """Gives the outcomes of before, in the same order."""

    def __init__(self, noted: Sequence[torch.Tensor]) -> None:
        self._noted = iter(noted)

    def take(self, draw: Callable[[], torch.Tensor]) -> torch.Tensor:
        """The outcome of the same draw in forward."""
        return next(self._noted)


def keep_values(run: ReplicaContext, scope: ReplicaScope, mapping: Mapping) -> None:
    """Let the parts of a forward pass keep what it has assigned since: its memory gets other values before backward."""
    if run.parts:
        for i, _ in scope.assigned(mapping):
            variable, value = mapping[i]
            kept = value.detach().clone().requires_grad_(value.requires_grad)
            for part in run.parts:
                part.keep(variable, value, kept)


def _keras_state() -> dict[str, Any]:
    """What Keras knows of this thread: the mode of the layer that calls others, the autocast scope, and more."""
    state = dict(vars(global_state.GLOBAL_STATE_TRACKER))
    if state.get("current_call_ctx") is not None:  # Keras changes it in place
        state["current_call_ctx"] = copy.copy(state["current_call_ctx"])
    return state


@contextmanager
def _with_keras_state(state: dict[str, Any]) -> Iterator[None]:
    """Let Keras know of this thread what it knew then."""
    mine = vars(global_state.GLOBAL_STATE_TRACKER)
    before = dict(mine)
    mine.update(state)
    try:
        yield
    finally:
        mine.clear()
        mine.update(before)


def _part(function: Callable[..., Any]) -> tuple[_Part, ReplicaContext] | None:
    """The part that begins here, if a replica runs here."""
    run, scope = running(), global_state.get_global_attribute("stateless_scope")
    if run is None or not isinstance(scope, ReplicaScope):
        return None
    return _Part(function, run, scope), run


def checkpoint_of_replica(original: Callable[..., Any]) -> Callable[..., Any]:
    """The generator behind checkpoints that are not reentrant: until it is resumed, the part runs in forward."""

    def generator(function: Callable[..., Any], preserve: bool, *args: Any, **kwargs: Any) -> Iterator[None]:
        found = _part(function)
        if found is None:
            yield from original(function, preserve, *args, **kwargs)
            return
        part, run = found
        # The state of torch's generators is the replica's own: what all replicas share stays untouched.
        with part.noting(run):
            yield from original(part, False, *args, **kwargs)

    return generator


class CheckpointOfReplica:
    """Stands for torch's `CheckpointFunction`, the reentrant kind."""

    def __init__(self, original: Any) -> None:
        self._original = original

    def __getattr__(self, name: str) -> Any:
        return getattr(self._original, name)

    def apply(self, function: Callable[..., Any], preserve: bool, *args: Any) -> Any:
        """Run the part; as torch does it, nothing in it is differentiated unless an argument is."""
        if running() is None:
            return self._original.apply(function, preserve, *args)
        if not any(isinstance(value, torch.Tensor) and value.requires_grad for value in args):
            with torch.no_grad():
                return function(*args)
        return checkpoint.checkpoint(function, *args, use_reentrant=False, preserve_rng_state=preserve)
