"""Tries a module on a few rows before its first step of a kind, and judges what several devices will merge."""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fastdp.comm.batch import Batch
from fastdp.program.torch.batch import Structure, undivided_batch
from fastdp.program.torch.rows.at_size import check_at_size, left_at_size
from fastdp.program.torch.rows.backward import check_backward
from fastdp.program.torch.rows.declared import DeclaredRows
from fastdp.program.torch.rows.draws import CannotSplitError
from fastdp.program.torch.rows.hints import of_values, refuse_packed
from fastdp.program.torch.rows.judge import Judge, Known
from fastdp.program.torch.rows.judged import Candidates, Judged
from fastdp.program.torch.rows.loss_trial import DeclaredLoss, check_loss
from fastdp.program.torch.rows.outside import SharedState
from fastdp.program.torch.rows.plain import keeps_rows_apart
from fastdp.program.torch.rows.readings import Reading, readings
from fastdp.program.torch.shared_draws import DrawPlaces
from fastdp.tensors import pytree
from fastdp.tensors.row_effects import ROWS_FIRST, NotByRowsError
from fastdp.tensors.thread_state import ThreadState
from fastdp.tensors.threads import intra_op_threads

_MUCH = 1 << 24  # multiplications, from which all cores run them faster than one


@dataclass(frozen=True, slots=True)
class _Found:
    """What trials have found.

    `judged` is None if rows come first and nothing else is assigned; `reading` are the layouts of all arrays, if they
    are not the default ones. `is_alone` says that the batch has one row, so that nothing can be split.
    """

    judged: Judged | None = None
    reading: Reading | None = None
    is_alone: bool = False


class Trials:
    """Tries a module before its first step of each kind.

    Args:
        module: the user's own.
        loss: a loss function that gets the rows of each device; None if there is none, or one that gets all rows.

    Where arrays have their rows is tried too, if they are not along all first axes: a mask may be the same for all
    rows, or a state have layers first. Such a finding holds for batches of the same lengths.

    A kind is that of the module (modes, functions, hooks, whatever it holds), the structure of the batch with the
    shapes of its rows, autocast, and whether gradients are recorded. A trial runs copies of the module on a few rows,
    on the others and on all of them. For each number of rows there is one more, on all rows of the batch and on those
    of each device. What a module gets by `fastdp.replica` is in each part what all rows gave, and a module that
    calls it is trusted: where the trial cannot tell, outputs have rows first, or are means.

    A module that consists of torch's own parts that keep rows apart, without hooks, is not tried.

    Attributes:
        thread_locals: objects of `threading.local` that the code of the module reaches.
        context_variables: that it reaches and that are no globals.
        count: of the kinds that were tried.
    """

    def __init__(self, module: nn.Module, loss: DeclaredLoss | None) -> None:
        self._module, self._loss = module, loss
        self._of_module = 0
        self._known: dict[Any, _Found] = {}
        self._by_lengths: set[Any] = set()
        self._families: dict[Any, Known] = {}
        self._checked: set[Any] = set()
        self.count = 0
        self._has_losses = False  # forward of the latest trials
        self.thread_locals: Sequence[threading.local] = ()
        self.context_variables: Sequence[contextvars.ContextVar[Any]] = ()

    def thread_state(self, *, several: bool) -> ThreadState:
        """The state of the present thread, with what the code of the module reaches. `several` as of `ThreadState`."""
        return ThreadState(several=several, thread_locals=self.thread_locals, variables=self.context_variables)

    def judged(self, batch: Batch, devices: int, *, wants: bool = False, kind: int = 0) -> Batch:
        """Find out what is known about the batch and about the module's outputs and buffers, by trials if need be.

        Args:
            batch: the global batch, of two or more rows, or one that cannot be split by rows as it is.
            devices: the number of devices, two or more.
            wants: whether gradients by arrays that require them are wanted.
            kind: of the module, as far as what it holds tells.

        Returns:
            The batch, or another one in which rows are elsewhere, with what is known in its structure: nothing if rows
            come first and nothing else is assigned.

        Raises:
            ValueError, TypeError: the batch or the module cannot be split by rows exactly, as far as trials can tell.
        """
        self._of_module = kind
        key = self._kind(batch, devices)
        if key in self._by_lengths:
            key = (*key, batch.rows)
        found = self._known.get(key)
        if found is None:
            self.count += 1
            found = self._found(batch, devices, wants=wants)
            if found is None:
                batch.structure.draws.places = DrawPlaces()
                return batch  # the step itself says why the module does not run; a later one is tried
            if found.reading is not None:  # holds for these lengths
                self._by_lengths.add(key)
                key = (*key, batch.rows)
            self._known[key] = found
        if found.is_alone:
            return undivided_batch(batch.structure.values)
        if found.reading is not None:
            batch = batch.structure.read_as(found.reading)
        if found.judged is not None or self._loss is not None:
            self._check_further(batch, found.judged, devices, wants=wants)
        batch.structure.judged = found.judged
        batch.structure.draws.places = found.judged.draws if found.judged is not None else None
        return batch

    def _check_further(self, batch: Batch, judged: Judged | None, devices: int, *, wants: bool) -> None:
        """Check what trials have found on all rows of the batch and on those of each device, gradients, and the loss.

        Raises:
            ValueError: it does not hold for so many rows, gradients do not add up, or the loss is not what was said.
        """
        wanted = batch.structure.wanted() if wants else ()
        family = self._family(self._kind(batch, devices))
        if (family, batch.rows) in self._checked:
            return
        shared = SharedState(self._module)
        self.thread_locals = list(dict.fromkeys((*self.thread_locals, *shared.thread_locals)))
        self.context_variables = list(dict.fromkeys((*self.context_variables, *shared.context_variables)))
        with shared.undone():
            self._check_in(family, batch, judged, devices, wanted)
        self._checked |= {family, (family, batch.rows)}

    def _check_in(self, family: Any, batch: Batch, judged: Judged | None, devices: int, wanted: Sequence[int]) -> None:
        """Run the checks of `_check_further` that are not known of a family of kinds. Raises as it does."""
        threads, rows = max(1, torch.get_num_threads() // devices), _rows_of(batch, devices)
        is_large = batch.rows * sum(one.numel() for one in self._module.parameters()) > _MUCH
        at_size = torch.get_num_threads() if is_large else threads
        is_new = family not in self._checked
        if judged is not None:
            if is_new and torch.is_grad_enabled() and not _is_told(batch.structure):  # that is believed
                self._run(threads, check_backward, batch, judged, rows, wanted)
            self._run(at_size, check_at_size, batch, judged, devices, wanted)
        if self._loss is not None:
            layouts = None if judged is None else judged.outputs
            self._run(at_size, check_loss, batch, self._loss, layouts, rows if is_new else None, batch.deal(devices))

    def look_at_size(self, batch: Batch, numbers: Sequence[int]) -> dict[int, Candidates]:
        """What outputs of these numbers may be, by all rows of a batch and by those of each device."""
        judged = batch.structure.judged
        with SharedState(self._module).undone(), intra_op_threads(torch.get_num_threads()):
            return contextvars.copy_context().run(left_at_size, self._module, batch, judged, numbers)

    def _run(self, threads: int, check: Callable[..., None], batch: Batch, *args: Any) -> None:
        """Run a check of the module in a copy of the context, on so many cores."""
        with intra_op_threads(threads):
            contextvars.copy_context().run(check, self._module, batch, *args)

    def _found(self, batch: Batch, devices: int, *, wants: bool) -> _Found | None:
        """What trials find out; None if the module does not run. Refusals say what in the batch cannot be split."""
        values = batch.structure.values
        refuse_packed(values)
        try:
            return self._tried(batch, devices, wants=wants)
        except NotByRowsError as error:
            hints = of_values(values)
            if not hints or hints in str(error):
                raise
            raise type(error)(f"{error}{hints}") from error

    def _tried(self, batch: Batch, devices: int, *, wants: bool) -> _Found | None:
        """What trials find out; None if the module does not run."""
        structure: Structure = batch.structure
        refused = structure.misfit
        if refused is None:
            if keeps_rows_apart(self._module) and all(one == ROWS_FIRST for one in structure.layouts):
                return _Found()
            try:
                judge = self._judge(batch, devices, wants=wants)
                return None if judge is None else _Found(judge.judged())
            except CannotSplitError:
                raise
            except ValueError as error:
                refused = error
        if isinstance(refused, ValueError) and structure.declared is not None:
            found = self._another(structure, structure.declared, devices, wants=wants)
            if found is not None:
                return found
        raise refused

    def _another(self, structure: Structure, declared: DeclaredRows, devices: int, *, wants: bool) -> _Found | None:
        """Another reading of a batch, which in trials gives the results of one device; None without one.

        Raises:
            NotByRowsError: the batch can be split, but the module runs and its results cannot be merged.
        """
        arrays = declared.given(structure.values, whole_targets=self._loss is None)
        refused: NotByRowsError | None = None
        for reading in readings(arrays):
            try:
                judge = self._judge(structure.read_as(reading), devices, wants=wants)
                if judge is not None and judge.findings.is_certain:
                    return _Found(judge.judged(), reading)
            except NotByRowsError as error:
                refused = refused or error
            except ValueError:
                continue
        if refused is not None and structure.misfit is not None:
            raise refused
        return _Found(is_alone=True) if arrays and arrays[0].shape[0] == 1 and not arrays[0].is_target else None

    def _judge(self, batch: Batch, devices: int, *, wants: bool) -> Judge | None:
        """What trials of a batch show; None if the module does not run on it.

        Raises:
            ValueError: the module cannot be split by rows exactly.
        """
        family = self._family(self._kind(batch, devices))
        known = self._families.get(family)
        if known is not None:
            try:
                judge = self._looked(batch, devices, wants, known)
                if judge is not None and judge.judged().is_like(known.judged):
                    return judge
            except ValueError:
                pass  # more trials tell more
        judge = self._newly(batch, devices, wants)
        if judge is not None:
            self._families[family] = Known(judge.judged(), judge.findings.means)
        return judge

    def _newly(self, batch: Batch, devices: int, wants: bool) -> Judge | None:
        """A judge of a family that is not known. If need be, losses in forward are weighed. As `_looked`."""
        try:
            judge = self._looked(batch, devices, wants, None)
            if judge is not None:
                judge.judged()
            return judge
        except NotByRowsError as error:
            if not self._has_losses:
                raise
            try:
                judge = self._looked(batch, devices, wants, None, weighs=True)
                if judge is not None:
                    judge.judged()
                    return judge
            except ValueError:
                pass
            raise error

    def _looked(
        self, batch: Batch, devices: int, wants: bool, known: Known | None, *, weighs: bool = False
    ) -> Judge | None:
        """A judge that has run its trials; None if the module does not run."""
        wanted = batch.structure.wanted() if wants else ()
        weighs = weighs if known is None else known.judged.weighs
        how: dict[str, Any] = {"known": known, "believes": _is_told(batch.structure), "weighs": weighs}
        judge = Judge(self._module, batch, _rows_of(batch, devices), wanted, **how)
        try:
            with intra_op_threads(max(1, torch.get_num_threads() // devices)):
                runs = contextvars.copy_context().run(judge.look)
        finally:
            self._has_losses = judge.has_losses
        return judge if runs else None

    def _kind(self, batch: Batch, devices: int) -> tuple[Any, ...]:
        """What the trial's result depends on. Axes that are as long as there are rows may be something else."""
        structure: Structure = batch.structure
        nest, autocast = structure.nest, structure.autocast
        modes = self._of_module
        if structure.misfit is not None:
            given, spec = pytree.tree_flatten(structure.values)
            how: tuple[Any, ...] = (_mode_of(structure), autocast.dtypes, devices)
            return modes, how, str(spec), tuple([_told(one) for one in given]), None, (), ()
        leaves = tuple([_told(one) for one in nest.leaves])
        alike = tuple(
            [(at, axis) for at, x in enumerate(batch) for axis, n in enumerate(x.shape) if axis and n == batch.rows]
        )
        how = (_mode_of(structure), autocast.dtypes, _rows_of(batch, devices), alike)
        return modes, how, str(nest.spec), leaves, nest.dtypes, batch.shapes, tuple(structure.layouts)

    @staticmethod
    def _family(kind: Any) -> Any:
        """What kinds have in common that differ in lengths only."""
        modes, how, spec, leaves, dtypes, shapes, layouts = kind
        others = tuple([(len(one[0]), one[1]) if isinstance(one, tuple) else one for one in leaves])
        return modes, (*how[:2], how[-1]), spec, others, dtypes, tuple([len(shape) for shape, _ in shapes]), layouts


def _rows_of(batch: Batch, devices: int) -> tuple[int, int]:
    """The numbers of rows of a trial's parts: unequal, and no single ones where no device gets a single one."""
    fewest = 2 if batch.rows // min(devices, batch.rows) >= 2 and batch.rows >= 5 else 1
    return (fewest, fewest + 1) if batch.rows >= 2 * fewest + 1 else (1, batch.rows - 1)


def _mode_of(structure: Structure) -> tuple[bool, bool]:
    """Whether gradients are recorded, and whether the call is in inference mode."""
    return torch.is_grad_enabled(), structure.inference


def _is_told(structure: Structure) -> bool:
    """Whether the user has said where the rows of all arguments are."""
    declared = structure.declared
    return declared is not None and None not in declared.of_arrays((*structure.values[:2], ()))


def _told(leaf: Any) -> Any:
    """A leaf of a batch, by what a trial's result depends on."""
    return (tuple(leaf.shape), str(leaf.dtype)) if hasattr(leaf, "dtype") else leaf
