"""A snapshot of variables and slots, used to roll back a failed update."""

from __future__ import annotations

from collections.abc import Sequence

from fastdp.buffers import FlatBuffers
from fastdp.engine.replicas import Replica


class Rollback:
    """A snapshot of the first replica's variables and slots from before an update.

    Args:
        replica: the first replica.
        parts: every replica updates a part, and has a snapshot of its own.
        always: before each update, since a device that is lost in the middle leaves the others ahead of its part.

    An update without user code is trusted after it has succeeded once, and then needs no snapshot: that saves 280 MB
    for a ResNet50 with Adam. In host memory, where running out of memory is no concern, success on copies of a few
    numbers is enough.

    Attributes:
        succeeded: whether an update has succeeded, on all devices that make it.
    """

    def __init__(self, replica: Replica, *, parts: bool = False, always: bool = False) -> None:
        self._replica, self.parts, self._always = replica, parts, always
        self._by_rank: dict[int, tuple[int, list[FlatBuffers]]] = {}
        self._in_host_memory = not replica.device.on_gpu
        self._saved = [] if self._in_host_memory and replica.update_is_reliable else self._made()
        self.succeeded = False

    @property
    def nbytes(self) -> int:
        """Bytes of the snapshot."""
        parts = self._by_rank.get(self._replica.rank, (0, []))[1]
        return sum(saved.nbytes for saved in (*self._saved, *parts))

    def save(self, replica: Replica, generation: int) -> bool:
        """Take a snapshot of the current values if one is needed; whether it was. On the worker of the first device, or
        of one that updates its part.

        Args:
            replica: the first one, or one that updates its part.
            generation: the number of the update.

        Raises:
            Exception: an exception that the update itself would raise, before anything has changed.
        """
        trusted = replica.update_is_reliable and not self._always
        if trusted and (self.succeeded or (self._in_host_memory and replica.rehearse_update())):
            self._saved = []
            self._by_rank.pop(replica.rank, None)
            return False
        if self.parts:
            saved = self._by_rank.get(replica.rank, (0, []))[1] or _like(replica.own, replica)
            self._by_rank[replica.rank] = -1, saved
            _copy(saved, replica.own)
            self._by_rank[replica.rank] = generation, saved
            return True
        if not self._saved:  # the update was reliable before, and is no longer
            self._saved = self._made()
        _copy(self._saved, replica.lasting)
        return True

    def restore(self, replicas: Sequence[Replica], generation: int) -> None:
        """Copy the snapshot to all replicas, or its own to each that has begun this update. Only while nothing runs."""
        for replica in replicas:
            if not self.parts:
                _copy(replica.lasting, self._saved)
            elif self._by_rank.get(replica.rank, (-1, []))[0] == generation:
                _copy(replica.own, self._by_rank[replica.rank][1])

    def _made(self) -> list[FlatBuffers]:
        return [] if self.parts else _like(self._replica.lasting, self._replica)


def _like(flats: Sequence[FlatBuffers], replica: Replica) -> list[FlatBuffers]:
    return [FlatBuffers(flat.specs, replica.device, like=flat) for flat in flats]


def _copy(targets: Sequence[FlatBuffers], sources: Sequence[FlatBuffers]) -> None:
    for target, source in zip(targets, sources, strict=True):
        target.copy_from(source)
