"""Isolates what compiles steps: a search path of libraries alone, and a private cache for TorchInductor.

TorchInductor keeps machine code in `/tmp/torchinductor_USER`, a name that anybody can guess and take first, and loads
what it finds there. Here its folder is one of fastdp's private folders.
"""

from __future__ import annotations

import atexit
import functools
import importlib
import os
import shutil
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

import torch

from fastdp import private_files
from fastdp.warn import warn_user

INDUCTOR_CACHE = "TORCHINDUCTOR_CACHE_DIR"
FOLDER = "compiled-steps"
# Run by an isolated interpreter, which takes nothing from the current folder, from environment variables or from the
# user's site.
_PROGRAM = """
import sys
sys.path[:] = {paths!r}
from fastdp.capture.compile import isolation, worker
isolation.keep_headers({cache!r})
isolation.keep_instruction_sets({instruction_sets!r})
worker.main(*sys.argv[1:])
"""


def command(*arguments: str, instruction_sets: list[str] | None = None) -> list[str]:
    """The command line of a worker. `instruction_sets`: those of `instruction_sets()`; None: the worker tries them."""
    program = _PROGRAM.format(paths=search_path(), cache=str(cache()), instruction_sets=instruction_sets)
    return [sys.executable, "-I", "-c", program, *arguments]


def keep_headers(folder: str) -> None:
    """Let Inductor in this process keep precompiled headers in a private folder.

    Torch keeps them in its guessable folder, whatever TORCHINDUCTOR_CACHE_DIR says, and compiles them into each step.
    """
    codecache: Any = importlib.import_module("torch._inductor.codecache")
    headers = os.path.join(folder, "precompiled_headers")
    if headers != codecache._HEADER_DIR:
        codecache._HEADER_DIR, codecache._HEADER_LOCK_DIR = headers, os.path.join(headers, "locks")
        codecache._precompile_header.cache_clear()  # it may know paths in the other folder


def instruction_sets() -> list[str]:
    """The CPU's vector instructions for which Inductor's code can be compiled and loaded here, by its names.

    Inductor compiles a test for each once, and starts a process to load it each time that it asks.
    """
    cpu_vec_isa: Any = importlib.import_module("torch._inductor.cpu_vec_isa")
    cpu_vec_isa.pick_vec_isa()
    return [str(one) for one in cpu_vec_isa.valid_vec_isa_list()]


def keep_instruction_sets(names: list[str] | None) -> None:
    """Let Inductor in this process use these vector instructions, which another process has tried; None: it tries."""
    cpu_vec_isa: Any = importlib.import_module("torch._inductor.cpu_vec_isa")
    known = [*cpu_vec_isa.supported_vec_isa_list]
    found = [[one for one in known if str(one) == name] for name in names or ()]
    if names is None or any(len(ones) != 1 for ones in found):  # two sets of ARM have one name, and are not tried
        return
    cpu_vec_isa.valid_vec_isa_list = lambda: [one for (one,) in found]
    for (one,) in found:
        type(one).__bool__ = lambda self: True  # asks for a try


def environment(temporary: Path) -> dict[str, str]:
    """The variables of a worker, whose temporary files, and those of its compilers, go into a folder."""
    return os.environ | {"TMPDIR": str(temporary), INDUCTOR_CACHE: use_cache()}


def search_path() -> list[str]:
    """Where a worker looks for modules: the standard library, fastdp, torch, and what else this process has.

    Left out: the current folder, the folder of the script, and names that depend on the current folder.
    """
    script = getattr(sys.modules.get("__main__"), "__file__", None)
    left_out = {os.path.realpath(os.getcwd()), os.path.realpath(os.path.dirname(script)) if script else ""}
    standard = [path for path in sys.path if _is_standard(path)] or [sysconfig.get_path("stdlib")]
    own = [str(Path(__file__).parents[3]), str(Path(str(torch.__file__)).parents[1])]
    rest = [path for path in sys.path if os.path.isabs(path) and os.path.realpath(path) not in left_out]
    return list(dict.fromkeys([*standard, *own, *rest]))


def _is_standard(path: str) -> bool:
    """Whether an entry of the search path belongs to Python itself."""
    places = {sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib")}
    inside = os.path.dirname(path) in places and not path.endswith("-packages")
    archive = path.endswith(".zip") and os.path.dirname(path) in {os.path.dirname(place) for place in places}
    return path in places or inside or archive


def use_cache() -> str:
    """Let Inductor in this process keep its files in the private folder, and return the folder it uses.

    A folder that the user chose by TORCHINDUCTOR_CACHE_DIR stays. Torch itself sets the variable to its guessable
    folder, which counts as not chosen.
    """
    chosen = os.environ.get(INDUCTOR_CACHE, "")
    guessable = os.path.join(tempfile.gettempdir(), "torchinductor_")
    if not chosen or os.path.abspath(chosen).startswith(guessable):
        os.environ[INDUCTOR_CACHE] = chosen = str(cache())
    return chosen


def cache() -> Path:
    """The private folder of compiled steps, which all processes of the user share.

    Where the user's cache folder is not private, it is a temporary one of this process, and a warning says so.

    Raises:
        OSError: temporary files are not private either.
    """
    path = private_files.cache_folder() / FOLDER
    try:
        return private_files.private_folder(path)
    except OSError as error:
        return _temporary(path, f"{type(error).__name__}: {error}")


@functools.cache
def _temporary(path: Path, reason: str) -> Path:
    folder = temporary_folder("fastdp-steps-")
    atexit.register(_remove, folder, os.getpid())
    warn_user(
        f"fastdp cannot keep compiled steps in {path} ({reason}): this process compiles its own. Set "
        "FASTDP_CACHE_DIR to a folder on a path that only you and root can write to."
    )
    return folder


def temporary_folder(prefix: str) -> Path:
    """Make a private folder for temporary files.

    Raises:
        OSError: it cannot be made, or others could put another in its place.
    """
    folder = Path(tempfile.mkdtemp(prefix=prefix))
    try:
        private_files.check_path(folder)
    except OSError:
        folder.rmdir()
        raise
    return folder


def _remove(folder: Path, process: int) -> None:
    if os.getpid() == process:  # not in a forked one
        shutil.rmtree(folder, ignore_errors=True)
