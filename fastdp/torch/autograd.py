"""Calls of a parallel module as nodes of autograd's graph: `loss.backward()` runs backward on all devices."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from fastdp.comm.batch import Batch
from fastdp.engine.data_parallel import DataParallel
from fastdp.errors import GraphsLostError, ReplicaError
from fastdp.options import Options
from fastdp.program.torch.capture.call_kinds import CallKinds
from fastdp.program.torch.loop import LoopProgram
from fastdp.program.torch.loop_passes import Apart, BackwardPass, ForwardPass, check_apart
from fastdp.program.torch.paths import PathPass, merged_path
from fastdp.runtime.host.resources import SEVERAL_THREADS_NBYTES
from fastdp.runtime.queue import QueueDevice
from fastdp.runtime.roster import Roster
from fastdp.tensors.compiled import not_compiled
from fastdp.tensors.thread_state import check_around
from fastdp.tensors.threads import LoopShare, given_cores
from fastdp.torch.captured import capture_forwards, capture_loops, is_observed
from fastdp.torch.paths import Watched, in_place_of, with_paths
from fastdp.torch.repeated_passes import Seen, again, changed_since, split_refused
from fastdp.torch.second_gradients import SecondGradients


@dataclass(slots=True)
class OpenPass:
    """A forward pass, and what is needed to repeat it on one device.

    `formed` is the engine's at the pass. `share`: of the cores, while it is open. `seen`: for a pass that may be
    repeated. `node` is that of autograd's graph, and `returned` the number of outputs that are no attributes.
    """

    calls: Calls
    work: ForwardPass
    values: Any
    numbers: list[int]
    formed: int
    drawn: torch.Tensor = field(default_factory=torch.get_rng_state)
    share: LoopShare | None = None
    seen: Seen | None = None
    watched: Watched = field(default_factory=Watched)
    node: Callable[[], Any] = lambda: None
    returned: int = 0


class Calls:
    """Runs calls of a module on all devices, with gradients where autograd wants them.

    Args:
        module: the user's own.
        devices: the devices of the replicas, two or more.
        options: as in `fastdp.wrap`.
        scope: entered around each pass.
        program_class: what runs the passes.
    """

    def __init__(
        self,
        module: nn.Module,
        devices: Sequence[QueueDevice] | Roster,
        options: Options,
        scope: Callable[[], AbstractContextManager[object]] = nullcontext,
        program_class: type[LoopProgram] = LoopProgram,
    ) -> None:
        self.program = program_class(module, sync_batch_norm=options.sync_batch_norm)
        # The user's optimizer updates the first replica's variables, from where all others get them.
        self.engine = DataParallel(
            self.program, devices, options=replace(options, update="first", shard_optimizer=False)
        )
        self._options, self._deal = options, self.engine.deal
        self._capture()
        self._kinds = CallKinds(module)
        self._scope = scope
        self.second = SecondGradients(self.program)
        self._apart: list[Apart] = []  # of the latest pass

    def _capture(self) -> None:
        """Have passes captured on the present replicas."""
        self._deal = self.engine.deal
        self.captures = capture_forwards(self.program, self._options, self.engine.devices)
        self.loops = capture_loops(self.program, self._options, self.engine.devices)

    def run(
        self,
        batch: Batch,
        values: tuple[Any, ...],
        *,
        inference: bool = False,
        placed: Callable[[Batch], Batch] | None = None,
    ) -> Any:
        """The merged outputs of a batch that was made of `values`; part of autograd's graph where plain torch's are.

        `inference`: the call is in torch's inference mode, which is off here. `placed`: gives the batch whose arrays
        lie on the devices, if there is one.
        """
        if self.engine.deal != self._deal:
            self._capture()
        check_apart(self._apart)
        users = self.program.users
        batch.structure.inference = inference
        keeps = torch.is_grad_enabled()
        with self._scope():
            batch = self.program.judge(batch, self.engine.size, wants=keeps)
            batch = batch if placed is None else placed(batch)
        work = ForwardPass.of(batch, values, keeps=keeps)
        numbers = [i for i, user in enumerate(users) if user.requires_grad] if keeps else []
        work.keeps = bool(numbers or work.given)
        if work.keeps:
            opened = OpenPass(self, work, values, numbers, self.engine.formed)
            opened.seen = Seen.by(self.program, work, values) if self._options.survives else None
            self._prepare_loop(work)
            tensors = self._recorded(opened, [*work.given, *(users[i] for i in numbers)])
            opened.share = self._share(tensors)
        else:
            tensors = self.program.sharing(work, self._without_gradients(work))
        assert work.nest is not None
        count = len(work.nest.dtypes)
        self.program.settle(work, tensors[count:])
        self._apart = work.apart
        return work.nest.pack(tensors[:count])

    def _recorded(self, opened: OpenPass, leaves: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The merged outputs of a pass as part of autograd's graph. `leaves`: whose gradients are wanted."""
        work = opened.work
        with torch.no_grad():
            outputs = self.forward(work)
            work.find_inner()
            ends = [at for at in work.inner.sources if work.requires_grad[at]]
            given = in_place_of(outputs, ends) if ends else outputs
        assert work.nest is not None
        opened.returned = len(work.nest.dtypes)
        tensors = list(_Node.apply(opened, given, *leaves))
        if work.inner:
            nodes = (tensor.grad_fn for tensor in tensors if tensor.grad_fn is not None)
            opened.node = weakref.ref(next(nodes))
            tensors = with_paths(opened, outputs, tensors)
        tensors = self.program.sharing(work, tensors)
        work.note_merged(tensors)
        return tensors

    def _without_gradients(self, work: ForwardPass) -> list[torch.Tensor]:
        """As `forward`, captured where it may be."""
        began = time.perf_counter()
        if self.captures is not None:
            kind = self._kinds.of(work.batch.structure)
            work.captures = self.captures.of(kind, kind.label)
        if work.captures is None:
            return self.forward(work)
        with self._scope():
            work.captures.prepare(work.batch, True, eager=is_observed())
        tensors = self.forward(work)
        work.captures.note(time.perf_counter() - began)
        return tensors

    def _prepare_loop(self, work: ForwardPass) -> None:
        """Have a pass with gradients captured, where it may be."""
        structure = work.batch.structure
        if self.loops is None or (structure.judged is not None and structure.judged.watched):
            return
        kind = self._kinds.of(structure)
        work.captures = self.loops.of(kind, f"{kind.label}, with gradients")
        if work.captures is not None:
            structure.differentiated = work.differentiated
            with self._scope():
                work.captures.prepare(work.batch, True, eager=is_observed())
            work.shapes = list(work.captures.present)

    def forward(self, work: ForwardPass) -> list[torch.Tensor]:
        """Run forward on the replicas; the merged outputs."""
        began = time.perf_counter()
        with self._scope():
            result = self.engine.call(work.batch, partial(self.program.run, self.program.forward, work))
            outputs = self.program.merged(work, result)
        work.seconds = time.perf_counter() - began
        return outputs

    def backward(
        self,
        opened: OpenPass,
        gradients: Sequence[torch.Tensor | None],
        *,
        retain: bool,
        given: Callable[[], Sequence[torch.Tensor]],
    ) -> list[torch.Tensor | None]:
        """Run backward on the replicas; the gradients by the tensors that were given, then those by the parameters.

        If the graphs of a replica are lost, or it has no memory for its rows at once, the pass is repeated on the
        devices that there are, with the same draws.

        Args:
            given: gives the tensors of the pass that may have a gradient.
        """
        while True:
            try:
                return self._on_replicas(opened, gradients, retain=retain)
            except (GraphsLostError, ReplicaError) as error:
                if isinstance(error, ReplicaError) and not error.rows_cut:
                    raise
                given()  # torch checks that they were not written to
                opened.work = again(self.program, opened.work, opened.seen, partial(self._forward_of, opened), error)
                opened.formed = self.engine.formed

    def _forward_of(self, opened: OpenPass) -> ForwardPass:
        """Another forward pass on the arguments of a pass."""
        made: list[ForwardPass] = []

        def once() -> None:
            args, kwargs, _ = opened.values
            batch = self.program.batch(args, kwargs, (), opened.work.batch.structure.declared)
            with self._scope():
                batch = self.program.judge(batch, self.engine.size, wants=True)
            work = ForwardPass.of(batch, opened.values, keeps=True)
            self.forward(work)
            made.append(work)

        self.engine.surviving(once)
        return made[-1]

    def check_optimizer(self) -> None:
        """Refuse a backward pass for an optimizer that is to be divided, and that nobody can divide."""
        if self._options.shard_optimizer:
            raise NotImplementedError(
                "shard_optimizer=True divides the optimizer of a train step; in a loop of your own the steps of the "
                "optimizer are yours, with all of its state on the first device. Train by model.train_step(loss_fn, "
                "optimizer), or wrap the module without `shard_optimizer`."
            )

    def _on_replicas(
        self, opened: OpenPass, gradients: Sequence[torch.Tensor | None], *, retain: bool
    ) -> list[torch.Tensor | None]:
        """As `backward`, through the replicas' graphs."""
        began = time.perf_counter()
        check_around(self.program.module, "A backward pass of a parallel module")
        opened.work.check_written()
        why = changed_since(self.program, opened.seen) if opened.seen is not None and self.engine.deal.cuts else ""
        if why:
            raise RuntimeError(f"Backward runs rows again for which a device has no memory at once, but {why}.")
        cut = opened.watched.present_cut()
        work = BackwardPass(opened.work, gradients, retain, opened.work.retained(gradients, cut), cut)
        rows = Batch([], None, opened.work.batch.rows)
        with self._scope():
            run = partial(self.program.run, self.program.backward, work)
            refused = split_refused(opened.work)
            result = self.engine.backward(rows, run, opened.formed, refused)
            if opened.share is not None:
                opened.share.keep()
            found = self.program.gradients_of(work, result)
            reduced = self.program.reduced(result)
            self.program.settle_backward(work, result)
        opened.work.ended(gradients, time.perf_counter() - began)
        if result.skipped:  # nothing changes: optimizers leave parameters without a gradient as they are
            return [None] * (len(found) + len(opened.numbers))
        return [*found, *(reduced[i] for i in opened.numbers)]

    def _share(self, outputs: Sequence[torch.Tensor]) -> LoopShare | None:
        """Keep the user's loop at a device's share of the cores, if its loss and its optimizer have little to do."""
        devices = self.engine.devices
        nbytes = self.engine.replicas[0].memory.variables.nbytes + sum(tensor.nbytes for tensor in outputs)
        if devices[0].on_gpu or nbytes > SEVERAL_THREADS_NBYTES:
            return None
        return LoopShare(max(1, given_cores() // len(devices)))

    def path(
        self, opened: OpenPass, ends: Sequence[int], gradients: Sequence[torch.Tensor | None], starts: Sequence[int]
    ) -> list[torch.Tensor | None]:
        """The gradients by outputs from which others are computed, as far as they come from these others.

        Args:
            ends: the others, by number.
            gradients: of the loss by them.
            starts: whose gradients are wanted, by number.

        Raises:
            NotImplementedError: it is to be differentiated again, and several devices cannot.
        """
        if torch.is_grad_enabled():
            return self.second.path(opened, ends, gradients, starts)
        work = PathPass(opened.work, ends, gradients, starts)
        rows = Batch([], None, opened.work.batch.rows)
        with self._scope():
            run = partial(self.program.run, self.program.path, work)
            return merged_path(work, self.engine.call(rows, run, opened.formed).every_note)


class _Node(torch.autograd.Function):
    """A forward pass on all devices as one node of autograd's graph.

    Its inputs are the tensors whose gradients are wanted and the module's trained parameters, so torch itself adds to
    `p.grad` and calls the hooks of parameters. Its outputs are the merged ones.
    """

    @staticmethod
    def forward(
        ctx: Any, opened: OpenPass, outputs: Sequence[torch.Tensor], *tensors: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        ctx.opened = opened
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)
        wanted = opened.work.requires_grad
        ctx.mark_non_differentiable(*(y for y, wants in zip(outputs, wanted, strict=True) if not wants))
        return tuple(outputs)

    @staticmethod
    @not_compiled
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        opened: OpenPass = ctx.opened
        opened.calls.check_optimizer()
        if torch.is_grad_enabled():
            return None, None, *opened.calls.second.with_graph(opened, ctx.saved_tensors, gradients)
        retain = torch._C._autograd._get_current_graph_task_keep_graph()
        given = partial(getattr, ctx, "saved_tensors")
        return None, None, *opened.calls.backward(opened, gradients, retain=retain, given=given)
