"""The statistics of Keras's BatchNormalization, and how they follow the moments of the global batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
import torch
from torch._subclasses import FakeTensor

from fastdp.program.keras.replica import ReplicaContext, running
from fastdp.tensors.moments import Moments, count_of, global_moments
from fastdp.tensors.replica_sums import ReplicaSum, by_exchange, in_graph, of_one
from fastdp.tensors.sums import like


def moments_of_replica(original: Callable[..., Any]) -> Callable[..., Any]:
    """Replaces BatchNormalization's moments: records them, and uses the global batch with `sync_batch_norm`."""

    def moments(layer: Any, inputs: torch.Tensor, mask: torch.Tensor | None) -> Any:
        state = running()
        if state is None:
            return original(layer, inputs, mask)
        if state.frozen_moments:
            return layer.moving_mean.value.to(inputs.dtype), layer.moving_variance.value.to(inputs.dtype)
        axes = layer._reduction_axes
        if state.sync_batch_norm and not _is_alone(state):
            epsilon = 0.0 if mask is None else keras.config.epsilon()  # Keras adds it to the count that it divides by
            place = f"the synchronized moments of {layer.path or layer.name}"
            mean, variance = global_moments(inputs, mask, axes, _sum_for(state, inputs), place, epsilon=epsilon)
        else:
            state.context.check_whole(f"The layer {layer.path or layer.name!r}")
            mean, variance = original(layer, inputs, mask)
        state.moments.append((layer, Moments(mean.detach(), variance.detach(), count_of(inputs, mask, axes))))
        return mean, variance

    return moments


def _is_alone(state: ReplicaContext) -> bool:
    """Whether a replica has all rows. In a trace, which names no other replicas, the rows tell."""
    rows = state.context.rows
    return state.context.size == 1 if state.draws is None else rows.count == rows.total


def _sum_for(state: ReplicaContext, inputs: torch.Tensor) -> ReplicaSum:
    """How moments are added up: in the graph while it is traced. The run that records draws needs no values."""
    if state.draws is None:
        return by_exchange(state.context.exchange)
    return in_graph if isinstance(inputs, FakeTensor) else of_one


def statistics(layer: keras.layers.Layer) -> list[keras.Variable]:
    """The statistics that a BatchNormalization layer moves; none for other layers or a subclass with its own `call`."""
    if type(layer).call is not keras.layers.BatchNormalization.call or layer.moving_mean is None:
        return []
    if layer.renorm:
        return [layer.renorm_mean, layer.renorm_stddev, layer.moving_mean, layer.moving_stddev, layer.moving_variance]
    return [layer.moving_mean, layer.moving_variance]


def moved_statistics(
    layer: keras.layers.BatchNormalization, values: Sequence[torch.Tensor], mean: np.ndarray, variance: np.ndarray
) -> list[torch.Tensor]:
    """`statistics(layer)` after a batch with this mean and variance (float64 vectors).

    Computed as in Keras, in the variables' own precision.
    """

    def moved(value: torch.Tensor, batch: np.ndarray, momentum: float) -> torch.Tensor:
        return value * momentum + like(batch, value) * (1.0 - momentum)

    if not layer.renorm:
        return [moved(value, new, layer.momentum) for value, new in zip(values, (mean, variance), strict=True)]
    deviation = np.sqrt(variance + layer.epsilon)
    moving_deviation = moved(values[3], deviation, layer.momentum)
    return [
        moved(values[0], mean, layer.renorm_momentum),
        moved(values[1], deviation, layer.renorm_momentum),
        moved(values[2], mean, layer.momentum),
        moving_deviation,
        torch.relu(moving_deviation * moving_deviation - layer.epsilon),
    ]
