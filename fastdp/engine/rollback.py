"""A snapshot of variables and slots, used to roll back a failed update."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastdp.buffers import FlatBuffers
from fastdp.engine.replicas import Replica


class Rollback:
    """The first replica's variables and slots as they were before an update.

    Args:
        replica: the first one.

    An update that runs none of the user's code is relied on once it has succeeded, and saves the copy: for a ResNet50
    with Adam 280 MB. In host memory, where room is no question, succeeding on copies of a few numbers is enough.

    Attributes:
        succeeded: whether an update has.
    """

    def __init__(self, replica: Replica) -> None:
        self._replica = replica
        device: Any = replica.device
        self._in_host_memory = not device.on_gpu
        self._saved = [] if self._in_host_memory and replica.update_is_reliable else self._made()
        self.succeeded = False

    @property
    def nbytes(self) -> int:
        """Bytes of the copy."""
        return sum(saved.nbytes for saved in self._saved)

    def save(self) -> bool:
        """Keep the values as they are now, if that is needed; whether they are kept. On the first device's worker.

        Raises:
            Exception: what the update itself would raise, before it has changed anything.
        """
        replica = self._replica
        if replica.update_is_reliable and (self.succeeded or (self._in_host_memory and replica.rehearse_update())):
            self._saved = []
            return False
        if not self._saved:  # the program has changed its mind
            self._saved = self._made()
        for saved, flat in zip(self._saved, self._replica.lasting, strict=True):
            saved.copy_from(flat)
        return True

    def restore(self, replicas: Sequence[Replica]) -> None:
        """Give all replicas the values that were kept. When nothing runs."""
        for replica in replicas:
            for saved, flat in zip(self._saved, replica.lasting, strict=True):
                flat.copy_from(saved)

    def _made(self) -> list[FlatBuffers]:
        device: Any = self._replica.device
        return [FlatBuffers(flat.specs, device) for flat in self._replica.lasting]
