"""Gives an engine its time limit, its count of steps, and the comparison of its replicas."""

from __future__ import annotations

from collections.abc import Sequence

from fastdp.engine.across import Across
from fastdp.engine.replicas import Replica, ReplicaGroup
from fastdp.engine.state import EngineState


class Inspection:
    """What callers ask of an engine's state. The attributes are the engine's."""

    replicas: Sequence[Replica]
    group: ReplicaGroup
    _state: EngineState
    _across: Across | None

    @property
    def timeout(self) -> float:
        """Seconds before a step is given up."""
        return self._state.timeout

    @timeout.setter
    def timeout(self, seconds: float) -> None:
        self._state.timeout = seconds

    @property
    def steps(self) -> int:
        """The number of steps so far, including failed ones and steps without an update."""
        return self._state.steps

    def assert_replicas_equal(self) -> None:
        """Compare all replicas with the first, bit by bit.

        Raises:
            RuntimeError: a replica's variables or slots differ; the message names the device.
        """
        self.group.assert_equal(self.steps)
        if self._across is not None:
            self._across.check_equal(self.replicas[0].lasting)
