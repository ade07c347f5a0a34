"""Judges how a module's outputs and buffers depend on rows, by trials on some rows, on others and on all of them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from torch import nn

from fastdp.comm.batch import Batch
from fastdp.program.torch.batch import Structure
from fastdp.program.torch.rows.decisions import Decisions, refused
from fastdp.program.torch.rows.draws import CannotSplitError, OtherDrawsError
from fastdp.program.torch.rows.findings import Findings
from fastdp.program.torch.rows.inputs import Change, Injected, OtherValues, TrialInputs, choices_of
from fastdp.program.torch.rows.judged import Candidates, Judged, is_exact
from fastdp.program.torch.rows.later import alike, look_later
from fastdp.program.torch.rows.outside import SharedState
from fastdp.program.torch.rows.refusals import failed
from fastdp.program.torch.rows.trial import Run, Trial
from fastdp.program.torch.rows.weights import usual_numbers
from fastdp.program.torch.shared_draws import DrawPlaces

# Errors that a module's own code may raise on rows that it was not made for.
FAILURES = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
_ALWAYS = 4  # trials
NOISE = 0.1
_MUCH_NOISE = 30.0


@dataclass(frozen=True, slots=True)
class Known:
    """What trials have found, and what they have left possible for the outputs that are means, by their numbers."""

    judged: Judged
    means: dict[int, Candidates]


class Judge:
    """Judges a module by trials on the rows of one batch.

    Args:
        module, batch, wanted: as in `Trial`.
        rows: the numbers of rows of a trial's parts.
        known: what trials of batches of other lengths have found. One trial is enough if it finds the same.
        believes: believe what the user has said about outputs; else it must agree with the trials.
        weighs: as in `Trial`.

    Three kinds of trials leave fewer and fewer possibilities: on several choices of rows as they are; on rows with
    other values, so that nothing agrees by accident, such as a mask of zeros; and, for means, with entries that may not
    count in some rows, such as ignored labels.

    Attributes:
        findings: what the trials leave possible.
    """

    def __init__(
        self,
        module: nn.Module,
        batch: Batch,
        rows: tuple[int, int],
        wanted: Sequence[int],
        *,
        known: Known | None = None,
        believes: bool = False,
        weighs: bool = False,
    ) -> None:
        self._module, self._batch, self._rows, self._wanted = module, batch, rows, wanted
        structure: Structure = batch.structure
        self._known, self._draws = known, DrawPlaces()
        self._weighs, self._tried = weighs, list[Trial]()
        self.findings = Findings(Trial(module, batch, ()).slots, structure, rows, believes=believes)

    def judged(self) -> Judged:
        """The judgement.

        Raises:
            ValueError: the trials cannot tell.
        """
        judged = self.findings.judged(self._draws)
        judged.weighs = self._weighs
        return judged

    @property
    def has_losses(self) -> bool:
        """Whether forward has called losses that can be weighed."""
        return any(trial.has_losses for trial in self._tried)

    def look(self) -> bool:
        """Run as many trials as are needed. False if the module does not run on all rows of one.

        Raises:
            ValueError: the module cannot be split by rows exactly.
        """
        choices = choices_of(self._batch.rows, sum(self._rows))
        shared = SharedState(self._module)
        with shared.undone():
            if self._known is None:
                self._check_shared(shared, choices)
            runs = self._look_at(choices)
        if self._known is not None and shared.undid:  # a table for greater lengths than those before
            with shared.undone():
                self._check_shared(shared, choices)
        return runs

    def _look_at(self, choices: Sequence[Sequence[int]]) -> bool:
        """Run trials on these choices of rows. Returns and raises as `look` does."""
        for number, chosen in enumerate(choices):
            if number >= (_ALWAYS if self._known is None else 1) and not self.findings.is_open():
                break
            if not self._look(chosen):
                return False
        if self.findings.is_open() and not self._look(choices[0], NOISE):
            return False
        if self._known is not None:
            self.findings.keep_means(self._known.means)
            return True
        for flags in (False, True):
            noise = 0.0 if flags else NOISE  # parameters may start as zeros: what they are multiplied by counts later
            if not self._look_again(choices[0], OtherValues(flags=flags), noise=noise):
                self._look_again(choices[0], OtherValues(flags=flags, exact=False), noise=noise)
        self._weigh(choices[-1])
        if self.findings.keeps:
            trial = self._trial(choices[0])
            look_later(trial, self.findings, self._rows, (*FAILURES, NotImplementedError))
        return True

    # Trials.

    def _trial(self, chosen: Sequence[int], **how: Any) -> Trial:
        """A trial on these rows. `how` as of `Trial`."""
        self._tried.append(Trial(self._module, self._batch, chosen, self._wanted, weighs=self._weighs, **how))
        return self._tried[-1]

    def _check_shared(self, shared: SharedState, choices: Sequence[Sequence[int]]) -> None:
        """Check that forward changes nothing that all copies share.

        Raises:
            CannotSplitError: it does.
        """
        total, first = sum(self._rows), self._rows[0]
        usual = self._trial(choices[0])
        mixed = self._trial(choices[-1], change=OtherValues(flags=False))

        def on_few() -> None:
            usual.run(0, first)

        def on_others() -> None:
            with suppress(NotImplementedError, *FAILURES):
                mixed.run(0, total)

        try:
            shared.check(lambda: usual.run(0, total), [on_few, on_others])
        except CannotSplitError:
            raise
        except (NotImplementedError, *FAILURES):
            return  # the trials that follow say why

    def _look(self, chosen: Sequence[int], noise: float = 0.0) -> bool:
        """Run one trial and keep what it leaves possible. False if the module does not run on all of its rows."""
        total, first = sum(self._rows), self._rows[0]
        trial = self._trial(chosen, noise=noise)
        try:
            whole, decisions = trial.run(0, total), [trial.decisions]
        except CannotSplitError:
            raise
        except NotImplementedError:
            return False
        except FAILURES as error:
            if list(chosen) != sorted(chosen):  # rows may have to be in descending order of lengths
                return self._look(sorted(chosen), noise)
            if self._runs():
                raise self._failed(error, trial) from error
            return False
        try:
            parts = []
            for start, stop in ((0, first), (first, total)):
                parts.append(trial.run(start, stop))
                decisions.append(trial.decisions)
            self._note_draws(trial)
        except (CannotSplitError, OtherDrawsError):
            raise
        except NotImplementedError:  # fastdp's own refusals, of which the step gives the right ones
            return False
        except FAILURES as error:
            raise self._failed(error, trial) from error
        self.findings.see(trial, parts, whole)
        self._check_decisions(trial, whole, decisions)
        return True

    def _check_decisions(self, trial: Trial, whole: Run, decisions: Sequence[Decisions]) -> None:
        """Check that no output depends on what forward decides by numbers of its rows. `decisions`: of all, of parts.

        Raises:
            CannotSplitError: one does.
        """
        for site in decisions[0].differing(decisions[1:]):
            try:
                run = trial.run(0, sum(self._rows), other=site)
            except (NotImplementedError, *FAILURES):
                continue  # such as an assertion
            if not alike(run, whole):
                raise refused(site)

    def _failed(self, error: BaseException, trial: Trial) -> ValueError:
        """The error for a module that does not run on the rows of a trial."""
        rows = self._batch.rows
        return failed(error, self._rows, rows, self._batch.structure.values, trial.held(rows))

    def _note_draws(self, trial: Trial) -> None:
        """Keep where the rows are in the draws of a trial.

        Raises:
            OtherDrawsError: they were elsewhere in another one.
        """
        for number, place in trial.draw_places.items():
            known = self._draws.setdefault(number, place)
            if known.site != place.site or not known.agrees_with(place):
                raise OtherDrawsError(
                    f"The module makes other random draws for some rows than for others: draw {number} differs between "
                    "rows of the batch. Draw for all rows and select afterwards, or use gpus=[0]."
                )

    def _look_again(self, chosen: Sequence[int], change: Change, *, noise: float = 0.0, on_host: bool = False) -> bool:
        """Run one trial on other values. False if the module does not run on them.

        Where only parts of the rows do not run, or have other shapes, a step on such rows would be an error too.
        """
        total, first = sum(self._rows), self._rows[0]
        trial = self._trial(chosen, noise=noise, change=change, on_host=on_host)
        try:
            whole = trial.run(0, total)
        except (*FAILURES, NotImplementedError):
            return False
        try:
            parts = [trial.run(0, first), trial.run(first, total)]
        except (*FAILURES, NotImplementedError):
            return True
        self.findings.see_again(trial, parts, whole)
        return True

    def _look_for(self, place: int, number: float | None, chosen: Sequence[int], first: int = 0) -> None:
        """Run one trial with a number in some entries of an array.

        A number that the array's own values do not suggest may mean nothing to the module, if it is not compared with
        it. What such a trial shows does not count if it leaves nothing possible.
        """
        array = TrialInputs(self._batch, list(chosen)).arrays[place]
        injected, before = Injected(place, number, first), self.findings.saved()
        usual = number is None or not is_exact(array) or min(0, int(array.min())) <= number <= int(array.max())
        try:
            self._look_again(chosen, injected, on_host=True)
        except ValueError:
            if usual or injected.is_met:
                raise
            self.findings.restore(before)

    def _weigh(self, chosen: Sequence[int]) -> None:
        """For means: run trials in which some entries may not count."""
        arrays = TrialInputs(self._batch, list(chosen)).arrays[: self._batch.structure.inputs]
        for place, array in enumerate(arrays):
            for number in usual_numbers(array, self.findings.compared):
                if not self.findings.has_means():
                    return
                self._look_for(place, number, chosen)
        for place, number in self.findings.left_out():
            self._look_for(place, number, chosen, self._rows[0])
        if self.findings.is_undecided():  # a loss that is nearly the same for all rows, as at the beginning
            changes: list[Change] = [Injected(place, number) for place, number in self.findings.left_out()]
            changes.append(OtherValues(flags=False))
            for rows, change in itertools.product((chosen, chosen[::-1]), changes):
                self._look_apart(rows, change)

    def _look_apart(self, chosen: Sequence[int], change: Change) -> None:
        """Run one trial with parameters that are far apart. It does not count if it leaves nothing possible."""
        before = self.findings.saved()
        try:
            self._look_again(chosen, change, noise=_MUCH_NOISE, on_host=True)
        except ValueError:
            self.findings.restore(before)

    def _runs(self) -> bool:
        """Whether the module runs on all rows of the batch."""
        rows = self._batch.rows
        try:
            self._trial(range(rows)).run(0, rows)
        except (*FAILURES, NotImplementedError):
            return False
        return True
