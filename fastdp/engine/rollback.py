"""A snapshot of variables and slots, used to roll back a failed update."""

from __future__ import annotations

from collections.abc import Sequence

from fastdp.buffers import FlatBuffers
from fastdp.engine.replicas import Replica


class Rollback:
    """A snapshot of the first replica's variables and slots from before an update.

    Args:
        replica: the first replica.

    An update without user code is trusted after it has succeeded once, and then needs no snapshot: that saves 280 MB
    for a ResNet50 with Adam. In host memory, where running out of memory is no concern, success on copies of a few
    numbers is enough.

    Attributes:
        succeeded: whether an update has succeeded.
    """

    def __init__(self, replica: Replica) -> None:
        self._replica = replica
        self._in_host_memory = not replica.device.on_gpu
        self._saved = [] if self._in_host_memory and replica.update_is_reliable else self._made()
        self.succeeded = False

    @property
    def nbytes(self) -> int:
        """Bytes of the snapshot."""
        return sum(saved.nbytes for saved in self._saved)

    def save(self) -> bool:
        """Take a snapshot of the current values if one is needed; whether it was. On the first device's worker.

        Raises:
            Exception: an exception that the update itself would raise, before anything has changed.
        """
        replica = self._replica
        if replica.update_is_reliable and (self.succeeded or (self._in_host_memory and replica.rehearse_update())):
            self._saved = []
            return False
        if not self._saved:  # the update was reliable before, and is no longer
            self._saved = self._made()
        for saved, flat in zip(self._saved, self._replica.lasting, strict=True):
            saved.copy_from(flat)
        return True

    def restore(self, replicas: Sequence[Replica]) -> None:
        """Copy the snapshot to all replicas. Only while nothing runs."""
        for replica in replicas:
            for saved, flat in zip(self._saved, replica.lasting, strict=True):
                flat.copy_from(saved)

    def _made(self) -> list[FlatBuffers]:
        return [FlatBuffers(flat.specs, self._replica.device, like=flat) for flat in self._replica.lasting]
