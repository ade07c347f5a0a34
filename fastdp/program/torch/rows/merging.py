"""Merges what replicas computed into what one device would have, and splits gradients by merged values again.

The gradient rule: each replica differentiates its contribution, and the plain sum of all replicas' gradients is the
gradient of one device. So a value that is the same on all replicas, or a mean over rows, counts on each replica by its
share of the rows, and a sum counts in full.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fastdp.shard import Rows
from fastdp.tensors.row_effects import MEAN_SCALAR, ROWS_FIRST, Effect, Layout
from fastdp.tensors.sums import weighted_sum

# Effects of values without rows that can be merged from the replicas' values, with their gradients.
MERGEABLE = (Effect.SAME, Effect.MEAN, Effect.SUM, Effect.LARGEST, Effect.SMALLEST)


def plain_layouts(tensors: Sequence[torch.Tensor]) -> list[Layout]:
    """The layouts of a module in which rows never meet: rows along the first axis, and means without axes."""
    return [ROWS_FIRST if tensor.ndim else MEAN_SCALAR for tensor in tensors]


def merge(parts: Sequence[torch.Tensor], layout: Layout, rows: Sequence[Rows]) -> torch.Tensor:
    """The tensor of the whole batch, from those of the replicas. It may be one of the parts itself.

    Args:
        parts: the replicas' tensors, in rank order, detached.
        layout: how the tensor depends on the rows.
        rows: the replicas' rows.
    """
    first = parts[0]
    if len(parts) == 1 or layout.effect is Effect.SAME:
        return first
    if layout.effect is Effect.ROWS:
        assert layout.axis is not None
        return torch.cat(list(parts), layout.axis)
    if layout.effect is Effect.LARGEST:
        return torch.stack(list(parts)).amax(0)
    if layout.effect is Effect.SMALLEST:
        return torch.stack(list(parts)).amin(0)
    if layout.effect is Effect.SUM:
        return torch.stack(list(parts)).sum(0, dtype=first.dtype)
    assert layout.effect is Effect.MEAN, layout
    if first.is_floating_point() or first.is_complex():
        return weighted_mean(parts, layout, rows)
    return weighted_mean([part.double() for part in parts], layout, rows).round().to(first.dtype)


def weighted_mean(parts: Sequence[torch.Tensor], layout: Layout, rows: Sequence[Rows]) -> torch.Tensor:
    """The mean of the replicas' values, weighted by rows or by what they count."""
    shares = [layout.share(one) for one in rows]
    if layout.weights is not None:  # nothing of 0/0 counts
        parts = [part for part, share in zip(parts, shares, strict=True) if share]
        shares = [share for share in shares if share]
    if parts[0].ndim == 0:
        return weighted_sum(parts, shares)
    return torch.stack([part * share for part, share in zip(parts, shares, strict=True)]).sum(0)


def own_gradient(gradient: torch.Tensor | None, part: torch.Tensor, layout: Layout, rows: Rows) -> torch.Tensor | None:
    """The gradient from which a replica's backward starts, from the gradient by the merged tensor.

    Args:
        gradient: of the loss, by the tensor of the whole batch; None if the loss does not depend on it.
        part: the replica's own tensor.
        layout: how the tensor depends on the rows: ROWS, SAME, MEAN or SUM. Extremes are the same on all replicas once
            they have been reduced.
        rows: the replica's rows.

    Returns:
        None without a gradient, and where the replica's rows count nothing in a mean and give no number, as 0/0.
    """
    if gradient is None or layout.effect is Effect.SUM:
        return gradient
    if layout.effect is Effect.ROWS:
        return own_part(gradient, layout, rows)
    share = layout.share(rows)
    return None if not share and not bool(torch.isfinite(part).all()) else gradient * share


def own_part(tensor: torch.Tensor, layout: Layout, rows: Rows) -> torch.Tensor:
    """A view of the replica's rows of a tensor for all rows."""
    assert layout.axis is not None
    per_row = tensor.shape[layout.axis] // rows.total
    return tensor.narrow(layout.axis, per_row * rows.start, per_row * rows.count)


def misfit(tensor: torch.Tensor, layout: Layout, rows: Rows) -> str | None:
    """Why a replica's tensor cannot have this layout, or None: its shape is not the one for the replica's rows."""
    if layout.effect is not Effect.ROWS:
        return None
    axis = layout.axis or 0
    if tensor.ndim > axis and tensor.shape[axis] and tensor.shape[axis] % rows.count == 0:
        return None
    return (
        f"must have its rows along axis {axis} (a multiple of {rows.count} for {rows.count} rows). "
        f"Received: shape {tuple(tensor.shape)}"
    )
