"""The limits between the algorithms of the all-reduce on some GPUs: measured once, then kept in a file.

NCCL adds in another order than our kernels, so the choice decides over bits. It must not depend on noise: what is used
is what the file holds, in the process that measured too, and of several processes that measure at once the first
writes it. Where no file can be kept the built-in limits hold.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from fastdp._version import __version__
from fastdp.comm import kept_table
from fastdp.comm.algorithm import Limits, built_in
from fastdp.comm.base import Communicator
from fastdp.comm.measure import Seconds, best_limits, measure
from fastdp.errors import DeviceTimeoutError
from fastdp.runtime.topology import driver, peer_matrix, physical_devices

# What measuring may take at first use, and for `fastdp devices --measure`.
FIRST_SECONDS, ASKED_SECONDS = 0.8, 2.0


def tune(communicator: Communicator, devices: Sequence[Any]) -> None:
    """Let a tunable communicator choose by what was measured on its GPUs, now or earlier, as far as it can be kept.

    On the host thread, while no step of any engine runs.

    Args:
        communicator: over the devices.
        devices: GPUs, each a card of its own.
    """
    key = key_of(devices, communicator.libraries())
    communicator.choice.use(_found(communicator, devices, key) if key is not None else None)


def _found(communicator: Communicator, devices: Sequence[Any], key: dict[str, Any]) -> Limits | None:
    """The limits that are kept for these GPUs, after they were measured if need be; None if none can be kept."""
    kept = kept_table.load(key)
    limits = _limits(kept)
    if limits is not None:
        return limits
    if not kept_table.writable():
        warnings.warn(
            f"fastdp cannot keep what all-reduces take on these GPUs in {kept_table.path_of(key).parent}: built-in "
            "sizes decide how gradients are reduced. Set FASTDP_CACHE_DIR to a folder of your own that can be written.",
            RuntimeWarning,
            stacklevel=3,
        )
        return None
    seconds = _measured(communicator, devices, FIRST_SECONDS)
    return None if seconds is None else _limits(kept_table.keep(key, _table(seconds), replace=kept is not None))


def measured_anew(communicator: Communicator, devices: Sequence[Any]) -> Seconds | None:
    """Measure all algorithms on these devices; None, with a warning, if an all-reduce fails or does not end.

    A tunable communicator uses what was found from now on, and so do later processes.
    """
    seconds = _measured(communicator, devices, ASKED_SECONDS)
    key = key_of(devices, communicator.libraries()) if communicator.choice.tunable and seconds else None
    if seconds is not None and key is not None:
        communicator.choice.use(_limits(kept_table.keep(key, _table(seconds), replace=True)))
    return seconds


def key_of(devices: Sequence[Any], libraries: Mapping[str, int]) -> dict[str, Any] | None:
    """All that times depend on: the cards in their order, how they are linked, the driver and versions. None without
    NVML, which knows the cards."""
    known = {info.index: info for info in physical_devices()}
    cards = [known[device.ordinal] for device in devices if device.ordinal in known]
    found = driver()
    if len(cards) < len(devices) or found is None:
        return None
    text = [{name: str(value) for name, value in asdict(card).items()} for card in cards]
    versions = {"fastdp": __version__, "driver": found.version, **{name: str(v) for name, v in libraries.items()}}
    return {"cards": text, "paths": peer_matrix(cards), "versions": versions}


def _measured(communicator: Communicator, devices: Sequence[Any], seconds: float) -> Seconds | None:
    """What the algorithms take, or None, with a warning, if one fails; the next step then cleans up."""
    try:
        return measure(communicator, devices, seconds)
    except (DeviceTimeoutError, RuntimeError) as error:
        if isinstance(error, DeviceTimeoutError):
            communicator.abort()
        for device in devices:
            device.unsettled = True
        warnings.warn(
            f"What all-reduces take on these devices was not measured ({error}): built-in sizes decide how gradients "
            "are reduced.",
            RuntimeWarning,
            stacklevel=4,
        )
        return None


def _table(seconds: Seconds) -> dict[str, Any]:
    """What is kept: the limits that follow, and the figures for readers."""
    limits = best_limits(seconds, built_in())
    rows = [[nbytes, way, taken] for (nbytes, way), taken in seconds.items()]
    return {"limits": [limits.one_shot, limits.two_shot], "seconds": rows}


def _limits(table: dict[str, Any] | None) -> Limits | None:
    """The limits in a table that was kept; None if it has none."""
    limits = (table or {}).get("limits")
    if not isinstance(limits, list) or len(limits) != 2 or not all(type(one) is int for one in limits):
        return None
    return Limits(*limits) if limits[0] <= limits[1] else None
