"""Runs a module on all rows of a step, and on those of each device, and compares what several devices would merge.

Other trials have a few rows. A module may do something else for many: `if len(x) > 32`, `x[:16].mean()`. So what they
have found is checked once for each number of rows that steps really have.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fastdp.comm.batch import Batch
from fastdp.program.torch.batch import Structure
from fastdp.program.torch.following.merged import Role, as_tensor, equal
from fastdp.program.torch.following.writes import MISSING, Place, Written, present
from fastdp.program.torch.nest import PLAIN
from fastdp.program.torch.rows.declared import output_roles
from fastdp.program.torch.rows.draws import CannotSplitError
from fastdp.program.torch.rows.judge import FAILURES
from fastdp.program.torch.rows.judged import (
    Candidates,
    Judged,
    candidates,
    is_exact,
    is_near,
    row_axis_of,
    state_candidates,
)
from fastdp.program.torch.rows.trial import Run, Trial
from fastdp.program.torch.rows.weights import Counted
from fastdp.program.torch.rows.written import is_number
from fastdp.shard import Rows
from fastdp.tensors import pytree
from fastdp.tensors.row_effects import ROWS_FIRST, Effect, Layout, NotByRowsError


def check_at_size(module: nn.Module, batch: Batch, judged: Judged, devices: int, wanted: Sequence[int]) -> None:
    """Check that trials on a few rows have found what holds for the rows of a batch and for those of each device.

    Args:
        module, batch, wanted: as in `Trial`.
        judged: what the trials have found.
        devices: the number of devices.

    A module that does not run here is left to the step, which says why, and so is one whose whole batch needs more
    memory than one GPU has.

    Raises:
        NotByRowsError: on so many rows the module gives something else.
    """
    grad = torch.is_grad_enabled()
    for records in dict.fromkeys((False, grad)):  # graphs of the whole batch take the memory of all devices
        with torch.set_grad_enabled(records):
            try:
                _Check(module, batch, judged, batch.deal(devices), wanted if records else ()).run()
            except (CannotSplitError, NotByRowsError):
                raise
            except torch.OutOfMemoryError:
                torch.cuda.empty_cache()
                return
            except (*FAILURES, NotImplementedError):
                continue
            return


_SAME = Role(Layout(Effect.SAME))
_MOST = 1 / 500  # of the entries of a value may differ


class _Check:
    """The runs of one check. Arguments as of `check_at_size`; `rows` are those of the devices."""

    def __init__(
        self, module: nn.Module, batch: Batch, judged: Judged, rows: Sequence[Rows], wanted: Sequence[int]
    ) -> None:
        self._trial = Trial(module, batch, range(batch.rows), wanted, weighs=judged.weighs)
        self._batch, self._judged, self._rows = batch, judged, rows
        self._counts = [one.count for one in rows]
        structure: Structure = batch.structure
        self._structure, self._rough = structure, structure.autocast.enabled
        self._said = structure.declared.buffers if structure.declared is not None else {}
        wide = any(slot.tensor.dtype in (torch.float64, torch.complex128) for slot in self._trial.slots)
        self._most = 0.0 if wide else _MOST  # rounding may decide an argmax, and with it some entries

    def run(self) -> None:
        """Run the module and compare.

        Raises:
            NotByRowsError: as of `check_at_size`.
        """
        whole = self._trial.run(0, self._batch.rows)
        parts = [self._seen(self._trial.run(one.start, one.stop), whole.written) for one in self._rows]
        seen = self._seen(whole, [place for part in parts for place in part.written])
        self._outputs([part.outputs for part in parts], seen.outputs)
        self._states([part.states for part in parts], seen.states)
        self._written([part.written for part in parts], seen.written)

    def candidates(self, numbers: Iterable[int]) -> dict[int, Candidates]:
        """What outputs of these numbers may be."""
        whole = _tensors(self._trial.run(0, self._batch.rows).outputs)
        parts = [_tensors(self._trial.run(one.start, one.stop).outputs) for one in self._rows]
        every = {at: [found[at].detach() for found in (*parts, whole)] for at in numbers}
        return {
            at: candidates(values[:-1], values[-1], self._counts, rough=self._rough) for at, values in every.items()
        }

    def _seen(self, run: Run, places: Iterable[Place]) -> _Seen:
        """What a run has given, and had at these places and where trials have seen that it writes."""
        written = dict(run.written)
        for place in (*places, *(place for place, _ in self._judged.roles)):
            there = written.get(place) or present(run.guard, place)
            if there is not None:
                written[place] = there
        states = {at: run.values[at] for at, slot in enumerate(self._trial.slots) if not slot.is_parameter}
        return _Seen(run.outputs, states, written)

    def _outputs(self, parts: Sequence[Any], whole: Any) -> None:
        if self._judged.outputs is None or self._trial.meets:
            return
        forms = [form_of(outputs, self._judged.outputs) for outputs in parts]
        if any(form != forms[0] for form in forms):
            return  # a step refuses them, and says in what they differ
        others = [_others(outputs) for outputs in (*parts, whole)]
        every = [_tensors(outputs) for outputs in (*parts, whole)]
        if any(one != others[-1] for one in others) or any(len(one) != len(self._judged.outputs) for one in every):
            raise self._refused("returns other values or more or fewer tensors")
        roles = output_roles(whole, self._structure.declared)
        for at, (layout, (name, declared)) in enumerate(zip(self._judged.outputs, roles, strict=True)):
            values = [tensors[at].detach() for tensors in every]
            if declared is None and not self._fits(values[:-1], values[-1], layout):
                raise self._refused(f"returns something else as its {name}", values)

    def _states(self, parts: Sequence[dict[int, torch.Tensor]], whole: dict[int, torch.Tensor]) -> None:
        for at, value in whole.items():
            slot, every = self._trial.slots[at], [one[at] for one in (*parts, whole)]
            before = slot.tensor.detach().to(value.device)
            if slot.name in self._said or any(one.shape != before.shape or one.dtype != before.dtype for one in every):
                continue
            left = state_candidates(every[:-1], every[-1], before, self._counts, rough=self._rough)
            if left is not None and self._judged.states.get(at, Effect.SAME) not in left:
                raise self._refused(f"changes the buffer `{slot.name}` in another way")

    def _written(self, parts: Sequence[dict[Place, Written]], whole: dict[Place, Written]) -> None:
        """Compare what was written, also where trials on a few rows have seen nothing."""
        if self._trial.meets:
            return
        for place in dict.fromkeys(place for one in (*parts, whole) for place in one):
            found = [one[place] for one in (*parts, whole) if place in one]
            if len(found) <= len(parts) or any(one.spec != found[-1].spec for one in found):
                raise self._refused(f"sets `{place.name}` to something else")
            for number, values in enumerate(zip(*(one.leaves for one in found), strict=True)):
                role = self._judged.roles.get((place, number), _SAME)
                first = next((one for one in found if one.before is not MISSING), found[-1])
                before = first.before_at(number)
                if not self._fits_written(values, role, before):
                    raise self._refused(f"sets `{place.name}` to something else")

    def _fits_written(self, values: Sequence[Any], role: Role, before: Any) -> bool:
        if not all(is_number(value) for value in values):
            return all(equal(values[-1], value) for value in values)
        tensors = [as_tensor(value).detach() for value in values]
        if role.adds and before is not MISSING:
            base = as_tensor(before).detach().to(tensors[-1].device)
            tensors = [tensor - base for tensor in tensors]
        return self._fits(tensors[:-1], tensors[-1], role.layout)

    def _fits(self, parts: Sequence[torch.Tensor], whole: torch.Tensor, layout: Layout) -> bool:
        """Whether a value for all rows is what its layout makes of those of the devices."""
        if layout.effect is Effect.ROWS:
            found = row_axis_of(parts, whole, self._counts)
            if found is None or found.axis is None or found.axis != layout.axis:
                return False
            return is_near(torch.cat(list(parts), found.axis), whole, rough=self._rough, most=self._most)
        if any(part.shape != whole.shape for part in parts):
            return False
        ways = layout.weights if isinstance(layout.weights, tuple) else (layout.effect,)
        weights: Any = {way: self._weights(way) for way in ways if isinstance(way, Counted)}
        left = candidates(parts, whole, self._counts, rough=self._rough, weights=weights)
        if is_exact(whole) and self._most and not left & set(ways):  # a count of what may be equal but for rounding
            left = candidates([part.float() for part in parts], whole.float(), self._counts, rough=True)
        return bool(left & {*ways, Effect.SAME} if Effect.MEAN in ways else left & set(ways))

    def _weights(self, way: Counted) -> list[float]:
        """What the devices' rows count in a mean."""
        each = way.of(self._trial.inputs.arrays[way.place])
        return [float(each[one.start : one.stop].sum()) for one in self._rows]

    def _refused(self, how: str, values: Sequence[torch.Tensor] = ()) -> NotByRowsError:
        shapes = f" (shapes {[tuple(value.shape) for value in values]})" if values else ""
        return NotByRowsError(
            f"The module does something else for some numbers of rows: with {self._counts} rows on the devices and "
            f"{self._batch.rows} in all it {how} than on a few rows{shapes}. Look for conditions on the number of rows "
            "(len(x), x.shape[0]) and for fixed numbers of rows (x[:32], a chunk size) in forward. Take them out, or "
            "ask for what all devices have, fastdp.replica.all_reduce(torch.tensor(len(x))); or use gpus=[0]."
        )


@dataclass(slots=True)
class _Seen:
    """What a run has given, without the copy of the module that ran."""

    outputs: Any
    states: dict[int, torch.Tensor]
    written: dict[Place, Written]


def form_of(outputs: Any, layouts: Sequence[Layout] | None) -> Any:
    """What the outputs of all devices have in common: plain values, dtypes, and lengths of axes without rows.

    Args:
        outputs: of one device.
        layouts: of the tensors among them; None if all have their rows first.
    """
    shapes = [list(tensor.shape) for tensor in _tensors(outputs)]
    for shape, layout in zip(shapes, layouts or [ROWS_FIRST] * len(shapes), strict=False):
        if layout.axis is not None and layout.axis < len(shape):
            shape[layout.axis] = 0
    return _others(outputs), [tensor.dtype for tensor in _tensors(outputs)], shapes


def _others(outputs: Any) -> list[Any]:
    return [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, PLAIN)]


def _tensors(outputs: Any) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, torch.Tensor)]


def left_at_size(module: nn.Module, batch: Batch, judged: Judged, numbers: Iterable[int]) -> dict[int, Candidates]:
    """What outputs of these numbers may be, by all rows of a batch and by those of each device."""
    return _Check(module, batch, judged, batch.shards, ()).candidates(numbers)
