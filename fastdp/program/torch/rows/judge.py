"""Judges how a module's outputs and buffers depend on rows, by trials on some rows, on others and on all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from fastdp.comm.batch import Batch
from fastdp.program.torch.batch import Structure
from fastdp.program.torch.rows.declared import output_roles
from fastdp.program.torch.rows.inputs import Change, Injected, OtherValues, choices_of
from fastdp.program.torch.rows.judged import (
    Candidates,
    Judged,
    candidates,
    decided,
    is_exact,
    layout_of,
    row_axis_of,
    row_layout,
    state_candidates,
)
from fastdp.program.torch.rows.refusals import failed, refused_output, refused_state
from fastdp.program.torch.rows.surroundings import CannotSplitError
from fastdp.program.torch.rows.trial import Run, Trial
from fastdp.program.torch.rows.weights import Counted, counted, usual_numbers
from fastdp.program.torch.shared_draws import DrawPlace
from fastdp.tensors.row_effects import Effect, Layout

# Errors that a module's own code may raise on rows that it was not made for.
FAILURES = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
_ALWAYS = 4  # trials
_NOISE = 0.01


class Judge:
    """Judges a module by trials on the rows of one batch.

    Args:
        module, batch, wanted: as in `Trial`.
        rows: the numbers of rows of a trial's parts.
        means: what batches of other shapes have left possible for the outputs that are means, by their numbers.

    Three kinds of trials leave fewer and fewer possibilities: on several choices of rows as they are; on rows with
    other values, so that nothing agrees by accident, such as a mask of zeros; and, for means, with entries that may not
    count in some rows, such as ignored labels.
    """

    def __init__(
        self,
        module: nn.Module,
        batch: Batch,
        rows: tuple[int, int],
        wanted: Sequence[int],
        means: Mapping[int, Candidates] | None = None,
    ) -> None:
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
        self._compared: set[float] = set()
        self._means = means
        self._found = False

    def look(self) -> bool:
        """Run as many trials as are needed. False if the module does not run on all rows of one.

        Raises:
            ValueError: the module cannot be split by rows exactly.
        """
        choices = choices_of(self._batch.rows, sum(self._rows))
        for number, chosen in enumerate(choices):
            if number >= _ALWAYS and not self._is_open():
                break
            if not self._look(chosen):
                return False
        if self._is_open() and not self._look(choices[0], _NOISE):
            return False
        if not self._look_again(choices[0], OtherValues()):
            self._look_again(choices[0], OtherValues(exact=False))
        if self._means is None:
            self._weigh(choices[-1])
        else:
            for at in self.means.keys() & self._means.keys():
                self._keep(at, self._means[at], "values that are no mean over rows")
        return True

    @property
    def means(self) -> dict[int, Candidates]:
        """What is possible for the outputs that are means, by their numbers."""
        return {
            at: found
            for at, found in self._outputs.items()
            if not self._exact[at] and decided(found, exact=False) is Effect.MEAN
        }

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
                raise refused_output(self._names[at], "values that may be a sum or an extreme over rows")
            layouts[at] = None if effect is None else layout_of(effect, found)
        known = [Layout(Effect.SAME) if one is None else one for one in layouts]  # declared ones are not asked for
        effects: dict[int, Effect] = {}
        for at, found in self._states.items():
            effect = decided(found, exact=is_exact(self._slots[at].tensor))
            if effect is None or effect is Effect.UNKNOWN:
                raise refused_state("buffer", self._slots[at].name)
            effects[at] = effect
        return Judged(None if self._trusted else known, effects, self._draws)

    # Trials.

    def _is_open(self) -> bool:
        """Whether further trials may tell more."""
        outputs = any(decided(found, exact=self._exact[at]) is None for at, found in self._outputs.items())
        return outputs or any(decided(found, exact=True) is None for found in self._states.values())

    def _look(self, chosen: Sequence[int], noise: float = 0.0) -> bool:
        """Run one trial and keep what it leaves possible. False if the module does not run on all of its rows."""
        total, first = sum(self._rows), self._rows[0]
        trial = Trial(self._module, self._batch, chosen, self._wanted, noise=noise)
        try:
            whole = trial.run(0, total)
        except NotImplementedError:
            return False
        except CannotSplitError:
            raise
        except FAILURES as error:
            if self._runs():
                raise failed(error, self._rows, self._batch.rows) from error
            return False
        try:
            parts = [trial.run(0, first), trial.run(first, total)]
            self._draws = {**trial.draw_places, **self._draws}
            if self._draws != {**self._draws, **trial.draw_places}:
                return False  # shapes that depend on values: the step's own checks apply
        except NotImplementedError:  # fastdp's own refusals, of which the step gives the right ones
            return False
        except FAILURES as error:
            raise failed(error, self._rows, self._batch.rows) from error
        self._compared |= trial.compared
        self._judge_outputs(trial, parts, whole)
        if not noise:
            self._judge_states(trial, parts, whole)
            self._judge_numbers(trial, parts, whole)
        return True

    def _look_again(self, chosen: Sequence[int], change: Change, *, on_host: bool = False) -> bool:
        """Run one trial on other values. False if the module does not run on them.

        Where only parts of the rows do not run, or have other shapes, a step on such rows would be an error too.
        """
        total, first = sum(self._rows), self._rows[0]
        trial = Trial(self._module, self._batch, chosen, self._wanted, change=change, on_host=on_host)
        try:
            whole = trial.run(0, total)
        except (*FAILURES, NotImplementedError):
            return False
        try:
            parts = [trial.run(0, first), trial.run(first, total)]
        except (*FAILURES, NotImplementedError):
            return True
        self._compared |= trial.compared
        self._found = trial.found
        every = [_tensors(run.outputs) for run in (*parts, whole)]
        if all(len(tensors) == len(self._names) for tensors in every):
            for at, (_, declared) in enumerate(output_roles(whole.outputs, self._declared)):
                values = [tensors[at].detach() for tensors in every]
                shapes = {value.shape for value in values}
                if declared is None and (len(shapes) == 1 or row_axis_of(values[:2], values[2], self._rows)):
                    self._judge_output(trial, at, values)
        self._judge_states(trial, parts, whole, finite=True)
        return True

    def _look_for(self, place: int, number: float | None, chosen: Sequence[int], first: int = 0) -> None:
        """Run one trial with a number in some entries of an array.

        A number that the array's own values do not suggest may mean nothing to the module, if it is not compared with
        it. What such a trial shows does not count if it leaves nothing possible.
        """
        array = Trial(self._module, self._batch, chosen).inputs.arrays[place]
        trial = Injected(place, number, first)
        usual = number is None or not is_exact(array) or min(0, int(array.min())) <= number <= int(array.max())
        before = dict(self._outputs), dict(self._states), self._trusted
        try:
            self._look_again(chosen, trial, on_host=True)
        except ValueError:
            if usual or self._found:
                raise
            self._outputs, self._states, self._trusted = before

    def _weigh(self, chosen: Sequence[int]) -> None:
        """For means: run trials in which some entries may not count."""
        arrays = Trial(self._module, self._batch, chosen).inputs.arrays[: self._batch.structure.inputs]
        for place, array in enumerate(arrays):
            for number in usual_numbers(array, self._compared):
                if not self._has_means():
                    return
                self._look_for(place, number, chosen)
        for place, number in self._left_out():
            self._look_for(place, number, chosen, self._rows[0])

    def _has_means(self) -> bool:
        """Whether an output or a buffer is a mean."""
        found = (left for at, left in self._states.items() if not is_exact(self._slots[at].tensor))
        return bool(self.means) or any(decided(left, exact=False) is Effect.MEAN for left in found)

    def _left_out(self) -> set[tuple[int, float]]:
        """The arrays with entries that do not count in a mean, and a number that stands for such an entry."""
        ways = {way for found in self.means.values() if Effect.MEAN not in found for way in found}
        return {(way.place, way.nothing) for way in ways if isinstance(way, Counted)}

    def _runs(self) -> bool:
        """Whether the module runs on all rows of the batch."""
        rows = self._batch.rows
        try:
            Trial(self._module, self._batch, range(rows), self._wanted).run(0, rows)
        except (*FAILURES, NotImplementedError):
            return False
        return True

    # Judgements.

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
            weights = {} if self._exact[at] else self._weights(trial)
            found = candidates(values[:2], values[2], self._rows, rough=self._rough, weights=weights)
            seen = f"shape {shapes[2]} for any rows, but values that are no mean, sum or extreme over rows"
            self._keep(at, found, seen, trusted=trial.meets)
            unknown = self._layouts[at] is not None
        else:
            layout = row_layout(values[:2], values[2], self._rows, rough=self._rough)
            unknown = layout.effect is Effect.UNKNOWN or (self._layouts[at] or layout) != layout or at in self._outputs
            self._layouts[at] = layout
            counts = [*self._rows, sum(self._rows)]
            seen = f"shapes {shapes} for {counts} rows, of which the first ones side by side are not the last one"
        if unknown and not trial.meets:
            raise refused_output(self._names[at], seen)
        self._trusted = self._trusted or unknown

    def _keep(self, at: int, found: Candidates, seen: str, *, trusted: bool = False) -> None:
        """Keep what is possible for an output without rows."""
        self._outputs[at] = self._outputs.get(at, found) & found
        if not self._outputs[at] and not trusted:
            raise refused_output(self._names[at], seen)
        self._trusted = self._trusted or not self._outputs[at]

    def _weights(self, trial: Trial) -> dict[Counted, tuple[float, float]]:
        """What the parts of a trial's rows may count in a mean."""
        first, found = self._rows[0], {}
        for place, array in enumerate(trial.inputs.arrays[: self._batch.structure.inputs]):
            for way in counted(place, array, self._compared | trial.compared):
                each = way.of(array)
                found[way] = (float(each[:first].sum()), float(each[first:].sum()))
        return found

    def _judge_states(self, trial: Trial, parts: Sequence[Run], whole: Run, *, finite: bool = False) -> None:
        """Keep what the parameters and buffers that a trial has changed leave possible; if `finite`, those that are."""
        runs = (*parts, whole)
        if any(len(run.values) != len(trial.slots) for run in runs):
            return  # forward has removed or added some: each replica has its own
        for at, slot in enumerate(trial.slots):
            before, values = slot.tensor.detach(), [run.values[at] for run in runs]
            if any(value.shape != before.shape or value.dtype != before.dtype for value in values):
                continue  # a cache of each replica
            if finite and not bool(torch.isfinite(values[2]).all()):
                continue
            left = state_candidates(values[:2], values[2], before, self._rows, rough=self._rough)
            if left is None:
                continue
            left = self._states.get(at, left) & left
            if not left or (slot.is_parameter and Effect.SAME not in left):
                raise refused_state("parameter" if slot.is_parameter else "buffer", slot.name)
            if not slot.is_parameter:
                self._states[at] = left

    def _judge_numbers(self, trial: Trial, parts: Sequence[Run], whole: Run) -> None:
        """Refuse numbers that are counted up by rows. Those that forward merely assigns are each replica's own."""
        for name, value in whole.numbers.items():
            if trial.meets or all(run.numbers.get(name) == value for run in parts):
                continue
            if trial.run(0, sum(self._rows), times=2).numbers[name] != value:
                raise refused_state("attribute", name)


def _tensors(outputs: Any) -> list[torch.Tensor]:
    """The tensors among outputs."""
    return [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, torch.Tensor)]
