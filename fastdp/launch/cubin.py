"""Compiles the kernels' sources on first use and keeps the cubins on disk, per architecture."""

from __future__ import annotations

import functools
import hashlib
import os
import sys
import tempfile
import warnings
from pathlib import Path

from fastdp import settings
from fastdp.launch import nvrtc

__all__ = ["OPTIONS", "cache_folder", "cubin", "kernel_folder", "kernel_names"]

# --fmad=false: a product and a sum round separately, as in the NumPy twins (see kernels/common.cuh).
OPTIONS = ("--std=c++17", "--fmad=false")


def kernel_folder() -> Path:
    """The folder of the .cu files: inside an installed package, or beside the package in a checkout.

    Raises:
        FileNotFoundError: there is neither.
    """
    package = Path(__file__).parents[1]
    for folder in (package / "kernels", package.parent / "kernels"):
        if (folder / "common.cuh").is_file():
            return folder
    raise FileNotFoundError(
        f"the CUDA sources are neither in {package / 'kernels'} nor in {package.parent / 'kernels'}; "
        "reinstall fastdp from a wheel or a checkout"
    )


def kernel_names() -> list[str]:
    """The names of the kernel files, without their suffix, sorted."""
    return sorted(path.stem for path in kernel_folder().glob("*.cu"))


def cache_folder() -> Path:
    """The folder of the cubin cache: FASTDP_CACHE_DIR, or the platform's cache folder of this user.

    A user without a home folder has none that is private: the path then is one that can neither be read nor made.
    """
    chosen = settings.cache_dir()
    if chosen is not None:
        return chosen
    home = Path(os.path.expanduser("~"))  # unlike Path.home(), no error where there is none
    if sys.platform == "win32" and "LOCALAPPDATA" in os.environ:
        return Path(os.environ["LOCALAPPDATA"]) / "fastdp" / "Cache"
    if sys.platform not in ("win32", "darwin") and os.environ.get("XDG_CACHE_HOME"):
        return Path(os.environ["XDG_CACHE_HOME"]) / "fastdp"
    if not home.is_absolute():
        return Path(os.devnull) / "no-home-folder"
    if sys.platform == "win32":
        return home / "AppData" / "Local" / "fastdp" / "Cache"
    return home / ("Library/Caches" if sys.platform == "darwin" else ".cache") / "fastdp"


def cubin(name: str, architecture: int, compiler: nvrtc.Nvrtc | None = None) -> bytes:
    """The machine code of one kernel file for one architecture, from the cache or newly compiled.

    Args:
        name: the file's name without suffix, such as "slice_rows".
        architecture: the GPU's compute capability, such as 90.
        compiler: the NVRTC to use; None loads the best one of this machine.

    Safe from several threads and processes: a cache file appears whole or not at all. If the cache cannot be written,
    a warning says so once, and every process compiles the code.

    Raises:
        ValueError: the compiler does not know the architecture.
        NvrtcNotFoundError, NvrtcError: see fastdp.launch.nvrtc.
    """
    compiler = compiler or nvrtc.load()
    if architecture not in compiler.architectures:
        raise ValueError(
            f"architecture=sm_{architecture} is not among those of NVRTC {_version(compiler)}: "
            f"{', '.join(f'sm_{a}' for a in compiler.architectures)}; install an NVRTC that knows it"
        )
    source, headers = _sources(name)
    options = (*OPTIONS, f"--gpu-architecture=sm_{architecture}")
    path = cache_folder() / f"{name}-sm_{architecture}-{_digest(source, headers, options, compiler)}.cubin"
    try:
        return path.read_bytes()
    except FileNotFoundError:
        pass
    except OSError as error:
        _warn_without_cache(path.parent, str(error))
    code = compiler.compile(source, name=f"{name}.cu", headers=headers, options=options)
    try:
        _write_whole(path, code)
    except OSError as error:
        _warn_without_cache(path.parent, str(error))
    return code


def _sources(name: str) -> tuple[str, dict[str, str]]:
    """A kernel file's text and all headers by name."""
    folder = kernel_folder()
    headers = {path.name: path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.cuh"))}
    return (folder / f"{name}.cu").read_text(encoding="utf-8"), headers


def _digest(source: str, headers: dict[str, str], options: tuple[str, ...], compiler: nvrtc.Nvrtc) -> str:
    parts = (_version(compiler), *options, source, *(part for item in headers.items() for part in item))
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def _version(compiler: nvrtc.Nvrtc) -> str:
    return "{}.{}".format(*compiler.version)


def _write_whole(path: Path, code: bytes) -> None:
    """Write to a temporary file in the same folder, then rename it, so that readers never see a partial file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".part")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(code)
        os.replace(temporary, path)
    except OSError:
        Path(temporary).unlink(missing_ok=True)
        raise


@functools.cache
def _warn_without_cache(folder: Path, reason: str) -> None:
    warnings.warn(
        f"fastdp cannot keep compiled kernels in {folder} ({reason}): each process compiles them anew. "
        "Set FASTDP_CACHE_DIR to a folder that can be written.",
        RuntimeWarning,
        stacklevel=3,
    )
