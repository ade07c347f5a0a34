"""Gradients on their way from backward into the flat buffer: each bucket is announced as soon as it is complete."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from fastdp.buckets import FlatBuffers


class Arrivals:
    """One replica's gradients, as backward comes to them.

    Args:
        flat: the replica's gradient buffers.
        views: its arrays as tensors.

    Hooks on the leaves of autograd call `arrived`, in the thread of the replica. The gradients of a bucket are written
    together when the last one is there. A replica with a single bucket has nothing to announce before its end: it is
    not `useful` to hook its leaves.
    """

    def __init__(self, flat: FlatBuffers, views: Sequence[torch.Tensor]) -> None:
        buckets = flat.buckets()
        self.useful = len(buckets) > 1
        self.stored: set[int] = set()
        self._views = views
        self._bucket_of = {number: i for i, bucket in enumerate(buckets) for number in bucket.arrays}
        self._sizes = [len(bucket.arrays) for bucket in buckets]
        self._here: list[dict[int, torch.Tensor]] = []
        self._ready: Callable[[int], None] | None = None

    def begin(self, ready: Callable[[int], None]) -> None:
        """A step whose complete buckets are to be told to `ready`."""
        self.stored = set()
        self._here = [{} for _ in self._sizes]
        self._ready = ready

    def arrived(self, number: int, gradient: torch.Tensor) -> None:
        """The whole gradient of an array is there. Nothing happens outside a step that was begun."""
        if self._ready is None:
            return
        bucket = self._bucket_of[number]
        here = self._here[bucket]
        here[number] = gradient
        if len(here) < self._sizes[bucket]:
            return
        with torch.no_grad():
            torch._foreach_copy_([self._views[i] for i in here], [dense(g) for g in here.values()])
        self.stored.update(here)
        here.clear()
        self._ready(bucket)

    def end(self) -> set[int]:
        """Backward is over. Gives the numbers of the arrays that have been written; all others are the caller's."""
        self._ready = None
        self._here = []
        return self.stored


def dense(gradient: torch.Tensor) -> torch.Tensor:
    """A gradient that can be copied into a view."""
    return gradient.todense() if gradient.is_sparse else gradient
