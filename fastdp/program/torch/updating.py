"""The update of a torch program: the optimizers, over one device's parameters or each device over its own."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch

from fastdp.program.base import Program, Totals
from fastdp.program.torch.following.follow import Following
from fastdp.program.torch.following.merged import MergedWrite, WriteNotes
from fastdp.program.torch.following.writes import Place
from fastdp.program.torch.module_buffers import assign_buffers
from fastdp.program.torch.optimizer import Optimizers
from fastdp.program.torch.passes import Notes, Passes, State
from fastdp.program.torch.sharded import OptimizerShards
from fastdp.program.torch.update import Applied, UpdateRules, apply, grads_restored
from fastdp.program.torch.window import Window
from fastdp.tensors.arrays import accumulate
from fastdp.tensors.thread_state import ThreadState


class TorchUpdate(Program):
    """Gives a torch program its update. The attributes are the program's.

    Attributes:
        applied: what the latest call's update has told; None if it made none.
    """

    rules: UpdateRules
    optimizers: Optimizers | None
    applied: Applied | None
    window: Window
    shards_optimizer = True
    _has_stepped: bool
    _shards: OptimizerShards | None
    _states: list[State]
    _thread: ThreadState
    _users: list[torch.Tensor]
    _bound: list[torch.Tensor]
    _bound_ids: list[int]
    _passes: Passes
    _following: Following
    _writes: tuple[list[WriteNotes], dict[Place, MergedWrite]] | None

    @property
    def users(self) -> list[torch.Tensor]:
        """The module's own parameters that can have a gradient, in the order of `gradients`."""
        raise NotImplementedError

    @property
    def update_is_reliable(self) -> bool:  # type: ignore[override]
        """Whether optimizers and scaler are torch's own and have made a step, and no hooks run on gradients."""
        ours = self.optimizers is not None and self.optimizers.are_reliable() and self.rules.are_reliable
        return ours and self._has_stepped and not self._passes.hooked

    @property
    def divides_update(self) -> bool:  # type: ignore[override]
        """Whether each device steps its own parameters."""
        return self._shards is not None and self.optimizers is not None

    @property
    def update_how(self) -> str:  # type: ignore[override]
        """How the optimizers are applied, if that is not as torch does."""
        return "whole parameters, each device its own" if self.divides_update else ""

    @property
    def update_is_shared(self) -> bool:  # type: ignore[override]
        """Whether virtual devices step their parameters at the same time, which changes no bit."""
        if self._shards is None or self.optimizers is None or self.rules.needs_norm:
            return False
        return self._shards.in_threads(self.optimizers.all, self._users)

    def slots_nbytes(self, rank: int) -> int:
        """Bytes of the optimizers' state that is on a replica's device."""
        if self.optimizers is None:
            return 0
        if self._shards is None:
            return self.optimizers.nbytes if rank == 0 else 0
        return self._shards.nbytes(self.optimizers.all, self.users, rank)

    def update(self, state: State, totals: Totals) -> None:
        """Assign buffers; at the end of a window, apply the optimizers to the summed gradients."""
        self._thread.run(self._update, state, totals)

    def skip(self, state: State, totals: Totals) -> None:
        """Note that the update is not made, restore what forward has changed, and begin a new window."""
        if state is self._states[0]:
            self._undo()
            self.applied, self.window = Applied(updated=False, skipped=True), Window()

    accumulate = staticmethod(accumulate)

    # Parts of it.

    def _check_optimizers(self, parameters: Any) -> None:
        """Check before a step that the optimizers are those of the module's parameters, and can be divided if asked.

        Raises:
            ValueError: they cannot.
        """
        if self.optimizers is None:
            return
        self.optimizers.check(parameters)
        if self._shards is not None:
            self._shards.check(self.optimizers.all, self.optimizers.are_reliable())

    def _undo(self) -> None:
        """Restore buffers that forward has changed in a step that failed."""
        for state in self._states:
            state.replica.undo()

    def _update(self, state: State, totals: Totals) -> None:
        """Assign buffers on each replica; run the optimizers with the first one's gradients at the end of a window."""
        with torch.no_grad():
            assign_buffers(state.variables, totals.sums[1:], totals.notes.buffers)
            if state is not self._states[0]:
                return
            if totals.notes.merged:
                self._writes = [note.writes for note in totals.every_note], totals.notes.merged
            window = self.window.with_call(totals)
            self.applied = self._apply(window, state, totals) if totals.reduced else None
            self.window = Window() if totals.reduced else window
            self._has_stepped |= self.applied is not None and self.applied.updated

    def _apply(self, window: Window, state: State, totals: Totals) -> Applied:
        """Run the optimizers on the gradients of a window."""
        assert self.optimizers is not None
        users, notes = self._users, totals.notes
        assert isinstance(notes, Notes)
        if [*map(id, users)] != self._bound_ids:
            users = self.optimizers.updated(users, self._bound)
        gradients = window.found.gradients(state.gradients.present)
        if notes.half is not None:
            notes.half.overflow(self._users, gradients)
        with ExitStack() as around:
            around.enter_context(grads_restored(users))
            if not self.update_is_reliable:
                around.enter_context(self.optimizers.restored_on_failure())
            if self._shards is not None:
                given = self.optimizers.all, users, self._thread, totals.work_stealing
                around.enter_context(self._shards.divide(*given))
            if notes.hooked is not None:
                notes.hooked.run(gradients)
            for user, gradient in zip(users, gradients, strict=True):
                user.grad = gradient
            return apply(self.optimizers, users, window.losses, self.rules)
