"""Turns errors of wrong labels and indices into ones that name the layer or loss, the range and the row.

Torch's own errors name none of these. When a step fails with such an error, it runs again on the same rows while each
operation's indices are checked first (`fastdp.tensors.indices.Watch`), and then on halves of the rows until one row is
left. A step that succeeds pays nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any

import keras
import torch

from fastdp.comm.context import Context
from fastdp.errors import ReplicaError, StepAborted
from fastdp.program.keras.batch import unpack
from fastdp.program.keras.patches import replica_aware
from fastdp.program.keras.replica import ReplicaContext, keras_device, replica_scope
from fastdp.program.keras.rows.probe import generators_kept
from fastdp.program.keras.variables import Mapping, ReplicaScope
from fastdp.tensors.indices import CheckedOneHot, Watch, Wrong
from fastdp.tensors.row_effects import NotByRowsError

if TYPE_CHECKING:
    from fastdp.program.keras.program import KerasProgram

_CLASSES: tuple[type[Exception], ...] = (IndexError, ValueError, RuntimeError)  # what torch raises for an index


class IndicesNamed:
    """A context manager that replaces the error of a wrong index by one that names the index, of the same class.

    Args:
        again: `again(start, stop)` repeats the work on these rows, without changing anything.
        start, stop: the range of rows within the global batch.

    Raises:
        IndexError, ValueError, RuntimeError: the class that torch raises for the index, with layer or loss, range,
            value and row in the message. Errors with other causes pass through.
    """

    def __init__(self, again: Callable[[int, int], Any], start: int, stop: int) -> None:
        self._again, self._start, self._stop = again, start, stop

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: TracebackType | None) -> None:
        if not isinstance(error, _CLASSES) or isinstance(error, (ReplicaError, StepAborted, NotByRowsError)):
            return
        with generators_kept():  # the step has already drawn
            found = _found(self._again, self._start, self._stop)
        if found is not None:
            raise found.kind(found.message) from error


def rows_of(leaf: Any, start: int, stop: int) -> Any:
    """Some rows of a leaf of a batch or of outputs; the whole leaf if it has no rows."""
    return leaf[start:stop] if getattr(leaf, "ndim", 0) else leaf


class RowsNamed(IndicesNamed):
    """`IndicesNamed` for a replica's step.

    Args:
        program: the program whose step it is.
        batch: the replica's rows.
        context: the replica's place in the step.
        mapping: the replica's variables; None for the model's own.
        trains: whether the step runs forward, loss and backward, or only forward.
    """

    def __init__(
        self,
        program: KerasProgram,
        batch: Iterable[Any],
        context: Context,
        mapping: Mapping | None = None,
        trains: bool = False,
    ):
        super().__init__(self._on_rows, context.rows.start, context.rows.stop)
        self._program, self._batch, self._context = program, batch, context
        self._mapping, self._trains = mapping, trains

    def _on_rows(self, start: int, stop: int) -> None:
        """Run the step on some of the rows, without an exchange, and keep nothing."""
        program, context, first = self._program, self._context, self._context.rows.start
        rows = [array[start - first : stop - first] for array in self._batch]
        alone = Context.alone(rows, context.structure, start, stop, context.rows.total)
        alone.device, alone.wants_outputs = context.device, False
        run = ReplicaContext(alone, program.sync_batch_norm, seed=program.seed, sites=program.effects.sites)
        mapping = self._mapping or [(v, v.value) for v in program.variables]
        nest = context.structure.pack(rows)
        with replica_aware():
            if self._trains:
                trained = set(map(id, program.trainable))
                program.passes.train([(v, t.detach().requires_grad_(id(v) in trained)) for v, t in mapping], nest, run)
                return
            with keras_device(context.device), torch.no_grad(), replica_scope(run), ReplicaScope(mapping, set()):
                program.passes.call(unpack(nest)[0], training=False)


@dataclass(frozen=True, slots=True)
class _Named:
    """A wrong index, where it occurred, and the class of torch's own error."""

    wrong: Wrong
    place: str
    argument: str
    kind: type[Exception]
    row: int | None = None

    @property
    def message(self) -> str:
        """The error message."""
        use = self.wrong.use
        row = f" in row {self.row} of the batch" if self.row is not None else ""
        if use.high is None:
            return f"{self.place} divides whole numbers by 0{row}."
        found = f"{use.expected} expected. Received: {self.wrong.found}{row}."
        return f"{self.place} got {self.argument} out of range: {found}"


def _found(again: Callable[[int, int], Any], start: int, stop: int) -> _Named | None:
    """The first wrong index of some rows; its row too, if halving the rows leads to the same place."""
    first = _look(again, start, stop)
    if first is None:
        return None
    last = first
    while stop - start > 1:
        middle = (start + stop) // 2
        found = _look(again, start, middle)
        if found is not None:
            stop = middle
        else:
            found, start = _look(again, middle, stop), middle
        if found is None or found.place != first.place:  # the error involves several rows
            return first
        last = found
    return _Named(last.wrong, last.place, last.argument, last.kind, start)


def _look(again: Callable[[int, int], Any], start: int, stop: int) -> _Named | None:
    """The first wrong index of these rows."""
    found: list[_Named] = []

    def told(wrong: Wrong, error: Exception) -> None:
        kind = next(one for one in _CLASSES if isinstance(error, one))
        found.append(_Named(wrong, *_place(), kind))
        raise error

    try:
        with CheckedOneHot(), Watch(told):
            again(start, stop)
    except _CLASSES:
        pass  # the error of the index, or another one, which the step's own error reports
    return found[0] if found else None


def _place() -> tuple[str, str]:
    """The innermost layer or loss that is being called, and the name of its indices in messages."""
    frame = sys._getframe(1)
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, keras.Loss):
            return f"The loss {owner.name!r}", "labels"
        if isinstance(owner, keras.layers.Layer) and not isinstance(owner, keras.Model):
            return f"The layer {owner.name!r} ({type(owner).__name__})", "indices"
        frame = frame.f_back  # type: ignore[assignment]
    return "The model", "indices"
