"""Which devices a model runs on at present: some may be lost, and the rows of some run in parts to save memory."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace

from fastdp.errors import DeviceTimeoutError
from fastdp.options import Options
from fastdp.runtime.queue import QueueDevice
from fastdp.runtime.select import present_device
from fastdp.runtime.shards import on_shards, part_of_device
from fastdp.shard import Deal

MOST_TOLD = 1000  # a device may come and go for weeks

_CLOSE_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Formation:
    """The devices of a model's replicas, in the order of the rows.

    Attributes:
        devices: one for each replica: devices of their own, or parts of some.
        merge: the one that merges outputs.
        deal: how the rows of a batch are dealt to them.
        tight: devices of their own whose rows run in parts, one after the other.
    """

    devices: list[QueueDevice]
    merge: QueueDevice
    deal: Deal
    tight: frozenset[QueueDevice]


class Roster:
    """The devices of a model, shared by all of its engines.

    Args:
        devices: as they were given, in the order of the rows; or their parts, by `on_shards`.
        options: with `merge_device` as an index into `devices`.
        process: as in `on_shards`.

    Attributes:
        present: the devices of their own that are there, in the order of the rows. The same list at all times.
        lost: why each of the others is not there.
        cuts: the number of parts in which the rows of a device run, or those of a shard (by its number).
        told: what has happened lately, in words, for reports.
        version: a number that grows with each change.
    """

    def __init__(self, devices: Sequence[QueueDevice], options: Options, process: tuple[int, int] = (0, 1)) -> None:
        self._options, self._process = options, process
        owners = [device.part_of or device for device in devices]
        self._order = list(dict.fromkeys(owners))
        if not -len(owners) <= options.merge_device < len(owners):
            raise ValueError(
                f"`merge_device` must be an index from 0 to {len(owners) - 1} into `gpus`. Received: "
                f"merge_device={options.merge_device!r}"
            )
        self._merge = owners[options.merge_device]
        self.present = list(self._order)
        self.lost: dict[QueueDevice, str] = {}
        self.cuts: dict[QueueDevice | int, int] = {}
        self.told: deque[str] = deque(maxlen=MOST_TOLD)
        self.version = 0
        self._followers: list[list[QueueDevice]] = []
        self._formation = self._formed()

    @classmethod
    def on_shards(cls, devices: Sequence[QueueDevice], options: Options, process: tuple[int, int]) -> Roster:
        """A roster of these devices, or of their parts where `options.shards` is set. Arguments as of `on_shards`."""
        return cls(*on_shards(devices, options, process), process)

    def formation(self) -> Formation:
        """The devices of the replicas now."""
        return self._formation

    def follow(self, devices: list[QueueDevice]) -> list[QueueDevice]:
        """Keep a list of the replicas' devices up to date. Returns the list."""
        self._followers.append(devices)
        return devices

    def _changed(self) -> None:
        """Something has changed."""
        self.version += 1
        self._formation = self._formed()
        for devices in self._followers:
            devices[:] = self._formation.devices

    def _formed(self) -> Formation:
        """As `formation`, made anew."""
        shares = self._shares()
        counts = [self.cuts.get(self._key(number, share), 1) for number, share in enumerate(shares)]
        devices: list[QueueDevice] = []
        used = {owner: sum(share.part_of is owner for share in shares) for owner in self.present}
        tight = set()
        for share, count in zip(shares, counts, strict=True):
            if count == 1:
                devices.append(share)
                continue
            owner = share.part_of or share
            tight.add(owner)
            first, further = ([share], count - 1) if share.part_of is not None else ([], count)
            devices += [*first, *(part_of_device(owner, used[owner] + place) for place in range(further))]
            used[owner] += further
        merge = next((one for one in devices if (one.part_of or one) is self._merge), devices[0])
        deal = Deal(len(shares), tuple(counts) if tight else ())
        return Formation(devices, merge, deal, frozenset(tight))

    def _shares(self) -> list[QueueDevice]:
        """The devices of equal shares of the rows."""
        return on_shards(self.present, replace(self._options, merge_device=0), self._process)[0]

    def _key(self, number: int, share: QueueDevice) -> QueueDevice | int:
        """What the cuts of a share are kept by: a shard may move to another device, and keeps its cuts."""
        return share if share.part_of is None else number

    # What happens to devices.

    def cut(self, place: int) -> tuple[str, int]:
        """Let the rows of a replica's share run in twice as many parts. Returns the device's name, and their number.

        Args:
            place: of the replica in the present formation.
        """
        shares = self._shares()
        for number, share in enumerate(shares):
            key = self._key(number, share)
            place -= self.cuts.get(key, 1)
            if place < 0:
                self.cuts[key] = 2 * self.cuts.get(key, 1)
                self._changed()
                return share.name, self.cuts[key]
        raise IndexError("there is no such replica")

    def set_cuts(self, cuts: dict[QueueDevice | int, int]) -> None:
        """Let rows run in these parts."""
        self.cuts = dict(cuts)
        self._changed()

    def lose(self, owner: QueueDevice, why: str, *, waits: bool = True) -> None:
        """Take a device out, and close it with its parts.

        Args:
            why: in words.
            waits: for its worker to end; False for one that hangs, and ends when it comes back.
        """
        self.present.remove(owner)
        self.cuts.pop(owner, None)
        self.lost[owner] = why
        owner.lost = owner.lost or why
        self._changed()
        owner.begin_close()
        if waits:
            with contextlib.suppress(DeviceTimeoutError):  # it hangs, and ends when it comes back
                owner.close(_CLOSE_SECONDS)

    def rejoin(self) -> list[str]:
        """Take back lost devices that answer again. Returns their names."""
        back = []
        for place, owner in enumerate(self._order):
            found = present_device(owner) if owner in self.lost else None
            if found is None:
                continue
            del self.lost[owner]
            self._order[place] = found
            self._merge = found if self._merge is owner else self._merge
            back.append(found.name)
        if back:
            self.told.append(f"{back} came back, and take their rows again.")
            self.present[:] = [owner for owner in self._order if owner not in self.lost]
            self._changed()
        return back
