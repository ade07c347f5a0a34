"""Compiles the kernels' sources on first use and keeps the cubins on disk, per architecture."""

from __future__ import annotations

import functools
import hashlib
import warnings
from pathlib import Path

from fastdp import private_files
from fastdp.launch import nvrtc

__all__ = ["OPTIONS", "cubin", "kernel_folder", "kernel_names"]

FOLDER = "kernels"
MOST_NBYTES = 1 << 26
CHECKSUM_NBYTES = 32  # SHA-256 of the code, at the head of its file

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


def cubin(name: str, architecture: int, compiler: nvrtc.Nvrtc | None = None) -> bytes:
    """The machine code of one kernel file for one architecture, from the cache or newly compiled.

    Args:
        name: the file's name without suffix, such as "slice_rows".
        architecture: the GPU's compute capability, such as 90.
        compiler: the NVRTC to use; None loads the best one of this machine.

    Safe from several threads and processes: a cache file appears whole or not at all. One that is not this user's own
    (see fastdp.private_files), or whose checksum is wrong, counts as none and is replaced. If the cache cannot be
    written, a warning says so once, and every process compiles the code.

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
    folder = private_files.cache_folder() / FOLDER
    file = f"{name}-sm_{architecture}-{_digest(source, headers, options, compiler)}.cubin"
    kept = _kept(folder, file)
    if kept is not None:
        return kept
    code = compiler.compile(source, name=f"{name}.cu", headers=headers, options=options)
    try:
        with private_files.opened_folder(folder, make=True) as opened:
            private_files.put(opened, file, hashlib.sha256(code).digest() + code, replace=True)
    except OSError as error:
        _warn_without_cache(folder, str(error))
    return code


def _kept(folder: Path, file: str) -> bytes | None:
    """The code in a file of the cache, or None."""
    try:
        with private_files.opened_folder(folder, make=False) as opened:
            content = private_files.read(opened, file, MOST_NBYTES)
    except OSError:
        return None  # writing meets the same error, and reports it
    if content is None or len(content) <= CHECKSUM_NBYTES:
        return None
    checksum, code = content[:CHECKSUM_NBYTES], content[CHECKSUM_NBYTES:]
    return code if hashlib.sha256(code).digest() == checksum else None


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


@functools.cache
def _warn_without_cache(folder: Path, reason: str) -> None:
    warnings.warn(
        f"fastdp cannot keep compiled kernels in {folder} ({reason}): each process compiles them anew. "
        "Set FASTDP_CACHE_DIR to a folder that can be written.",
        RuntimeWarning,
        stacklevel=3,
    )
