"""Writes gradients into the flat buffer during backward, and announces each bucket that is complete."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch

from fastdp.buffers import FlatBuffers


class GradientBuckets:
    """One replica's gradients, in the order in which backward computes them.

    Args:
        flat: the replica's gradient buffers.
        views: the buffers' arrays as tensors.

    Hooks on the leaves of autograd call `arrived` in the replica's thread. The gradients of a bucket are written
    together when the last one has arrived. With a single bucket there is nothing to announce before the end, so
    hooking the leaves is not `useful`.
    """

    def __init__(self, flat: FlatBuffers, views: Sequence[torch.Tensor]) -> None:
        self.flat = flat
        buckets = flat.buckets()
        self.useful = len(buckets) > 1
        self.stored: set[int] = set()
        self._views = views
        self._bucket_of = {number: i for i, bucket in enumerate(buckets) for number in bucket.arrays}
        self._sizes = [len(bucket.arrays) for bucket in buckets]
        self._unhooked: Sequence[torch.Tensor] = ()
        self._here: list[dict[int, torch.Tensor]] = []
        self._ready: Callable[[int], None] | None = None

    def hook(self, leaves: Sequence[torch.Tensor]) -> None:
        """Have the gradients of these leaves, in the order of the arrays, passed to `arrived` once anybody listens.

        For `torch.autograd.grad`, which reaches each leaf once.
        """
        self._unhooked = leaves if self.useful else ()

    def begin(self, ready: Callable[[int], None]) -> None:
        """Begin a step that announces complete buckets by `ready`."""
        for number, leaf in enumerate(self._unhooked):
            leaf.register_hook(partial(self.arrived, number))
        self._unhooked = ()
        self.stored = set()
        self._here = [{} for _ in self._sizes]
        self._ready = ready

    def arrived(self, number: int, gradient: torch.Tensor) -> None:
        """The complete gradient of an array has arrived. Does nothing outside a step that was begun."""
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
        """Backward is over. `stored` holds the indices of the arrays already written; the others are still to write."""
        self._ready = None
        self._here = []

    @contextmanager
    def during(self, ready: Callable[[int], None] | None) -> Iterator[None]:
        """Wrap a step. Complete buckets are announced by `ready`, unless it is None."""
        self.stored = set()
        if self.useful and ready is not None:
            self.begin(ready)
        try:
            yield
        finally:
            self.end()

    def store(self, found: Sequence[torch.Tensor | None]) -> frozenset[int]:
        """Copy the step's gradients into the flat buffer, and zeros for missing ones. Returns the indices of those.

        Gradients already stored are left alone: their buckets may already hold the sum over all replicas.
        """
        stored, self.stored = self.stored, set()
        unused = frozenset(i for i, gradient in enumerate(found) if gradient is None)
        # A captured step has written some gradients to their place already.
        left = [i for i in range(len(found)) if i not in unused and i not in stored]
        moved = [i for i in left if found[i] is not self._views[i]]
        with torch.no_grad():
            if moved:
                torch._foreach_copy_([self._views[i] for i in moved], [found[i] for i in moved])
            for i in unused:
                self._views[i].zero_()
        return unused


def dense(gradient: torch.Tensor) -> torch.Tensor:
    """The gradient as a dense tensor, which can be copied into a view."""
    return gradient.to_dense() if gradient.is_sparse else gradient
