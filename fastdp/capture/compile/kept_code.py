"""Keeps compiled steps in the user's cache folder: a later process loads them in place of compiling for seconds.

A file is named by a hash of the graph that was compiled, of the cores that its operations use, of all versions, and of
the machine. It begins with the checksum of its content. A file that is not this user's own (`fastdp.private_files`), is
cut, or was changed counts as none.
"""

from __future__ import annotations

import functools
import hashlib
import os
import pickle
import platform
import sys
from contextlib import suppress
from pathlib import Path

import torch

from fastdp import private_files, settings
from fastdp._version import __version__

FOLDER = "step-code"
MOST_FILES, MOST_NBYTES = 200, 1 << 28
_CHECKSUM_NBYTES = 32  # of SHA-256


def name_of(graph: bytes, threads: int) -> str:
    """The file name for the code of a graph, as `to_bytes` gives it, whose operations use `threads` cores."""
    # Not of the bytes: equal graphs are pickled differently if they hold equal objects in place of the same ones.
    return digest(repr(pickle.loads(graph)), threads, machine())


def digest(*parts: object) -> str:
    """A hash of these parts."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:40]


@functools.cache
def machine() -> str:
    """What compiled code depends on besides its graph, as text: versions, the processor, GPUs and options."""
    cpu = ""
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        cpu = "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))
    chosen = {name: one for name, one in os.environ.items() if name.startswith(("TORCHINDUCTOR_", "CXX"))}
    chosen.pop("TORCHINDUCTOR_CACHE_DIR", None)
    gpus = (
        [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    )
    versions = __version__, torch.__version__, torch.version.git_version, sys.version
    return digest(versions, platform.machine(), platform.system(), cpu, gpus, sorted(chosen.items()), os.cpu_count())


def find(name: str) -> bytes | None:
    """The code of this name; None if there is none, or FASTDP_REMEMBER is off."""
    content = found(FOLDER, name, MOST_NBYTES)
    if content is None or len(content) <= _CHECKSUM_NBYTES:
        return None
    checksum, code = content[:_CHECKSUM_NBYTES], content[_CHECKSUM_NBYTES:]
    return code if hashlib.sha256(code).digest() == checksum else None


def keep(name: str, code: bytes) -> None:
    """Keep the code of this name, unless FASTDP_REMEMBER is off or the folder is not private."""
    put(FOLDER, name, hashlib.sha256(code).digest() + code)


def drop(name: str, folder: str = FOLDER) -> None:
    """Remove the file of this name, if there is one."""
    with suppress(OSError), private_files.opened_folder(_path(folder), make=False) as opened:
        private_files.remove(opened, name)


def found(folder: str, name: str, most_nbytes: int) -> bytes | None:
    """The content of a file in a folder of the cache; None where there is none, or FASTDP_REMEMBER is off."""
    if not settings.remembers():
        return None
    with suppress(OSError), private_files.opened_folder(_path(folder), make=False) as opened:
        return private_files.read(opened, name, most_nbytes)
    return None


def put(folder: str, name: str, content: bytes) -> None:
    """Write a file into a folder of the cache, where that is possible, and remove the oldest of too many."""
    if not settings.remembers():
        return
    with suppress(OSError), private_files.opened_folder(_path(folder), make=True) as opened:
        private_files.put(opened, name, content, replace=True)
        private_files.keep_newest(opened, MOST_FILES)


def _path(folder: str) -> Path:
    return private_files.cache_folder() / folder
