"""Turns `gpus=` into devices, and makes the virtual devices of this process."""

from __future__ import annotations

import atexit
import importlib
import importlib.util
import operator
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from fastdp import settings
from fastdp.errors import DeviceTimeoutError
from fastdp.runtime.environment import WANTED, ask_for
from fastdp.runtime.host.device import HostDevice
from fastdp.runtime.queue import QueueDevice
from fastdp.runtime.topology import DeviceInfo, physical_devices
from fastdp.warn import warn_user

AUTO = "auto"
# That closing devices may take: while the process runs, when it ends, and then for one that a step was given up on,
# which has been waited for already.
CLOSE_SECONDS, EXIT_SECONDS, GIVEN_UP_SECONDS = 60.0, 20.0, 1.0


class _VirtualDevices:
    """The virtual devices of this process. Created on first use, closed at exit."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._asked: int | None = None
        self._kind: str | None = None
        self._devices: list[QueueDevice] = []
        self._cpu: HostDevice | None = None

    def resize(self, count: int, kind: str | None = None) -> None:
        """Set the count and kind. Devices that stay in range are kept, and models wrapped on them keep working."""
        with self._lock:
            kept = count if kind in (None, self._kind) or not self._devices else 0
            dropped = self._devices[kept:]
            del self._devices[kept:]
            if count == 0 and self._cpu is not None:
                dropped, self._cpu = [*dropped, self._cpu], None
            self._asked = count
            self._kind = kind or self._kind
        failures = _closed(dropped, CLOSE_SECONDS)
        if failures:
            raise failures[0]

    def hand_over(self) -> list[QueueDevice]:
        """All virtual devices, which the caller closes."""
        with self._lock:
            dropped, self._devices = self._devices, []
            return dropped if self._cpu is None else [*dropped, self._cpu]

    def count(self) -> int:
        """The requested number: from a call, else from the environment."""
        return settings.virtual_devices() if self._asked is None else self._asked

    @property
    def kind(self) -> str:
        """What the devices are parts of: "gpu" if the process can use GPUs, else "host"."""
        if self._kind is None:
            self._kind = settings.virtual_kind() or ("gpu" if _has_cupy() and physical_devices() else "host")
        return self._kind

    def get(self) -> list[QueueDevice]:
        """All virtual devices. Virtual GPUs are assigned to the cards round-robin."""
        with self._lock:
            if self.kind == "host" and any(device.cut_short for device in self._devices):
                self._devices = []  # new models of a forked child can have new devices, and the old ones no work
            self._devices = [HostDevice(one.index) if one.lost and one.answers() else one for one in self._devices]
            for index in range(len(self._devices), self.count()):
                if self.kind == "host":
                    self._devices.append(HostDevice(index))
                else:
                    if self.count() > 1:
                        ask_for(*WANTED)
                    cards = _cuda("cupy_api").device_count()
                    self._devices.append(_cuda("device").CudaDevice(index, index % cards, virtual=True))
            return list(self._devices)

    def cpu(self) -> QueueDevice:
        """The one device on the CPU that `gpus="auto"` means without a GPU; `devices()` does not count it."""
        with self._lock:
            if self._cpu is None:
                self._cpu = HostDevice(0, "cpu:0")
            return self._cpu


class _Gpus:
    """The GPUs of this process. A GPU gets a context only when a model is first wrapped on it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._devices: dict[int, QueueDevice] = {}

    def get(self, ordinal: int) -> QueueDevice:
        """The device for a card."""
        with self._lock:
            if ordinal not in self._devices:
                self._devices[ordinal] = _cuda("device").CudaDevice(ordinal, ordinal)
            return self._devices[ordinal]

    def hand_over(self) -> list[QueueDevice]:
        """All GPUs, which the caller closes."""
        with self._lock:
            dropped, self._devices = list(self._devices.values()), {}
            return dropped


def _closed(
    devices: Sequence[QueueDevice], seconds: float, given_up: float = CLOSE_SECONDS
) -> list[DeviceTimeoutError]:
    """Close all devices within a time limit for all of them. Returns the errors of those still busy.

    `given_up`: another limit, for devices on which a step was given up.
    """
    failures, began = [], time.monotonic()
    for device in devices:  # all of them end at the same time
        device.begin_close()
    for device in devices:
        limit = min(seconds, given_up) if any(one.unsettled for one in (device, *device.parts)) else seconds
        try:
            device.close(max(0.1, round(began + limit - time.monotonic(), 1)))
        except DeviceTimeoutError as error:  # the others are closed all the same
            failures.append(error)
    return failures


def _has_cupy() -> bool:
    """Whether CuPy is installed."""
    return importlib.util.find_spec("cupy") is not None


def _cuda(module: str) -> Any:
    """Import a module of fastdp.runtime.cuda.

    Raises:
        ValueError: CuPy is not installed or finds no CUDA. Every problem with `gpus` is a ValueError.
    """
    try:
        return importlib.import_module(f"fastdp.runtime.cuda.{module}")
    except ImportError as error:
        raise ValueError(
            "To run on GPUs fastdp needs CuPy of the driver's CUDA version: pip install 'fastdp[cuda13]' or "
            f"'fastdp[cuda12]'; `fastdp devices` says which. Without it, fastdp.set_virtual_devices(n, kind=\"host\") "
            f"runs on the CPU. Importing it failed with: {error}"
        ) from error


class _Default:
    """What `gpus=None` means (None: all devices), and whether it was told that `gpus="auto"` found no GPU."""

    gpus: Any = None
    told = False


_virtual = _VirtualDevices()
_gpus = _Gpus()
_default = _Default()


def _close_collectives() -> None:
    """Close what collectives hold on GPUs, if any ran. Not imported: that would load CuPy."""
    closing = sys.modules.get("fastdp.comm.cuda.at_exit")
    if closing is not None:
        closing.close(EXIT_SECONDS)


def _close_devices() -> None:
    """Close all devices at the end of the process. What is still busy then is left to the system, with a word."""
    for error in _closed([*_virtual.hand_over(), *_gpus.hand_over()], EXIT_SECONDS, GIVEN_UP_SECONDS):
        sys.stderr.write(f"fastdp: {error} It is left as it is.\n")


atexit.register(_close_devices)
atexit.register(_close_collectives)  # the last one registered is the first to run


def set_virtual_devices(count: int, kind: str | None = None) -> None:
    """Set the number of virtual devices, which are parts of the visible GPUs or of the host.

    On a machine with GPUs, each virtual device is a part of a card with its own memory and streams, so that every code
    path for several GPUs can run on one. Elsewhere, or with kind="host", each is a thread on host memory.

    Args:
        count: number of devices, 1024 at most; 0 closes all of them.
        kind: "gpu" or "host". None: the kind used before, else FASTDP_VIRTUAL_KIND, else "gpu" if there are GPUs and
            CuPy. A change of kind closes the existing devices.

    Models wrapped before keep working as long as their devices stay in range.
    The environment variable FASTDP_VIRTUAL_DEVICES does the same for a whole process.

    Raises:
        ValueError: `count` is not a whole number from 0 to 1024; an unknown `kind`.

    Example:
        >>> import fastdp
        >>> fastdp.set_virtual_devices(2)
        >>> [device.name for device in fastdp.devices()]
        ['virtual:0', 'virtual:1']
    """
    wanted = _whole_number(count)
    if wanted is None or not 0 <= wanted <= settings.MOST_VIRTUAL_DEVICES:
        raise ValueError(
            f"`count` must be a whole number from 0 to {settings.MOST_VIRTUAL_DEVICES}. Received: count={count!r}"
        )
    if kind not in (None, *settings.VIRTUAL_KINDS):
        raise ValueError(f'`kind` must be "gpu", "host" or None. Received: kind={kind!r}')
    _virtual.resize(wanted, kind)


def set_default_devices(gpus: Any) -> None:
    """Make `gpus=None` mean these devices; None: all devices. `resolve` checks them."""
    _default.gpus = gpus


def devices() -> list[DeviceInfo]:
    """The devices that `gpus=` counts: the virtual devices if any were requested, else the visible GPUs.

    Raises:
        ValueError: FASTDP_VIRTUAL_DEVICES is not a whole number.
    """
    if _virtual.count():
        return [DeviceInfo(device.index, device.name, device.kind) for device in _virtual.get()]
    return physical_devices()


def resolve(gpus: Any, *, minimum: int = 1, caller: str = "fastdp.wrap") -> list[QueueDevice]:
    """Turn the `gpus` argument into devices, by a strict version of Keras 2.3.1's rules.

    `None`, `0` and an empty list mean every device; a whole number means that many; a list, tuple, range
    or array of ints names ordinals, whose order is the order of the rows. "auto" means every device, and one on the CPU
    if there is none, which is told once on the error stream; callers that need two devices do not take it.

    Args:
        gpus: the argument as the user passed it.
        minimum: the smallest number of devices that the caller accepts.
        caller: name of the public function, for messages.

    Raises:
        ValueError: any problem with `gpus`; documented scripts catch this error.
    """
    available = devices()
    if _is_auto(_default.gpus if gpus is None else gpus) and (minimum < 2 or gpus is None):
        if not available and minimum < 2:
            return [_on_the_cpu(caller)]
        gpus = 0
    ordinals = _ordinals(gpus, len(available), caller)
    shown = f"Received: gpus={gpus!r}"
    if settings.restarted() and available:
        ordinals = _those_left(ordinals, available, gpus)
    if not available:
        raise ValueError(
            f"`{caller}` needs at least {minimum} device(s), but this machine has no visible NVIDIA GPU. "
            "To try it without GPUs, call fastdp.set_virtual_devices(n) first (or set "
            f"{settings.VIRTUAL_DEVICES}=n). {shown}"
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
    if not _virtual.count():
        return [_gpus.get(i) for i in ordinals]
    pool = _virtual.get()
    return [pool[i] for i in ordinals]


def present_device(lost: QueueDevice) -> QueueDevice | None:
    """The device that has taken the place of one that was lost; None while there is none."""
    if not lost.answers() or lost.kind != "virtual":
        return None
    pool = _virtual.get()
    return pool[lost.index] if lost.index < len(pool) and not pool[lost.index].closed else None


def devices_of_engine(devices: Any, merge_device: Any) -> list[QueueDevice]:
    """The devices of `fastdp.DataParallel`, given as device objects or in any form that `gpus=` takes.

    Raises:
        ValueError: no device, a duplicate, a `merge_device` out of range, or as in `resolve`.
    """
    if not isinstance(devices, (list, tuple)) or not any(isinstance(one, QueueDevice) for one in devices):
        devices = resolve(devices, caller="fastdp.DataParallel")
    if not devices or len({id(device) for device in devices}) != len(devices):
        raise ValueError(f"`devices` must be one or more different devices. Received: {list(devices)}")
    if isinstance(merge_device, bool) or merge_device not in range(len(devices)):
        raise ValueError(
            f"`merge_device` must be an index from 0 to {len(devices) - 1} into `devices`. Received: "
            f"merge_device={merge_device!r}"
        )
    return list(devices)


def warn_of_relocation(asked: bool, devices: Sequence[QueueDevice]) -> None:
    """Warn that `cpu_relocation`, if requested, does not move weights that live on a GPU."""
    if asked and any(device.on_gpu for device in devices):
        warn_user(
            "`cpu_relocation=True` has no effect here: the model's weights are already in GPU memory, where a replica "
            "trains them; reading or saving copies them to the host. The option works only for a Keras model that has "
            "not been wrapped on GPUs before."
        )


def _is_auto(gpus: Any) -> bool:
    """Whether `gpus` is "auto". Arrays are not compared with text."""
    return isinstance(gpus, str) and gpus == AUTO


def _on_the_cpu(caller: str) -> QueueDevice:
    """The device on the CPU, told once. No warning: a script that runs anywhere asked for it."""
    if not _default.told and sys.stderr is not None:
        _default.told = True
        sys.stderr.write(
            f'fastdp: no GPU is visible, so {caller} runs on one device on the CPU (gpus="auto"). `fastdp devices` '
            "says what is missing.\n"
        )
    return _virtual.cpu()


def _those_left(ordinals: Sequence[int], available: Sequence[DeviceInfo], gpus: Any) -> Sequence[int]:
    """The ordinals of devices that are there, in a process that takes the place of one that has failed."""
    named = ordinals[: settings.MOST_VIRTUAL_DEVICES]  # a number may be huge
    left = [ordinal for ordinal in named if ordinal < len(available)]
    if len(left) == len(named) or not left or min(left) < 0:
        return ordinals
    warn_user(
        f"fastdp: gpus={gpus!r} means more devices than this machine has by now. The script was started again after a "
        f"failure, and goes on with {[available[one].name for one in left]}."
    )
    return left


def _ordinals(gpus: Any, available: int, caller: str) -> Sequence[int]:
    """The ordinals that `gpus` names, not checked against the machine. A large count stays a range."""
    gpus = _default.gpus if gpus is None else gpus
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
        '`gpus` must be None, a whole number, a list of device ordinals such as [0, 1], or "auto" (not for '
        "multi_gpu_model). "
        f"Received: gpus={gpus!r} (of type {type(gpus).__name__})"
    )


def _shown(ordinals: Sequence[int]) -> str:
    """The ordinals as text, cut to a length that fits a message."""
    first = ", ".join(map(str, ordinals[:16]))
    return f"[{first}{', ...' if ordinals[16:] else ''}]"


def _whole_number(value: Any) -> int | None:
    """`value` as an int if it is a Python or NumPy integer (bool excluded), else None."""
    if isinstance(value, (bool, np.bool_, np.ndarray)):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None
