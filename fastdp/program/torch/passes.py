"""A replica's forward and backward passes: alone in plain torch, or in step with other replicas.

A replica that works alone on a step runs the module as plain torch does: no functions are replaced, random numbers come
from torch's own generators, and backward runs from the loss through the whole graph. Replicas that share a step run in
a mode that makes draws, batch normalization and the loss those of the global batch, and cut the graph at the outputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.amp import GradScaler

from fastdp.capture.pure_step import Draws
from fastdp.comm.context import Context
from fastdp.program.base import Result, Totals
from fastdp.program.torch import activations, batch_axis, embeddings, fast_paths, weighed_losses
from fastdp.program.torch import batch_norm as torch_batch_norm
from fastdp.program.torch import gradients as torch_gradients
from fastdp.program.torch.batch import Structure, outputs_to_arrays, with_extremes
from fastdp.program.torch.fast_paths import FAST_PATHS
from fastdp.program.torch.following.merged import MergedWrite, WriteNotes, merge_writes, write_notes
from fastdp.program.torch.following.writes import Place
from fastdp.program.torch.gradients import Found, Gradients
from fastdp.program.torch.half import HalfGradients, may_overflow
from fastdp.program.torch.loss import NOTHING_TO_TRAIN, WITHOUT_GRADIENT, LossFunction, contribute
from fastdp.program.torch.losses import Reported, check_equal_nests, split
from fastdp.program.torch.module import ReplicaModule
from fastdp.program.torch.module_buffers import BufferNotes, gather_buffers
from fastdp.program.torch.nest import Nest
from fastdp.program.torch.parameter_hooks import HookedGradients, NodeHooks
from fastdp.program.torch.random import handlers as random_handlers
from fastdp.program.torch.random.checkpoints import REPEATED_DRAWS
from fastdp.program.torch.replica import ReplicaContext, backward
from fastdp.program.torch.rows.judged import Candidates
from fastdp.program.torch.rows.outside import StepWatch
from fastdp.program.torch.rows.reopened import check_same
from fastdp.program.torch.shared_draws import SharedDraws
from fastdp.tensors import pytree
from fastdp.tensors.collectives import StepPeers, peers_scope
from fastdp.tensors.function_mode import Handler, ReplicaMode

HANDLERS: dict[Any, Handler] = {
    **random_handlers.HANDLERS,
    **activations.HANDLERS,
    **batch_axis.HANDLERS,
    **embeddings.HANDLERS,
    **fast_paths.HANDLERS,
    **torch_batch_norm.HANDLERS,
    **torch_gradients.HANDLERS,
    **weighed_losses.HANDLERS,
}


HOOKS_IN_A_WINDOW = (
    "`accumulate` must be 1 for a module with hooks on its parameters: on several devices gradients are reduced once "
    "per window, and a hook must see the gradient of each call. Remove the hooks, or do what they do in the optimizer."
)


@contextmanager
def together_with(running: ReplicaContext) -> Iterator[None]:
    """Run passes of a replica that shares its step with others: torch's functions are those of the global batch."""
    with REPEATED_DRAWS, FAST_PATHS, ReplicaMode(running, HANDLERS):
        yield


@dataclass(slots=True)
class State:
    """A replica over its memory's `variables`.

    `draws_by` makes the draws of a step that is compared with its captured form.
    """

    replica: ReplicaModule
    variables: list[torch.Tensor]
    gradients: Gradients
    draws_by: Draws | None = None


@dataclass(slots=True)
class Notes:
    """The layout of a step's sums: the loss, then the numbers that `buffers` describes.

    `found` says which parameters have a gradient; `hooked` are their hooks, `half` those in float16. `reported` are the
    numbers of the loss function that are not trained on. `trains`: whether the replica's part of the loss has a
    gradient. `writes` are what else passes have written, `merged` that of all replicas. `watch`:
    over what all copies share. `open`
    are the outputs that were the same for all rows in all trials, which may be what `left` tells.
    """

    outputs: Nest | None = None
    loss_dtype: torch.dtype = torch.float32
    buffers: BufferNotes = field(default_factory=BufferNotes)
    found: Found = field(default_factory=Found)
    hooked: HookedGradients | None = None
    half: HalfGradients | None = None
    reported: Reported | None = None
    draws: SharedDraws | None = None
    trains: bool = True
    writes: WriteNotes | None = None
    merged: dict[Place, MergedWrite] = field(default_factory=dict)
    watch: StepWatch | None = None
    left: dict[int, Candidates] = field(default_factory=dict)
    open: dict[int, torch.Tensor] = field(default_factory=dict)

    def agree(self, every: Sequence[Notes]) -> None:
        """Check that all replicas have drawn the same random numbers, and agree on buffers. Called before the update.

        Raises:
            RuntimeError, ValueError: they have not, or do not.
        """
        if self.draws is not None:
            self.draws.end()
        self.buffers.check([note.buffers for note in every])
        if self.watch is not None:
            self.watch.check()
        check_same(self.left, [note.open for note in every])
        self.merged = merge_writes([note.writes for note in every if note.writes is not None])
        check_equal_nests([note.reported for note in every])
        if not any(note.trains for note in every):
            raise ValueError(NOTHING_TO_TRAIN)


def no_totals() -> Totals:
    """The totals of an update without a batch, by gradients that wait."""
    return Totals(np.zeros(1), Notes(), [Notes()])


class Passes:
    """Runs the passes of all replicas of a program, each on its own thread.

    Args:
        loss_fn, reduction, sync_batch_norm, accumulate: as in `TorchProgram`.
        scaler: scales the loss; see `UpdateRules`.

    Attributes:
        scale: the scaler's at the beginning of the step.
        replicas: the number of replicas, with and without rows in a step.
        hooked: whether hooks run on the gradients of the latest step after its reduction.
        nodes: finds hooks on autograd's nodes.
        draws: those of the present step, if replicas share it.
        watch: over what all replicas share.
    """

    def __init__(
        self,
        loss_fn: LossFunction | None,
        reduction: str | None,
        sync_batch_norm: bool,
        accumulate: int,
        scaler: GradScaler | None,
    ) -> None:
        self.loss_fn = loss_fn
        self.reduction = reduction
        self.sync_batch_norm = sync_batch_norm
        self.accumulate = accumulate
        self.scaler = scaler
        self.scale = 1.0
        self.replicas = 0
        self.hooked = False
        self.nodes = NodeHooks()
        self.draws: SharedDraws | None = None
        self.watch: StepWatch | None = None
        self._told: set[str] = set()

    def train(self, state: State, users: Sequence[torch.Tensor], batch: list[np.ndarray], context: Context) -> Result:
        """Compute forward, the replica's contribution to the loss, and its gradient.

        Args:
            state: the replica.
            users: the user's own parameters that can have a gradient.
            batch, context: as in `Program.train`.
        """
        together = context.size > 1
        run = self._train_together if together else self._train_alone
        hooked = None
        if context.index == 0 and self.replicas > 1:
            hooked = HookedGradients(users, self.nodes)
            if hooked and together and self.accumulate > 1:
                raise ValueError(HOOKS_IN_A_WINDOW)
            if together:
                hooked.check()
        aside = hooked if together else None
        passes = state.gradients.passes(users, aside, announces=context.listens)
        with torch.enable_grad(), state.replica.passes(), passes:
            result = run(state, users, batch, context)
        if context.index == 0:
            self.hooked = bool(hooked) and together
            result.notes.hooked = hooked if self.hooked else None
        return result

    def predict(self, state: State, batch: list[np.ndarray], context: Context) -> Result:
        """Run forward only. Changes no buffer, even in training mode."""
        structure: Structure = context.structure
        args, kwargs, _ = structure.pack(batch)
        with torch.no_grad(), state.replica.passes(), ExitStack() as forward:
            if context.size > 1:
                forward.enter_context(peers_scope(StepPeers(context)))
                forward.enter_context(together_with(self.running(context)))
            forward.enter_context(structure.autocast.enter())
            outputs = state.replica.module(*args, **kwargs)
            state.replica.restore_buffers()
            state.replica.restore_written()
        arrays, nest = outputs_to_arrays(outputs, context)
        return Result(arrays, np.zeros(1), Notes(nest, draws=structure.draws if context.size > 1 else None))

    def running(self, context: Context) -> ReplicaContext:
        """What a replica's thread knows in a step that begins."""
        if context.size > 1:
            self.draws = context.structure.draws
            self.draws.begin()
        judged = context.structure.judged
        weighs = judged is not None and judged.weighs
        return ReplicaContext(context, context.rows, self.sync_batch_norm, told=self._told, weighs=weighs)

    def _train_alone(
        self, state: State, users: Sequence[torch.Tensor], batch: list[np.ndarray], context: Context
    ) -> Result:
        """Plain torch, by the only replica of the step."""
        assert self.loss_fn is not None
        structure: Structure = context.structure
        args, kwargs, targets = structure.pack(batch, None if batch else context.torch_device)
        with structure.autocast.enter():
            outputs = state.replica.module(*args, **kwargs)
            loss, reported = split(self.loss_fn(outputs, *targets), self.reduction)
        if loss.requires_grad:
            self._scaled(loss).backward()
        else:
            raise ValueError(WITHOUT_GRADIENT if _requires_grad(outputs) else NOTHING_TO_TRAIN)
        arrays, nest = outputs_to_arrays(outputs, context) if context.wants_outputs else ([], None)
        notes = Notes(nest, loss.dtype, found=state.gradients.store({}, keep=self.replicas == 1 == self.accumulate))
        if state.replica.adopted is None or self.replicas > 1:
            notes.buffers.constant = [(i, value.clone()) for i, value, _ in state.replica.changed_buffers()]
        notes.reported = reported and reported.read(1.0)
        state.replica.keep_buffers()
        return Result(arrays, np.array([float(loss.detach())]), notes)

    def _scaled(self, loss: torch.Tensor) -> torch.Tensor:
        """What plain torch runs backward from."""
        loss = loss if self.accumulate == 1 else loss / self.accumulate
        return loss if self.scaler is None else self.scaler.scale(loss)

    def _train_together(
        self, state: State, users: Sequence[torch.Tensor], batch: list[np.ndarray], context: Context
    ) -> Result:
        """The replica's part of a step that several replicas share."""
        assert self.loss_fn is not None
        structure: Structure = context.structure
        args, kwargs, targets = structure.pack(batch)
        running = self.running(context)
        running.draws_by = state.draws_by
        with peers_scope(StepPeers(context)), together_with(running), ExitStack() as forward:
            forward.enter_context(structure.autocast.enter())
            outputs = with_extremes(state.replica.module(*args, **kwargs), context)
            running.scale = self.scale / self.accumulate
            part = contribute(self.reduction, self.loss_fn, outputs, targets, users, running)
            forward.close()
            if part.roots:
                with state.gradients.announcing(running, part.direct):
                    backward(running, part.roots, part.seeds)
        arrays, nest = outputs_to_arrays(outputs, context) if context.wants_outputs else ([], None)
        notes = Notes(nest, part.dtype, found=state.gradients.store(part.direct), draws=structure.draws)
        notes.reported, notes.trains = part.reported, bool(part.roots or part.direct)
        notes.watch = self.watch
        judged = structure.judged
        if judged is not None and judged.open:
            tensors = [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, torch.Tensor)]
            notes.left, notes.open = dict(judged.open), {at: tensors[at].detach() for at in judged.open}
        # In a window each call's sum over rows is a float16 number, and there is only one sum over all calls.
        may = self.scaler is not None or may_overflow(structure.autocast, part.roots)
        if may and context.index == 0 and self.accumulate == 1:
            notes.half = HalfGradients(part.roots)
        sums = gather_buffers(state.replica, running, notes.buffers)
        state.replica.restore_buffers()
        notes.writes = write_notes(state.replica.guard, structure.roles, context.rows)
        return Result(arrays, np.concatenate([[part.value], *sums]), notes)


def _requires_grad(outputs: Any) -> bool:
    """Whether a tensor in a nest requires a gradient."""
    return any(isinstance(leaf, torch.Tensor) and leaf.requires_grad for leaf in pytree.tree_leaves(outputs))
