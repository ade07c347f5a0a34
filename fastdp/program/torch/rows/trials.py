"""Tries a module on a few rows before its first step of a kind, and judges what several devices will merge."""

from __future__ import annotations

import contextvars
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from fastdp.comm.batch import Batch
from fastdp.program.torch.batch import Structure
from fastdp.program.torch.rows.declared import output_roles
from fastdp.program.torch.rows.judged import (
    REMEDIES,
    Candidates,
    Judged,
    candidates,
    decided,
    is_exact,
    row_layout,
    state_candidates,
)
from fastdp.program.torch.rows.plain import keeps_rows_apart
from fastdp.program.torch.rows.surroundings import CannotSplitError
from fastdp.program.torch.rows.trial import Run, Trial
from fastdp.program.torch.shared_draws import DrawPlace
from fastdp.tensors.row_effects import Effect, Layout

# Errors that a module's own code may raise on rows that it was not made for.
FAILURES = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
_ALWAYS = 4  # trials
_NOISE = 0.01


class Trials:
    """Tries a module before its first step of each kind.

    Args:
        module: the user's own.

    A kind is the training mode of all parts, the structure of the batch with the shapes of its rows, autocast, and
    whether gradients are recorded. A trial runs copies of the module on a few rows, on the others and on all of them.
    The user's hooks do not run in it. What a module gets by `fastdp.replica` is in each part what all rows gave, and a
    module that calls it is trusted: where the trial cannot tell, outputs have rows first, or are means.

    A module that consists of torch's own parts that keep rows apart is not tried.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._parts = list(module.modules())
        self._known: dict[Any, Judged | None] = {}

    def judged(self, batch: Batch, devices: int, *, wants: bool = False) -> Judged | None:
        """What is known about the module's outputs and buffers; None if rows come first and nothing else is assigned.

        Args:
            batch: the global batch, of two or more rows.
            devices: the number of devices, two or more.
            wants: whether gradients by arrays that require them are wanted.

        Raises:
            ValueError: the module cannot be split by rows exactly, as far as the trial can tell.
        """
        fewest = 2 if batch.rows // min(devices, batch.rows) >= 2 and batch.rows >= 5 else 1
        rows = (fewest, fewest + 1) if batch.rows >= 2 * fewest + 1 else (1, batch.rows - 1)
        kind = self._kind(batch, rows)
        if kind not in self._known:
            judge = _Judge(self._module, batch, rows, batch.structure.wanted() if wants else ())
            apart = keeps_rows_apart(self._module)
            if not apart and not contextvars.copy_context().run(judge.look):
                return None  # the step itself says why the module does not run; a later one is tried
            self._known[kind] = None if apart else judge.judged()
        return self._known[kind]

    def _kind(self, batch: Batch, rows: tuple[int, int]) -> Any:
        """What the trial's result depends on."""
        structure: Structure = batch.structure
        nest, autocast = structure.nest, structure.autocast
        leaves = tuple([(one.shape, one.dtype) if isinstance(one, torch.Tensor) else one for one in nest.leaves])
        modes = tuple([part.training for part in self._parts])
        how = (torch.is_grad_enabled(), autocast.dtypes, rows)
        return modes, how, str(nest.spec), leaves, nest.dtypes, batch.shapes, tuple(structure.layouts)


class _Judge:
    """Judges a module by trials on the rows of one batch.

    Args:
        module, batch, wanted: as in `Trial`.
        rows: the numbers of rows of a trial's parts.
    """

    def __init__(self, module: nn.Module, batch: Batch, rows: tuple[int, int], wanted: Sequence[int]) -> None:
        self._module, self._batch, self._rows, self._wanted = module, batch, rows, wanted
        structure: Structure = batch.structure
        self._declared, self._rough = structure.declared, structure.autocast.enabled
        self._layouts: list[Layout | None] = []
        self._outputs: dict[int, Candidates] = {}
        self._states: dict[int, Candidates] = {}
        self._names: list[str] = []
        self._exact: list[bool] = []
        self._slots = Trial(module, batch, ()).slots
        self._trusted = False
        self._draws: dict[int, DrawPlace] = {}

    def look(self) -> bool:
        """Run as many trials as are needed. False if the module does not run on all rows of one.

        Raises:
            ValueError: the module cannot be split by rows exactly.
        """
        choices = _choices(self._batch.rows, sum(self._rows))
        for number, chosen in enumerate(choices):
            if number >= _ALWAYS and not self._is_open():
                break
            if not self._look(chosen):
                return False
        return not self._is_open() or self._look(choices[0], _NOISE)

    def judged(self) -> Judged:
        """The judgement.

        Raises:
            ValueError: the trials cannot tell.
        """
        layouts = list(self._layouts)
        for at, found in self._outputs.items():
            effect = decided(found, exact=self._exact[at])
            if effect is None and Effect.SAME in found:  # zero, whatever the parameters are
                effect = Effect.SAME if self._exact[at] else Effect.MEAN
            if not self._trusted and effect in (None, Effect.UNKNOWN):
                raise self._refused(at, "values that may be a sum or an extreme over rows")
            layouts[at] = None if effect is None else Layout(effect)
        known = [Layout(Effect.SAME) if one is None else one for one in layouts]  # declared ones are not asked for
        effects: dict[int, Effect] = {}
        for at, found in self._states.items():
            effect = decided(found, exact=is_exact(self._slots[at].tensor))
            if effect is None or effect is Effect.UNKNOWN:
                raise _refused_state("buffer", self._slots[at].name)
            effects[at] = effect
        return Judged(None if self._trusted else known, effects, self._draws)

    def _is_open(self) -> bool:
        """Whether further trials may tell more."""
        outputs = any(decided(found, exact=self._exact[at]) is None for at, found in self._outputs.items())
        return outputs or any(decided(found, exact=True) is None for found in self._states.values())

    def _look(self, chosen: Sequence[int], noise: float = 0.0) -> bool:
        """Run one trial and keep what it leaves possible. False if the module does not run on all of its rows."""
        total, first = sum(self._rows), self._rows[0]
        trial = Trial(self._module, self._batch, chosen, self._wanted, noise)
        try:
            whole = trial.run(0, total)
        except NotImplementedError:
            return False
        except CannotSplitError:
            raise
        except FAILURES as error:
            if self._runs():
                raise self._failed(error) from error
            return False
        try:
            parts = [trial.run(0, first), trial.run(first, total)]
            self._draws = {**trial.draw_places, **self._draws}
            if self._draws != {**self._draws, **trial.draw_places}:
                return False  # shapes that depend on values: the step's own checks apply
        except NotImplementedError:  # fastdp's own refusals, of which the step gives the right ones
            return False
        except FAILURES as error:
            raise self._failed(error) from error
        self._judge_outputs(trial, parts, whole)
        if not noise:
            self._judge_states(trial, parts, whole)
            self._judge_numbers(trial, parts, whole)
        return True

    def _runs(self) -> bool:
        """Whether the module runs on all rows of the batch."""
        rows = self._batch.rows
        try:
            Trial(self._module, self._batch, range(rows), self._wanted).run(0, rows)
        except (*FAILURES, NotImplementedError):
            return False
        return True

    def _judge_outputs(self, trial: Trial, parts: Sequence[Run], whole: Run) -> None:
        """Keep what the outputs of a trial leave possible."""
        roles = output_roles(whole.outputs, self._declared)
        every = [_tensors(run.outputs) for run in (*parts, whole)]
        counts = [len(tensors) for tensors in every]
        if len({*counts, len(self._names or roles)}) > 1:
            self._trusted = self._trusted or trial.meets
            if not self._trusted:
                raise ValueError(
                    f"The module returns {counts} tensors for {[*self._rows, sum(self._rows)]} rows of the batch. "
                    "Return as many for any rows, or use gpus=[0]."
                )
            return
        if not self._names:
            self._names, self._layouts = [name for name, _ in roles], [role for _, role in roles]
            self._exact = [is_exact(tensor) for tensor in every[2]]
        for at, (_, declared) in enumerate(roles):
            if declared is None:
                self._judge_output(trial, at, [tensors[at].detach() for tensors in every])

    def _judge_output(self, trial: Trial, at: int, values: Sequence[torch.Tensor]) -> None:
        """Keep what an output, for the two parts and for all rows, leaves possible."""
        shapes = [tuple(value.shape) for value in values]
        if len(set(shapes)) == 1:
            found = candidates(values[:2], values[2], self._rows, rough=self._rough)
            self._outputs[at] = self._outputs.get(at, found) & found
            unknown = not self._outputs[at] or self._layouts[at] is not None
            seen = f"shape {shapes[2]} for any rows, but values that are no mean, sum or extreme over rows"
        else:
            layout = row_layout(values[:2], values[2], self._rows, rough=self._rough)
            unknown = layout.effect is Effect.UNKNOWN or (self._layouts[at] or layout) != layout or at in self._outputs
            self._layouts[at] = layout
            counts = [*self._rows, sum(self._rows)]
            seen = f"shapes {shapes} for {counts} rows, of which the first ones side by side are not the last one"
        if unknown and not trial.meets:
            raise self._refused(at, seen)
        self._trusted = self._trusted or unknown

    def _judge_states(self, trial: Trial, parts: Sequence[Run], whole: Run) -> None:
        """Keep what the parameters and buffers that a trial has changed leave possible."""
        runs = (*parts, whole)
        if any(len(run.values) != len(trial.slots) for run in runs):
            return  # forward has removed or added some: each replica has its own
        for at, slot in enumerate(trial.slots):
            before, values = slot.tensor.detach(), [run.values[at] for run in runs]
            if any(value.shape != before.shape or value.dtype != before.dtype for value in values):
                continue  # a cache of each replica
            left = state_candidates(values[:2], values[2], before, self._rows, rough=self._rough)
            if left is None:
                continue
            left = self._states.get(at, left) & left
            if not left or (slot.is_parameter and Effect.SAME not in left):
                raise _refused_state("parameter" if slot.is_parameter else "buffer", slot.name)
            if not slot.is_parameter:
                self._states[at] = left

    def _judge_numbers(self, trial: Trial, parts: Sequence[Run], whole: Run) -> None:
        """Refuse numbers that are counted up by rows. Those that forward merely assigns are each replica's own."""
        for name, value in whole.numbers.items():
            if trial.meets or all(run.numbers.get(name) == value for run in parts):
                continue
            if trial.run(0, sum(self._rows), times=2).numbers[name] != value:
                raise _refused_state("attribute", name)

    def _failed(self, error: BaseException) -> ValueError:
        first, last = self._rows
        return ValueError(
            f"The module does not run on {first}, {last} or {first + last} of the batch's {self._batch.rows} rows, as "
            f"several devices would run it: {type(error).__name__}: {error} If an argument has no rows, say so: "
            'fastdp.wrap(module, rows={"mask": "same"}), or the number of the axis that has the rows; or use gpus=[0].'
        )

    def _refused(self, at: int, seen: str) -> ValueError:
        return ValueError(
            f"The {self._names[at]} of the module cannot be merged from several devices: fastdp ran the module on a "
            f"few rows of the batch, and saw {seen}. {REMEDIES}"
        )


def _refused_state(kind: str, name: str) -> ValueError:
    """The error for what forward changes in a way that cannot be merged."""
    what = "no mean, sum or extreme over rows" if kind == "buffer" else "not the same on all devices"
    return ValueError(
        f"forward changes the {kind} `{name}` of the module by the rows of the batch, and the change is {what}. "
        "Combine the replicas' values in forward by fastdp.replica.all_reduce or fastdp.replica.all_gather, or use "
        "gpus=[0]." + ("" if kind == "buffer" else " A sum or a mean over rows may be kept in a registered buffer.")
    )


def _choices(rows: int, total: int) -> list[tuple[int, ...]]:
    """Rows of a batch for each trial: the first ones, some all over the batch, the last ones, and others."""
    last = rows - total
    spread = tuple(at * (rows - 1) // (total - 1) for at in range(total))
    starts = [tuple(range(start, start + total)) for start in (0, last, last // 2, last // 4)]
    return list(dict.fromkeys([starts[0], spread, tuple(reversed(spread)), *starts[1:]]))


def _tensors(outputs: Any) -> list[torch.Tensor]:
    """The tensors among outputs."""
    return [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, torch.Tensor)]
