"""Chooses how the gradients of a step are reduced: during backward, inside CUDA graphs, or at the end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from fastdp.buffers import Bucket, FlatBuffers
from fastdp.comm.base import Communicator
from fastdp.engine.step import Step
from fastdp.program.base import Program

# After so many steps of a batch's shape, a GPU's steps allocate nothing any more. Of so many shapes it is known.
WARM_STEPS, MOST_SHAPES = 2, 256

# Of so many replicas with rows: the gradients of those, and of all that need the sum.
Ends = Callable[[int], tuple[Sequence[FlatBuffers], Sequence[FlatBuffers]]]


class Reductions:
    """Chooses for each step, on the host thread and for all replicas alike.

    Args:
        program: what runs; one whose replicas can reduce within their work has `whole_step` (see `Program`).
        communicator: over the replicas' devices.
        buckets: of the gradients.
        replicas: how many there are.
    """

    def __init__(self, program: Program, communicator: Communicator, buckets: Sequence[Bucket], replicas: int) -> None:
        self._program: Any = program
        self._communicator, self._buckets, self._replicas = communicator, buckets, replicas
        self._trained: dict[Any, int] = {}

    def begin(self, step: Step, batch: Sequence[np.ndarray], held: int, ends: Ends) -> None:
        """Give a step that is about to run its reduction, if it has one before its replicas are done.

        Args:
            step: whose rows are on their devices.
            batch: the global batch.
            held: how many replicas have sums of earlier steps, which are to be added to the gradients at the end.
            ends: gives what is to be reduced, of so many replicas with rows, and where to.
        """
        if self._replicas == 1 or self._is_whole(step, held):
            return
        # Not where sums of earlier steps are still to be added to the gradients.
        if not step.reduces or held:
            return
        shapes = tuple([array.shape for array in batch])
        warm = self._trained.get(shapes, 0) >= WARM_STEPS
        if not warm:
            if len(self._trained) >= MOST_SHAPES:
                self._trained.clear()
            self._trained[shapes] = self._trained.get(shapes, 0) + 1
        step.reduction = self._communicator.begin(*ends(len(step.shards)), self._buckets, warm=warm)
        for context in step.contexts:
            context.ready = partial(step.reduction.ready, context.rank)

    def _is_whole(self, step: Step, held: int) -> bool:
        """Let the replicas reduce within their work, where they can and nothing is against it."""
        whole_step = getattr(self._program, "whole_step", None)
        if whole_step is None:
            return False
        why_not = ""
        if not step.reduces:
            why_not = "gradients wait for a later step"
        elif held:
            why_not = "gradients of earlier steps are added"
        elif len(step.contexts) < self._replicas:
            why_not = "fewer rows than devices"
        found = whole_step(step.batches, step.contexts, why_not)
        if found is None:
            return False
        step.reduction = reduction = found.begin()
        for context in step.contexts:
            context.whole, context.launch = found, partial(reduction.launch, context.rank, context.rendezvous)
        return True
