"""Turning `gpus=` into devices; the virtual devices of this process."""

from __future__ import annotations

import atexit
import operator
import os
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

from fastdp.backend.host import HostDevice
from fastdp.errors import DeviceTimeoutError
from fastdp.topology import DeviceInfo, physical_devices

VIRTUAL_DEVICES_VARIABLE = "FASTDP_VIRTUAL_DEVICES"


class _VirtualDevices:
    """The virtual devices of this process. Made on first use, closed at exit."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._asked: int | None = None
        self._devices: list[HostDevice] = []

    def resize(self, count: int) -> None:
        """Have `count` devices. Devices that stay in range are kept, with the models wrapped on them."""
        with self._lock:
            dropped = self._devices[count:]
            del self._devices[count:]
            self._asked = count
        failures = []
        for device in dropped:
            try:
                device.close()
            except DeviceTimeoutError as error:  # the others are closed first
                failures.append(error)
        if failures:
            raise failures[0]

    def count(self) -> int:
        """How many were asked for, by a call or else by the environment."""
        if self._asked is not None:
            return self._asked
        text = os.environ.get(VIRTUAL_DEVICES_VARIABLE, "").strip()
        if not text:
            return 0
        if not text.isdecimal():
            raise ValueError(
                f"The environment variable {VIRTUAL_DEVICES_VARIABLE} must be a whole number >= 0, such as 8. "
                f"Received: {text!r}"
            )
        return int(text)

    def get(self) -> list[HostDevice]:
        """All of them."""
        with self._lock:
            for index in range(len(self._devices), self.count()):
                self._devices.append(HostDevice(index))
            return list(self._devices)


_virtual = _VirtualDevices()
atexit.register(lambda: _virtual.resize(0))


def set_virtual_devices(count: int) -> None:
    """Have `count` virtual devices, each backed by host memory and one worker thread.

    Models wrapped before keep working as long as their devices stay in range; `0` closes all of them.
    The environment variable FASTDP_VIRTUAL_DEVICES does the same for a whole process.

    Raises:
        ValueError: `count` is not a whole number >= 0.

    Example:
        >>> import fastdp
        >>> fastdp.set_virtual_devices(2)
        >>> [device.name for device in fastdp.devices()]
        ['virtual:0', 'virtual:1']
    """
    wanted = _whole_number(count)
    if wanted is None or wanted < 0:
        raise ValueError(f"`count` must be a whole number >= 0. Received: count={count!r}")
    _virtual.resize(wanted)


def devices() -> list[DeviceInfo]:
    """The devices that `gpus=` counts: the virtual ones if any were asked for, else the visible GPUs.

    Raises:
        ValueError: FASTDP_VIRTUAL_DEVICES holds no whole number.
    """
    if _virtual.count():
        return [DeviceInfo(device.index, device.name, device.kind) for device in _virtual.get()]
    return physical_devices()


def resolve(gpus: Any, *, minimum: int = 1, caller: str = "fastdp.wrap") -> list[HostDevice]:
    """Turn the `gpus` argument into devices, by Keras 2.3.1's rules made strict.

    `None`, `0` and an empty list mean every device; a whole number means that many; a list, tuple, range
    or array of ints names ordinals, whose order is the order of the rows.

    Args:
        gpus: what the user passed.
        minimum: the fewest devices that make sense to the caller.
        caller: the public function, for the message.

    Raises:
        ValueError: anything wrong with `gpus`: documented scripts catch it.
    """
    available = devices()
    ordinals = _ordinals(gpus, len(available), caller)
    shown = f"Received: gpus={gpus!r}"
    if not available:
        raise ValueError(
            f"`{caller}` needs at least {minimum} device(s), but this machine has no visible NVIDIA GPU. "
            "To try it without GPUs, call fastdp.set_virtual_devices(n) first (or set "
            f"{VIRTUAL_DEVICES_VARIABLE}=n). {shown}"
        )
    if not isinstance(ordinals, range) and len(set(ordinals)) != len(ordinals):
        raise ValueError(
            f"`gpus` must name each device once. To split one GPU into several, use "
            f"fastdp.set_virtual_devices(n). {shown}"
        )
    if any(not 0 <= i < len(available) for i in ordinals):
        raise ValueError(
            f"`{caller}` with gpus={gpus!r} wants the devices {_shown(ordinals)}, but this machine has "
            f"{len(available)}: {[device.name for device in available]}. Use ordinals from 0 to "
            f"{len(available) - 1}, or fewer devices."
        )
    if len(ordinals) < minimum:
        raise ValueError(
            f"`{caller}` needs gpus >= {minimum}, or a list of at least {minimum} devices; {len(ordinals)} "
            f"of {len(available)} available device(s) would be used. For one device use fastdp.wrap, or keep "
            f"the model as it is; without more GPUs, fastdp.set_virtual_devices(n) gives virtual ones. {shown}"
        )
    if available[0].kind != "virtual":
        raise ValueError(
            "This version of fastdp runs on virtual devices only; the CUDA device layer is not part of it. "
            f"Call fastdp.set_virtual_devices(n) first. Found: {[device.name for device in available]}. {shown}"
        )
    pool = _virtual.get()
    return [pool[i] for i in ordinals]


def _ordinals(gpus: Any, available: int, caller: str) -> Sequence[int]:
    """The ordinals that `gpus` names, not yet checked against the machine: however many, not yet listed."""
    if gpus is None:
        return range(available)
    count = _whole_number(gpus)
    if count is not None:
        if count < 0:
            raise ValueError(f"`{caller}` needs gpus >= 1 (0 or None for all). Received: gpus={gpus!r}")
        return range(count or available)
    if isinstance(gpus, range):
        return gpus or range(available)
    if isinstance(gpus, (list, tuple)) or (isinstance(gpus, np.ndarray) and gpus.ndim == 1):
        ordinals = [_whole_number(item) for item in gpus]
        if None not in ordinals:
            return [i for i in ordinals if i is not None] or range(available)
    raise ValueError(
        "`gpus` must be None, a whole number, or a list of device ordinals such as [0, 1]. "
        f"Received: gpus={gpus!r} (of type {type(gpus).__name__})"
    )


def _shown(ordinals: Sequence[int]) -> str:
    """The ordinals as a list that fits a message."""
    first = ", ".join(map(str, ordinals[:16]))
    return f"[{first}{', ...' if ordinals[16:] else ''}]"


def _whole_number(value: Any) -> int | None:
    """`value` as an int if it is one (NumPy's too, a bool not); None otherwise."""
    if isinstance(value, (bool, np.bool_, np.ndarray)):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None
