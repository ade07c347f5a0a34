"""Writes gradients into the flat buffer during backward, and announces each bucket that is complete."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch

from fastdp.buffers import FlatBuffers


class GradientBuckets:
    """One replica's gradients, as backward comes to them.

    Args:
        flat: the replica's gradient buffers.
        views: its arrays as tensors.

    Hooks on the leaves of autograd call `arrived`, in the thread of the replica. The gradients of a bucket are written
    together when the last one is there. A replica with a single bucket has nothing to announce before its end: it is
    not `useful` to hook its leaves.
    """

    def __init__(self, flat: FlatBuffers, views: Sequence[torch.Tensor]) -> None:
        self.flat = flat
        buckets = flat.buckets()
        self.useful = len(buckets) > 1
        self.stored: set[int] = set()
        self._views = views
        self._bucket_of = {number: i for i, bucket in enumerate(buckets) for number in bucket.arrays}
        self._sizes = [len(bucket.arrays) for bucket in buckets]
        self._here: list[dict[int, torch.Tensor]] = []
        self._ready: Callable[[int], None] | None = None

    def hook(self, leaves: Sequence[torch.Tensor]) -> None:
        """Have the gradients of these leaves, in the order of the arrays, told to `arrived`.

        For `torch.autograd.grad`, which comes to each leaf once.
        """
        for number, leaf in enumerate(leaves if self.useful else ()):
            leaf.register_hook(partial(self.arrived, number))

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

    def end(self) -> None:
        """Backward is over. `stored` are the numbers of the arrays that have been written; all others are to be."""
        self._ready = None
        self._here = []

    @contextmanager
    def during(self, ready: Callable[[int], None] | None) -> Iterator[None]:
        """Around a step whose complete buckets are to be told to `ready`; to nobody where that is None."""
        self.stored = set()
        if self.useful and ready is not None:
            self.begin(ready)
        try:
            yield
        finally:
            self.end()

    def store(self, found: Sequence[torch.Tensor | None]) -> frozenset[int]:
        """Copy the step's gradients into the flat buffer; zeros where there are none, whose numbers are given back.

        Those that have been stored are there: their buckets may hold the sum of all replicas already.
        """
        stored, self.stored = self.stored, set()
        unused = frozenset(i for i, gradient in enumerate(found) if gradient is None)
        # A captured step has written them to their place.
        left = [i for i in range(len(found)) if i not in unused and i not in stored]
        moved = [i for i in left if found[i] is not self._views[i]]
        with torch.no_grad():
            if moved:
                torch._foreach_copy_([self._views[i] for i in moved], [found[i] for i in moved])
            for i in unused:
                self._views[i].zero_()
        return unused


def dense(gradient: torch.Tensor) -> torch.Tensor:
    """A gradient that can be copied into a view."""
    return gradient.todense() if gradient.is_sparse else gradient
