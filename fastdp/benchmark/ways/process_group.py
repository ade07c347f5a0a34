"""A group of processes for DistributedDataParallel: this one is rank 0, starts the others, and says what to train."""

from __future__ import annotations

import contextlib
import datetime
import tempfile
from collections.abc import Callable
from typing import Any, Generic, Protocol, TypeVar

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

TIMEOUT = datetime.timedelta(minutes=15)  # of a collective: another rank may still be compiling
JOIN_SECONDS = 20.0


class Member(Protocol):
    """What a process of the group trains."""

    def train(self, steps: int) -> Any:
        """Train so many steps."""

    def close(self) -> None:
        """Release what it holds."""


MemberT = TypeVar("MemberT", bound=Member)


class ProcessGroup(Generic[MemberT]):
    """Trains in `size` processes at once.

    Args:
        size: number of processes.
        backend: "nccl", with one GPU for each process, or "gloo".
        make: `make(rank)` makes what a process trains, once the group exists. Other processes import its module: a
            function of a module, or a `functools.partial` of one.

    Attributes:
        own: what this process trains.

    The other processes end with this one, and `close` ends them.
    """

    def __init__(self, size: int, backend: str, make: Callable[[int], MemberT]) -> None:
        self._folder = tempfile.TemporaryDirectory()
        join = (f"file://{self._folder.name}/store", size, backend, make)
        context = mp.get_context("spawn")
        self._failures = context.SimpleQueue()
        arguments = ((rank, self._failures, *join) for rank in range(1, size))
        self._others = [context.Process(target=_follow, args=one, daemon=True) for one in arguments]
        try:
            for other in self._others:
                other.start()
            self.own: MemberT = _join(0, *join)
        except BaseException:
            self._kill()
            raise

    def train(self, steps: int) -> None:
        """Train so many steps in all processes, and wait for all of them.

        Raises:
            RuntimeError: another process has failed; the message has its reason.
        """
        try:
            _agreed(steps)
            self.own.train(steps)
            dist.barrier()
        except RuntimeError as error:  # collectives raise it where another process is gone
            for other in self._others:
                other.join(1.0)
            if self._failures.empty():
                raise
            raise RuntimeError(self._failures.get()) from error

    def close(self) -> None:
        """End all processes."""
        with contextlib.suppress(RuntimeError):  # one that has failed does not answer
            _agreed(0)
        for other in self._others:
            other.join(JOIN_SECONDS)
        self.own.close()
        self._kill()

    def _kill(self) -> None:
        """End what still runs, and forget the group."""
        for other in self._others:
            if other.is_alive():
                other.kill()
                other.join(JOIN_SECONDS)
        if dist.is_initialized():
            dist.destroy_process_group()
        self._failures.close()
        self._folder.cleanup()


def _join(rank: int, store: str, size: int, backend: str, make: Callable[[int], MemberT]) -> MemberT:
    """Join the group, and make what this process trains."""
    if backend == "nccl":
        torch.cuda.set_device(rank)
    dist.init_process_group(backend, init_method=store, rank=rank, world_size=size, timeout=TIMEOUT)
    return make(rank)


def _follow(rank: int, failures: Any, store: str, size: int, backend: str, make: Callable[[int], Member]) -> None:
    """Run a rank other than 0: train as many steps as rank 0 announces, until it announces 0."""
    try:
        own = _join(rank, store, size, backend, make)
        while steps := _agreed(0):
            own.train(steps)
            dist.barrier()
        own.close()
    except BaseException as error:
        failures.put(f"rank {rank} of {size}: {type(error).__name__}: {error}")
        raise
    dist.destroy_process_group()


def _agreed(count: int) -> int:
    """Broadcast rank 0's `count` to every rank."""
    number = torch.tensor(count, device="cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.broadcast(number, 0)
    return int(number)
