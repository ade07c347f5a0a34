"""Makes the `Report` of an engine, and warns once of work that is too small for its devices."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

from fastdp.engine.replicas import Replica, ReplicaGroup
from fastdp.engine.report import ENOUGH_STEPS, CardReport, DeviceReport, Report
from fastdp.engine.rollback import Rollback
from fastdp.engine.timing import Timings
from fastdp.engine.updates import Updates
from fastdp.runtime.queue import QueueDevice
from fastdp.runtime.roster import Roster
from fastdp.warn import warn_user

try:
    import resource
except ImportError:  # not on Windows
    resource = None  # type: ignore[assignment]


class Reporting:
    """Gives an engine its `report()`. The attributes are the engine's."""

    devices: list[QueueDevice]
    replicas: Sequence[Replica]
    times: Timings
    rollback: Rollback
    group: ReplicaGroup
    update: str
    _roster: Roster
    _updates: Updates

    @property
    def skipped_steps(self) -> int:
        """How many steps changed nothing because of `on_nonfinite="skip"`."""
        return self._updates.skipped

    def report(self) -> Report:
        """How training steps run, where their time goes, and where the memory is. Prints as tables.

        Parallel models have a `report` of their own, which also tells of their calls and of their library's memory.
        """
        return make_report(self, self.group.program.steps_report)


def make_report(
    engine: Reporting | None,
    steps: list[dict[str, Any]],
    *,
    library_nbytes: Callable[[QueueDevice], int] = lambda device: 0,
    further_devices: Sequence[QueueDevice] = (),
    calls: Sequence[dict[str, Any]] = (),
    passes: Sequence[dict[str, Any]] = (),
    inputs: Sequence[dict[str, Any]] = (),
) -> Report:
    """Make the report of an engine with these entries about its steps. Without an engine it has only the entries.

    Args:
        calls, passes, inputs: these entries of the report.
        library_nbytes: gives the peak memory of the model's library on a device's card, without the engine's memory.
        further_devices: the devices of replicas that span several, other than the engine's.
    """
    if engine is None:
        return Report(steps, passes=list(passes), inputs=list(inputs))
    times, program = engine.times, engine.group.program
    cards = _cards([*engine.devices, *further_devices], library_nbytes)
    peaks = {card.name: card.peak_nbytes for card in cards}
    devices = []
    for rank, replica in enumerate(engine.replicas):
        found = times.device(rank)
        memory = replica.memory
        device = replica.device
        nbytes = {
            "variables": memory.variables.nbytes,
            "slots": sum(flat.nbytes for flat in (memory.slots, memory.parts) if flat is not None)
            + program.slots_nbytes(rank),
            "gradients": memory.gradients.nbytes,
            "spare": engine.rollback.nbytes if rank == 0 else 0,
        }
        devices.append(DeviceReport(device.name, found.rows, found.seconds, nbytes, peaks.get(device.space)))
    return Report(
        steps,
        devices,
        trained=times.steps,
        timed=times.timed,
        step_seconds=times.step,
        between_seconds=times.between,
        overhead_seconds=times.overhead,
        optimizer=program.update_how,
        update="parts" if program.divides_update else engine.update,
        cards=cards,
        peak_nbytes=_peak_nbytes(),
        buckets=len(engine.group.buckets),
        early_buckets=times.early,
        calls=list(calls),
        passes=list(passes),
        inputs=list(inputs),
        faults=list(engine._roster.told),
    )


def _cards(devices: Sequence[QueueDevice], library_nbytes: Callable[[QueueDevice], int]) -> list[CardReport]:
    """The GPUs of these devices, in their order."""
    by_card: dict[str, list[Any]] = {}
    for device in devices:
        if device.on_gpu:
            by_card.setdefault(device.space, []).append(device)
    cards = []
    for name, there in by_card.items():
        engine, library = there[0].peak_nbytes, library_nbytes(there[0])
        cards.append(CardReport(name, [device.name for device in there], engine, library, engine + library))
    return cards


class SmallWorkWarning:
    """Warns once that a model's work is too small for its devices."""

    def __init__(self) -> None:
        self._said = False

    def check(self, engine: Reporting | None) -> None:
        """Warn if this engine's work is known to be too small, unless already done."""
        if self._said or engine is None or len(engine.devices) < 2 or engine.times.timed < ENOUGH_STEPS:
            return
        message = make_report(engine, []).too_small
        if message:
            self._said = True
            warn_user(message)


def _peak_nbytes() -> int | None:
    """The largest resident size that this process has had."""
    if resource is None:
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * unit
