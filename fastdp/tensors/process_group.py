"""The processes of a torchrun, connected by torch.distributed's gloo: `Processes` over host memory."""

from __future__ import annotations

import atexit
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from fastdp.buffers import storage_dtype
from fastdp.comm.host.reduction import sum_by_shards, sum_in_order
from fastdp.comm.processes import Processes, launched
from fastdp.comm.transport import SIXTEEN_BITS, Transport, narrowed, widened
from fastdp.comm.tree import join_branches
from fastdp.errors import ProcessError
from fastdp.tensors.wire import dumps, loads

SLICE = 0.5  # seconds between two looks of a thread that waits, so that interrupts and failures reach it
PATIENCE = 5.0  # seconds in which the others say where they are, after one was lost
INLINE = 4096  # bytes of a gathered value that need no second round
JOIN_TIMEOUT = 300.0

_lock = threading.Lock()
_joined: dict[int, ProcessGroups] = {}  # by process id: a forked child does not talk for its parent


def join() -> ProcessGroups | None:
    """This process's connection to the others that torchrun has started; None if there are none."""
    rank, size = launched()
    if size == 1:
        return None
    with _lock:
        if os.getpid() not in _joined:
            _joined[os.getpid()] = ProcessGroups(rank, size)
        return _joined[os.getpid()]


class _Begun:
    """A collective under way."""

    def __init__(self, work: Any) -> None:
        self.work = work


class ProcessGroups(Processes):
    """All processes of this torchrun.

    Gradients have a group of their own, since they are summed while replicas exchange values by the other one.

    Raises:
        ValueError: MASTER_ADDR or MASTER_PORT is missing.
        ProcessError: not all processes come.
    """

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self._store: Any = _store(rank, size)
        self._generation = 0
        self._broken = ""  # what has gone wrong: an error would keep its frames, and by them gloo's work, to the end
        self._failed_in = -1
        self._connect()
        atexit.register(self._leave)

    def _connect(self) -> None:
        """Make the groups of the present generation."""
        store = dist.PrefixStore(str(self._generation), self._store)
        limit = timedelta(seconds=JOIN_TIMEOUT)
        try:
            self._talk: Any = dist.ProcessGroupGloo(dist.PrefixStore("talk", store), self.rank, self.size, limit)
            self._sums: Any = dist.ProcessGroupGloo(dist.PrefixStore("sums", store), self.rank, self.size, limit)
        except RuntimeError as error:
            raise ProcessError(
                f"Process {self.rank} of {self.size} could not connect to all others within {JOIN_TIMEOUT:g} seconds: "
                f"{error}"
            ) from error
        self._inbox = torch.zeros(self.size, INLINE, dtype=torch.uint8)

    # Values.

    def gather(self, value: Any, what: str, timeout: float, known: Sequence[object] = ()) -> list[Any]:
        """In one round if the values are small, else in two."""
        self._check()
        data = dumps((what, value), known)
        head = torch.zeros(INLINE, dtype=torch.uint8)
        head[:8] = torch.from_numpy(np.array([len(data)], np.int64).view(np.uint8))
        fits = min(len(data), INLINE - 8)
        head[8 : 8 + fits] = torch.frombuffer(bytearray(data), dtype=torch.uint8)[:fits]
        rows = list(torch.zeros(self.size, INLINE, dtype=torch.uint8))
        self._wait(self._start(self._talk.allgather, [rows], [head]), timeout, what)
        lengths = [int(row[:8].view(torch.int64)) for row in rows]
        longest = max(lengths)
        if longest > INLINE - 8:
            whole = torch.zeros(longest, dtype=torch.uint8)
            whole[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
            rows = list(torch.zeros(self.size, longest, dtype=torch.uint8))
            self._wait(self._start(self._talk.allgather, [rows], [whole]), timeout, what)
        else:
            rows = [row[8:] for row in rows]
        every = []
        for rank, (row, length) in enumerate(zip(rows, lengths, strict=True)):
            if rank == self.rank:
                every.append(value)
                continue
            theirs, found = loads(row[:length].numpy().tobytes(), known)
            if theirs != what:
                raise ProcessError(
                    f"The processes do different things: process {self.rank} is at {what}, process {rank} at {theirs}. "
                    "Every process must make the same steps in the same order: let all of them call fit, evaluate, "
                    "predict and train steps alike, with the same batches."
                )
            every.append(found)
        return every

    def share(self, array: np.ndarray, bounds: Sequence[int], timeout: float, what: str) -> None:
        """By one broadcast of each process's rows."""
        self._check()
        flat = torch.from_numpy(array.reshape(array.shape[0], -1).view(np.uint8))
        works = []
        for rank in range(self.size):
            options = dist.BroadcastOptions()
            options.rootRank = rank
            part = flat[bounds[rank] : bounds[rank + 1]]
            if part.numel():
                works.append(self._start(self._talk.broadcast, [part], options))
        for work in works:
            self._wait(work, timeout, what)

    # Gradients.

    def sum(self, array: np.ndarray, dtype: str, *, transport: Transport | None = None) -> Callable[[float, str], None]:
        """16-bit floats are summed in fp32 and rounded once."""
        self._check()
        if transport is not None and dtype in ("float32", "float64"):
            return self._sum_of_halves(array, transport)
        wide = widened(array, dtype) if dtype in SIXTEEN_BITS else array
        numbers = wide.view(_real(wide.dtype)) if np.iscomplexobj(wide) else wide
        work = self._start(self._sums.allreduce, [torch.from_numpy(numbers)])

        def wait(timeout: float, what: str) -> None:
            self._wait(work, timeout, what)
            if wide is not array:
                array[...] = narrowed(wide, dtype)

        return wait

    def _sum_of_halves(self, array: np.ndarray, transport: Transport) -> Callable[[float, str], None]:
        """Each process adds one part up, in rank order, and gives the sum to all."""
        each = -(-array.size // self.size)
        given, taken = (np.zeros((self.size, each), storage_dtype(transport.dtype)) for _ in range(2))
        given.reshape(-1)[: array.size] = transport.rounded(array)
        work = self._start(self._sums.alltoall_base, _bytes(taken), _bytes(given), [], [])

        def wait(timeout: float, what: str) -> None:
            self._wait(work, timeout, what)
            total = transport.added(list(taken), sum_in_order)
            parts = [torch.zeros(2 * each, dtype=torch.uint8) for _ in range(self.size)]
            self._wait(
                self._start(self._sums.allgather, [parts], [_bytes(narrowed(total, transport.dtype))]), timeout, what
            )
            array[...] = widened(torch.cat(parts).numpy().view(taken.dtype)[: array.size], transport.dtype)

        return wait

    def sum_branches(
        self,
        own: Sequence[np.ndarray],
        every: Sequence[Sequence[tuple[int, int]]],
        dtype: str,
        *,
        transport: Transport | None = None,
    ) -> Callable[[float, str], None]:
        """Each process adds one part of all vectors up, and gives the sum to all."""
        self._check()
        travels = transport if dtype in ("float32", "float64") else None
        wire = travels.dtype if travels is not None else dtype
        size, kind = own[0].size, storage_dtype(wire)
        each = -(-size // self.size)
        given = np.zeros((self.size, len(own), each), kind)
        for number, vector in enumerate(own):
            padded = np.zeros(self.size * each, kind)
            padded[:size] = vector if travels is None else travels.rounded(vector)
            given[:, number] = padded.reshape(self.size, each)
        taken = np.zeros((sum(map(len, every)), each), kind)
        lengths = [len(branches) * each * kind.itemsize for branches in every]
        equal = [len(own) * each * kind.itemsize] * self.size
        work = self._start(self._sums.alltoall_base, _bytes(taken), _bytes(given), lengths, equal)

        def wait(timeout: float, what: str) -> None:
            self._wait(work, timeout, what)
            places = [branch for branches in every for branch in branches]
            total = _in_tree(dict(zip(places, taken, strict=True)), wire, travels)
            parts = [torch.zeros(total.nbytes, dtype=torch.uint8) for _ in range(self.size)]
            self._wait(self._start(self._sums.allgather, [parts], [_bytes(total)]), timeout, what)
            whole = torch.cat(parts).numpy().view(kind)[:size]
            own[0][...] = whole if travels is None else widened(whole, wire)

        return wait

    def copy_first(self, array: np.ndarray) -> Callable[[float, str], None]:
        """By a broadcast of the bytes."""
        self._check()
        work = self._start(self._sums.broadcast, [_bytes(array)])
        return lambda timeout, what: self._wait(work, timeout, what)

    # Failures.

    def fail(self, error: BaseException, step: int) -> None:
        """Leaves a note for the others, and closes the connections, which ends their waits."""
        if self._broken and self._failed_in >= 0:
            return
        self._failed_in = step
        text = f"step {step}: {type(error).__name__}: {error}"
        self._broken = f"Process {self.rank} failed in {text}"
        self._note("failed", text)
        self._close()

    def recover(self, timeout: float) -> None:
        """Connects again if every process has failed in the same step, and rolled it back."""
        if not self._broken:
            return
        steps = [self._failed_in]
        for rank in range(self.size):
            if rank != self.rank:
                text = self._read(rank, "failed", max(timeout, 4 * PATIENCE))  # it may still ask who is there
                steps.append(int(text.split(":")[0].removeprefix("step ")) if text else -2)
        if len(set(steps)) > 1:
            raise ProcessError(
                f"{self._broken} The processes are not at the same step any more, so this training cannot go on. End "
                "all of them, and start again from a checkpoint (torchrun --max-restarts does so)."
            )
        self._generation += 1
        self._connect()
        self._broken, self._failed_in = "", -1

    def _check(self) -> None:
        if self._broken:
            raise ProcessError(self._broken)

    def _start(self, call: Callable[..., Any], *args: Any) -> _Begun:
        """Start a collective."""
        try:
            return _Begun(call(*args))
        except RuntimeError as error:
            raise self._lost(str(error), "a collective") from error

    def _wait(self, begun: _Begun, timeout: float, what: str) -> None:
        """Wait for a collective in slices. It is let go of, since the frames of an error may live to the very end."""
        deadline = time.monotonic() + timeout
        try:
            while True:
                try:
                    begun.work.wait(timedelta(seconds=max(0.001, min(SLICE, deadline - time.monotonic()))))
                    return
                except RuntimeError as error:
                    if begun.work.is_completed():
                        raise self._lost(str(error), what) from error
                    if time.monotonic() >= deadline:
                        raise self._lost(f"not all came within {timeout:g} seconds", what) from error
                self._check()
        finally:
            begun.work = None

    def _lost(self, why: str, what: str) -> ProcessError:
        """The error after a collective that did not end: asks the others where they are."""
        self._note("seen", what)
        told: list[str] = []
        silent: list[str] = []
        deadline = time.monotonic() + PATIENCE
        for rank in range(self.size):
            if rank == self.rank:
                continue
            text = self._last(rank, deadline)
            (told if text else silent).append(f"process {rank} {text}" if text else str(rank))
        failed = [text for text in told if " failed" in text or " has ended" in text]
        if silent:
            many = len(silent) > 1
            failed.append(
                f"process{'es' * many} {' and '.join(silent)} {'do' if many else 'does'} not answer: "
                "killed, hung, or cut off"
            )
        reason = "; ".join(failed or told)
        error = ProcessError(f"Process {self.rank} of {self.size} lost the others at {what}: {reason} ({why}).")
        self._broken = self._broken or str(error)
        return error

    def _last(self, rank: int, deadline: float) -> str:
        """What another process says of itself; empty if it says nothing."""
        while True:
            for kind, words in (("failed", "failed in "), ("left", "has ended its script"), ("seen", "waits at ")):
                text = self._read(rank, kind, 0.0)
                if text:
                    return words + (text if kind != "left" else "")
            if time.monotonic() >= deadline:
                return ""
            time.sleep(0.05)

    def _note(self, kind: str, text: str) -> None:
        """Write a note for the others."""
        key = f"{kind}/{self._generation}/{self.rank}"
        try:
            self._store.set(key, text[:2000])
        except RuntimeError:  # the store's own process is gone, which the others see by themselves
            return

    def _read(self, rank: int, kind: str, timeout: float) -> str:
        """Another process's note; empty if there is none in time."""
        key = f"{kind}/{self._generation}/{rank}"
        deadline = time.monotonic() + timeout
        try:
            while not self._store.check([key]):
                if time.monotonic() >= deadline:
                    return ""
                time.sleep(0.05)
            return self._store.get(key).decode() or " "
        except RuntimeError:
            return ""

    def _close(self) -> None:
        """Close the connections: waits of others end at once."""
        for group in (self._talk, self._sums):
            group.abort()

    def _leave(self) -> None:
        """Tell the others that the script has ended, and end gloo's threads while the interpreter still runs."""
        self._note("left", socket.gethostname())
        if self._broken:
            self._close()
        self._talk = self._sums = self._store = None


def _store(rank: int, size: int) -> Any:
    """The key-value store that torchrun offers, or one that process 0 holds."""
    try:
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    except (KeyError, ValueError) as error:
        raise ValueError(
            "MASTER_ADDR and MASTER_PORT must name process 0's machine and a free port there, beside RANK and "
            f"WORLD_SIZE. Received: {error}. torchrun sets all four."
        ) from None
    holds = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" and not dist.is_initialized()
    limit = timedelta(seconds=JOIN_TIMEOUT)
    try:
        store = dist.TCPStore(host, port, size, holds, limit, wait_for_workers=False, multi_tenant=True)
    except RuntimeError as error:
        raise ProcessError(f"Process {rank} of {size} found no store at {host}:{port}: {error}") from error
    run = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"fastdp/{run}", store)


def _in_tree(sums: Mapping[tuple[int, int], np.ndarray], dtype: str, transport: Transport | None) -> np.ndarray:
    """The sum of the tree over the shards, of vectors as they have travelled. 16-bit ones are rounded once."""
    count = max(stop for _, stop in sums)
    if dtype not in SIXTEEN_BITS:
        with np.errstate(over="ignore", invalid="ignore"):
            return join_branches(sums, count)
    values = [sums[branch] for branch in sorted(sums)]
    if transport is None:
        return sum_by_shards(values, dtype)
    return narrowed(transport.added(values, sum_by_shards), dtype)


def _bytes(array: np.ndarray) -> torch.Tensor:
    """The memory of an array as bytes."""
    return torch.from_numpy(array.reshape(-1).view(np.uint8))


def _real(dtype: np.dtype) -> np.dtype:
    """The dtype of the parts of complex numbers."""
    return np.dtype(f"f{dtype.itemsize // 2}")
