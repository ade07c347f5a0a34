"""The replica that a thread is running, and what of Keras is bent for it while it runs.

Keras's random ops and BatchNormalization know nothing of replicas. While replicas run, `replica_aware`
puts a few functions of Keras in place of others, which behave as before in every thread that runs no
replica, and puts them back afterwards.

Random draws are indexed by the global row: a replica draws for the whole global batch, with the seed
that one device would use, and keeps its own rows. So 1, 2 and 8 devices see the same masks and noise, and
with a seed they are those of plain Keras. (Unseeded dropout is drawn from the layer's seed generator;
plain Keras draws it from torch's global generator, which threads would share.)

BatchNormalization's moments are recorded, so that the moving statistics can be updated with the mean and
the variance of the global batch; with `sync_batch_norm` they are those of the global batch to begin with.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import keras
import torch
from keras.src.backend.torch import random as torch_random
from keras.src.layers.rnn.dropout_rnn_cell import DropoutRNNCell
from keras.src.random.seed_generator import SeedGenerator

from fastdp.program.base import Context
from fastdp.program.keras_moments import Moments, global_moments, local_moments

_replica = threading.local()
_originals: list[tuple[Any, str, Any]] = []


@dataclass(slots=True)
class Running:
    """What a replica's thread knows while it runs the model.

    `frozen_moments` makes BatchNormalization use its moving statistics (for probing, where rows must not
    influence each other).
    """

    context: Context
    sync_batch_norm: bool = False
    frozen_moments: bool = False
    unseeded: int = 0
    seed: int = 0
    moments: list[tuple[keras.layers.Layer, Moments]] = field(default_factory=list)
    terms: list[torch.Tensor] = field(default_factory=list)
    masks: dict[tuple[int, str], Any] = field(default_factory=dict)
    draws: Draws | None = None


class NotCapturable(Exception):
    """A step does something that cannot be recorded once and replayed. The message says what."""


class Draws(Protocol):
    """Who decides about random draws while a step is captured."""

    def take(self, draw: Callable[[], torch.Tensor]) -> torch.Tensor:
        """The outcome of `draw()`, or what stands for it."""


def running() -> Running | None:
    """The replica that this thread is running, if any."""
    return getattr(_replica, "running", None)


@contextmanager
def replica_scope(state: Running) -> Iterator[Running]:
    """Mark this thread as running a replica."""
    before = running()
    _replica.running = state
    try:
        yield state
    finally:
        _replica.running = before


@contextmanager
def replica_aware() -> Iterator[None]:
    """Keep Keras's random ops, BatchNormalization and recurrent dropout aware of replicas."""
    _patched.enter()
    try:
        yield
    finally:
        _patched.leave()


class _Patched:
    """Counts who needs the replica-aware functions: the first puts them in place, the last takes them out."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._depth = 0

    def enter(self) -> None:
        """One more needs them."""
        with self._lock:
            self._depth += 1
            if self._depth == 1:
                _patch()

    def leave(self) -> None:
        """One less."""
        with self._lock:
            self._depth -= 1
            if self._depth == 0:
                _unpatch()


_patched = _Patched()


def _patch() -> None:
    """Put the replica-aware functions in place."""
    moments = keras.layers.BatchNormalization._moments
    targets: list[tuple[Any, str, Callable[..., Any]]] = [
        (keras.layers.BatchNormalization, "_moments", _moments(moments)),
        (torch_random, "dropout", _dropout(torch_random.dropout)),
        (torch_random, "gamma", _alone(torch_random.gamma)),
        (torch_random, "binomial", _alone(torch_random.binomial)),
        (torch_random, "beta", _alone(torch_random.beta)),
        (torch_random, "torch_seed_generator", _generator(torch_random.torch_seed_generator)),
        (torch_random, "draw_seed", _draw_seed(torch_random.draw_seed)),
        (DropoutRNNCell, "get_dropout_mask", _own_mask("dropout")),
        (DropoutRNNCell, "get_recurrent_dropout_mask", _own_mask("recurrent_dropout")),
        (DropoutRNNCell, "reset_dropout_mask", _forget_mask("dropout")),
        (DropoutRNNCell, "reset_recurrent_dropout_mask", _forget_mask("recurrent_dropout")),
    ]
    spatial = (keras.layers.SpatialDropout1D, keras.layers.SpatialDropout2D, keras.layers.SpatialDropout3D)
    targets += [(layer, "_get_noise_shape", _own_rows(layer._get_noise_shape)) for layer in spatial]
    targets += [(torch_random, name, _by_rows(getattr(torch_random, name))) for name in _SHAPED]
    for owner, name, function in targets:
        _originals.append((owner, name, getattr(owner, name)))
        setattr(owner, name, function)


def _unpatch() -> None:
    """Put Keras's own functions back."""
    while _originals:
        setattr(*_originals.pop())


# Random ops.

_SHAPED = ("normal", "uniform", "randint", "truncated_normal")
_global_generator = threading.Lock()


def _global_shape(shape: Any, context: Context) -> tuple[int, ...] | None:
    """`shape` with the rows of the global batch, if its first axis is the replica's rows."""
    shape = tuple(int(size) for size in shape)
    rows = context.rows
    if shape and shape[0] == rows.count < rows.total:
        return (rows.total, *shape[1:])
    return None


def _by_rows(original: Callable[..., Any]) -> Callable[..., Any]:
    """A draw of the given shape: for the whole batch, of which the replica's rows are kept."""

    def draw(shape: Any, *args: Any, **kwargs: Any) -> Any:
        state = running()
        if state is None:
            return original(shape, *args, **kwargs)
        return _take(state, lambda: rows_of(shape, *args, **kwargs), args, kwargs)

    def rows_of(shape: Any, *args: Any, **kwargs: Any) -> Any:
        state = running()
        assert state is not None
        whole = _global_shape(shape, state.context)
        if whole is None:
            return original(shape, *args, **kwargs)
        # Inside, `truncated_normal` draws by `normal`: the shapes it asks for are already the batch's.
        with _whole_batch(state):
            drawn = original(whole, *args, **kwargs)
        return drawn[state.context.rows.start : state.context.rows.stop]

    return draw


def _take(state: Running, draw: Callable[[], Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What `draw()` gives: now, or as the capture of the step wants it. Draws within draws are its own."""
    draws = state.draws
    if draws is None:
        return draw()
    if any(isinstance(value, torch.Tensor) for value in (*args, *kwargs.values())):
        raise NotCapturable("a random op whose parameters are computed by the model")
    state.draws = None
    try:
        return draws.take(draw)
    finally:
        state.draws = draws


@contextmanager
def _whole_batch(state: Running) -> Iterator[None]:
    """Within a draw for the whole batch nothing is sliced a second time."""
    context = state.context
    total = context.rows.total
    state.context = Context.alone(context.batch, context.structure, 0, total, total)
    try:
        yield
    finally:
        state.context = context


def _dropout(original: Callable[..., Any]) -> Callable[..., Any]:
    """Dropout whose mask is drawn for the whole batch, from the layer's own generator, seeded or not."""

    def dropout(inputs: torch.Tensor, rate: float, noise_shape: Any = None, seed: Any = None) -> torch.Tensor:
        state = running()
        if state is None or rate in (0.0, 1.0):
            return original(inputs, rate, noise_shape, seed)
        given = noise_shape if noise_shape is not None else [None] * inputs.ndim
        shape = [size if size is not None else inputs.shape[i] for i, size in enumerate(given)]
        rows = state.context.rows
        # A single row given in numbers may as well mean one mask for all rows.
        spans_rows = given[0] is None or 1 < given[0] == rows.count
        by_rows = spans_rows and inputs.shape[0] == rows.count < rows.total
        if by_rows:
            shape[0] = rows.total

        def mask() -> torch.Tensor:
            state = running()
            assert state is not None
            generator = torch_random.torch_seed_generator(seed)
            # The same draw as Keras's seeded dropout: bernoulli of a constant matrix.
            keep = torch.bernoulli(torch.full(shape, 1.0 - rate), generator=generator).bool()
            return keep[state.context.rows.start : state.context.rows.stop] if by_rows else keep

        keep = _take(state, mask, (), {})
        scaled = inputs / (1.0 - rate)
        return torch.where(keep.expand(inputs.shape), scaled, torch.zeros((), dtype=inputs.dtype))

    return dropout


def _own_rows(original: Callable[..., Any]) -> Callable[..., Any]:
    """The noise shape of spatial dropout, which says "each row" instead of the replica's number of rows."""

    def noise_shape(layer: Any, inputs: Any) -> Any:
        shape = original(layer, inputs)
        return shape if running() is None else (None, *shape[1:])

    return noise_shape


def _alone(original: Callable[..., Any]) -> Callable[..., Any]:
    """A draw for which Keras sets and restores torch's global generator: one thread at a time."""

    def draw(shape: Any, *args: Any, **kwargs: Any) -> Any:
        state = running()
        if state is None:
            return original(shape, *args, **kwargs)
        if state.draws is not None:
            raise NotCapturable("a random op that is not drawn by rows")
        with _global_generator:
            return original(shape, *args, **kwargs)

    return draw


def _generator(original: Callable[..., Any]) -> Callable[..., Any]:
    """Generators for draws that no capture knows how to repeat end it."""

    def torch_seed_generator(seed: Any) -> Any:
        state = running()
        if state is not None and state.draws is not None:
            raise NotCapturable("a random op that is not drawn by rows")
        return original(seed)

    return torch_seed_generator


def _draw_seed(original: Callable[..., Any]) -> Callable[..., Any]:
    """Seeds of draws without a seed: by step and count, since the global generator is per thread."""

    def draw_seed(seed: Any) -> Any:
        state = running()
        if state is None or seed is not None:
            return original(seed)
        state.unseeded += 1
        return torch.tensor([state.seed + state.context.step * 7919, state.unseeded], dtype=torch.int64)

    return draw_seed


# Recurrent dropout: Keras caches the masks on the cell, which all replicas share.


def _own_mask(kind: str) -> Callable[..., Any]:
    """The replica's own cached mask of a cell."""
    original = getattr(DropoutRNNCell, f"get_{kind}_mask")

    def get_mask(cell: Any, step_input: Any) -> Any:
        state = running()
        if state is None:
            return original(cell, step_input)
        rate = getattr(cell, kind)
        if not rate:
            return None
        key = (id(cell), kind)
        if key not in state.masks:
            state.masks[key] = cell._create_dropout_mask(step_input, rate)
        return state.masks[key]

    return get_mask


def _forget_mask(kind: str) -> Callable[..., Any]:
    """Forget the replica's cached mask of a cell."""
    original = getattr(DropoutRNNCell, f"reset_{kind}_mask")

    def reset_mask(cell: Any) -> None:
        state = running()
        if state is None:
            original(cell)
        else:
            state.masks.pop((id(cell), kind), None)

    return reset_mask


# BatchNormalization.


def _moments(original: Callable[..., Any]) -> Callable[..., Any]:
    """Moments that are recorded, and those of the global batch where that is asked for."""

    def moments(layer: Any, inputs: torch.Tensor, mask: torch.Tensor | None) -> Any:
        state = running()
        if state is None:
            return original(layer, inputs, mask)
        if state.frozen_moments:
            return layer.moving_mean.value.to(inputs.dtype), layer.moving_variance.value.to(inputs.dtype)
        axes = layer._reduction_axes
        if state.sync_batch_norm and state.context.size > 1:
            mean, variance, count = global_moments(inputs, mask, axes, state.context)
        else:
            mean, variance, count = local_moments(original(layer, inputs, mask), inputs, mask, axes)
        state.moments.append((layer, Moments(mean.detach(), variance.detach(), count)))
        return mean, variance

    return moments


def seed_generators(model: keras.Model) -> list[SeedGenerator]:
    """The seed generators of a model's layers."""
    return [generator for layer in model._flatten_layers() for generator in layer._seed_generators]
