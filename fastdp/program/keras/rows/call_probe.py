"""Finds out whether one call of a layer can be split by rows: runs it on two rows and on each alone.

The decision rests on actual calls of the layer, not on the lengths of its arguments. A call can be split if each output
for two rows is the output for one row stacked on the output for the other. If another argument is as long as the batch,
so that its role is ambiguous, the two rows must also match those rows of the outputs for the whole batch.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import keras
import numpy as np
import torch

from fastdp.comm.context import Context
from fastdp.program.keras.batch import Structure, unpack
from fastdp.program.keras.batch_norm import statistics
from fastdp.program.keras.patches import replica_aware
from fastdp.program.keras.plain_outputs import is_same
from fastdp.program.keras.rows.at_size import MOST_SIZES, differs_at_size
from fastdp.program.keras.rows.backward import BackwardTrial, Forward
from fastdp.program.keras.rows.probe import Effects, generators_kept
from fastdp.program.keras.rows.written import Writes
from fastdp.program.keras.variables import ReplicaScope
from fastdp.shard import Rows
from fastdp.tensors.row_effects import MIXED_TOLERANCE, Effect, Layout, classify

# A call by rows: the row tensors, then the tensors that all rows share.
RowsCall = Callable[[Sequence[torch.Tensor], Sequence[torch.Tensor]], Any]

# Effects by which the replicas' values combine to the value for the whole batch; UNDECIDED is tried again.
_PUT_TOGETHER = frozenset((Effect.MEAN, Effect.SUM, Effect.SAME, Effect.UNDECIDED))


@dataclass(slots=True)
class _Seen:
    """What a layer did with some rows.

    Attributes:
        outputs: the outputs.
        made_up: whether draws invented values for missing rows, so that the outputs' values are unknown.
        losses: the `add_loss` terms.
        moved: the changes of variables, by number.
    """

    outputs: list[Any]
    made_up: bool
    losses: list[torch.Tensor] = field(default_factory=list)
    moved: dict[int, torch.Tensor] = field(default_factory=dict)

    @property
    def numbers(self) -> list[torch.Tensor]:
        """The scalar outputs."""
        return [out for out in self.outputs if is_number(out)]


class Attempt:
    """A context manager that catches an exception of a trial and keeps it as `error`.

    The user's program does not make trials. Whatever a layer raises in one means that it cannot be run that way.
    """

    error: BaseException | None = None

    def __enter__(self) -> Attempt:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        self.error = error
        return isinstance(error, Exception)


class LayerEffects(Effects):
    """What is known about the calls of one layer with certain arguments.

    Attributes:
        tried: whether the trial gave an answer.
        refused: why the calls cannot be split by rows; None if they can.
        numbers: how the scalar outputs depend on the rows.
    """

    tried = False
    refused: str | None = None
    numbers: Sequence[Effect] = ()
    _sizes: frozenset[int] | None = None  # the numbers of rows that were looked at; None: none has to be

    def asks_of_size(self, count: int) -> bool:
        """Whether `check_at_size` has to look at calls of `count` rows."""
        return self._sizes is not None and count not in self._sizes and len(self._sizes) < MOST_SIZES

    def take_as_known(self) -> None:
        """Skip the trial: the layer keeps rows apart, adds no losses and assigns nothing."""
        self.tried, self._losses = True, []

    def try_call(
        self, call: RowsCall, batch: Sequence[np.ndarray], structure: Structure, shared: Sequence[torch.Tensor]
    ) -> Any:
        """Try the call on two rows and on each alone. Returns the rows for `is_part_of` to compare.

        The question stays open if all rows of the batch are equal (there is nothing to compare then) or if an
        `add_loss` term is zero for the rows tried.
        """
        start = unlike_next(batch)
        if start is None:
            self.refused = "the rows of its arguments are all equal, so fastdp cannot tell whether it mixes them"
            return None
        places = ((start, start + 2), (start, start + 1), (start + 1, start + 2))
        attempt = Attempt()
        with attempt, replica_aware(), self._noting_writes() as writes:
            both, a, b = (self._on_rows(call, batch, structure, shared, *place) for place in places)
            if writes.wrote:
                self._written(writes, both, lambda: self._on_rows(call, batch, structure, shared, *places[0]))
        if attempt.error is not None:
            self._answer(f"it fails on a part of the rows: {_told(attempt.error)}")
            return None
        why = self.refused
        self.refused = None
        self._judge(a, b, both)
        if why is not None:
            self._answer(why)
        elif self.refused is None and torch.is_grad_enabled():
            self._judge_backward(call, batch, structure, shared, both, start)
        return start, both

    def _written(self, writes: Writes, both: _Seen, again: Callable[[], _Seen]) -> None:
        """Refuse the call where its passes write something else each time, or do something else after a write."""
        place, why = writes.found(), "each time another value"
        if place is None:
            writes.keeps = True
            again()
            second = again()
            writes.keeps = False
            same = second.moved.keys() == both.moved.keys() and _are_same(second, both)
            place, why = writes.moved_on() if same else writes.first(), "after which the next call is another"
            if place is None:
                return
        what = f"changes `{place.name}`, which lies outside of the model's layers"
        if place.layer is not None:
            what = f"writes the attribute {place.name!r} of {place.layer.name!r}"
        self.refused = f"its forward pass {what}, {why}, and all devices would write it at the same time"

    def _judge_backward(
        self,
        call: RowsCall,
        batch: Sequence[np.ndarray],
        structure: Structure,
        shared: Sequence[torch.Tensor],
        both: _Seen,
        start: int,
    ) -> None:
        """Refuse the call if the gradients of two rows are not those of each, added up."""
        effects = [*self.numbers, *self._losses] if self._losses else [*self.numbers]
        outputs = [out for out in both.outputs if isinstance(out, torch.Tensor) and not is_number(out)]
        layouts = [Layout(Effect.ROWS, 0, out.shape[0] // 2, True) for out in outputs]

        @contextmanager
        def run(first: int, last: int) -> Iterator[Forward]:
            context = Context.alone(batch, structure, start + first, start + last, len(batch[0]))
            own = {id(v) for v in self._model.variables if v.trainable and v.value.is_floating_point()}
            mapping = [(v, t.requires_grad_(id(v) in own)) for v, t in self._copied()]
            scope = ReplicaScope(mapping, own)
            with self._passing(context, scope) as state:
                rows, _, _ = unpack(structure.pack([array[start + first : start + last].copy() for array in batch]))
                rows = [row.requires_grad_() if row.is_floating_point() else row for row in rows]
                found = keras.tree.flatten(call(rows, [tensor.detach() for tensor in shared]))
                tensors = [one for one in found if isinstance(one, torch.Tensor)]
                masks = [getattr(one, "_keras_mask", None) for one in tensors]
                tensors += [mask for mask in masks if mask is not None]
                values = [one for one in tensors if not is_number(one)] + [one for one in tensors if is_number(one)]
                values += [keras.ops.sum(loss) for loss in scope.losses]
                leaves = [scope.get_current_value(v) for v, _ in mapping if id(v) in own]
                yield ([] if state.made_up else values), leaves, [row for row in rows if row.requires_grad]

        attempt = Attempt()
        with attempt, replica_aware(), generators_kept():
            if BackwardTrial(run, [*layouts, *map(Layout, effects)], 1, 2).differs():
                self._answer(
                    "its backward pass combines rows (a hook on a tensor, or the backward of an autograd.Function or "
                    "of keras.ops.custom_gradient): the gradients of two rows are not those of each row, added up"
                )

    def is_part_of(self, rows: Any, call: Callable[[], Any], batch: Sequence[np.ndarray], structure: Structure) -> bool:
        """Whether the result of `try_call` equals the same rows of the outputs of `call()` for the whole batch."""
        start, both = rows
        count = len(batch[0])
        attempt = Attempt()
        with attempt, replica_aware(), self._noting_writes():
            whole = self._on_rows(lambda *_: call(), batch, structure, (), 0, count)
        if attempt.error is not None or len(whole.outputs) != len(both.outputs):
            return False
        for part, out in zip(both.outputs, whole.outputs, strict=True):
            if not isinstance(part, torch.Tensor) or is_number(part):
                continue
            per_row = part.shape[0] // 2
            if not isinstance(out, torch.Tensor) or out.shape != (per_row * count, *part.shape[1:]):
                return False
            known = not (both.made_up or whole.made_up)
            if known and not is_close(part, out[per_row * start : per_row * (start + 2)]):
                return False
        return True

    def check_at_size(
        self,
        call: RowsCall,
        batch: Sequence[np.ndarray],
        structure: Structure,
        shared: Sequence[torch.Tensor],
        parts: Sequence[Rows],
    ) -> None:
        """Refuse the call if devices together do not give what it gives for all rows. Arguments as of `try_call`.

        Args:
            parts: the rows of each device.
        """

        self._sizes = (self._sizes or frozenset()) | {len(batch[0])}

        def outputs(start: int, stop: int) -> list[Any]:
            seen = self._on_rows(call, batch, structure, shared, start, stop)
            return [] if seen.made_up else seen.outputs

        with replica_aware(), generators_kept(), self._noting_writes():
            if differs_at_size(outputs, None, parts):
                self._answer("it gives something else for all rows of a batch than for the rows of each device")

    def _answer(self, refused: str | None) -> None:
        self.tried, self.refused = True, refused

    def _judge(self, a: _Seen, b: _Seen, both: _Seen) -> None:
        """Judge from the results for rows a and b alone and for both."""
        self._answer(why_not_by_rows(a, b, both))
        if self.refused is not None:
            return
        self.numbers = [classify((x, y), xy) for x, y, xy in zip(a.numbers, b.numbers, both.numbers, strict=True)]
        if not _PUT_TOGETHER.issuperset(self.numbers):
            self.refused = "one of its outputs is a number that is neither a mean nor a sum over rows"
        if len({len(seen.losses) for seen in (a, b, both)}) > 1:
            self.refused = "it calls add_loss() more often for some rows than for others"
            return
        self._losses = [classify((x, y), xy) for x, y, xy in zip(a.losses, b.losses, both.losses, strict=True)]
        if not _PUT_TOGETHER.issuperset(self._losses):
            self.refused = "its add_loss() is neither a mean nor a sum over rows"
        elif Effect.UNDECIDED in (*self._losses, *self.numbers):
            self.tried = False
            self.refused = (
                "its add_loss() or output is zero for the rows tried, so fastdp cannot tell a mean from a sum"
            )
        self._assigned |= self._moves(a, b, both)  # type: ignore[arg-type]
        for i, effect in self._assigned.items():
            if effect not in _PUT_TOGETHER:
                self._answer(
                    f"it assigns a value to {self._variables[i].path} that is neither a mean nor a sum over rows"
                )

    def _on_rows(
        self,
        call: RowsCall,
        batch: Sequence[np.ndarray],
        structure: Structure,
        shared: Sequence[torch.Tensor],
        start: int,
        stop: int,
    ) -> _Seen:
        """Run the layer on some rows of the batch, without changing anything."""
        context = Context.alone(batch, structure, start, stop, len(batch[0]))
        mapping = self._copied()
        scope = ReplicaScope(mapping, set())
        with torch.no_grad(), self._passing(context, scope) as run:
            rows, _, _ = unpack(structure.pack([array[start:stop].copy() for array in batch]))
            outputs = keras.tree.flatten(call(rows, [tensor.detach() for tensor in shared]))
            masks = [getattr(out, "_keras_mask", None) for out in outputs]
            losses = [keras.ops.sum(loss) for loss in scope.losses]
        scope.assigned_foreign(frozenset(), alone=False)
        outputs += [mask for mask in masks if mask is not None]
        others = {id(v) for layer in self._model._flatten_layers() for v in statistics(layer)} | self.seeds
        moved = {}
        for i, (variable, before) in enumerate(mapping):
            value = scope.get_current_value(variable)
            if value is not before and id(variable) not in others:
                moved[i] = value.double() - before.double()
        return _Seen(outputs, run.made_up, losses, moved)


def _told(error: BaseException) -> str:
    """An error in one line, without the text that Keras adds."""
    said = re.sub(r"\x1b\[\d*m", "", str(error)).partition("Arguments received by")[0]
    return f"{type(error).__name__}: {' '.join(said.split())[:200]}"


def is_number(output: Any) -> bool:
    """Whether an output of a layer is a scalar tensor."""
    return isinstance(output, torch.Tensor) and not output.ndim


def unlike_next(batch: Sequence[np.ndarray]) -> int | None:
    """The first row that differs from the next row, if possible in all arrays; None if all rows are equal."""
    found = None
    for row in range(len(batch[0]) - 1):
        unlike = [not np.array_equal(array[row], array[row + 1]) for array in batch]
        if all(unlike):
            return row
        if found is None and any(unlike):
            found = row
    return found


def why_not_by_rows(a: _Seen, b: _Seen, both: _Seen) -> str | None:
    """Why the outputs for rows a and b together are not those for a stacked on those for b; None if they are."""
    if not len(a.outputs) == len(b.outputs) == len(both.outputs):
        return "it returns more outputs for some rows than for others"
    for one, other, two in zip(a.outputs, b.outputs, both.outputs, strict=True):
        if not all(isinstance(out, torch.Tensor) for out in (one, other, two)):
            if not (is_same(one, two) and is_same(other, two)):
                return f"one of its outputs is not a tensor ({type(two).__name__}) and differs between rows"
            continue
        if is_number(one) and is_number(other) and is_number(two):
            continue
        if not one.ndim or not one.shape[0] or two.shape != (2 * one.shape[0], *one.shape[1:]):
            return (
                f"one of its outputs has the shape {tuple(two.shape)} for two rows and {tuple(one.shape)} for one, so "
                "rows do not lie along its first axis alone"
            )
        if other.shape != one.shape or two.dtype != one.dtype:
            return "the shapes or dtypes of its outputs depend on the values"
        known = not (a.made_up or b.made_up or both.made_up)
        if known and not is_close(torch.cat([one, other]), two):
            return "its outputs for a row depend on the other rows"
    return None


def _are_same(one: _Seen, other: _Seen) -> bool:
    """Whether two passes of the same rows have given the same."""
    pairs = [*zip(one.outputs, other.outputs, strict=False), *zip(one.losses, other.losses, strict=False)]
    pairs += [(one.moved[i], value) for i, value in other.moved.items()]
    tensors = [pair for pair in pairs if all(isinstance(value, torch.Tensor) for value in pair)]
    return all(x.shape == y.shape and is_close(x, y) for x, y in tensors)


def is_close(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors of equal shape are equal up to rounding."""
    if not (one.is_floating_point() or one.is_complex()):
        return bool(torch.equal(one, other))
    precise = torch.complex128 if one.is_complex() else torch.float64
    left, right = one.detach().to(precise), other.detach().to(precise)
    finite = left[torch.isfinite(left)].abs()
    tolerance = MIXED_TOLERANCE * max(1.0, float(finite.max()) if finite.numel() else 0.0)
    if one.dtype.itemsize < 4:
        tolerance *= 20.0
    same = ((left - right).abs() <= tolerance) | (left == right) | (torch.isnan(left) & torch.isnan(right))
    return bool(same.all())
