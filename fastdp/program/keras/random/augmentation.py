"""Makes image augmentation that draws outside of `keras.random` follow the rows of the global batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import torch

from fastdp.program.keras.random.ops import whole_batch
from fastdp.program.keras.replica import running


class PythonRandom:
    """Replaces the module `random` inside Keras, where AugMix chooses its operations and seeds are made with it.

    Every replica draws from its own copy of that generator in the state before the step, so all replicas choose what
    one device would choose.
    """

    def __init__(self, module: Any) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        state = running()
        if state is None:
            return getattr(self._module, name)
        state.not_captured("a choice by Python's random generator")
        return getattr(state.generators.python, name)


def elastic_by_rows(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap the elastic transformation: draw for all rows of the batch, and keep the replica's rows.

    Keras 3.15 on torch draws it from torch's global generator and ignores the seed.
    """

    def elastic_transform(images: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        state = running()
        if state is None:
            return original(images, *args, **kwargs)
        state.not_captured("an elastic transformation, which draws from torch's global generator")
        rows, before = state.context.rows, images
        by_rows = images.ndim == 4 and images.shape[0] == rows.count
        if by_rows:
            rest = [images.new_zeros((n, *images.shape[1:])) for n in (rows.start, rows.total - rows.stop)]
            images = torch.cat([rest[0], before, rest[1]])
        with whole_batch(state, drawing=True):
            moved = state.generators.with_torch(None, lambda: original(images, *args, **kwargs), images.device)
        return moved[rows.start : rows.stop] if by_rows else moved

    return elastic_transform


def histogram_of_batch(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap the histogram of Equalization, which Keras takes over all rows: sum it over all replicas."""

    def histogram(layer: Any, *args: Any, **kwargs: Any) -> Any:
        counts = original(layer, *args, **kwargs)
        state = running()
        if state is None:
            return counts
        state.made_up |= state.context.rows.count < state.context.rows.total and state.context.size == 1
        return sum(state.context.exchange(counts, ("the histogram of an equalization", layer.name)))

    return histogram


def writes_to_inputs(model: keras.Model) -> bool:
    """Whether a layer writes to its inputs, which may be the user's batch. Keras's RandomBrightness does."""
    return any(isinstance(layer, keras.layers.RandomBrightness) for layer in model._flatten_layers())
