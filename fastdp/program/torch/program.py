"""`TorchProgram`: the steps of a real torch.nn.Module as pure functions over explicit state."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer

from fastdp.buffers import Allocator, ArraySpec, Home, Memory
from fastdp.capture.cuda_graphs.step_graphs import RecordedStepGraph
from fastdp.capture.resumed import ResumedCaptures
from fastdp.capture.trace import Captured
from fastdp.comm.batch import Batch
from fastdp.comm.context import Context
from fastdp.comm.processes import launched
from fastdp.program.base import Launched, Result
from fastdp.program.torch.batch import Structure, make_batch, undivided_batch
from fastdp.program.torch.capture.outcome import TorchOutcome
from fastdp.program.torch.capture.pure_step import TorchPureStep
from fastdp.program.torch.capture.replays import CapturedReplica, Replays
from fastdp.program.torch.following.follow import Following
from fastdp.program.torch.following.merged import MergedWrite, WriteNotes
from fastdp.program.torch.following.writes import Place
from fastdp.program.torch.gradients import Gradients
from fastdp.program.torch.loss import LossFunction, check_options
from fastdp.program.torch.module import AdoptedSlots, adopted, slots_of, users_own
from fastdp.program.torch.optimizer import OptimizerFactory, Optimizers
from fastdp.program.torch.passes import Passes, State
from fastdp.program.torch.rows.declared import DeclaredRows
from fastdp.program.torch.rows.loss_trial import DeclaredLoss
from fastdp.program.torch.rows.trials import Trials
from fastdp.program.torch.sharded import OptimizerShards
from fastdp.program.torch.update import Applied, UpdateRules
from fastdp.program.torch.updating import TorchUpdate
from fastdp.program.torch.window import Window
from fastdp.runtime.queue import QueueDevice
from fastdp.shard import Deal
from fastdp.tensors.arrays import settle, spec_of, tensors_of
from fastdp.tensors.thread_state import ThreadState
from fastdp.tensors.threads import given_cores, in_place_of_workers, prepare_worker, replicas_run


class TorchProgram(TorchUpdate):
    """Runs a torch module as replicas.

    Args:
        module: the user's own, on the CPU. Its tensors become views of the first replica's memory.
        loss_fn: `loss_fn(outputs, *targets)`, one number for a batch. None: the program can only predict.
        optimizer: an optimizer, several, or a function that makes them from parameters; see `Optimizers`.
        reduction: None if `loss_fn` may be any function of the batch (computed on the merged outputs);
            "mean" or "sum" if it is the mean or sum over samples (each replica computes its own part).
        sync_batch_norm: normalize by the global batch instead of each replica's rows.
        rules: what happens to the gradient of the global batch before the optimizer uses it.
        shards_optimizer: each device steps its parameters, and keeps the optimizer's state of these.
        accumulate: update once per `accumulate` calls, with the mean of their gradients.

    Buffers that the replicas' forward passes assign are combined for the global batch: the running statistics
    of batch normalization by moments, others as a trial has shown (`judge`): means and sums by the replicas' changes,
    extremes by their values, what is the same by the first replica's. Without a trial, floating-point buffers are
    means, and integers and booleans the same. If forward changes a buffer's shape, the buffer is a cache and stays
    private to each replica.

    Raises:
        ValueError: an unknown `reduction`, or an `accumulate` that is not positive.

    Example:
        >>> program = TorchProgram(module, F.cross_entropy, lambda p: torch.optim.SGD(p, lr=0.1))  # doctest: +SKIP
        >>> engine = DataParallel(program, devices)  # doctest: +SKIP
        >>> loss = results.loss(engine.train(program.batch((x,), {}, (y,))))  # doctest: +SKIP
    """

    def __init__(
        self,
        module: nn.Module,
        loss_fn: LossFunction | None = None,
        optimizer: OptimizerFactory | Optimizer | Sequence[Optimizer] | None = None,
        *,
        reduction: str | None = None,
        sync_batch_norm: bool = False,
        rules: UpdateRules | None = None,
        accumulate: int = 1,
        shards_optimizer: bool = False,
    ) -> None:
        check_options(reduction, accumulate)
        self.module = module
        self.loss_fn = loss_fn
        self.reduction = reduction
        self.sync_batch_norm = sync_batch_norm
        self.rules = rules or UpdateRules()
        self.scales_loss = self.rules.scaler is not None and self.rules.scaler.is_enabled()
        self.applied: Applied | None = None  # by the latest call; None if it made no update
        self._has_stepped = False
        self.accumulate_calls = accumulate
        self.calls = 0
        self.optimizers = Optimizers(optimizer) if optimizer is not None else None
        self._slots = slots_of(module)
        self._differentiable = [
            i
            for i, s in enumerate(self._slots)
            if s.is_parameter and (s.tensor.is_floating_point() or s.tensor.is_complex())
        ]
        specs = [spec_of(slot.name, slot.tensor) for slot in self._slots]
        self.gradients: Sequence[ArraySpec] = (
            [specs[i] for i in self._differentiable] if self.optimizers is not None else []
        )
        self._following = Following(module, self._slots)
        self._followed = False  # since the module was judged
        self._writes: tuple[list[WriteNotes], dict[Place, MergedWrite]] | None = None  # of the present step
        self._shards = OptimizerShards() if shards_optimizer else None
        self._trials = Trials(module, DeclaredLoss(loss_fn, reduction) if loss_fn and reduction else None)
        self._adopted: AdoptedSlots | None = None
        self._states: list[State] = []
        self._thread = ThreadState()
        self._watched = (0, 0)
        self._users: list[torch.Tensor] = []  # in the step that runs
        self._bound: list[torch.Tensor] = []  # the user's parameters at first
        self._bound_ids: list[int] = []
        self.window = Window()  # of gradient accumulation
        self._passes = Passes(loss_fn, reduction, sync_batch_norm, accumulate, self.rules.scaler)
        self._captured: dict[int, CapturedReplica] = {}
        self._replays: Replays | None = None

    # Around a step, on the host thread.

    @staticmethod
    def batch(
        args: Sequence[Any],
        kwargs: dict[str, Any],
        targets: Sequence[Any] = (),
        declared: DeclaredRows | None = None,
        *,
        no_graphs: bool = False,
    ) -> Batch:
        """Make a batch for the engine.

        Args:
            args, kwargs: the module's arguments: tensors or arrays with rows first, in any nest.
            targets: what `loss_fn` gets besides the outputs.
            declared: what the user has said about rows.
            no_graphs: tensors that require gradients cannot be split: their graph would be lost.

        A batch that cannot be split by rows has none; `judge` makes another one of it, or says why.
        """
        return make_batch((tuple(args), dict(kwargs), tuple(targets)), declared, no_graphs=no_graphs)

    def judge(self, batch: Batch, devices: int, *, wants: bool = False) -> Batch:
        """Before a step: find out how the module's values depend on the rows, unless steps of this kind are known.

        Args:
            batch: the step's, as made by `batch`.
            devices: the number of devices. One gets any values, as plain torch does.
            wants: whether gradients by arrays that require them are wanted.

        Returns:
            The batch for the step.

        Raises:
            ValueError, TypeError: batch or module cannot be split by rows exactly; the message has the remedies.
        """
        structure: Structure = batch.structure
        if devices == 1:
            return batch if structure.misfit is None else undivided_batch(structure.values)
        self._following.follow()
        if batch.rows != 1:
            batch = self._trials.judged(batch, devices, wants=wants, kind=self._following.kind)
            structure = batch.structure
            structure.weigh(batch.arrays, batch.rows)
            self._following.check_reader(self.loss_fn, structure.roles)
            self._watch_outside()
        self._followed = True
        return batch

    def _watch_outside(self) -> None:
        """Watch what all copies share, anew after trials and after changes of the module."""
        present = self._trials.count, self._following.remade
        if present != self._watched:
            self._watched = present
            self._passes.watch = self._following.outside(self.loss_fn if self.reduction is not None else None)

    @property
    def users(self) -> list[torch.Tensor]:
        """The module's own parameters that can have a gradient, in the order of `gradients`."""
        return [self._slots[i].tensor for i in self._differentiable]

    @property
    def reduces(self) -> bool:
        """Whether the next call ends a window of gradient accumulation."""
        return self.window.calls + 1 >= self.accumulate_calls

    # Memory: members of Program.

    home_is_exposed = True  # the user may write to parameters through `.data` and NumPy
    first_may_run_here = False  # what a module sets for its thread would be the caller's

    def home(self, device: Allocator) -> Home:
        """The module's own tensors, in flat buffers."""
        self._adopted = adopted(self.module, device)
        return self._adopted.home

    def known_parts(self) -> Sequence[object]:
        """The module, its submodules, parameters and buffers."""
        return [*self.module.modules(), *(slot.tensor for slot in self._slots)]

    def changed_outside(self) -> bool:
        """Whether the user replaced a parameter or a buffer by another one."""
        assert self._adopted is not None
        self._undo()
        changed = self._adopted.changed()
        if changed or self._adopted.home.device.on_gpu:
            settle(slot.tensor for slot in self._slots)
        return changed

    def committed(self) -> None:
        """The step is over: buffers stay as they are."""
        for state in self._states:
            state.replica.pending = False

    def unbind(self, deal: Deal) -> None:
        """Forget all replicas. Captured steps are kept where the rows of a replica stay what they are."""
        self._states.clear()
        self._captured.clear()
        self._following.forget_copies()
        self._passes.replicas = 0
        if self._shards is not None:
            self._shards.begin_anew()
        if self.captures is not None:
            self.captures.deal_by(deal)

    def bind(self, memory: Memory, device: QueueDevice, rank: int) -> State:
        """The user's module in its memory and its optimizers, or a copy of it over other memory."""
        assert self._adopted is not None
        if memory.variables is self._adopted.home.variables:
            replica = self._following.user = users_own(self.module, self._adopted)
        else:
            memory.variables.copy_from(self._adopted.home.variables)
            replica = self._following.replicate(tensors_of(memory.variables))
        if rank == 0 and self.optimizers is not None:
            self.optimizers.make(list(self.module.parameters()))
            self._bound = self.users
            self._bound_ids = [*map(id, self._bound)]
        if self._shards is not None:
            self._shards.add(device, rank)
        copies = None if replica.adopted is not None else self._pick(replica.parameters)
        gradients = Gradients(copies, memory.gradients, tensors_of(memory.gradients))
        variables = tensors_of(memory.variables)
        self._states.append(State(replica, variables, gradients))
        self._passes.replicas = max(len(self._states), launched()[1])
        self._captured[rank] = CapturedReplica(device, variables, gradients.flat, memory.gradients)
        return self._states[-1]

    @property
    def cores(self) -> int:  # type: ignore[override]
        """The cores that the user lets torch use."""
        return given_cores()

    def prepare_thread(self, threads: int, device: QueueDevice) -> None:
        """Set the worker's number of threads."""
        prepare_worker(threads, device)

    @contextmanager
    def running(self, threads: int) -> Iterator[None]:
        """Sync replicas with the user's module, note the user's thread, and divide the cores."""
        self._thread = self._trials.thread_state(several=self._passes.replicas > 1)
        if not self._followed:
            self._following.follow()
        self._followed = False
        self._users = self.users
        self._check_optimizers(self.module.parameters())
        if self.rules.scaler is not None:
            self._passes.scale = self.rules.scaler.get_scale()
        if self._passes.watch is not None:
            self._passes.watch.begin()
        with self._undone_on_failure(), self._thread.held(), replicas_run(threads):
            yield
        writes, self._writes = self._writes, None
        if writes is not None:
            self._following.finish(*writes, {})

    # The step.

    def pure_step(self, devices: int) -> TorchPureStep:
        """The training step for captured steps on this number of devices."""
        assert self.loss_fn is not None
        return TorchPureStep(
            self.module,
            self._slots,
            self._differentiable,
            self._captured,
            self.loss_fn,
            reduction=self.reduction,
            sync_batch_norm=self.sync_batch_norm,
            accumulate=self.accumulate_calls,
            scales=self.rules.scaler is not None,
            devices=devices,
        )

    def capture_by(self, captures: ResumedCaptures[Captured[TorchOutcome]]) -> None:
        """Use these captured steps, which must be of this program, where they exist."""
        self._replays = Replays(
            captures, self._captured, self._slots, self._differentiable, merges=self.reduction is None
        )

    @property
    def captures(self) -> ResumedCaptures[Captured[TorchOutcome]] | None:
        """The captured steps; None where all steps run eagerly."""
        return self._replays.captures if self._replays is not None else None

    def train(self, state: State, batch: list[np.ndarray], context: Context) -> Result:
        """Compute forward, this replica's contribution to the loss, and its gradient."""

        def eager(context: Context) -> Result:
            return self._passes.train(state, self._users, batch, context)

        if self._replays is None:
            return self._thread.run(eager, context)
        return self._thread.run(self._replays.train, state, batch, context, eager)

    def step_graph(self, contexts: Sequence[Context], why_not: str) -> RecordedStepGraph | None:
        """The step graph for these rows; None if there is none."""
        return self.captures.step_graph(contexts, why_not) if self.captures is not None else None

    def launches(self, contexts: Sequence[Context]) -> bool:
        """Whether the replicas' steps are recorded as CUDA graphs."""
        return self._replays is not None and self._replays.launches(contexts)

    launching = staticmethod(in_place_of_workers)  # the thread gets its streams and modes of torch back

    def launch(self, state: State, batch: list[np.ndarray], context: Context) -> Launched:
        """Enqueue a recorded step."""
        assert self._replays is not None, "`launches` has found it"
        return self._thread.run(self._replays.launch, state, batch, context)

    def predict(self, state: State, batch: list[np.ndarray], context: Context) -> Result:
        """Run forward only. Changes no parameter and no buffer, even in training mode."""
        return self._thread.run(self._passes.predict, state, batch, context)

    # Parts of the step.

    @contextmanager
    def _undone_on_failure(self) -> Iterator[None]:
        """Restore the module's buffers, torch's random generator and the module's own ones if the step fails."""
        drawn = torch.get_rng_state()
        self._passes.draws = None
        try:
            yield
        except BaseException:
            if self._passes.draws is not None:
                self._passes.draws.undo()
            torch.set_rng_state(drawn)
            self._undo()
            self._writes = None
            self._following.undo()
            raise

    def _pick(self, parameters: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The parameters that can have a gradient."""
        at = dict(zip((i for i, s in enumerate(self._slots) if s.is_parameter), parameters, strict=True))
        return [at[i] for i in self._differentiable]
