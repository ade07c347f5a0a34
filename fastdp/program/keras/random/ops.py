"""Keras's random operations on a replica: draws are indexed by the row of the global batch.

A replica draws for the whole batch, with the seed that one device would use, and keeps its own rows. Each function here
wraps one of Keras's functions to make it aware of replicas. In a thread that runs no replica, it behaves as before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from keras.src.backend.torch import random as torch_random
from keras.src.backend.torch.core import get_device
from keras.src.random.seed_generator import SeedGenerator

from fastdp.errors import NotCapturable
from fastdp.program.keras.random.generators import CommonGenerator, is_held_by_scope
from fastdp.program.keras.replica import ReplicaContext, running
from fastdp.shard import Rows
from fastdp.tensors.random import global_generator, own_rows, uniform_tensor, whole_shape
from fastdp.tensors.row_effects import NotByRowsError

_NOT_BY_ROWS = "a random op that is not drawn by rows"
SHAPED = ("normal", "uniform", "randint", "truncated_normal")


def by_rows(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a draw of a given shape: draw for the whole batch, and keep the replica's rows."""

    def draw(shape: Any, *args: Any, **kwargs: Any) -> Any:
        state = running()
        if state is None:
            return original(shape, *args, **kwargs)
        per_row = state.entries_per_row(shape, kwargs.get("seed"))
        return _take(state, lambda: rows_of(per_row, shape, *args, **kwargs), args, kwargs)

    def rows_of(per_row: int, shape: Any, *args: Any, **kwargs: Any) -> Any:
        state = running()
        assert state is not None
        whole = whole_shape(shape, per_row, state.context.rows) if per_row else shape
        # `truncated_normal` calls `normal` inside, with a shape that is already right.
        with whole_batch(state, drawing=True):
            drawn = original(whole, *args, **kwargs)
        return own_rows(drawn, per_row, state.context.rows)

    return draw


def _take(state: ReplicaContext, draw: Callable[[], Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The result of `draw()`, or what the step's capture puts in its place. Nested draws belong to `draw()`."""
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
def whole_batch(state: ReplicaContext, *, drawing: bool = False) -> Iterator[None]:
    """Inside this context the replica sees the whole batch: its draws are not sliced, or not sliced again.

    `drawing` says that the code inside is itself one of Keras's draws.
    """
    context, before = state.context, state.drawing
    total = context.rows.total
    state.context = replace(context, rank=0, rows=Rows(0, total, total), size=1)
    state.drawing = before or drawing
    try:
        yield
    finally:
        state.context, state.drawing = context, before


def dropout_by_rows(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap dropout: draw the mask for the whole batch from the layer's own generator, seeded or not."""

    def dropout(inputs: torch.Tensor, rate: float, noise_shape: Any = None, seed: Any = None) -> torch.Tensor:
        state = running()
        if state is None or rate in (0.0, 1.0):
            return original(inputs, rate, noise_shape, seed)
        given = noise_shape if noise_shape is not None else [None] * inputs.ndim
        shape = [size if size is not None else inputs.shape[i] for i, size in enumerate(given)]
        rows = state.context.rows
        per_row = state.entries_per_row(inputs.shape if given[0] is None else shape, seed)
        if per_row:
            shape[0] = rows.total * per_row
        # Plain Keras draws these with torch's own dropout, from torch's global generator.
        owes_nothing = noise_shape is None and _is_unseeded(seed)

        def mask() -> torch.Tensor:
            state = running()
            assert state is not None
            if owes_nothing:
                return _own_draw(state, per_row, [inputs.shape[0], *shape[1:]]) < 1.0 - rate
            generator = torch_random.torch_seed_generator(seed)
            # The same draw as Keras's seeded dropout: bernoulli of a constant matrix.
            chance = torch.full(shape, 1.0 - rate, device=generator.device)
            with whole_batch(state, drawing=True):
                keep = torch.bernoulli(chance, generator=generator).bool()
            return own_rows(keep, per_row, state.context.rows)

        keep = _take(state, mask, (), {})
        scaled = inputs / (1.0 - rate)
        return torch.where(keep.expand(inputs.shape), scaled, torch.zeros((), dtype=inputs.dtype, device=inputs.device))

    return dropout


def noise_shape(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap the noise shape of spatial dropout: it has None for the rows instead of the replica's number of rows."""

    def of_rows(layer: Any, inputs: Any) -> Any:
        shape = original(layer, inputs)
        return shape if running() is None else (None, *shape[1:])

    return of_rows


def _is_unseeded(seed: Any) -> bool:
    """Whether the user set no seed, so that a replica need not draw for the whole batch."""
    return seed is None or (isinstance(seed, SeedGenerator) and seed._initial_seed is None)


def _own_draw(state: ReplicaContext, per_row: int, shape: Sequence[int]) -> torch.Tensor:
    """Uniform numbers for the replica's rows only.

    Their key comes from torch's global generator, from which plain Keras draws them, so `set_random_seed` makes them
    repeatable.
    """
    start = state.context.rows.start * per_row
    return uniform_tensor(state.generators.draw_number(), start, shape[0], shape, get_device())


def alone_by_rows(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a draw for which Keras seeds torch's global generator, so that only one thread draws at a time.

    The draw is made for the whole batch, with the parameters of all replicas; the replica keeps its rows.
    """

    def draw(shape: Any, *args: Any, **kwargs: Any) -> Any:
        state = running()
        if state is None:
            return original(shape, *args, **kwargs)
        state.not_captured(_NOT_BY_ROWS)
        per_row = state.entries_per_row(shape, kwargs.get("seed"))
        if per_row:
            shape = whole_shape(shape, per_row, state.context.rows)
            args = tuple(_of_all(value, state, per_row) for value in args)
            kwargs = {name: _of_all(value, state, per_row) for name, value in kwargs.items()}
        with global_generator, whole_batch(state, drawing=True):
            drawn = original(shape, *args, **kwargs)
        return own_rows(drawn, per_row, state.context.rows)

    return draw


def categorical_by_rows(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `categorical`: sample with the logits of the whole batch, and keep the replica's rows."""

    def categorical(logits: Any, *args: Any, **kwargs: Any) -> Any:
        state = running()
        if state is None:
            return original(logits, *args, **kwargs)
        state.not_captured(_NOT_BY_ROWS)
        whole = _of_all(logits, state)
        rows = state.context.rows
        with whole_batch(state, drawing=True):
            drawn = original(whole, *args, **kwargs)
        return drawn if whole is logits else drawn[rows.start : rows.stop]

    return categorical


def shuffle_by_rows(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `shuffle` along an axis other than the rows: draw the orders for the whole batch."""

    def shuffle(x: Any, axis: int = 0, seed: Any = None) -> Any:
        state = running()
        if state is None:
            return original(x, axis, seed)
        state.not_captured(_NOT_BY_ROWS)
        rows = state.context.rows
        if x.ndim == 0 or x.shape[0] != rows.count or rows.count == rows.total:
            with whole_batch(state, drawing=True):
                return original(x, axis, seed)
        if axis % x.ndim == 0:
            raise NotByRowsError(
                "keras.random.shuffle with axis=0 would move rows between devices. Shuffle the data instead (fit "
                "does), or use gpus=[0]."
            )
        axis %= x.ndim
        generator = torch_random.torch_seed_generator(seed)
        shape = (rows.total, *x.shape[1 : axis + 1])
        with whole_batch(state, drawing=True):
            order = torch.rand(shape, generator=generator, device=generator.device).argsort(axis)
        order = order[rows.start : rows.stop].reshape(*x.shape[: axis + 1], *([1] * (x.ndim - axis - 1)))
        return x.gather(axis, order.expand(x.shape))

    return shuffle


def _of_all(value: Any, state: ReplicaContext, per_row: int = 1) -> Any:
    """Gather a tensor of the replica's rows from all replicas. Anything else is returned unchanged."""
    context, rows = state.context, state.context.rows
    if not isinstance(value, torch.Tensor) or value.ndim == 0 or value.shape[0] != rows.count * per_row:
        return value
    if context.size == 1:  # all rows are here; in a trial, missing rows are invented
        state.made_up = rows.count < rows.total
        return value[:1].expand(rows.total * per_row, *value.shape[1:]) if state.made_up else value
    return torch.cat(context.exchange(value.detach(), "a draw that depends on values of all rows"))


def generator_of_replica(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap Keras's function that makes a torch generator: draws from it cannot be captured."""

    def torch_seed_generator(seed: Any) -> Any:
        state = running()
        if state is not None:
            state.not_captured(_NOT_BY_ROWS)
        return original(seed)

    return torch_seed_generator


def global_of_replica(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap Keras's global seed generator: use the replica's copy of the host thread's. Keras has one per thread."""

    def global_seed_generator() -> Any:
        state = running()
        return original() if state is None else CommonGenerator(state.generators)

    return global_seed_generator


def next_of_replica(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `SeedGenerator.next` for generators that do not belong to the model."""

    def next(generator: Any, ordered: bool = True) -> Any:
        state = running()
        if state is None or is_held_by_scope(generator):
            return original(generator, ordered)
        state.not_captured("a seed generator that the model reads itself")
        return state.generators.next_seed(generator, ordered)

    return next


def state_of_replica(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a function of torch that seeds, reads or sets its global generator: it uses the replica's copy."""

    def function(*args: Any) -> Any:
        state = running()
        if state is None or state.drawing:
            return original(*args)
        state.not_captured("the state of torch's global generator")
        return state.generators.with_torch(None, lambda: original(*args))

    return function


# Recurrent dropout: Keras caches the masks on the cell, but all replicas share the cell.


def own_mask(kind: str, original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a cell's getter of a mask: the cached mask belongs to the replica."""

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


def forget_mask(kind: str, original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a cell's reset of a mask: forget the replica's cached mask."""

    def reset_mask(cell: Any) -> None:
        state = running()
        if state is None:
            original(cell)
        else:
            state.masks.pop((id(cell), kind), None)

    return reset_mask
