"""Finding out how a model's side effects depend on the rows of a batch, by running it on two of them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import torch

from fastdp.program.base import Context
from fastdp.program.keras_batch import Structure, split_leaves, unpack
from fastdp.program.keras_draws import DrawSites
from fastdp.program.keras_effects import (
    Effect,
    check_loss,
    check_outputs,
    classify,
    warn_mixed_rows,
    warn_variable,
)
from fastdp.program.keras_memory import ReplicaScope
from fastdp.program.keras_plain import Plain, check_same
from fastdp.program.keras_replica import Running, replica_scope
from fastdp.program.keras_rows import keeps_rows_apart
from fastdp.program.keras_scope import replica_aware


class Effects:
    """What is known of a model's `add_loss` terms and of the variables that it assigns.

    Args:
        model: the template.
        variables: all its variables, as the program numbers them.
        call: `call(x, training)` runs it.
        seed: of draws without a seed of their own.
    """

    def __init__(
        self, model: keras.Model, variables: Sequence[keras.Variable], call: Callable[[Any, bool], Any], seed: int
    ) -> None:
        self._model, self._variables, self._call, self._seed = model, variables, call, seed
        self.sites = DrawSites()
        layers = model._flatten_layers()
        self.seeds = {id(g.state) for layer in layers for g in layer._seed_generators}
        self._metrics = [[id(v) for v in metric.variables] for layer in layers for metric in layer._metrics]
        self._metric_ids = {number for metric in self._metrics for number in metric}
        self._assigned: dict[int, Effect] = {}
        self._losses: list[Effect] | None = None
        self._tried_equal_rows = False

    def of_losses(self, count: int) -> list[Effect]:
        """How each of `count` terms depends on the rows: means, as long as nothing is known."""
        known = self._losses or []
        return known if len(known) == count else [Effect.MEAN] * count

    def of_variable(self, index: int, variable: keras.Variable) -> Effect:
        """How an assigned variable's value depends on the rows."""
        if id(variable) in self.seeds:
            return Effect.SAME
        if index in self._assigned:
            return self._assigned[index]
        if id(variable) in self._metric_ids:
            return Effect.SUM
        return Effect.MEAN if variable.dtype.startswith(("float", "bfloat")) else Effect.SAME

    def inspect(self, batch: Sequence[np.ndarray], structure: Structure) -> None:
        """Find out, once, how `add_loss` terms and assigned variables depend on the rows, and warn of mixed rows.

        Runs the model on two rows of the batch, and on each alone, without changing anything. With fewer
        rows, rows that are all equal, or values that are all zero, the question is asked again at the next step.
        A model of layers that are known (`fastdp.program.keras_rows`) is not run: there is nothing to find out.

        Raises:
            NotByRowsError: an `add_loss` term, or outputs, that cannot be put together from the replicas' rows.
        """
        if self._losses is None and keeps_rows_apart(self._model):
            self._losses = []
        undecided = Effect.UNDECIDED in (*self._assigned.values(), *(self._losses or []))
        if (self._losses is not None and not undecided and not self._tried_equal_rows) or len(batch[0]) < 2:
            return
        other = _unlike_first(batch, structure)
        self._tried_equal_rows = other is None
        pair = [np.asarray(array[[0, other or 1]]) for array in batch]
        with replica_aware():
            both = self._try_rows(pair, structure, 0, 2)
            a, b = (self._try_rows(pair, structure, row, row + 1) for row in (0, 1))
        check_same([a.plain, b.plain, both.plain], both.nest)
        if self._losses is None and a.outputs and b.outputs:
            check_outputs(self._model.name, a.outputs, both.outputs)
            warn_mixed_rows(self._model, a.outputs, b.outputs, both.outputs)
        losses = [classify(*values) for values in zip(a.losses, b.losses, both.losses, strict=True)]
        for index, effect in enumerate(losses):
            check_loss(effect, index)
        self._losses = losses  # not before: whoever goes on after the error gets it again
        self._assigned |= {
            i: warn_variable(effect, self._variables[i]) for i, effect in self._moves(a, b, both).items()
        }
        if not both.losses and not both.moved:
            self._tried_equal_rows = False  # nothing that other rows could tell more about

    def _moves(self, a: _Trial, b: _Trial, both: _Trial) -> dict[int, Effect]:
        """How far variables moved, by number: as a mean over rows, or as what else.

        A layer's metric is updated by numbers of each row, and is a sum over rows, or by one number of the batch
        (`update_state(ops.mean(...))`), and counts batches. The count says which where the total was zero.
        """
        found = {
            i: classify(a.moved[i], b.moved[i], both.moved[i]) for i in both.moved if i in a.moved and i in b.moved
        }
        numbers = {id(self._variables[i]): i for i in found}
        for metric in self._metrics:
            of_metric = [numbers[one] for one in metric if one in numbers]
            by_batch = any(found[i] in (Effect.SAME, Effect.MEAN) for i in of_metric)
            for i in of_metric:
                if found[i] is Effect.UNDECIDED:
                    found[i] = Effect.MEAN if by_batch else Effect.SUM
        return found

    def _try_rows(self, batch: Sequence[np.ndarray], structure: Structure, start: int, stop: int) -> _Trial:
        """Run the model on some of two rows. What that fails with says so: the step itself has other rows."""
        context = Context.alone(batch, structure, start, stop, 2)
        run = Running(context, frozen_moments=True, seed=self._seed, sites=self.sites)
        mapping = [(v, v.value.detach()) for v in self._variables]
        explained = _explained(stop - start)
        with explained, torch.no_grad(), replica_scope(run), ReplicaScope(mapping, set()) as scope:
            x, _, _ = unpack(structure.pack([array[start:stop].copy() for array in batch]))
            nest = self._call(x, True)
            tensors, plain = split_leaves(nest)
            outputs = [leaf.detach() for leaf in tensors]
            losses = [keras.ops.sum(loss) for loss in scope.losses]
        normalized = {id(v) for layer in self._model._flatten_layers() for v in _statistics(layer)}
        moved = {}
        for i, (variable, before) in enumerate(mapping):
            value = scope.get_current_value(variable)
            if value is not before and id(variable) not in normalized and id(variable) not in self.seeds:
                moved[i] = value.double() - before.double()
        return _Trial(losses, moved, [] if run.made_up else outputs, plain, nest)


@contextmanager
def _explained(rows: int) -> Iterator[None]:
    """Let an error of a trial say what was run."""
    try:
        yield
    except BaseException as error:
        if sys.version_info >= (3, 11):  # which Keras 3.15 needs anyway
            error.add_note(
                f"fastdp ran the model on {rows} of the batch's rows, before the step itself, to find out how its "
                "outputs and losses depend on the rows."
            )
        raise


@dataclass(frozen=True, slots=True)
class _Trial:
    """What the model did with some rows: `add_loss` terms, how far variables moved by number, outputs (none where
    draws had to make up rows that were not there)."""

    losses: list[torch.Tensor]
    moved: dict[int, torch.Tensor]
    outputs: list[torch.Tensor]
    plain: Plain = ()
    nest: Any = None


def _unlike_first(batch: Sequence[np.ndarray], structure: Structure) -> int | None:
    """The first row whose inputs differ from those of row 0, if there is one."""
    for row in range(1, len(batch[0])):
        for array, name in zip(batch, structure.names, strict=True):
            if name.startswith("x") and not np.array_equal(array[0], array[row]):
                return row
    return None


def _statistics(layer: keras.layers.Layer) -> list[keras.Variable]:
    """The moving statistics of a BatchNormalization layer; nothing of others."""
    if not isinstance(layer, keras.layers.BatchNormalization):
        return []
    return [v for v in (layer.moving_mean, layer.moving_variance) if v is not None]
