"""Runs a model on some rows of a batch, without changing it, to see how its values depend on them."""

from __future__ import annotations

import random
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import torch

from fastdp.comm.context import Context
from fastdp.program.keras.batch import Structure, split_leaves, unpack
from fastdp.program.keras.batch_norm import statistics
from fastdp.program.keras.plain_outputs import Plain
from fastdp.program.keras.random.draw_sites import DrawSites
from fastdp.program.keras.random.host_draws import held_generators_stay
from fastdp.program.keras.replica import ReplicaContext, replica_scope
from fastdp.program.keras.rows.backward import Forward
from fastdp.program.keras.rows.units import Call, Recorder, Unit
from fastdp.program.keras.rows.written import Writes, writes_of
from fastdp.program.keras.variables import Mapping, ReplicaScope
from fastdp.tensors.row_effects import Effect, Layout, NotByRowsError, classify

# Returns another value of a variable for a trial, from its present value and a generator of random numbers.
Change = Callable[[keras.Variable, torch.Tensor, torch.Generator], torch.Tensor]


class Effects:
    """What is known about the `add_loss` terms and the assigned variables of a model or a layer.

    Args:
        model: the template.
        variables: all variables of the model, in the program's numbering.
        call: `call(x, training)` runs the model.
        seed: seed of draws that have no seed themselves.
        sites: what is known about the model's draws.
    """

    training = True
    layouts: Sequence[Layout] | None = None
    alone = False
    asked_of_every_row = True

    def __init__(
        self,
        model: Any,
        variables: Sequence[keras.Variable],
        call: Callable[[Any, bool], Any],
        seed: int,
        sites: DrawSites | None = None,
    ) -> None:
        self._model, self._variables, self._call, self._seed = model, variables, call, seed
        self.sites = DrawSites() if sites is None else sites
        layers = model._flatten_layers()
        self.seeds = {id(g.state) for layer in layers for g in layer._seed_generators}
        self._metrics = [[id(v) for v in metric.variables] for layer in layers for metric in layer._metrics]
        self._metric_ids = {number for metric in self._metrics for number in metric}
        self._assigned: dict[int, Effect] = {}
        self._losses: list[Effect] | None = None
        self._writes: Writes | None = None

    @contextmanager
    def _noting_writes(self) -> Iterator[Writes]:
        """Note what the passes of a trial write to attributes, and take it back at the end."""
        with writes_of(self._model) as writes:
            self._writes = writes
            try:
                yield writes
            finally:
                self._writes = None

    def units(self) -> Any:
        """An object that controls how the units of a replica's forward pass run; None if nothing does."""
        return None

    @property
    def outputs_are_plain(self) -> bool:
        """Whether each output has its rows on axis 0 or is a mean over rows."""
        layouts = self.layouts or []
        return all((one.effect is Effect.ROWS and not one.axis) or one.effect is Effect.MEAN for one in layouts)

    def is_seed(self, index: int) -> bool:
        """Whether a variable is the state of a random generator, which changes equally on all replicas."""
        return id(self._variables[index]) in self.seeds

    def path(self, index: int) -> str:
        """A variable's path."""
        return str(self._variables[index].path)

    def check_count(self, count: int) -> None:
        """Do nothing. `ModelEffects` checks here that there are as many terms as in the trial."""

    def check_undecided(self, known: Sequence[Effect], values: Sequence[torch.Tensor]) -> None:
        """Do nothing. `ModelEffects` checks here that such terms are still zero."""

    def contributions(self, losses: Sequence[torch.Tensor], context: Context) -> list[torch.Tensor]:
        """A replica's contributions to the `add_loss` terms.

        Raises:
            UndecidedError: a term that was zero in the trial is no longer zero.
        """
        if context.size > 1:
            self.check_count(len(losses))
        known, values = self.of_losses(len(losses)), [keras.ops.sum(loss) for loss in losses]
        if Effect.UNDECIDED in known and context.size > 1:
            self.check_undecided(known, values)
        factors = [1.0 if effect is Effect.SUM else context.rows.share for effect in known]
        return [value * factor for value, factor in zip(values, factors, strict=True)]

    def of_losses(self, count: int) -> list[Effect]:
        """How each of `count` terms depends on the rows; a mean while unknown."""
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

    def _moves(self, a: Trial, b: Trial, both: Trial, rows: Sequence[int] = (1, 1)) -> dict[int, Effect]:
        """How the changes of variables depend on the rows, by the variable's number.

        A layer may update its metric with one number per row; the metric is then a sum over rows. Or it updates it with
        one number per batch (`update_state(ops.mean(...))`), which counts batches. If the total was zero, the metric's
        count tells which case it is.
        """
        found = {
            i: classify((a.moved[i], b.moved[i]), both.moved[i], rows)
            for i in both.moved
            if i in a.moved and i in b.moved
        }
        numbers = {id(self._variables[i]): i for i in found}
        for metric in self._metrics:
            of_metric = [numbers[one] for one in metric if one in numbers]
            by_batch = any(found[i] in (Effect.SAME, Effect.MEAN) for i in of_metric)
            for i in of_metric:
                if found[i] is Effect.UNDECIDED:
                    found[i] = Effect.MEAN if by_batch else Effect.SUM
        return found

    def _try_rows(
        self,
        batch: Sequence[np.ndarray],
        structure: Structure,
        start: int,
        stop: int,
        *,
        recorder: Recorder | None = None,
        shifted: Sequence[int] = (),
        change: Change | None = None,
    ) -> Trial:
        """Run the model on some rows of the batch.

        Args:
            batch: all rows that are tried.
            structure: the structure of `batch`.
            start, stop: the range of rows of `batch` to run on.
            recorder: records the units.
            shifted: numbers of the variables to which 1 is added for this trial.
            change: gives the floating-point variables other values for this trial.
        """
        context = Context.alone(batch, structure, start, stop, len(batch[0]))
        recorder = recorder or Recorder()
        mapping = self._copied()
        for i in shifted:
            mapping[i] = (mapping[i][0], mapping[i][1] + 1)
        if change is not None:
            generator = torch.Generator().manual_seed(0)
            mapping = [(v, change(v, t, generator) if t.is_floating_point() else t) for v, t in mapping]
        scope = _TrialScope(mapping, recorder)
        with torch.no_grad(), self._passing(context, scope, recorder) as run:
            x, _, _ = unpack(structure.pack([array[start:stop].copy() for array in batch]))
            nest = self._call(x, self.training)
            tensors, plain = split_leaves(nest)
            outputs = [leaf.detach() for leaf in tensors]
            losses = [keras.ops.sum(loss) for loss in scope.losses]
        scope.assigned_foreign(frozenset(), alone=False)
        normalized = {id(v) for layer in self._model._flatten_layers() for v in statistics(layer)}
        moved = {}
        for i, (variable, before) in enumerate(mapping):
            value = scope.get_current_value(variable)
            if value is not before and id(variable) not in normalized and id(variable) not in self.seeds:
                moved[i] = value.double() - before.double()
        found = [] if run.made_up else outputs
        return Trial(losses, moved, found, recorder.calls, recorder.losses, plain=plain, nest=nest)

    @contextmanager
    def differentiable(
        self, batch: Sequence[np.ndarray], structure: Structure, start: int, stop: int
    ) -> Iterator[Forward]:
        """Run the model on some rows with a graph: outputs and losses, the trainable variables, and no rows."""
        context = Context.alone(batch, structure, start, stop, len(batch[0]))
        trained = {id(v) for v in self._model.trainable_variables if v.value.is_floating_point()}
        mapping = [(v, t.requires_grad_(id(v) in trained)) for v, t in self._copied()]
        scope = ReplicaScope(mapping, trained)
        with self._passing(context, scope) as run:
            x, _, _ = unpack(structure.pack([array[start:stop].copy() for array in batch]))
            tensors, _ = split_leaves(self._call(x, self.training))
            values = [*tensors, *(keras.ops.sum(loss) for loss in scope.losses)]
            leaves = [scope.get_current_value(v) for v, _ in mapping if id(v) in trained]
            yield ([] if run.made_up else values), leaves, []

    def _copied(self) -> Mapping:
        """The variables with copies of their values, which code that writes in place cannot harm."""
        return [(v, v.value.detach().clone()) for v in self._variables]

    @contextmanager
    def _passing(self, context: Context, scope: ReplicaScope, units: Any = None) -> Iterator[ReplicaContext]:
        """Within this context a trial's pass runs. An error gets a note that names the trial and its number of rows.

        Raises:
            NotByRowsError: the pass has changed a variable in place.
        """
        run = ReplicaContext(context, frozen_moments=True, seed=self._seed, sites=self.sites, units=units)
        held = held_generators_stay(self._model)
        noted = self._writes.noting() if self._writes is not None else nullcontext()
        given = dict(scope.state_mapping)
        versions = {number: value._version for number, value in given.items()}
        with quiet(), _explained(context.rows.count), held, noted, replica_scope(run), scope:
            yield run
        for variable in self._variables:
            if given[id(variable)]._version != versions[id(variable)]:
                raise changed_in_place(variable)


def changed_in_place(variable: keras.Variable) -> NotByRowsError:
    """The error for a variable that a forward pass has changed in place."""
    return NotByRowsError(
        f"The variable {variable.path!r} is changed in place in the forward pass (v.value.add_(...) and "
        "the like), which goes past Keras and would change one device's copy by its own rows. Use "
        "v.assign(...), v.assign_add(...), or gpus=[0]."
    )


def last_bits(variable: keras.Variable, value: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A `Change` of all variables in their last bits, which shows the size of rounding errors."""
    return value * (1.0 + 5e-7 * _random(value, generator))


def other_weights(variable: keras.Variable, value: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A `Change` of the trainable variables by about 0.1: biases of zero and gains of one no longer cancel anything."""
    return value + 0.1 * _random(value, generator) if variable.trainable else value


def _random(value: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Standard normal numbers like `value`."""
    return torch.randn(value.shape, generator=generator).to(value.device, value.dtype)


class _TrialScope(ReplicaScope):
    """A scope that reports assigned variables to the recorder."""

    def __init__(self, mapping: Mapping, recorder: Recorder) -> None:
        super().__init__(mapping, set())
        self._numbers = {id(variable): i for i, (variable, _) in enumerate(mapping)}
        self._recorder = recorder

    def add_update(self, update: tuple[keras.Variable, torch.Tensor]) -> None:
        """Record an assignment and the unit that made it."""
        number = self._numbers.get(id(update[0]))
        if number is not None:
            self._recorder.wrote(number)
        super().add_update(update)


@contextmanager
def quiet() -> Iterator[None]:
    """Suppress warnings: the step itself does not run on these rows alone."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def _explained(rows: int) -> Iterator[None]:
    """Add a note to an error of a trial that says what was run."""
    try:
        yield
    except BaseException as error:
        if sys.version_info >= (3, 11):  # Keras 3.15 requires it anyway
            error.add_note(
                f"fastdp ran the model on {rows} of the batch's rows, before the step itself, to find out how its "
                "outputs and losses depend on the rows."
            )
        raise


@contextmanager
def generators_kept() -> Iterator[None]:
    """Restore the global generators of torch, NumPy and Python afterwards: a trial must not advance them."""
    numpy_state, python_state = np.random.get_state(), random.getstate()  # noqa: NPY002
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        np.random.set_state(numpy_state)  # noqa: NPY002
        random.setstate(python_state)


@dataclass(frozen=True, slots=True)
class Trial:
    """What the model did with some rows.

    Attributes:
        losses: the `add_loss` terms.
        moved: the changes of variables, by number.
        outputs: the outputs; empty if draws had to invent values for missing rows.
        calls: the units.
        layers: the layer of each term.
        failed: the unit that failed.
    """

    losses: list[torch.Tensor]
    moved: dict[int, torch.Tensor]
    outputs: list[torch.Tensor]
    calls: dict[Unit, Call]
    layers: list[Any]
    failed: Unit | None = None
    plain: Plain = ()
    nest: Any = None


def seed_generators() -> None:
    """Seed the host's global generators equally for each trial. Call it inside `generators_kept`."""
    torch.default_generator.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002
    random.seed(1)


def unlike_rows(batch: Sequence[np.ndarray], structure: Structure, wanted: int) -> list[int]:
    """Up to `wanted` rows whose inputs differ pairwise, starting with row 0."""
    places = [i for i, name in enumerate(structure.names) if name.startswith("x")]
    found = [0]
    for row in range(1, len(batch[0])):
        if len(found) == wanted:
            break
        if all(any(not np.array_equal(batch[i][row], batch[i][other]) for i in places) for other in found):
            found.append(row)
    return found
