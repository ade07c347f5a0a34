"""Decides how to run a model in which rows meet: the argument `rows=` of `fastdp.wrap`.

The model is tried on some rows. If its outputs, `add_loss` terms and assigned variables can be combined from the
replicas' shards, nothing needs to be done. Otherwise the trial searches for the units in which rows meet
(`fastdp.program.keras.rows.mixing`) and runs them on merged inputs. If no such unit can be isolated, the whole model
runs on one device.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import keras
import numpy as np
import torch
from torch.utils.hooks import RemovableHandle

from fastdp.errors import NotCapturable
from fastdp.program.keras.batch import Structure
from fastdp.program.keras.patches import replica_aware
from fastdp.program.keras.replica import running
from fastdp.program.keras.rows.at_size import MOST_SIZES, differs_at_size, model_at_size
from fastdp.program.keras.rows.backward import BackwardTrial
from fastdp.program.keras.rows.known_layers import KnownLayers, hooks_of, why_overwritten
from fastdp.program.keras.rows.mixing import Tried, capital, said_of, title
from fastdp.program.keras.rows.probe import Effects, generators_kept, unlike_rows
from fastdp.program.keras.rows.trials import FAILURES, Verdict
from fastdp.program.keras.rows.units import Merged, Plan, Unit
from fastdp.shard import Rows
from fastdp.tensors.row_effects import Effect, Layout, NotByRowsError, UndecidedError
from fastdp.warn import warn_user

_MOST_TRIALS = 4
_REMEDIES = (
    'Pass rows="merge" to fastdp.wrap: it then runs on the whole batch on each device, which is exact. Or pass '
    'rows="replica": each device uses only its own rows, as in Keras 2, and results differ from one device. Or use '
    "gpus=[0]."
)

_OF_WRITES = (
    "Return the value from call(), or keep it in a variable (self.add_weight(..., trainable=False)), or use gpus=[0]."
)


@dataclass(slots=True)
class Policy:
    """What to do about rows that meet.

    Args:
        rows: None, "merge" or "replica"; see `fastdp.wrap`.
        falls_back: the caller falls back to plain Keras, so the model is never run on one device here.
        said: warnings already given for the model.
    """

    rows: str | None = None
    falls_back: bool = False
    said: set[str] = field(default_factory=set)

    def say(self, message: str) -> None:
        """Warn, once."""
        if message not in self.said:
            self.said.add(message)
            warn_user(message)


class ModelEffects(Effects):
    """What is known about a whole model, and how to run it.

    Args:
        arguments: those of `Effects`.
        training: whether this is for training steps or for forward-only steps.
        policy: what to do about rows that meet.

    Attributes:
        layouts: how the model's outputs depend on the rows; None while unknown.
        alone: whether the model runs on one device, with all rows.
        is_known: whether the model is made of known layers, and needs no trial.
    """

    def __init__(self, *arguments: Any, training: bool, policy: Policy) -> None:
        super().__init__(*arguments)
        self.training, self._policy = training, policy
        self._plans: dict[Unit, Plan] = {}
        self._calls: dict[int, int] = {}
        self._trials = self._rows_tried = 0
        self._sizes: set[int] = set()
        self._unlike = True
        self._looked, self._hooks = -1, list[int]()
        self.is_known, self._known_layers = False, KnownLayers(self._model)
        self.layouts, self.alone = None, False
        self.asked_of_every_row = False

    def units(self) -> Merged | None:
        """A runner for the units planned on merged inputs, for one forward pass of a replica; None without plans."""
        return Merged(self._plans, self._calls) if self._plans else None

    def of_variable(self, index: int, variable: keras.Variable) -> Effect:
        """How an assigned variable's value depends on the rows; UNDECIDED if the trial did not see it move."""
        effect = super().of_variable(index, variable)
        seen = index in self._assigned or id(variable) in self.seeds or id(variable) in self._metric_ids
        if seen or not self._trials:
            return effect
        return Effect.MEAN if self._policy.rows == "replica" else Effect.UNDECIDED

    def check_count(self, count: int) -> None:
        """Check that there are as many `add_loss` terms as in the trial.

        Raises:
            UndecidedError: there are more or less.
            NotCapturable: called while tracing, after which nobody would ask again.
        """
        known = len(self._losses) if self._losses is not None else count
        if known == count or self._policy.rows == "replica" or self.asked_of_every_row:
            return
        state = running()
        if state is not None and state.draws is not None:
            raise NotCapturable("another number of add_loss() terms than when the model was tried")
        raise UndecidedError(f"The model has called add_loss() {count} times, and {known} times when fastdp tried it.")

    def check_undecided(self, known: Sequence[Effect], values: Sequence[torch.Tensor]) -> None:
        """Check that losses which were zero in the trial are still zero.

        Raises:
            UndecidedError: a loss is no longer zero.
            NotCapturable: called while tracing, where values cannot be read.
        """
        state = running()
        if state is not None and state.draws is not None:
            raise NotCapturable("an add_loss() term that was zero when the model was tried")
        if self.asked_of_every_row:
            return
        for effect, value in zip(known, values, strict=True):
            if effect is Effect.UNDECIDED and bool(value != 0):
                raise UndecidedError("An add_loss() term was zero for the rows that fastdp tried, but is not zero now.")

    # Trials.

    def asks_of(self, count: int, *, every_row: bool = False) -> bool:
        """Whether `inspect` would try the model on a batch of `count` rows."""
        self._note_hooks()
        if self.is_known and not self._known_layers:
            self.forget()
        if self._losses is None and self._known_layers:
            self._losses, self._rows_tried, self.is_known = [], 3, True
        open_question = self._losses is None or self._rows_tried < min(3, count) or not self._unlike
        return count >= 2 and not self.alone and (every_row or (open_question and self._trials < _MOST_TRIALS))

    def _note_hooks(self) -> None:
        """Forget what trials have found if layers have other hooks than then."""
        if RemovableHandle.next_id != self._looked:
            self._looked, hooks = RemovableHandle.next_id, hooks_of(self._model)
            if hooks and hooks != self._hooks:
                self._known_layers = KnownLayers(self._model)
                self.forget()
            self._hooks = hooks

    def forget(self) -> None:
        """Forget what trials have found: something that the model's code reads has changed."""
        if not self.alone:
            self._losses, self.layouts, self.is_known = None, None, False
            self._trials, self._rows_tried, self._sizes = 0, 0, set()
            self._plans, self._calls, self._assigned = {}, {}, {}

    def asks_of_size(self, count: int) -> bool:
        """Whether `check_at_size` would run the model on a batch of `count` rows."""
        known = not self._trials or self.alone or self._plans or self._policy.rows == "replica"
        return not known and count > 3 and count not in self._sizes and len(self._sizes) < MOST_SIZES

    def check_at_size(self, batch: Sequence[np.ndarray], structure: Structure, parts: Sequence[Rows]) -> None:
        """Check, for each number of rows that is new, that devices together give what the model gives for all rows.

        Args:
            batch, structure: all rows.
            parts: the rows of each device.

        Raises:
            NotByRowsError: they do not, and the model cannot run on one device under this policy.
        """
        count = len(batch[0])
        if not self.asks_of_size(count):
            return
        with replica_aware(), generators_kept(), self._noting_writes():
            differs = differs_at_size(model_at_size(self, batch, structure), self.layouts, parts)
        if differs:
            why = (
                f"The model {self._model.name!r} gives something else for {count} rows of a batch than for the rows of "
                "each device, though not for three rows: something in it depends on how many rows there are."
            )
            self._cannot_try(NotByRowsError(f"{why} {_REMEDIES}"), why)
        self._sizes.add(count)  # not after an error: another step would run

    def inspect(self, batch: Sequence[np.ndarray], structure: Structure, *, every_row: bool = False) -> None:
        """Determine, once, how outputs, `add_loss` terms and assigned variables depend on the rows.

        Runs the model on three rows of the batch, on one of them, and on the other two, without changing anything. If
        there are fewer rows, or all are equal, the next steps try again; `every_row` tries now, on all rows. A model
        made of known layers (`fastdp.program.keras.rows.known_layers`) needs no trial.

        Raises:
            NotByRowsError: something can be neither combined from the replicas' shards nor merged under this policy.
        """
        if not self.asks_of(len(batch[0]), every_row=every_row):
            return
        self.asked_of_every_row |= every_row
        with replica_aware(), generators_kept(), self._noting_writes():
            tried = self._tried(batch, structure, every_row)
            if tried is not None:
                self._decide(tried)

    def _tried(self, batch: Sequence[np.ndarray], structure: Structure, every_row: bool) -> Tried | None:
        """Run the model on some rows. Returns None if that fails and the failure has been handled."""
        refused = why_overwritten(self._variables) if self.training else None
        if refused is not None:
            self._cannot_try(NotByRowsError(refused), refused)
            return None
        count = len(batch[0])
        every = list(range(count))
        unlike = unlike_rows(batch, structure, 3)
        some = [*unlike, *(row for row in every if row not in unlike)][: min(count, 3)]
        halves = [(every, (count + 1) // 2)]
        failed: Exception | None = None
        for chosen, cut in halves if every_row else [(some, 1), *halves]:
            arrays = [np.asarray(array[chosen]) for array in batch]
            try:
                tried = self._tried_once(arrays, structure, cut)
            except NotByRowsError as error:  # its message gives the reason
                self._cannot_try(error, str(error))
                return None
            except FAILURES as error:
                failed = failed or error
                continue
            self._trials += 1
            self._rows_tried, self._unlike = max(self._rows_tried, len(chosen)), len(unlike) > 1
            return tried
        assert failed is not None
        # If the model fails on the whole batch too, plain Keras raises the same error.
        self._try_rows([np.asarray(array[every]) for array in batch], structure, 0, count)
        said = str(failed).strip().splitlines()
        self._cannot_try(
            failed,
            f"The model {self._model.name!r} runs on the whole batch but fails on a part of it, so the batch cannot "
            f"be split between devices ({type(failed).__name__}: {said[0] if said else ''}).",
        )
        return None

    def _tried_once(self, arrays: list[np.ndarray], structure: Structure, cut: int) -> Tried:
        """Run the model on some rows and on two parts of them.

        Raises:
            NotByRowsError: a layer writes something else to an attribute in each of these passes.
        """
        assert self._writes is not None
        self._writes.begin()
        tried = Tried(self, arrays, structure, cut)
        if not self._writes.wrote:
            return tried
        found = self._writes.found()
        why = "each time another value. All devices would write it at the same time, each the value of its rows"
        if found is None:
            found = tried.moved_on_by(self._writes)
            why = "after which the next pass of the same rows is another. A device would begin before or after another"
        if found is not None:
            raise NotByRowsError(f"{capital(said_of(found, self._model))} in its forward pass, {why}. {_OF_WRITES}")
        return tried

    def _cannot_try(self, failed: Exception, why: str) -> None:
        """Handle a model that cannot run on a part of the batch.

        Raises:
            NotByRowsError: `rows` is None, or the model cannot run on any device's shard.
        """
        if self._policy.rows == "merge":
            self._run_alone(why)
        elif isinstance(failed, NotByRowsError):
            raise failed
        elif self._policy.rows is None:
            raise NotByRowsError(f"{why} {_REMEDIES}") from failed
        else:
            self._losses, self._trials = [], _MOST_TRIALS
            self._policy.say(f'fastdp: {why} Each device still gets only its own rows, because of rows="replica".')

    # Decisions.

    def _decide(self, tried: Tried) -> None:
        """Apply the policy to the results of the trials.

        Raises:
            NotByRowsError: `rows` is None, but the user may want each device to use only its own rows.
        """
        verdict = tried.verdict({})
        if verdict.is_well:
            self._keep(verdict, tried, {})
            self._check_backward(tried, verdict, {})
            return
        repeats = tried.is_repeatable()
        plans, culprits, merged = tried.merged(verdict) if repeats else ({}, [], None)
        story = tried.story(verdict, culprits)
        if not repeats:
            story = (
                f"{capital(title(self._model))} returns different numbers for the same rows: it draws at random "
                "outside of keras.random, which devices cannot share."
            )
        if self._policy.rows == "replica":
            self._let_replicas(verdict, tried, story)
            return
        grown = next(
            (i for i in verdict.outputs if not verdict.layouts[i].stacks and tried.whole.outputs[i].ndim), None
        )
        if self._policy.rows is None and grown is None and not (verdict.is_affine and merged is not None):
            raise NotByRowsError(f"{story} {_REMEDIES}")
        if merged is None:
            self._run_alone(story if grown is None else f"{story} {tried.shapes(grown)}")
            return
        self._keep(merged, tried, plans)
        self._check_backward(tried, merged, plans)
        if self._policy.rows is None and grown is not None:
            names = ", ".join(dict.fromkeys(title(call.operation) for call in culprits))
            self._policy.say(
                f"fastdp: {tried.shapes(grown)} So {names} runs on the whole batch on each device, which gives the "
                'results of one device. Pass rows="merge" to fastdp.wrap to do so without this warning.'
            )

    def _check_backward(self, tried: Tried, verdict: Verdict, plans: dict[Unit, Plan]) -> None:
        """Check that the gradients of some rows and of others add up to those of all rows.

        Raises:
            NotByRowsError: they do not, and the model cannot run on one device under this policy.
        """
        if not self.training or self._policy.rows == "replica":
            return
        layouts = [*verdict.layouts, *map(Layout, verdict.losses)]
        run = partial(self.differentiable, tried.arrays, tried.structure)
        try:
            differs = BackwardTrial(run, layouts, tried.rows[0], tried.total, together=bool(plans)).differs()
        except FAILURES:
            return
        if differs:
            why = (
                f"In the backward pass of the model {self._model.name!r} something combines the rows of the batch, as "
                "g / ops.norm(g) or g - ops.mean(g, 0) do: a hook (register_hook), or the backward of an "
                "autograd.Function or of keras.ops.custom_gradient. The gradients of some rows and of others do not "
                "add up to those of all rows, and each device has only its own rows."
            )
            remedy = "Let it treat each row by itself, or change the gradients of the weights in the optimizer."
            self._cannot_try(NotByRowsError(f"{why} {remedy} {_REMEDIES}"), why)

    def _keep(self, verdict: Verdict, tried: Tried, plans: dict[Unit, Plan]) -> None:
        """Store the verdict and the plans for the following steps."""
        counts = Counter(unit[0] for unit in tried.whole.calls)
        self._plans, self._calls = plans, {unit[0]: counts[unit[0]] for unit in plans}
        self.layouts = verdict.layouts or None
        self._losses = verdict.losses
        self._assigned |= verdict.moves

    def _let_replicas(self, verdict: Verdict, tried: Tried, story: str) -> None:
        """Let each replica use only its own rows, as `rows="replica"` requests.

        Raises:
            NotByRowsError: the outputs cannot be combined at all.
        """
        for i in verdict.outputs:
            layout, has_axes = verdict.layouts[i], tried.whole.outputs[i].ndim > 0
            if has_axes and not layout.stacks:
                raise NotByRowsError(f'{tried.shapes(i)} {story} Leave out rows="replica", or use gpus=[0].')
            by_rows = Layout(Effect.ROWS, layout.axis, layout.per_row, True)
            verdict.layouts[i] = by_rows if has_axes else Layout(Effect.MEAN)
        for i in verdict.terms:
            verdict.losses[i] = Effect.MEAN
        for i in verdict.variables:
            verdict.moves[i] = Effect.MEAN
        self._keep(verdict, tried, {})
        self._policy.say(
            f'fastdp: {story} Because of rows="replica", each device uses only its own rows, so results differ from '
            "one device."
        )

    def _run_alone(self, why: str) -> None:
        """Run the model on one device from now on.

        Raises:
            NotByRowsError: the caller falls back to plain Keras instead.
        """
        if self._policy.falls_back:
            raise NotByRowsError(why)
        self._plans, self._calls, self.layouts, self._losses, self.alone = {}, {}, None, [], True
        self._policy.say(f"fastdp: the model {self._model.name!r} runs on one device, with all rows. {why}")
