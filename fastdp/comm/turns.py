"""Lets the shards of a device run one after the other: a shard that waits for others lets the next one run."""

from __future__ import annotations

import threading
from collections.abc import Collection, Sequence

from fastdp.errors import DeviceTimeoutError
from fastdp.runtime.host.resources import CORES
from fastdp.runtime.queue import QueueDevice


class Turn:
    """One shard's turn on its device, of which several shards take turns. Used by the shard's worker alone.

    Args:
        places: counts the shards of the device that may run at the same time.
        timeout: seconds that the shard may wait for its turn.
        name: the device's name, for the message of a timeout.
    """

    def __init__(self, places: threading.Semaphore, timeout: float, name: str) -> None:
        self._places, self._timeout, self._name = places, timeout, name
        self._mine = False

    def take(self) -> None:
        """Wait for the turn.

        Raises:
            DeviceTimeoutError: it did not come in time.
        """
        if not self._places.acquire(timeout=min(self._timeout, threading.TIMEOUT_MAX)):
            raise DeviceTimeoutError(
                f"Another shard kept {self._name} busy for timeout={self._timeout} seconds: the shards of a device run "
                "one after the other."
            )
        self._mine = True

    def give(self) -> None:
        """Let another shard run. Does nothing between turns."""
        if self._mine:
            self._mine = False
            self._places.release()


def turns_of(devices: Sequence[QueueDevice], timeout: float, tight: Collection[QueueDevice] = ()) -> list[Turn | None]:
    """A turn for each shard of a step; None for shards that have their device to themselves.

    Virtual devices that have cores to spare run several of their shards at a time: as many as make all devices of the
    step busy on all cores. On GPUs, whose streams order the work, nobody takes turns.

    Args:
        devices: by shard.
        tight: devices that have run out of memory. Of each, also of a GPU, one shard runs at a time.
    """
    owners = [device.part_of for device in devices]
    if not any(owners) or (devices[0].on_gpu and not tight):
        return [None] * len(devices)
    distinct = dict.fromkeys(owner for owner in owners if owner is not None)
    usual = (
        len(devices)
        if devices[0].on_gpu
        else max(1, CORES // len({o or d for o, d in zip(owners, devices, strict=True)}))
    )
    most = {owner: 1 if owner in tight else usual for owner in distinct}
    places = {owner: threading.Semaphore(most[owner]) for owner in distinct if owners.count(owner) > most[owner]}
    return [
        Turn(places[owner], timeout, device.name) if owner is not None and owner in places else None
        for owner, device in zip(owners, devices, strict=True)
    ]
