"""Builds CuPy's own binding against a CUDA runtime of our own, in a folder named after all that it is made of.

CuPy's wheels hold a static CUDA runtime, which wants a real driver. The rest of CuPy does not. So one module of the
wheel, `cupy_backends.cuda.api.runtime`, is exchanged for the same one, translated from CuPy's source distribution of
the same version and linked against the machine of this folder, which is `libcuda.so.1` as well.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
HOST_CUDA = HERE.parent.parent / "kernels" / "host_cuda.h"
SECONDS = 200.0  # that fetching and building may take
# Cython as CuPy 14.2 asks for it, and the headers of the runtime in its wheels for CUDA 12.
CYTHON, HEADERS = "cython==3.2.4", "nvidia-cuda-runtime-cu12==12.9.79"
CUDA_VERSION = 12090
FLAGS = ["-std=c++17", "-O2", "-fPIC", "-pthread", "-ffp-contract=off", "-fno-strict-aliasing"]
WARNINGS = ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
# Entry points of the binding that fastdp does not use: each says its name and that it is not supported.
STUB = 'extern "C" int NAME(...) { rig::violation("NAME is not modelled"); return 801; }\n'


class NotToBeHad(Exception):
    """What the rig is made of cannot be had here; the message says what and why."""


def built() -> Path:
    """The folder with the rig: `site` for sys.path, `lib` for the loader, `cache` for compiled kernels.

    Raises:
        NotToBeHad: there is no g++, or the packages cannot be fetched.
        RuntimeError: the sources of this folder do not compile.
    """
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        raise NotToBeHad(f"the rig is for Linux on x86-64, and this is {platform.system()} on {platform.machine()}")
    if shutil.which("g++") is None:
        raise NotToBeHad("g++ is not installed")
    rigs = ROOT / "build" / "rig"
    rigs.mkdir(parents=True, exist_ok=True)
    folder = rigs / _digest()
    with (rigs / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / ".built").exists():
            for old in rigs.iterdir():
                if old.is_dir() and old.name != "packages":
                    shutil.rmtree(old)
            _build(folder, _packages(rigs / "packages"))
    return folder


def environment(folder: Path, cards: int, **more: str) -> dict[str, str]:
    """The environment of a process with so many cards of the rig; `more` is added."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "CUDA_", "NCCL_"))}
    return {
        **kept,
        "PYTHONPATH": os.pathsep.join([str(folder / "site"), str(ROOT), str(HERE)]),
        "LD_LIBRARY_PATH": str(folder / "lib"),
        "CUDA_PATH": str(folder.parent / "packages" / "headers" / "nvidia" / "cuda_runtime"),
        "CUPY_CACHE_DIR": str(folder / "cache"),
        "FASTDP_CACHE_DIR": str(folder / "cache"),
        "RIG_GPUS": str(cards),
        **more,
    }


def _cupy_version() -> str:
    """The version of CuPy that constraints.txt pins."""
    found = re.search(r"^cupy-cuda12x==(\S+)", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
    assert found is not None
    return found[1]


def _digest() -> str:
    """A name made of all that the rig is made of."""
    kernels = sorted((ROOT / "kernels").iterdir())
    sources = [Path(__file__), HOST_CUDA, *sorted(HERE.rglob("*.h")), *sorted(HERE.glob("*.cpp")), *kernels]
    parts = [sys.version.encode(), *(path.read_bytes() for path in sources), _cupy_version().encode()]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def _packages(folder: Path) -> Path:
    """CuPy's wheel and sources, Cython and the headers, fetched by pip unless they are there."""
    version = _cupy_version()
    wanted = f"{version} {CYTHON} {HEADERS} {sys.version}"
    stamp = folder / ".fetched"
    if stamp.exists() and stamp.read_text(encoding="utf-8") == wanted:
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    pins = ["-c", str(ROOT / "constraints.txt")]
    _pip("install", *pins, "--target", str(folder / "site"), "cupy-cuda12x", "cuda-pathfinder")
    _pip("install", "--target", str(folder / "tools"), CYTHON)
    _pip("install", "--target", str(folder / "headers"), HEADERS)
    # pip looks into a source distribution by its setup.py, which else wants a CUDA toolkit.
    sources = ["--no-binary", ":all:", "--no-build-isolation", "-d", str(folder), f"cupy=={version}"]
    _pip("download", *sources, CUPY_INSTALL_USE_STUB="1")
    with tarfile.open(folder / f"cupy-{version}.tar.gz") as archive:
        wanted_files = [item for item in archive.getmembers() if "/cupy_backends/" in item.name]
        archive.extractall(folder, wanted_files, filter="data")
    (folder / f"cupy-{version}").rename(folder / "cupy")
    stamp.write_text(wanted, encoding="utf-8")
    return folder


def _pip(command: str, *arguments: str, **more: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pip", command, "--quiet", "--disable-pip-version-check", "--no-deps", *arguments],
        env={**os.environ, **more},
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    if done.returncode:
        said = done.stderr.strip().splitlines() or ["no reason given"]
        raise NotToBeHad(f"pip {command} {arguments[-1]} failed: {said[-1]}")


def _build(folder: Path, packages: Path) -> None:
    objects, lib, site = folder / "objects", folder / "lib", folder / "site"
    for made in (objects, lib):
        made.mkdir(parents=True)
    _translate(packages, objects / "binding.cpp")
    headers = packages / "headers" / "nvidia" / "cuda_runtime" / "include"
    include = ["-isystem", str(HERE / "include"), "-isystem", str(headers)]
    # The binding includes CuPy's headers relative to its own folder. It is long, and calls what takes the time.
    python = ["-w", "-O0", "-I", sysconfig.get_path("include"), "-I", str(packages / "cupy/cupy_backends/cuda/api")]
    host = [*WARNINGS, "-I", str(HOST_CUDA.parent)]
    jobs: dict[str, list[str]] = {"binding.o": [*python, *include, str(objects / "binding.cpp")]}
    for source in sorted(HERE.glob("*.cpp")):
        flags = host if source.stem == "kernels" else [*WARNINGS, *include]
        jobs[f"{source.stem}.o"] = [*flags, str(source)]
    for kernel in sorted((ROOT / "kernels").glob("*.cu")):
        jobs[f"{kernel.stem}.o"] = [*host, "-x", "c++", "-include", str(HOST_CUDA), str(kernel)]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda job: _compile(["-c", *job[1], "-o", str(objects / job[0])]), jobs.items()))
    nvml = objects / "nvml.o"
    _compile(["-shared", str(nvml), "-o", str(lib / "libnvidia-ml.so.1")])
    machine = [objects / name for name in jobs if name not in ("binding.o", "nvml.o", "nccl.o")]
    _write_stubs(objects, machine)
    cuda = [str(path) for path in [*machine, objects / "stubs.o"]]
    _compile(["-shared", *cuda, "-Wl,-soname,libcuda.so.1", "-ldl", "-o", str(lib / "libcuda.so.1")])
    _compile(["-shared", str(objects / "nccl.o"), str(lib / "libcuda.so.1"), "-o", str(lib / "libnccl.so.2")])
    shutil.copytree(packages / "site", site, copy_function=os.link)
    (binding,) = site.glob("cupy_backends/cuda/api/runtime.*.so")
    binding.unlink()
    _compile(["-shared", str(objects / "binding.o"), str(lib / "libcuda.so.1"), "-o", str(binding)])
    (folder / ".built").touch()


def _translate(packages: Path, target: Path) -> None:
    """CuPy's runtime.pyx as C++, by Cython in a process of its own."""
    program = f"""
import sys
sys.path.insert(0, {str(packages / "tools")!r})
from Cython.Compiler.Main import CompilationOptions, compile
from Cython.Compiler.Version import version
options = CompilationOptions(
    cplus=True, include_path=["."], output_file={str(target)!r},
    compiler_directives={{"language_level": 3, "embedsignature": True}},
    compile_time_env={{
        "CUPY_USE_CUDA_PYTHON": False, "CUPY_CUFFT_STATIC": False, "CUPY_CYTHON_VERSION": version,
        "CUPY_CUDA_VERSION": {CUDA_VERSION}, "CUPY_HIP_VERSION": 0,
    }},
)
sys.exit(compile(["cupy_backends/cuda/api/runtime.pyx"], options).num_errors)
"""
    command = [sys.executable, "-c", program]
    _ran(subprocess.run(command, cwd=packages / "cupy", capture_output=True, text=True, timeout=SECONDS, check=False))


def _write_stubs(objects: Path, machine: Sequence[Path]) -> None:
    """Definitions of what the binding wants and the machine lacks."""
    missing = _symbols(objects / "binding.o", "--undefined-only").difference(
        *(_symbols(path, "--defined-only") for path in machine)
    )
    stubs = "".join(STUB.replace("NAME", name) for name in sorted(missing))
    source = objects / "stubs.cpp"
    source.write_text(
        f"#include <string>\nnamespace rig {{ void violation(const std::string&); }}\n{stubs}", encoding="utf-8"
    )
    _compile(["-c", str(source), "-o", str(objects / "stubs.o")])


def _symbols(path: Path, which: str) -> set[str]:
    """CUDA's names in an object file."""
    done = subprocess.run(["nm", which, str(path)], capture_output=True, text=True, timeout=60, check=False)
    _ran(done)
    return set(re.findall(r"\b(cuda[A-Z]\w*)$", done.stdout, re.MULTILINE))


def _compile(arguments: Sequence[str]) -> None:
    command = ["g++", *FLAGS, *arguments]
    _ran(subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False))


def _ran(done: subprocess.CompletedProcess[str]) -> None:
    if done.returncode:
        raise RuntimeError(f"{' '.join(done.args)[:500]}\n{done.stderr[-4000:]}")
