"""Lets a step be repeated after a device has run out of memory or was lost: in parts, or on the other devices."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeVar

from fastdp.comm.processes import several
from fastdp.engine.recovery import Recovery
from fastdp.engine.state import EngineState
from fastdp.engine.step_scope import between_steps
from fastdp.errors import CannotSplitError, DeviceLostError, DeviceTimeoutError, GraphsLostError, ReplicaError
from fastdp.options import Options
from fastdp.runtime.device_faults import is_lost, is_out_of_memory, is_sticky
from fastdp.runtime.queue import QueueDevice
from fastdp.runtime.roster import Formation, Roster
from fastdp.runtime.shards import MOST_ON_GPUS
from fastdp.shard import Deal
from fastdp.warn import warn_user

T = TypeVar("T")

# Seconds that devices may take to end a step that was given up, before they count as stalled.
STALL_SECONDS = 10.0
_BY_ROWS = ("run", "merge")  # verbs whose memory depends on how many rows run at a time
_WHOLE = 'The rows cannot run in parts (on_oom="split"): '
_NO_GRAPHS = (
    "The graphs of the forward pass are lost, or replicas have been made anew since: run the forward pass of this "
    "batch again. Nothing has changed."
)
_RESTART = (
    "CUDA cannot be used any more in this process. `fastdp run --restarts N` starts the script again from its "
    "checkpoint, on the GPUs that are there."
)


class Survival:
    """Gives an engine `surviving`. The attributes are the engine's."""

    devices: list[QueueDevice]
    formation: Formation
    formed: int
    _roster: Roster
    _options: Options
    _state: EngineState
    _recovery: Recovery
    _survivor: int | None = None
    _cuts_before: dict[QueueDevice | int, int] | None = None  # before cuts that no forward pass has tried yet
    _never: str = ""  # why rows do not run in parts, as such a pass has found
    _version: int

    def _form(self) -> None:
        """Make the replicas on the roster's present devices."""
        raise NotImplementedError

    @property
    def deal(self) -> Deal:
        """How the rows of a batch are dealt to the replicas."""
        return self.formation.deal

    @property
    def lost_devices(self) -> dict[str, str]:
        """The names of the devices that are lost, and why."""
        return {device.name: why for device, why in self._roster.lost.items()}

    def rejoin_devices(self) -> list[str]:
        """Take back devices that were lost and answer again. Called between steps. Returns their names.

        The next step runs on them too. A replica there gets weights and optimizer from the first one.
        """
        return self._roster.rejoin()

    def surviving(self, work: Callable[[], T]) -> T:
        """Run `work()`, which begins a step of this engine, and repeat it as `on_oom` and `on_device_loss` say.

        A step that fails leaves everything as before it, so it can be repeated with the rows of a device in parts, or
        without a device. `work` must prepare what depends on the number of replicas, which may change in between.

        Raises:
            Exception: what `work` raises and cannot be survived, with the reason.
        """
        if not self._options.survives or self._survivor == threading.get_ident():
            return work()
        self._survivor = threading.get_ident()
        try:
            return _Tries(self).run(work)
        finally:
            self._survivor = None

    def through_graphs(self, formed: int, work: Callable[[], T], whole: str = "") -> T:
        """Run `work()`, a backward pass through graphs that the replicas keep, which only its caller can repeat.

        Args:
            formed: the engine's `formed` at the forward pass.
            whole: why the rows of a device cannot run in parts; empty if they can.

        Raises:
            ReplicaError: a device failed. `rows_cut` if its rows run in more parts from now on.
            GraphsLostError: the graphs are those of replicas that are no more, or a device was lost now.
        """
        if not self._options.survives:
            return work()
        if formed != self.formed or any(device.lost for device in self._roster.present):
            raise GraphsLostError(_NO_GRAPHS)
        before, self._survivor = self._survivor, threading.get_ident()
        try:
            return work()
        except ReplicaError as error:
            if is_out_of_memory(error) and self._options.on_oom == "split":
                raise self._cut_later(error, whole) from error.__cause__
            if not is_lost(error) or self._options.on_device_loss == "raise":
                raise
            _, owner = self.owner_of(error.device)
            if owner.on_gpu or several():
                raise
            self.lose(owner, _words(error))
            raise GraphsLostError(f"{error} {_NO_GRAPHS}") from error
        finally:
            self._survivor = before

    def why_whole(self, error: ReplicaError) -> str:
        """Why the rows of a device that has no memory left cannot run in more parts; empty if they can."""
        if several():
            return "several processes deal rows in one way"
        if self.devices[0].on_gpu and 2 * len(self.devices) > MOST_ON_GPUS:
            return f"all-reduces on GPUs add up at most {MOST_ON_GPUS} replicas"
        if error.verb not in _BY_ROWS:
            return f"the memory that `{error.verb}` needs does not depend on how many rows run at a time"
        if error.rows is None or error.rows[1] - error.rows[0] == 1:
            return "one row alone needs more memory than the device has"
        return ""

    def _cut_later(self, error: ReplicaError, whole: str) -> ReplicaError:
        """Cut the rows of a device that has no memory left in a backward pass, if possible. Returns the error."""
        why = whole or self._never or self.why_whole(error)
        if why:
            return _with(error, f"{_WHOLE}{why}")
        self._cuts_before = dict(self._roster.cuts) if self._cuts_before is None else self._cuts_before
        name, parts = self._roster.cut(self.owner_of(error.device)[0])
        error.rows_cut = True
        words = f"rows run in {parts} parts from the next forward pass on"
        self._tell(f"{name} ran out of memory in a backward pass. Its {words}, one after the other.")
        return _with(error, f"Its {words}.")

    def tried_cuts(self, why_not: str = "") -> bool:
        """Keep cuts that a backward pass has made, or take them back since the rows cannot run so. Whether it does."""
        before, self._cuts_before = self._cuts_before, None
        if before is None or not why_not:
            return False
        self._never = why_not
        self._roster.set_cuts(before)
        return True

    def keep_up(self) -> None:
        """Make the replicas anew if devices are lost or back, or rows are cut in another way. Between steps.

        Raises:
            DeviceLostError: no device is left, or one is lost and that is to be an error.
        """
        for device in [one for one in self._roster.present if one.lost]:
            if self._options.on_device_loss == "raise":
                raise device._closed_error()
            self.lose(device, device.lost)
        if self._version != self._roster.version:
            # Not alone: a step of others that hangs would keep this model from leaving a device of its own.
            with between_steps([*self.devices, *self._roster.formation().devices], self._state.timeout):
                self._form()

    def lose(self, device: QueueDevice, why: str, *, stalled: bool = False) -> None:
        """Take a device out, and tell so.

        Raises:
            DeviceLostError: it is the last one.
        """
        if len(self._roster.present) == 1:
            raise DeviceLostError(f"{device.name} was lost ({why}), and no other device is left to take its rows.")
        self._roster.lose(device, why, waits=not stalled)
        names = [one.name for one in self._roster.present]
        self._tell(f"{device.name} was lost ({why}). Its rows run on {names} from now on.")

    def owner_of(self, name: str) -> tuple[int, QueueDevice]:
        """The place of the replica on the device of this name, and the device that it is a part of."""
        place = next(place for place, device in enumerate(self.devices) if device.name == name)
        return place, self.devices[place].part_of or self.devices[place]

    def stalled(self) -> list[QueueDevice]:
        """The devices of their own that do not end a step that was given up, in a few seconds."""
        seconds = min(STALL_SECONDS, self._state.timeout)
        hanging = []
        for device in self.devices:
            try:
                device.synchronize(seconds)
            except DeviceTimeoutError:
                hanging.append(device)
        working = [device for device in hanging if device.runs] or hanging
        return list(dict.fromkeys(device.part_of or device for device in working))

    def settle_without(self, stalled: list[QueueDevice]) -> None:
        """Clean up after a step that was given up, without waiting for these devices."""
        self._recovery.without = frozenset(stalled)
        for device in stalled:
            device.drop_work(DeviceLostError(f"{device.name} hangs."))
        self._recovery.settle()

    def _tell(self, what: str) -> None:
        """Note what has happened for the report, and warn of it."""
        self._roster.told.append(what)
        warn_user(f"fastdp: {what}")


class _Tries:
    """The tries of one step.

    Args:
        engine: its engine.
    """

    def __init__(self, engine: Survival) -> None:
        self._engine, self._roster, self._options = engine, engine._roster, engine._options
        self._before = dict(self._roster.cuts)
        self._short: ReplicaError | None = None  # the first error for lack of memory
        self._cut = ("", 0)

    def run(self, work: Callable[[], T]) -> T:
        """Run the step until it is done, or cannot be survived."""
        while True:
            self._engine.keep_up()
            try:
                result = work()
            except (ReplicaError, DeviceTimeoutError) as error:
                self._survive(error)
            except (ValueError, TypeError, NotImplementedError, RuntimeError) as error:
                if self._short is None:
                    raise
                self._whole_again(str(error), error)
            else:
                self._done()
                return result

    def _survive(self, error: ReplicaError | DeviceTimeoutError) -> None:
        """Change what keeps the step from being done. Raises the error if nothing can be changed."""
        if isinstance(error, DeviceTimeoutError):
            self._without_stalled(error)
        elif is_out_of_memory(error) and self._options.on_oom == "split":
            self._split(error)
        elif isinstance(error.__cause__, CannotSplitError) and self._short is not None:
            self._whole_again(str(error.__cause__), error)
        elif isinstance(error.__cause__, CannotSplitError) and self._engine.tried_cuts(str(error.__cause__)):
            return
        elif is_lost(error) and self._options.on_device_loss != "raise":
            _, owner = self._engine.owner_of(error.device)
            if owner.on_gpu or several():
                raise _with(error, _RESTART if owner.on_gpu else "Processes of one training go on together.")
            self._engine.lose(owner, _words(error))
        elif is_sticky(error) and self._engine.owner_of(error.device)[1].on_gpu:
            raise _with(error, _RESTART)
        else:
            raise error

    def _split(self, error: ReplicaError) -> None:
        """Let the rows of the device that has no memory left run in twice as many parts."""
        why = self._engine.why_whole(error)
        if why:
            self._whole_again(why, error)
        self._short = self._short or error
        place, _ = self._engine.owner_of(error.device)
        self._cut = self._roster.cut(place)

    def _whole_again(self, why: str, error: BaseException) -> None:
        """Undo the cuts of this step, and raise the first error with the reason."""
        first = self._short or error
        if self._short is not None:
            self._roster.set_cuts(self._before)
            self._engine.keep_up()
        assert isinstance(first, ReplicaError)
        raised = _with(first, f"{_WHOLE}{why}")
        if raised is error:
            raise raised
        raise raised from error

    def _without_stalled(self, error: DeviceTimeoutError) -> None:
        """Go on without the devices that hang, if the option says so."""
        if self._options.on_device_loss != "continue_stalled" or self._engine.devices[0].on_gpu:
            raise error
        stalled = self._engine.stalled()
        home = self._engine.devices[0].part_of or self._engine.devices[0]
        if not stalled or home in stalled:
            if stalled:
                error.args = (f"{error.args[0]}\n{home.name} hangs, and the model's weights are its memory.",)
            raise error
        self._engine.settle_without(stalled)
        for device in stalled:
            self._engine.lose(
                device, f"it was not done within timeout={self._engine._state.timeout} seconds", stalled=True
            )

    def _done(self) -> None:
        """Tell of the parts in which rows run from now on."""
        self._engine.tried_cuts()
        if self._short is None:
            return
        name, parts = self._cut
        start, stop = self._short.rows or (0, 0)
        bits = ""
        if self._options.shards is not None:
            bits = (
                " The sum over the parts of a shard is rounded in another way than that of the whole shard: from this "
                "step on the bits are those of a run whose shard was split at the same step."
            )
        self._engine._tell(
            f"{name} ran out of memory on {stop - start} rows. Its rows run in {parts} parts from now on, one after "
            f"the other.{bits}"
        )


def _words(error: ReplicaError) -> str:
    """The cause of a loss in one sentence."""
    cause: Any = error.__cause__
    return str(cause).strip().rstrip(".")


def _with(error: ReplicaError, what: str) -> ReplicaError:
    """The error with a further sentence."""
    error.args = (f"{error.args[0]} {what}", *error.args[1:])
    return error
