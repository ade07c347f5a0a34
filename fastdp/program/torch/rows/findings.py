"""Keeps what trials of a module leave possible for its outputs and buffers, and decides what they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from fastdp.program.torch.batch import Structure
from fastdp.program.torch.following.writes import Place
from fastdp.program.torch.module import Slot
from fastdp.program.torch.nest import PLAIN, Nest
from fastdp.program.torch.rows.declared import output_roles
from fastdp.program.torch.rows.hints import TOTAL_LENGTH
from fastdp.program.torch.rows.judged import (
    Candidates,
    Judged,
    agrees,
    candidates,
    decided,
    is_exact,
    layout_of,
    row_axis_of,
    row_layout,
    state_candidates,
)
from fastdp.program.torch.rows.refusals import refused_argument, refused_output, refused_state
from fastdp.program.torch.rows.trial import Run, Trial
from fastdp.program.torch.rows.weights import Counted, counted
from fastdp.program.torch.rows.written import WrittenRoles
from fastdp.program.torch.shared_draws import DrawPlaces
from fastdp.shard import Rows
from fastdp.tensors import pytree
from fastdp.tensors.marks import MeanOver
from fastdp.tensors.row_effects import ROWS_FIRST, Effect, Layout


class Findings:
    """What trials leave possible.

    Args:
        slots: the module's parameters and buffers.
        structure: of the batch.
        rows: the numbers of rows of a trial's parts.
        believes: believe what the user has said about outputs; else it must agree with the trials.
    """

    def __init__(self, slots: Sequence[Slot], structure: Structure, rows: tuple[int, int], *, believes: bool) -> None:
        self._slots, self._rows, self._believes = slots, rows, believes
        self._declared, self._rough = structure.declared, structure.autocast.enabled
        self._said = structure.declared.buffers if structure.declared is not None else {}
        self._inputs = structure.inputs
        self._layouts: list[Layout | None] = []
        self._outputs: dict[int, Candidates] = {}
        self._states: dict[int, Candidates] = {}
        self._names: list[str] = []
        self._exact: list[bool] = []
        self._trusted = self._meets = False
        self._structure = structure
        self._written: set[int] = set()
        self._replaced: set[int] = set()
        self._compared: set[float] = set()
        self._roles = WrittenRoles(rows, rough=self._rough)

    @property
    def compared(self) -> set[float]:
        """The numbers that the module compares tensors with."""
        return self._compared

    def is_open(self) -> bool:
        """Whether further trials may tell more."""
        outputs = any(decided(found, exact=self._exact[at]) is None for at, found in self._outputs.items())
        states = any(decided(found, exact=True) is None for found in self._states.values())
        return outputs or states or self._roles.is_open()

    @property
    def is_certain(self) -> bool:
        """Whether the trials alone tell, and the outputs depend on the rows."""
        if self._meets or self._trusted:
            return False
        by_rows = any(layout is not None and layout.effect is not Effect.SAME for layout in self._layouts)
        return by_rows or any(Effect.SAME not in found for found in self._outputs.values())

    @property
    def means(self) -> dict[int, Candidates]:
        """What is possible for the outputs that are means, by their numbers."""
        return {
            at: found
            for at, found in self._outputs.items()
            if not self._exact[at] and decided(found, exact=False) is Effect.MEAN
        }

    def judged(self, draws: DrawPlaces) -> Judged:
        """The judgement, with the places of rows in draws.

        Raises:
            ValueError: the trials cannot tell.
        """
        layouts = self._judged_layouts()
        known = [Layout(Effect.SAME) if one is None else one for one in layouts]  # declared ones are not asked for
        effects: dict[int, Effect] = {}
        for at, found in self._states.items():
            effect = decided(found, exact=is_exact(self._slots[at].tensor))
            if effect is None or effect is Effect.UNKNOWN:
                raise refused_state("buffer", self._slots[at].name)
            effects[at] = effect
        judged = Judged(None if self._trusted else known, effects, draws, self._written_arrays(), self._roles.roles())
        judged.replaced = frozenset(self._replaced)
        judged.open = {at: found for at, found in self._outputs.items() if Effect.SAME in found and not self._trusted}
        return judged

    def _written_arrays(self) -> frozenset[int]:
        """The arrays that forward changes in place, by their numbers.

        Raises:
            ValueError: replicas would change one memory, or copies.
        """
        nest, layouts = self._structure.nest, self._structure.layouts
        holes = [place for place in range(len(nest.leaves)) if nest.is_hole(place)]
        for place in self._written:
            if place not in holes or (layouts and layouts[holes.index(place)] != ROWS_FIRST):
                raise refused_argument(self._structure.name_of(place))
        return frozenset(map(holes.index, self._written))

    def _judged_layouts(self) -> list[Layout | None]:
        """The layouts of the outputs; None where trusted ones are not known, or declared."""
        layouts = list(self._layouts)
        for at, found in self._outputs.items():
            effect = decided(found, exact=self._exact[at])
            if effect is None and Effect.SAME in found:  # zero, whatever the parameters are
                effect = Effect.SAME if self._exact[at] else Effect.MEAN
            if not self._trusted and effect in (None, Effect.UNKNOWN):
                raise refused_output(self._names[at], "values that may be a sum or an extreme over rows")
            layouts[at] = None if effect is None else layout_of(effect, found)
        return layouts

    def has_means(self) -> bool:
        """Whether an output or a buffer is a mean."""
        found = (left for at, left in self._states.items() if not is_exact(self._slots[at].tensor))
        states = any(decided(left, exact=False) is Effect.MEAN for left in found)
        return bool(self.means) or states or self._roles.has_means()

    def left_out(self) -> set[tuple[int, float]]:
        """The arrays with entries that do not count in a mean, and a number that stands for such an entry."""
        ways = {way for found in self.means.values() if Effect.MEAN not in found for way in found}
        return {(way.place, way.nothing) for way in ways if isinstance(way, Counted)}

    def is_undecided(self) -> bool:
        """Whether a mean may be one over entries of several arrays, or of several parts of one."""
        every = ([way for way in found if isinstance(way, Counted)] for found in self.means.values())
        return any(len({(way.place, way.cut) for way in ways}) > 1 for ways in every)

    # Trials.

    def see(self, trial: Trial, parts: Sequence[Run], whole: Run) -> None:
        """Keep what a trial on rows as they are leaves possible.

        Raises:
            ValueError: nothing.
        """
        self._compared |= trial.compared
        self._written |= trial.written
        self._meets = self._meets or trial.meets
        self._judge_outputs(trial, parts, whole)
        if not trial.is_noisy:
            self._judge_states(trial, parts, whole)
        self._roles.look(parts, whole, lambda: trial.run(0, sum(self._rows), times=2), trusted=trial.meets)

    def see_again(self, trial: Trial, parts: Sequence[Run], whole: Run) -> None:
        """Keep what a trial on rows with other values leaves possible, of outputs that can be put side by side.

        Raises:
            ValueError: nothing.
        """
        self._compared |= trial.compared
        every = [_tensors(run.outputs) for run in (*parts, whole)]
        if all(len(tensors) == len(self._names) for tensors in every):
            for at, (_, declared) in enumerate(output_roles(whole.outputs, self._declared)):
                values = [tensors[at].detach() for tensors in every]
                shapes = {value.shape for value in values}
                if len(shapes) > 1 and row_axis_of(values[:2], values[2], self._rows) is None:
                    continue
                if declared is None:
                    self._judge_output(trial, at, values)
                else:
                    self._check_output(trial, at, values, declared)
        self._judge_states(trial, parts, whole, finite=True)
        self._roles.look_again(parts, whole, trusted=self._meets)

    def see_later(self, trial: Trial, parts: Sequence[Run], whole: Run) -> None:
        """Keep what a second pass leaves possible for buffers and for what is written.

        Raises:
            ValueError: nothing.
        """
        self._judge_states(trial, parts, whole, finite=True)
        self._roles.look_later(parts, whole, trusted=trial.meets)

    @property
    def keeps(self) -> bool:
        """Whether forward keeps something that may depend on the rows."""
        return any(left != {Effect.SAME} for left in self._states.values()) or self._roles.keeps()

    def kept_by_rows(self, run: Run) -> dict[tuple[Place, int], Layout]:
        """Where the rows are in what this run has written by rows, by place and number of the leaf."""
        found = self._roles.by_rows().items()
        return {leaf: layout for leaf, layout in found if leaf[0] in run.written}

    def keep_means(self, means: Mapping[int, Candidates]) -> None:
        """Keep what is possible for means in batches of other lengths too."""
        for at in self.means.keys() & means.keys():
            self._keep(at, means[at], "values that are no mean over rows")

    def saved(self) -> tuple[Any, ...]:
        """What is possible now, for `restore`."""
        return dict(self._outputs), dict(self._states), self._trusted, self._roles.saved()

    def restore(self, saved: tuple[Any, ...]) -> None:
        """Forget what later trials have shown."""
        self._outputs, self._states, self._trusted, written = saved
        self._roles.restore(written)

    # Judgements.

    def _judge_outputs(self, trial: Trial, parts: Sequence[Run], whole: Run) -> None:
        """Keep what the outputs of a trial leave possible."""
        Nest.flatten(whole.outputs, "The module's outputs")  # says what cannot be merged at all
        roles = output_roles(whole.outputs, self._declared)
        others = [_others(run.outputs) for run in (*parts, whole)]
        if any(one != others[2] for one in others):
            raise ValueError(
                f"The module returns, besides tensors, {others} for {[*self._rows, sum(self._rows)]} rows of a batch. "
                "Values that are no tensors must be the same for any rows. Return a tensor in their place, such as "
                "torch.tensor(value), or use gpus=[0]."
            )
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
            values = [tensors[at].detach() for tensors in every]
            if declared is None:
                self._judge_output(trial, at, values)
            else:
                self._check_output(trial, at, values, declared)

    def _judge_output(self, trial: Trial, at: int, values: Sequence[torch.Tensor]) -> None:
        """Keep what an output, for the two parts and for all rows, leaves possible."""
        shapes = [tuple(value.shape) for value in values]
        if len(set(shapes)) == 1:
            weights = {} if self._exact[at] else self._weights(trial)
            found = candidates(values[:2], values[2], self._rows, rough=self._rough, weights=weights)
            seen = f"shape {shapes[2]} for any rows, but values that are no mean, sum or extreme over rows"
            if shapes[2] == ():
                seen += " (means over different entries must be returned one by one, not as their sum)"
            self._keep(at, found, seen, trusted=trial.meets)
            unknown = self._layouts[at] is not None
        else:
            layout = row_layout(values[:2], values[2], self._rows, rough=self._rough)
            unknown = layout.effect is Effect.UNKNOWN or (self._layouts[at] or layout) != layout or at in self._outputs
            self._layouts[at] = layout
            counts = [*self._rows, sum(self._rows)]
            kinds = " and ".join(sorted({str(value.dtype) for value in values}))
            seen = f"{kinds} of shapes {shapes} for {counts} rows, of which the first two are not the last"
            if sum(len(set(sizes)) > 1 for sizes in zip(*shapes, strict=False)) > 1:
                seen += f" (a length that follows from the rows' values must be given: {TOTAL_LENGTH})"
        if unknown and not trial.meets:
            raise refused_output(self._names[at], seen)
        self._trusted = self._trusted or unknown

    def _check_output(self, trial: Trial, at: int, values: Sequence[torch.Tensor], declared: Layout) -> None:
        """Check what the user has said about an output, which is wrong if the rows of an argument are elsewhere."""
        if self._believes or trial.meets:
            return
        weights: Sequence[float] = ()
        if isinstance(declared.weights, MeanOver) and self._declared is not None:
            total = sum(self._rows)
            given = trial.inputs.of(Rows(0, total, total), "cpu")
            each = self._declared.weights(declared.weights, given, total)
            weights = [float(one.sum()) for one in each.split(list(self._rows))]
        if not agrees(values[:2], values[2], declared, self._rows, rough=self._rough, weights=weights):
            shapes, said = [tuple(value.shape) for value in values], declared.effect.value
            where = said if declared.axis is None else f"{said}, number {declared.axis}"
            raise refused_output(
                self._names[at],
                f"shapes {shapes} for {[*self._rows, sum(self._rows)]} rows and values that are not what `rows` says "
                f"of it ({where}): are the rows of an argument elsewhere? If not, say where those of all arguments "
                "are, and this is believed",
            )

    def _keep(self, at: int, found: Candidates, seen: str, *, trusted: bool = False) -> None:
        """Keep what is possible for an output without rows."""
        self._outputs[at] = self._outputs.get(at, found) & found
        if not self._outputs[at] and not trusted:
            raise refused_output(self._names[at], seen)
        self._trusted = self._trusted or not self._outputs[at]

    def _weights(self, trial: Trial) -> dict[Counted | MeanOver, Sequence[float]]:
        """What the parts of a trial's rows may count in a mean."""
        first = self._rows[0]
        found: dict[Counted | MeanOver, Sequence[float]] = {}
        for place, array in enumerate(trial.inputs.arrays[: self._inputs]):
            for way in counted(place, array, self._compared | trial.compared):
                each = way.of(array)
                found[way] = (float(each[:first].sum()), float(each[first:].sum()))
        return found

    def _judge_states(self, trial: Trial, parts: Sequence[Run], whole: Run, *, finite: bool = False) -> None:
        """Keep what the parameters and buffers that a trial has changed leave possible; if `finite`, those that are."""
        runs = (*parts, whole)
        if any(len(run.values) != len(trial.slots) for run in runs):
            return  # forward has removed or added some: each replica has its own
        self._replaced.update(*(run.replaced for run in runs))
        for at, slot in enumerate(trial.slots):
            before, values = slot.tensor.detach(), [run.values[at] for run in runs]
            if any(value.shape != before.shape or value.dtype != before.dtype for value in values):
                continue  # a cache of each replica
            if slot.name in self._said:
                continue
            if finite and not bool(torch.isfinite(values[2]).all()):
                continue
            known = self._states.get(at)
            left = state_candidates(values[:2], values[2], before, self._rows, rough=self._rough, among=known)
            if left is None:
                continue
            left = left if known is None else known & left
            if not left or (slot.is_parameter and Effect.SAME not in left):
                raise refused_state("parameter" if slot.is_parameter else "buffer", slot.name)
            if not slot.is_parameter:
                self._states[at] = left


def _others(outputs: Any) -> list[Any]:
    """What is no tensor among outputs, and may be there."""
    return [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, PLAIN)]


def _tensors(outputs: Any) -> list[torch.Tensor]:
    """The tensors among outputs."""
    return [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, torch.Tensor)]
