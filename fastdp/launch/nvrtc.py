"""NVIDIA's runtime compiler through ctypes: compiles CUDA source to a cubin without driver, GPU or CuPy.

NVRTC's user guide documents the calls. The library comes from a pip wheel (`nvidia-cuda-nvrtc` for CUDA 13,
`nvidia-cuda-nvrtc-cu12` for CUDA 12; torch's CUDA builds include one) or from a CUDA toolkit.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import functools
import importlib.util
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

__all__ = ["Nvrtc", "NvrtcError", "NvrtcNotFoundError", "find_libraries", "load"]

# cu13 wheels share one folder; cu12 wheels have one each.
_WHEEL_FOLDERS = ("cu13/lib", "cu13/lib64", "cu13/bin/x86_64", "cuda_nvrtc/lib", "cuda_nvrtc/bin")
_PATTERN = "nvrtc64_*_0.dll" if sys.platform == "win32" else "libnvrtc.so*"
_HOW_TO_INSTALL = (
    "install the pip wheel of your driver's CUDA version (`pip install nvidia-cuda-nvrtc` for CUDA 13, "
    "`pip install nvidia-cuda-nvrtc-cu12` for CUDA 12) or a CUDA toolkit, and set CUDA_PATH where it is "
    "not in /usr/local/cuda"
)


class NvrtcNotFoundError(ImportError):
    """No NVRTC library was found; the message says how to install one."""


class NvrtcError(RuntimeError):
    """NVRTC refused a call or a program; the message holds its log."""


def find_libraries() -> list[Path]:
    """The NVRTC libraries of this machine, best first.

    Returns: paths, wheels before toolkits, each from newest to oldest. A name that only the system's
    loader can resolve is returned as it is. Empty if there is none.
    """
    found = [path for folder in _folders() for path in sorted(folder.glob(_PATTERN), reverse=True)]
    system = ctypes.util.find_library("nvrtc")
    if system:
        found.append(Path(system))
    unique = {path.resolve() if path.is_absolute() else path: path for path in reversed(found)}
    return [path for path in reversed(unique.values()) if ".alt." not in path.name]


def _folders() -> Iterator[Path]:
    """The folders where wheels and toolkits keep their libraries."""
    spec = importlib.util.find_spec("nvidia")
    for root in (spec.submodule_search_locations or ()) if spec else ():
        yield from (Path(root) / folder for folder in _WHEEL_FOLDERS)
    for variable in ("CUDA_PATH", "CUDA_HOME"):
        if os.environ.get(variable):
            yield from (Path(os.environ[variable]) / folder for folder in ("lib64", "lib", "bin"))
    yield Path("/usr/local/cuda/lib64")


@functools.cache
def load(newest_major: int | None = None, architecture: int | None = None) -> Nvrtc:
    """The newest NVRTC of this machine that the driver and the card take; of equally new ones the first found.

    Args:
        newest_major: the CUDA major version of the driver, which may not load a newer compiler's cubins.
            None accepts any compiler.
        architecture: the compute capability of the card, such as 90. None accepts any compiler.

    Raises:
        NvrtcNotFoundError: no library is installed, or none will do; the message says what was found.
    """
    fitting: list[Nvrtc] = []
    found = []
    for path in find_libraries():
        try:
            library = Nvrtc(path)
        except OSError as error:
            found.append(f"{path} (cannot be loaded: {error})")
            continue
        version = "CUDA {}.{}".format(*library.version)
        if newest_major is not None and library.version[0] > newest_major:
            found.append(f"{path} ({version}, too new)")
        elif architecture is not None and architecture not in library.architectures:
            found.append(f"{path} ({version}, does not know sm_{architecture})")
        else:
            fitting.append(library)
    if fitting:
        return max(fitting, key=lambda library: library.version)
    limit = "" if newest_major is None else f" for CUDA {newest_major} or older"
    card = "" if architecture is None else f" that knows sm_{architecture}"
    raise NvrtcNotFoundError(f"no NVRTC library{limit}{card}; found: {', '.join(found) or 'none'}; {_HOW_TO_INSTALL}")


class Nvrtc:
    """One NVRTC library.

    Attributes:
        path: where it was loaded from.
        version: (major, minor) of its CUDA.
        architectures: the compute capabilities it compiles for, as 70, 90, 120.

    Raises:
        OSError: the library cannot be loaded.

    Example: `Nvrtc(find_libraries()[0]).compile(source, name="concat_rows.cu", options=("-arch=sm_90",))`
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._library = ctypes.CDLL(str(path))
        self._library.nvrtcGetErrorString.restype = ctypes.c_char_p
        major, minor = ctypes.c_int(), ctypes.c_int()
        self._call("nvrtcVersion", ctypes.byref(major), ctypes.byref(minor))
        self.version = (major.value, minor.value)
        self.architectures = self._supported_architectures()

    def compile(
        self, source: str, *, name: str, headers: Mapping[str, str] | None = None, options: Sequence[str] = ()
    ) -> bytes:
        """Compile CUDA source to a cubin.

        Args:
            source: the text of the program.
            name: its name in error messages.
            headers: text by the name under which the source includes it.
            options: NVRTC's options; `--gpu-architecture=sm_XX` names a real architecture.

        Raises:
            NvrtcError: the source does not compile; holds NVRTC's log.
        """
        headers = headers or {}
        program = ctypes.c_void_p()
        texts = _strings(list(headers.values()))
        names = _strings(list(headers))
        self._call(
            "nvrtcCreateProgram",
            ctypes.byref(program),
            source.encode(),
            name.encode(),
            len(headers),
            texts,
            names,
        )
        try:
            status = self._library.nvrtcCompileProgram(program, len(options), _strings(options))
            if status != 0:
                log = self._bytes("nvrtcGetProgramLog", program).rstrip(b"\0").decode()
                raise NvrtcError(f"{name} does not compile with {' '.join(options)}: {self._text(status)}\n{log}")
            return self._bytes("nvrtcGetCUBIN", program)
        finally:
            self._call("nvrtcDestroyProgram", ctypes.byref(program))

    def _supported_architectures(self) -> tuple[int, ...]:
        count = ctypes.c_int()
        self._call("nvrtcGetNumSupportedArchs", ctypes.byref(count))
        values = (ctypes.c_int * count.value)()
        self._call("nvrtcGetSupportedArchs", values)
        return tuple(values)

    def _bytes(self, function: str, program: ctypes.c_void_p) -> bytes:
        """The result of `function`, whose length `function` + "Size" returns."""
        size = ctypes.c_size_t()
        self._call(f"{function}Size", program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        self._call(function, program, buffer)
        return buffer.raw

    def _call(self, function: str, *args: object) -> None:
        status = getattr(self._library, function)(*args)
        if status != 0:
            raise NvrtcError(f"{function}: {self._text(status)}")

    def _text(self, status: int) -> str:
        return str(self._library.nvrtcGetErrorString(status).decode())


def _strings(values: Sequence[str]) -> ctypes.Array[ctypes.c_char_p]:
    return (ctypes.c_char_p * len(values))(*(value.encode() for value in values))
