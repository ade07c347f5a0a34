"""A device that is a process on the CPU: runs kernels/*.cu, compiled by g++, under a sanitizer.

Its memory is the process's, so addresses mean nothing here, as on a GPU. It is a fastdp.launch.Launcher, so the
typed functions run against it unchanged: what they pack is what the compiled kernels read.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import hashlib
import os
import shutil
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from fastdp.launch import Kernels
from fastdp.launch.cubin import kernel_folder, kernel_names

HERE = Path(__file__).parent
WARNINGS = ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
# No contraction: the kernels are compiled with --fmad=false for the GPU as well.
FLAGS = ["-std=c++17", "-O1", "-g", "-ffp-contract=off", "-fno-strict-aliasing", "-fno-sanitize-recover=all"]
ADDRESS = "address,undefined"
THREAD = "thread"
LOOP, CONCURRENT = 0, 1  # the runner's launch modes


def build_runner(folder: Path, sanitizer: str, files: list[str] | None = None) -> Path:
    """The runner with kernel files (all where None), compiled into `folder` where it is not there yet.

    Of several test processes that ask at once, each compiles some of the files.
    """
    flags = [*WARNINGS, *FLAGS, f"-fsanitize={sanitizer}"]
    shared = [HERE / "host_cuda.h", *sorted(kernel_folder().glob("*.cuh"))]
    kernel = ["-x", "c++", "-include", str(HERE / "host_cuda.h")]
    names = files or kernel_names()
    objects: dict[str, Path | None] = {}
    for wait in (False, True):  # first those that no other process compiles
        for name in names:
            if objects.get(name) is None:
                source = [kernel_folder() / f"{name}.cu"]
                objects[name] = _built(folder, [*flags, *kernel, "-c"], source, shared, wait=wait)
    return _built(folder, [*flags, "-pthread"], [HERE / "runner.cpp", *(objects[name] for name in names)], shared)


def _built(
    folder: Path, flags: list[str], sources: list[Path], shared: list[Path], *, wait: bool = True
) -> Path | None:
    """What g++ makes of the sources, kept under a name made of all that it depends on.

    None where another process is making it, unless `wait`.
    """
    compiler = shutil.which("g++")
    assert compiler is not None
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True).stdout
    parts = [version, " ".join(flags).encode(), *(path.read_bytes() for path in [*sources, *shared])]
    digest = hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]
    target = folder / f"{sources[0].stem}-{digest}"
    if target.exists():
        return target
    with (folder / f"{target.name}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            return None
        if not target.exists():
            part = folder / f"{target.name}-{os.getpid()}"
            command = [compiler, *flags, *(str(path) for path in sources)]
            done = subprocess.run([*command, "-o", str(part)], capture_output=True, text=True, check=False)
            assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr}"
            os.replace(part, target)
    return target


class HostDevice:
    """One runner process."""

    def __init__(self, runner: Path, log: Path, sm_count: int = 3) -> None:
        self._runner, self._log = runner, log
        self._live: list[int] = []
        self._start()
        self.kernels = Kernels(self, 90, sm_count, compile_file=lambda name, _: name.encode())
        self.launches: list[tuple[str, int, int, ctypes.Structure]] = []

    def _start(self) -> None:
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [str(self._runner)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env={**os.environ, "TSAN_OPTIONS": "halt_on_error=1"},  # in the test that it happens in
            )

    # fastdp.launch.Launcher

    def load(self, cubin: bytes) -> bytes:
        return cubin

    def function(self, module: bytes, name: str) -> str:
        return name

    def launch(self, function: str, grid: int, block: int, args: ctypes.Structure, stream: int) -> None:
        mode = CONCURRENT if function.startswith(("all_reduce", "reduce_scatter")) else LOOP
        self.launches.append((function, grid, block, args))
        name, packed = function.encode(), bytes(args)
        size = self._ask(
            b"L"
            + struct.pack("<I", len(name))
            + name
            + struct.pack("<5I", grid, block, mode, stream, len(packed))
            + packed
        )
        assert size == len(packed), f"{function} takes {size} bytes of arguments and was given {len(packed)}"

    # memory

    def empty(self, nbytes: int, lead: int = 0) -> int:
        """Address of poisoned memory, `lead` bytes past a 16-byte boundary and with a guard zone before."""
        address = self._ask(b"A" + struct.pack("<QQ", nbytes, 16 + lead))
        self._live.append(address)
        return address

    def put(self, array: np.ndarray, lead: int = 0) -> int:
        """Address of a copy of the array."""
        address = self.empty(array.nbytes, lead)
        self.write(address, array)
        return address

    def write(self, address: int, array: np.ndarray) -> None:
        data = np.ascontiguousarray(array).tobytes()
        self._ask(b"W" + struct.pack("<QQ", address, len(data)) + data)

    def get(self, address: int, like: np.ndarray) -> np.ndarray:
        """The array at this address, of the shape and dtype of `like`, after all launches."""
        self.synchronize()
        self._send(b"R" + struct.pack("<QQ", address, like.nbytes))
        return np.frombuffer(self._receive(like.nbytes), like.dtype).reshape(like.shape).copy()

    def synchronize(self) -> None:
        """Run what was launched: each stream by its own thread."""
        self._ask(b"S")

    @contextlib.contextmanager
    def scope(self) -> Iterator[HostDevice]:
        """Free at the end what was allocated inside, after checking the guard zones.

        A process that a sanitizer ended in an earlier scope is replaced.
        """
        if self._process.poll() is not None:
            self._drop()
            self._start()
        self._live.clear()
        self.launches.clear()
        yield self
        self.synchronize()
        damaged = [address for address in self._live if self._ask(b"F" + struct.pack("<Q", address))]
        self._live.clear()
        assert not damaged, "bytes before an allocation were written"

    def close(self) -> None:
        """End the process; a leak or a race found at its end is an error."""
        self._drop()
        assert self._process.returncode == 0, self._report()

    def _drop(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait(timeout=60)
        self._process.stdout.close()

    def _ask(self, message: bytes) -> int:
        self._send(message)
        return struct.unpack("<Q", self._receive(8))[0]

    def _send(self, message: bytes) -> None:
        try:
            self._process.stdin.write(message)
            self._process.stdin.flush()
        except BrokenPipeError:
            raise AssertionError(self._report()) from None

    def _receive(self, nbytes: int) -> bytes:
        data = self._process.stdout.read(nbytes)
        assert len(data) == nbytes, self._report()
        return data

    def _report(self) -> str:
        self._process.wait(timeout=60)
        report = self._log.read_text(errors="replace")
        return f"the device ended with {self._process.returncode}:\n{report[:6000]}"
