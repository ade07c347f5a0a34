"""Finds what a model's code writes besides variables in a step, though it wrote nothing when it was tried.

`if ops.max(x) > limit: self.hits += 1` may write for the first time in the fifth step. Such a step stops before its
update, everything gets the values of before, and the model is tried again on all rows of this batch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch

from fastdp.comm.context import Context
from fastdp.program.keras.rows.probe import changed_in_place
from fastdp.program.keras.rows.reached import Record, record_of
from fastdp.program.keras.step_sums import StepSums
from fastdp.program.keras.variables import Mapping
from fastdp.tensors.row_effects import UndecidedError

_SMALL_NBYTES = 1 << 20  # variables that are not trained are mostly statistics and counters
_ALWAYS = 32  # changes of one value; later ones if their number is a power of two
_WAYS = "which way code goes"
_OFTEN = 2  # what trials have found harmless so often is not asked about again


class LaterWrites:
    """Compares what a model's code reaches before and after each step that several replicas run.

    Args:
        model: the template.

    Attributes:
        is_active: whether there is anything to compare: the model was tried, so it has code that is not known.
    """

    def __init__(self, model: Any) -> None:
        self._model, self.is_active = model, False
        self._record: Record | None = None
        self._harmless: Counter[str] = Counter()
        self._changes: Counter[str] = Counter()
        self._found = ""
        self._is_confirmed = False
        self._kept: Mapping = []

    def begin(self) -> None:
        """Note the present values. On the host thread, before a step."""
        if not self.is_active:
            return
        if self._record is None or self._record.changed():
            self._record = record_of(self._model, with_layers=True)
        others = [v for v in self._model.non_trainable_variables if v._value.nbytes <= _SMALL_NBYTES]
        self._kept = [(v, v._value.detach().clone()) for v in others]

    def has_changed(self) -> bool:
        """Whether what the code reaches was changed since the last step, so that the model has to be tried again.

        What changes all the time is asked about less and less often.
        """
        record = self._record
        if record is None or not record.changed():
            return False
        names = [name for _, name, _ in record.written(functions=True) if not self._harmless[name]]
        self._record = None
        self._changes.update(names)
        counts = [self._changes[name] for name in names]
        return any(count <= _ALWAYS or not count & (count - 1) for count in counts)

    @property
    def wrote(self) -> bool:
        """Whether the latest step has failed because it has written something."""
        return bool(self._found)

    def tried(self, *, every_row: bool) -> None:
        """The model was tried. Of all rows: what this step writes is written alike by all devices."""
        self.is_active = True
        if every_row:
            self._harmless[self._found or _WAYS] += 1
            self._found, self._is_confirmed = "", True

    def versions(self, mapping: Mapping) -> list[int]:
        """The versions of a replica's variables, before its pass; empty if there is nothing to compare."""
        return [value._version for _, value in mapping] if self.is_active else []

    def check(self, context: Context, mapping: Mapping, versions: Sequence[int]) -> None:
        """Check that no replica has written anything yet. In each replica's thread, at the end of its pass.

        Args:
            context: of the replica.
            mapping: its variables.
            versions: from before its pass.

        Raises:
            UndecidedError: one has.
            NotByRowsError: this one has changed a variable in place.
        """
        if context.size > 1:
            for (variable, value), version in zip(mapping, versions, strict=False):
                if value._version != version:
                    self._found = variable.path
                    raise changed_in_place(variable)
        record = self._record
        if record is None or self._is_confirmed or context.size == 1 or not record.changed():
            return
        found = next((name for _, name, _ in record.written() if self._harmless[name] < _OFTEN), None)
        if found is None:
            return
        self._found = found
        raise UndecidedError(
            f"The model {self._model.name!r} has changed `{found}` in this step, which is no variable, and did not "
            "do so when fastdp tried it. All devices would change it at the same time. Return the value from call(), "
            "or keep it in a variable (self.add_weight(..., trainable=False)), or use gpus=[0]."
        )

    def asked(self, outcome: StepSums) -> tuple[bool, ...]:
        """The ways that a replica's forward pass has gone, as far as they have to be those of all replicas."""
        return () if self._is_confirmed or self._harmless[_WAYS] >= _OFTEN else outcome.branches

    def end(self, *, failed: bool) -> None:
        """Take back what a step has written that has failed for it. On the host thread, when all replicas are done."""
        if failed and self._found and not self._is_confirmed and self._record is not None:
            self._record.restore()
            self._record = None
            with torch.no_grad():
                for variable, value in self._kept:
                    variable._value.copy_(value)
        self._is_confirmed = False
