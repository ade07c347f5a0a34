"""Forward passes that keep their graphs on the replicas, and backward passes through them, for users' loops.

A loop calls the module, computes any loss of the outputs, and runs backward:

    forward     each replica runs its rows and keeps its part of autograd's graph; outputs are merged
    backward    each replica goes back through its graph, from its part of the gradients by the merged outputs; the
                gradients of parameters are reduced, those of inputs are merged

Several forward passes may be open. The graphs of a pass are freed as torch's are: by backward, or with the outputs.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from fastdp.buffers import FlatBuffers, Memory
from fastdp.comm.context import Context
from fastdp.program.base import Result
from fastdp.program.torch.activations import keep
from fastdp.program.torch.batch import Structure, with_extremes
from fastdp.program.torch.capture.forward_replays import ForwardReplays, parts_of
from fastdp.program.torch.capture.joint_replays import JointReplays
from fastdp.program.torch.capture.pure_forward import TorchPureForward
from fastdp.program.torch.capture.pure_joint import TorchPureJoint
from fastdp.program.torch.capture.replays import CapturedReplica
from fastdp.program.torch.following.graphs import PassWrites
from fastdp.program.torch.following.merged import IN_BACKWARD, REMEDY, WriteNotes, merge_writes, write_notes
from fastdp.program.torch.gradients import Found
from fastdp.program.torch.half import HalfGradients, may_overflow
from fastdp.program.torch.loop_passes import BackwardNotes, BackwardPass, ForwardNotes, ForwardPass, KeptGraph
from fastdp.program.torch.module import Buffer
from fastdp.program.torch.module_buffers import BufferNotes, assign_buffers, gather_buffers
from fastdp.program.torch.nest import Nest
from fastdp.program.torch.parameter_hooks import HookedGradients
from fastdp.program.torch.passes import State, together_with
from fastdp.program.torch.paths import PathPass, arriving, go_back, hooked
from fastdp.program.torch.program import TorchProgram
from fastdp.program.torch.recomputed import Recomputed, check_parts
from fastdp.program.torch.replica import backward
from fastdp.program.torch.rows.declared import parts_fit, rows_back, rows_first
from fastdp.program.torch.rows.forms import OutputForm
from fastdp.program.torch.rows.merging import merge, own_gradient
from fastdp.program.torch.rows.reopened import layouts_in_step
from fastdp.program.torch.sharing import Sharing, aliases_on
from fastdp.runtime.queue import QueueDevice
from fastdp.shard import Deal
from fastdp.tensors.arrays import as_tensor, dtype_name, output_array, settle, spec_of
from fastdp.tensors.collectives import StepPeers, peers_scope
from fastdp.tensors.function_mode import plain
from fastdp.tensors.row_effects import ROWS_FIRST


class StepResult(Protocol):
    """What the engine returns of an operation (fastdp.engine.step)."""

    outputs: list[np.ndarray]
    sums: np.ndarray
    notes: Any
    every_note: list[Any]


class LoopProgram(TorchProgram):
    """Runs a torch module as replicas that keep their graphs from a `ForwardPass` to a `BackwardPass`.

    Args:
        module, sync_batch_norm: as in `TorchProgram`.

    `run` with `forward` or `backward` is work for `DataParallel.call` and `DataParallel.backward`.
    """

    def __init__(self, module: nn.Module, *, sync_batch_norm: bool = False) -> None:
        super().__init__(module, sync_batch_norm=sync_batch_norm)
        self.gradients = [spec_of(self._slots[i].name, self._slots[i].tensor) for i in self._differentiable]
        self._memory: dict[int, CapturedReplica] = {}  # without gradients
        self._forwards = ForwardReplays(self._memory, self._slots)
        self._joints = JointReplays(self._slots, self._differentiable)
        self._sharing = Sharing()

    def bind(self, memory: Memory, device: QueueDevice, rank: int) -> State:
        """As in `TorchProgram`."""
        state = super().bind(memory, device, rank)
        self._memory[rank] = CapturedReplica(device, state.variables, [], FlatBuffers([], device))
        return state

    def unbind(self, deal: Deal) -> None:
        """As in `TorchProgram`."""
        super().unbind(deal)
        self._memory.clear()

    def pure_forward(self, devices: int, *, records: bool) -> TorchPureForward:
        """A forward pass without gradients for captured passes on this number of devices.

        `records`: gradients are enabled around the call, though nothing has any.
        """
        return TorchPureForward(
            self.module,
            self._slots,
            self._memory,
            sync_batch_norm=self.sync_batch_norm,
            devices=devices,
            records=records,
        )

    def pure_joint(self, devices: int) -> TorchPureJoint:
        """A forward pass with gradients and its backward pass, for captured passes on this number of devices."""
        return TorchPureJoint(
            self.module,
            self._slots,
            self._differentiable,
            self._memory,
            sync_batch_norm=self.sync_batch_norm,
            devices=devices,
        )

    # On the replicas' threads.

    def run(self, work: Callable[..., Result], *args: Any) -> Result:
        """Run `forward` or `backward` with these arguments as on the user's own thread."""
        return self._thread.run(work, *args)

    def forward(self, work: ForwardPass, state: State, batch: list[np.ndarray], context: Context) -> Result:
        """Run a replica's rows. The result's outputs are those with rows first; the others are in its notes."""
        eager = partial(self._eagerly, work, state)
        if not work.keeps:
            return self._forwards.run(work, state, batch, context, eager)
        if context.among_cut:  # captured passes keep what backward needs
            return eager(batch, context)[0]
        state.gradients.follow(self._users)
        running, leaves = self._passes.running(context), partial(work.leaves, batch, context)
        return self._joints.run(work, state, batch, context, running, eager, leaves)

    def _eagerly(
        self, work: ForwardPass, state: State, batch: list[np.ndarray], context: Context
    ) -> tuple[Result, Sequence[torch.Tensor]]:
        """As `forward`, by the module's own code. The tensors of the outputs come with the result."""
        structure: Structure = context.structure
        leaves = work.leaves(batch, context)
        args, kwargs, _ = structure.nested(leaves.tensors)
        running = self._passes.running(context)
        running.draws_by = state.draws_by
        running.keeps_graph = True
        running.repeatable = int(work.keeps and context.among_cut)  # whoever draws first draws for parts that run again
        state.gradients.follow(self._users)
        replaced = (() if structure.judged is None else structure.judged.replaced) if work.keeps else None
        with torch.set_grad_enabled(work.records), state.replica.passes(replaced), ExitStack() as together:
            if context.size > 1:
                together.enter_context(peers_scope(StepPeers(context)))
                together.enter_context(together_with(running))
            with structure.entered():
                module: Callable[..., Any] = state.replica.module
                if context.is_cut and work.keeps:  # backward computes it again, part by part
                    module = partial(checkpoint, Recomputed(state.replica), use_reentrant=False)
                outputs = with_extremes(module(*args, **kwargs), context)
            with plain():
                nest, tensors = Nest.flatten(outputs, "The module's outputs")
                layouts = structure.layouts_of(outputs, tensors)
                parts_fit(layouts, tensors, context.rows)
                structure.agree(OutputForm.of(nest, tensors, layouts, context.rows))
                buffers = BufferNotes()
                sums = gather_buffers(state.replica, running, buffers)
                writes = write_notes(state.replica.guard, structure.roles, context.rows)
                check_parts(work, context, writes)
                wanted = [tensor.requires_grad for tensor in tensors]
                notes = ForwardNotes(nest, layouts, wanted, [], structure.draws, writes, buffers)
                notes.aliases = aliases_on(state.replica, leaves.tensors, tensors, writes)
                if work.keeps:
                    state.replica.outdate(buffers.unjudged)
                state.replica.restore_buffers()
        if work.keeps:
            work.kept[context.index] = KeptGraph(running, tensors, leaves.rows, leaves.shared)
        arrays, notes.others = parts_of(tensors, layouts, context)
        return Result(arrays, np.concatenate([np.zeros(0), *sums]), notes), tensors

    def backward(self, work: BackwardPass, state: State, batch: list[np.ndarray], context: Context) -> Result:
        """Run backward. The result's outputs are the gradients by inputs with rows."""
        kept = work.forward.kept[context.index]
        running, users = kept.running, self._users
        running.context.rendezvous, running.context.ready = context.rendezvous, context.ready
        roots, seeds = [], []
        for tensor, layout, gradient in zip(kept.outputs, work.forward.layouts, work.gradients, strict=True):
            own = own_gradient(gradient, tensor, layout, context.rows) if tensor.requires_grad else None
            if own is not None:
                roots.append(tensor)
                seeds.append(own.to(tensor.device))
        retained = [kept.outputs[at] for at in work.retained]
        for tensor in retained:
            if tensor.requires_grad:
                tensor.retain_grad()
        # Torch itself runs the hooks of the user's parameters, when it gets the reduced gradients.
        aside = HookedGradients(users, self._passes.nodes) if context.index == 0 else None
        with state.gradients.passes(users, aside, announces=context.listens), ExitStack() as together:
            if context.size > 1 and not kept.captured:
                together.enter_context(peers_scope(StepPeers(running.context)))  # for hooks
                together.enter_context(together_with(running))
            whole = {tensor: total.to(tensor.device) for tensor, total in _whole(work, kept, context)}
            with state.gradients.announcing(running, {}), hooked(arriving(whole)):
                backward(running, roots, seeds, retain=work.retain)
            gradients = state.gradients.store({})
        roles = work.forward.batch.structure.roles
        writes = write_notes(state.replica.guard, roles, context.rows)
        by_rows, shared = ([leaf.grad for leaf in leaves] for leaves in (kept.rows, kept.shared))
        for leaf in (*kept.rows, *kept.shared):
            leaf.grad = None
        notes = BackwardNotes(
            gradients, [g is not None for g in by_rows], [None if g is None else g.cpu() for g in shared], writes
        )
        with warnings.catch_warnings():  # torch warns where there is no gradient
            warnings.simplefilter("ignore")
            notes.retained = [None if one.grad is None else one.grad.cpu() for one in retained]
        for tensor in retained:
            tensor.grad = None
        found = [torch.zeros_like(x) if g is None else g for x, g in zip(kept.rows, by_rows, strict=True)]
        layouts = work.forward.row_layouts
        arrays = [output_array(rows_first(g, one), context.device) for g, one in zip(found, layouts, strict=True)]
        if context.index == 0 and may_overflow(work.forward.batch.structure.autocast, roots):
            notes.half = HalfGradients(roots)
        return Result(arrays, np.zeros(0), notes)

    def path(self, work: PathPass, state: State, batch: list[np.ndarray], context: Context) -> Result:
        """Run backward from some outputs to others."""
        return go_back(work, state, context)

    # On the host's thread.

    def merged(self, work: ForwardPass, result: StepResult) -> list[torch.Tensor]:
        """Assign the buffers of a forward pass, and merge its outputs. The caller owns them."""
        every: list[ForwardNotes] = result.every_note
        notes: ForwardNotes = result.notes
        written = self._merged_writes([note.writes for note in every if note.writes is not None])
        if work.keeps:
            places = notes.buffers.places if work.may_repeat else notes.buffers.readable
            work.before.update({at: self._states[0].variables[at].clone() for at in places})
        self.assign(result.sums, notes.buffers)
        work.layouts, work.nest, work.used = notes.layouts, notes.nest, notes.used
        given = ((number, work.arrays[number]) for number in work.written)
        work.versions = {number: tensor._version for number, tensor in given if tensor is not None}
        work.requires_grad = [any(flags) for flags in zip(*(note.requires_grad for note in every), strict=True)]
        notes.layouts = work.layouts = layouts_in_step(
            work.batch.structure.judged,
            notes.layouts,
            [note.others for note in every],
            work.requires_grad,
            partial(self._trials.look_at_size, work.batch),
        )
        rows = work.batch.shards
        arrays, others = iter(result.outputs), zip(*(note.others for note in every), strict=True)
        outputs = [
            as_tensor(next(arrays), name) if layout == ROWS_FIRST else merge(next(others), layout, rows).clone()
            for layout, name in zip(notes.layouts, notes.nest.dtypes, strict=True)
        ]
        work.noted = written
        if work.keeps:
            work.graphs = written.graphs()
            for one in work.graphs:
                work.layouts = [*work.layouts, one.layout]
                work.requires_grad.append(True)
                for rank, part in enumerate(one.parts):
                    work.kept[rank].outputs.append(part)
                outputs.append(one.merged)
        self._sharing.note(work, every)
        return outputs

    def sharing(self, work: ForwardPass, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The merged tensors of a pass, with memory in common where those of one device have it."""
        return self._sharing.given_to(work, tensors, self._states[0].replica)

    def settle(self, work: ForwardPass, tensors: Sequence[torch.Tensor]) -> None:
        """After a forward pass: give the module and its copies what the pass has written.

        Args:
            work: the pass.
            tensors: the merged tensors behind the outputs.
        """
        if work.noted is not None:
            graphs = {(one.place, one.number): tensor for one, tensor in zip(work.graphs, tensors, strict=True)}
            self._following.finish(work.noted.every, work.noted.merged, graphs)

    def _merged_writes(self, every: list[WriteNotes], remedy: str = REMEDY) -> PassWrites:
        """What the replicas have written, merged. `remedy` as of `merge_writes`.

        Raises:
            ValueError: it cannot be merged. The module has what it held before.
        """
        try:
            if self._passes.watch is not None:
                self._passes.watch.check()
            return PassWrites(every, merge_writes(every, remedy))
        except ValueError:
            self._following.undo()
            raise

    def gradients_of(self, work: BackwardPass, result: StepResult) -> list[torch.Tensor | None]:
        """The gradients of a backward pass by the tensors `ForwardPass.given`. The caller owns them."""
        every: list[BackwardNotes] = result.every_note
        found: list[torch.Tensor | None] = []
        by_rows = zip(work.forward.rows.values(), result.outputs, work.forward.row_layouts, strict=True)
        for at, (tensor, array, layout) in enumerate(by_rows):
            used = any(note.rows[at] for note in every)
            found.append(rows_back(as_tensor(array, dtype_name(tensor)), layout) if used else None)
        for parts in zip(*(note.shared for note in every), strict=True):
            there = [part for part in parts if part is not None]
            found.append(sum(there[1:], there[0].clone()) if there else None)
        return found

    def settle_backward(self, work: BackwardPass, result: StepResult) -> None:
        """After a backward pass: give the module what the pass has written, by hooks or in parts that it recomputed.

        Retained outputs get their gradients.

        Raises:
            ValueError: it cannot be merged.
        """
        forward = work.forward
        for at, parts in zip(
            work.retained, zip(*(note.retained for note in result.every_note), strict=True), strict=True
        ):
            merged = forward.merged[at]()
            if merged is not None:
                keep(merged, parts, forward.layouts[at], work.gradients[at])
        every = [note.writes for note in result.every_note if note.writes is not None]
        written = self._merged_writes(every, IN_BACKWARD)
        self._following.finish(written.every, written.merged, {})

    @contextmanager
    def as_before(self, work: ForwardPass) -> Iterator[None]:
        """While the block runs, the user's module holds what it held before this pass."""
        assert work.noted is not None
        self._following.take_back(work.noted)
        try:
            # Copies, as the graph that is made now may need them later.
            with self._states[0].replica.with_buffers(work.before):
                yield
        finally:
            self._following.restore()

    def reduced(self, result: StepResult) -> list[torch.Tensor | None]:
        """The reduced gradients of a backward pass by the module's parameters. The caller owns them."""
        flat = self._states[0].gradients.flat
        found = Found().with_all(note.found for note in result.every_note).gradients(flat)
        mine = [g.clone() if g is own else g for g, own in zip(found, flat, strict=True)]
        if result.notes.half is not None:
            result.notes.half.overflow(self._users, mine)
        settle(g for g in mine if g is not None)
        return mine

    @property
    def changes(self) -> int:
        """A number that another one takes the place of when what the module holds is changed, or by forward itself."""
        return self._following.changes

    @property
    def user_buffers(self) -> list[Buffer]:
        """The buffers of the user's module."""
        return self._states[0].replica.buffers

    def exchange_buffers(self, values: Mapping[int, torch.Tensor]) -> dict[int, torch.Tensor]:
        """Give buffers these values, by their places among the variables. Returns those that they had."""
        assert self._adopted is not None
        variables = self._states[0].variables
        before = {at: variables[at].clone() for at in values}
        if values:
            with torch.no_grad():
                for at, value in values.items():
                    variables[at].copy_(value)
            settle(variables)
            self._adopted.home.advance()
        return before

    def assign(self, sums: np.ndarray, notes: BufferNotes) -> None:
        """Give the module's buffers their values after a forward pass of the global batch."""
        assert self._adopted is not None
        if not (notes.constant or notes.moved or notes.normalized):
            return
        with torch.no_grad():
            assign_buffers(self._states[0].variables, sums, notes)
        settle(self._states[0].variables)
        self._adopted.home.advance()


def _whole(work: BackwardPass, kept: KeptGraph, context: Context) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """A replica's outputs at which another gradient arrives than its whole one, with that one."""
    for at in work.cut:
        part, total = kept.outputs[at], work.gradients[at]
        if total is not None and part.requires_grad:
            own = own_gradient(total, part, work.forward.layouts[at], context.rows)
            yield part, torch.zeros_like(part) if own is None else own
