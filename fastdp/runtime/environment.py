"""Sets the environment variables that CUDA reads when it starts, or tells that it has started without them."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from fastdp import settings
from fastdp.warn import warn_user

__all__ = ["ask_for", "check_environment", "set_early"]

# What several devices that wait for each other need.
WANTED = {
    # Loading a kernel at its first launch may wait for the whole GPU, and so for a collective that waits for that very
    # launch. fastdp launches its own kernels once before; NCCL's and torch's it does not know.
    "CUDA_MODULE_LOADING": "EAGER",
    # Streams that share a connection wait for each other's kernels. The kernels of an all-reduce wait for one another,
    # and virtual GPUs have five streams each, so the default of 8 connections is too low.
    "CUDA_DEVICE_MAX_CONNECTIONS": "32",
}
# Read by NCCL, at its first use. By default it orders captured and eager collectives with extra events, and fastdp
# mixes them on no communicator.
NCCL_VARIABLE, NCCL_VALUE = "NCCL_GRAPH_MIXING_SUPPORT", "0"

_NOT_INITIALIZED = 3  # CUDA_ERROR_NOT_INITIALIZED

_told: set[str] = set()


def set_early() -> None:
    """Set what is unset, if this process will probably use several devices. Called on `import fastdp`; calls no CUDA.

    One GPU alone needs none of it, and loading all kernels at once takes torch seconds and hundreds of megabytes.
    """
    if _several_to_be_seen():
        _set_unset(started())


def ask_for(*names: str) -> None:
    """Set what is unset of these variables. Where CUDA has started without one, a warning says so, once.

    Call when several devices are about to be used.
    """
    os.environ.setdefault(NCCL_VARIABLE, NCCL_VALUE)
    late = [name for name in _set_unset(started(), names) if name not in _told]
    if late:
        _told.update(late)
        values = " and ".join(f"{name}={WANTED[name]}" for name in late)
        warn_user(
            f"CUDA had started before fastdp could set {values}; importing Keras or using torch on a GPU starts it. A "
            "kernel that is loaded or launched late may then wait for devices that wait for it, and training may hang. "
            f"Set {values} in the shell, or import fastdp first, with CUDA_VISIBLE_DEVICES or FASTDP_VIRTUAL_DEVICES "
            "naming the devices."
        )


def started() -> bool:
    """Whether CUDA has started in this process: its driver is loaded and initialized."""
    try:
        if sys.platform == "win32":
            if not ctypes.windll.kernel32.GetModuleHandleW("nvcuda.dll"):
                return False
            library = ctypes.CDLL("nvcuda.dll")
        else:
            library = ctypes.CDLL("libcuda.so.1", os.RTLD_NOLOAD | os.RTLD_LAZY)
        count = library.cuDeviceGetCount
    except (OSError, AttributeError):
        return False
    return bool(count(ctypes.byref(ctypes.c_int())) != _NOT_INITIALIZED)


def _set_unset(late: bool, names: tuple[str, ...] = tuple(WANTED)) -> list[str]:
    """Set the unset ones of these variables unless it is too late; returns those for which it is."""
    missing = [name for name in names if not os.environ.get(name, "").strip()]
    if late:
        return missing
    for name in missing:
        os.environ[name] = WANTED[name]
    return []


def _several_to_be_seen() -> bool:
    """Whether the environment, or else the devices' files, show several GPUs or virtual devices."""
    with contextlib.suppress(ValueError):  # told when devices are asked for: an import must not fail
        virtual = settings.virtual_devices()
        if virtual:
            return virtual > 1
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([part for part in visible.split(",") if part.strip()]) > 1
    return len(list(Path("/dev").glob("nvidia[0-9]*"))) > 1


def check_environment(devices: Sequence[int]) -> None:
    """Reject settings under which these devices cannot work together, and set those that the user left unset.

    With several devices, sets CUDA_MODULE_LOADING and NCCL_GRAPH_MIXING_SUPPORT, each unless it is already set; a
    warning says if CUDA has started without the first (`fastdp.runtime.environment`).

    Raises:
        RuntimeError: CUDA_LAUNCH_BLOCKING=1 with several devices.
    """
    if len(set(devices)) < 2:
        return
    blocking = os.environ.get("CUDA_LAUNCH_BLOCKING", "0").strip()
    if blocking not in ("", "0"):
        raise RuntimeError(
            f"CUDA_LAUNCH_BLOCKING={blocking!r} with {len(set(devices))} GPUs in one process: each launch would wait "
            "until its kernel is over, and a collective is over only when all GPUs have launched theirs. Unset it, "
            "or use one GPU."
        )
    ask_for("CUDA_MODULE_LOADING")
