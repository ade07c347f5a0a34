"""Which GPUs this box has, how they are linked, and what is missing to use them; by NVML, without CUDA."""

from __future__ import annotations

import ctypes
import ctypes.util
import importlib.metadata
import importlib.util
import os
import platform
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pynvml

# The oldest CUDA that CuPy 14's wheels are built for, and the wheels by CUDA major version.
OLDEST_CUDA = (12, 0)
CUPY_WHEELS = {12: "cupy-cuda12x", 13: "cupy-cuda13x"}
# Torch's own indices, by the CUDA major version of the driver.
_TORCH_INDEX = {12: "cu126", 13: "cu130"}
NCCL_WHEELS = ("nvidia-nccl-cu12", "nvidia-nccl-cu13")

# How to install the driver, by the ID in /etc/os-release.
_DRIVER_LINES = {
    "ubuntu": "sudo ubuntu-drivers install",
    "debian": "sudo apt install nvidia-driver",
    "arch": "sudo pacman -S nvidia-open",
}

_ANCESTORS = {
    0: "same board",
    10: "one PCIe switch",
    20: "PCIe switches",
    30: "PCIe host bridge",
    40: "same NUMA node",
    50: "across NUMA nodes",
}
_P2P_READ, _P2P_OK = 0, 0


@dataclass(frozen=True, slots=True)
class DeviceInfo:
    """Properties of one device: `kind` is "virtual" or "cuda".

    Memory is in bytes, 0 if unknown. `compute_capability` is (major, minor), `link` the widest PCIe link that
    the board and the slot allow, `nvlinks` the number of active NVLinks. `physical` is NVML's ordinal, which
    differs from `index` if CUDA_VISIBLE_DEVICES selects devices.
    """

    index: int
    name: str
    kind: str
    memory_nbytes: int = 0
    compute_capability: tuple[int, int] | None = None
    link: str = ""
    nvlinks: int = 0
    physical: int = -1


@dataclass(frozen=True, slots=True)
class Driver:
    """The NVIDIA driver: its version, and the newest CUDA version that it supports, as (major, minor)."""

    version: str
    cuda: tuple[int, int]


def physical_devices() -> list[DeviceInfo]:
    """The NVIDIA GPUs that this process may see, in CUDA's order under CUDA_VISIBLE_DEVICES.

    Empty without a driver; `problems()` tells why.
    """
    with _nvml() as error:
        if error is not None:
            return []
        handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        visible = _in_the_driver_s_order(handles)
        if visible is None:
            visible = visible_ordinals([_text(pynvml.nvmlDeviceGetUUID(handle)) for handle in handles])
        return [_describe(index, ordinal, handles[ordinal]) for index, ordinal in enumerate(visible)]


def driver() -> Driver | None:
    """The driver, or None if there is none."""
    with _nvml() as error:
        if error is not None:
            return None
        cuda = int(pynvml.nvmlSystemGetCudaDriverVersion_v2())
        return Driver(_text(pynvml.nvmlSystemGetDriverVersion()), (cuda // 1000, cuda % 1000 // 10))


def peer_matrix(devices: Sequence[DeviceInfo]) -> list[list[str]]:
    """How each device reaches each other: "NVLink", else the PCIe path, with "no peer access" appended if so.

    Entry [i][j] is the path from `devices[i]` to `devices[j]`; the diagonal is empty.
    """
    with _nvml() as error:
        if error is not None:
            return [["" for _ in devices] for _ in devices]
        handles = [pynvml.nvmlDeviceGetHandleByIndex(device.physical) for device in devices]
        return [["" if a is b else _path(a, b) for b in handles] for a in handles]


def problems() -> list[str]:
    """The problems that keep this process from using GPUs, each with its remedy; empty if there are none."""
    with _nvml() as error:
        if isinstance(error, pynvml.NVMLError_LibraryNotFound):
            return [f"No NVIDIA driver is installed (libnvidia-ml.so is missing). {_driver_remedy()}"]
        if error is not None:
            return [
                f"The NVIDIA driver does not answer ({error}). Load it (modprobe nvidia), or reboot after an update."
            ]
        present = pynvml.nvmlDeviceGetCount()
    found = driver()
    assert found is not None
    return [*_hidden(present), *_libraries(found)]


def _driver_remedy() -> str:
    """How to install the driver on this system."""
    try:
        named = platform.freedesktop_os_release()
    except OSError:
        named = {}
    line = next(
        (
            _DRIVER_LINES[one]
            for one in (named.get("ID", ""), *named.get("ID_LIKE", "").split())
            if one in _DRIVER_LINES
        ),
        None,
    )
    how = f"Install it with: {line}" if line else "Install it from https://www.nvidia.com/drivers"
    return f"{how} (in a container: on its host, and start the container with --gpus all)."


def _hidden(present: int) -> Iterator[str]:
    """Problems with GPUs that are missing or hidden from this process."""
    visible = len(physical_devices())
    text = os.environ.get("CUDA_VISIBLE_DEVICES")
    if not present:
        yield "The driver finds no GPU. Check that one is plugged in and passed through to this machine or container."
    elif visible < present and text is not None:
        yield (
            f"CUDA_VISIBLE_DEVICES={text!r} shows {visible} of {present} GPUs. Unset it, or list the ordinals to use."
        )


def _libraries(found: Driver) -> Iterator[str]:
    """Problems with CuPy and NCCL: not installed, or not compatible with the driver."""
    major = found.cuda[0]
    if found.cuda < OLDEST_CUDA:
        yield (
            f"The driver {found.version} runs CUDA {found.cuda[0]}.{found.cuda[1]} at most, and CuPy 14 needs "
            f"{OLDEST_CUDA[0]}.{OLDEST_CUDA[1]}. Update the driver."
        )
        return
    installed = [wheel for wheel in CUPY_WHEELS.values() if _installed(wheel)]
    wanted = CUPY_WHEELS.get(min(major, max(CUPY_WHEELS)), "cupy-cuda12x")
    if not installed:
        extra = wanted.removeprefix("cupy-").rstrip("x")
        yield f"CuPy is not installed. Install it with: pip install 'fastdp[{extra}]'"
    for wheel in installed:
        if next(m for m, name in CUPY_WHEELS.items() if name == wheel) > major:
            yield (
                f"{wheel} is newer than the driver {found.version} (CUDA {major}). Install {wanted} instead: "
                f"pip uninstall {wheel} && pip install 'fastdp[cuda{major}]'"
            )
    yield from _torch_problems(found)
    if not any(map(_installed, NCCL_WHEELS)) and ctypes.util.find_library("nccl") is None:
        yield "libnccl is missing. Install it with: pip install nvidia-nccl-cu" + str(min(major, 13))


def _torch_problems(found: Driver) -> Iterator[str]:
    """A torch that cannot use the driver's GPUs."""
    built = _torch_build()
    if built is None:
        return
    version, cuda = built
    major = found.cuda[0]
    index = f"https://download.pytorch.org/whl/{_TORCH_INDEX.get(min(major, 13), 'cu126')}"
    get = f"Install it with: pip install --force-reinstall torch=={version.split('+')[0]} --index-url {index}"
    if not cuda:
        yield f"torch {version} is built for the CPU: Keras models and torch modules find no GPU. {get}"
    elif int(cuda.split(".")[0]) > major:
        yield (
            f"torch {version} is built for CUDA {cuda}, and the driver {found.version} runs CUDA {found.cuda[0]}."
            f"{found.cuda[1]} at most: Keras models and torch modules find no GPU. Update the driver, or: {get}"
        )


def _torch_build() -> tuple[str, str] | None:
    """The installed torch's version and the CUDA that it is built for, empty for none, without importing it."""
    spec = importlib.util.find_spec("torch")
    file = Path(spec.origin).with_name("version.py") if spec is not None and spec.origin else None
    if file is None or not file.is_file():
        return None
    text = file.read_text(encoding="utf-8")
    version = re.search(r"^__version__ = ['\"]([^'\"]+)", text, re.MULTILINE)
    cuda = re.search(r"^cuda\b.*= ['\"]([\d.]+)", text, re.MULTILINE)
    return (version[1] if version else "", cuda[1] if cuda else "")


def visible_ordinals(uuids: Sequence[str]) -> Sequence[int]:
    """The physical ordinals that CUDA_VISIBLE_DEVICES leaves visible, among GPUs with these UUIDs.

    As in the CUDA runtime, an entry is an ordinal or a prefix of one GPU's UUID, and reading stops at the first
    entry that names no GPU: `-1`, `none` or an empty entry hides all that follow. A MIG instance (MIG-...)
    counts as one device; only the runtime knows which GPU it is on, so the next GPU is reported.
    """
    text = os.environ.get("CUDA_VISIBLE_DEVICES")
    if text is None:
        return range(len(uuids))
    visible: list[int] = []
    for part in (piece.strip() for piece in text.split(",")):
        if part.startswith("GPU-"):
            matches = [i for i, uuid in enumerate(uuids) if uuid.startswith(part)]
            ordinal = matches[0] if len(matches) == 1 else -1
        elif part.startswith("MIG-"):
            ordinal = min(len(visible), len(uuids) - 1)
        else:
            ordinal = int(part) if part.isdecimal() else -1
        if not 0 <= ordinal < len(uuids):
            break
        visible.append(ordinal)
    return visible


def _in_the_driver_s_order(handles: Sequence[Any]) -> Sequence[int] | None:
    """NVML's ordinals of the visible GPUs in CUDA's order; None where NVML's order is CUDA's.

    CUDA puts the fastest GPUs first unless CUDA_DEVICE_ORDER=PCI_BUS_ID. Only the driver knows which it takes for the
    fastest, so it is asked where GPUs differ. That starts CUDA, but makes no context.
    """
    names = {_text(pynvml.nvmlDeviceGetName(handle)) for handle in handles}
    if len(names) < 2 or os.environ.get("CUDA_DEVICE_ORDER", "").strip() == "PCI_BUS_ID":
        return None
    places = _driver_bus_ids()
    if places is None:
        return None
    ordinals = {_place(_text(pynvml.nvmlDeviceGetPciInfo(handle).busId)): i for i, handle in enumerate(handles)}
    return [ordinals[place] for place in map(_place, places)]


def _driver_bus_ids() -> list[str] | None:
    """The PCI bus IDs of the visible GPUs in the driver's order; None if there is no driver that says."""
    try:
        library = ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
        calls = library.cuInit, library.cuDeviceGetCount, library.cuDeviceGetPCIBusId
    except (OSError, AttributeError):
        return None
    init, get_count, get_bus_id = calls
    count, text = ctypes.c_int(), ctypes.create_string_buffer(32)
    if init(0) or get_count(ctypes.byref(count)):
        return None
    found = []
    for device in range(count.value):
        if get_bus_id(text, len(text), device):
            return None
        found.append(text.value.decode())
    return found


def _place(bus_id: str) -> tuple[int, ...]:
    """The numbers of a PCI bus ID such as "00000000:3B:00.0", which CUDA writes with a shorter domain."""
    return tuple(int(part, 16) for part in re.split("[:.]", bus_id))


@contextmanager
def _nvml() -> Iterator[pynvml.NVMLError | None]:
    """Initialize NVML; yields None, or the error if that fails."""
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        yield error
        return
    try:
        yield None
    finally:
        pynvml.nvmlShutdown()


def _describe(index: int, ordinal: int, handle: Any) -> DeviceInfo:
    """The properties of one GPU according to NVML."""
    generation = _ask(pynvml.nvmlDeviceGetMaxPcieLinkGeneration, handle)
    width = _ask(pynvml.nvmlDeviceGetMaxPcieLinkWidth, handle)
    memory = _ask(pynvml.nvmlDeviceGetMemoryInfo, handle)
    capability = _ask(pynvml.nvmlDeviceGetCudaComputeCapability, handle)
    return DeviceInfo(
        index,
        _text(pynvml.nvmlDeviceGetName(handle)),
        "cuda",
        int(memory.total) if memory is not None else 0,
        (int(capability[0]), int(capability[1])) if capability is not None else None,
        f"PCIe {generation} x{width}" if generation and width else "",
        _count_nvlinks(handle),
        ordinal,
    )


def _count_nvlinks(handle: Any) -> int:
    """The number of active NVLinks; the first link number that the GPU does not have ends the count."""
    active = 0
    for link in range(pynvml.NVML_NVLINK_MAX_LINKS):
        state = _ask(pynvml.nvmlDeviceGetNvLinkState, handle, link)
        if state is None:
            break
        active += state == 1
    return active


def _path(a: Any, b: Any) -> str:
    """How one GPU reaches another."""
    if _ask(pynvml.nvmlDeviceGetP2PStatus, a, b, pynvml.NVML_P2P_CAPS_INDEX_NVLINK) == _P2P_OK:
        return "NVLink"
    ancestor = _ask(pynvml.nvmlDeviceGetTopologyCommonAncestor, a, b)
    path = _ANCESTORS.get(-1 if ancestor is None else int(ancestor), "unknown path")
    reads = _ask(pynvml.nvmlDeviceGetP2PStatus, a, b, _P2P_READ) == _P2P_OK
    return path if reads else f"{path}, no peer access"


def _ask(function: Callable[..., Any], *arguments: Any) -> Any:
    """NVML's answer, or None if this GPU or driver does not support the query."""
    try:
        return function(*arguments)
    except pynvml.NVMLError:
        return None


def _installed(distribution: str) -> bool:
    """Whether a distribution is installed."""
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _text(name: str | bytes) -> str:
    """Decode a string, which old releases of NVML's binding return as bytes."""
    return name.decode() if isinstance(name, bytes) else name
