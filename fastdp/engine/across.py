"""A step over several processes: whose rows are where, sums of all replicas, and outputs whole everywhere.

Every process runs the same script and gets the same global batch. With at least one row per replica the replicas of all
processes share it: each process takes its own rows, gradients are summed in the process first and between the processes
then. With fewer rows every process runs the whole batch on its own devices, and the gradients of process 0 count.
"""

from __future__ import annotations

import importlib
import os
import threading
import zlib
from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from typing import Any

import numpy as np

from fastdp.buffers import Bucket, FlatBuffers
from fastdp.checkpoint.generators import read_generators, write_generators
from fastdp.comm.batch import Batch
from fastdp.comm.processes import Processes, ProcessesRendezvous, ending, several
from fastdp.comm.rendezvous import Rendezvous
from fastdp.comm.scatter_merge import Merger
from fastdp.comm.transport import SIXTEEN_BITS, Transport
from fastdp.comm.tree import branches
from fastdp.comm.turns import Turn
from fastdp.options import Options
from fastdp.program.base import Program, Result
from fastdp.runtime.queue import QueueDevice
from fastdp.shard import Rows, dealt_rows

JOIN_TIMEOUT = 600.0  # seconds in which all processes must have built their models
SAMPLED = 64  # numbers of each row that tell whether processes have the same batch
_seeded: set[int] = set()  # ids of processes whose generators are those of process 0


def processes() -> Processes | None:
    """This process's connection to the others of its torchrun; None without any.

    Raises:
        ValueError, ProcessError: they cannot be connected.
    """
    if not several():
        return None
    found: Processes | None = importlib.import_module("fastdp.tensors.process_group").join()
    return found


def all_replicas(here: int) -> int:
    """The number of replicas of all processes, of which this one has so many. All processes must call it."""
    connected = processes()
    return here if connected is None else sum(connected.gather(here, "making replicas", JOIN_TIMEOUT))


def connect(devices: Sequence[QueueDevice], options: Options, transport: Transport | None) -> Across | None:
    """The replicas of all processes of this torchrun; None where there is one process. Arguments as of `Across`."""
    connected = processes()
    return None if connected is None else Across(connected, devices, options, transport)


class Across:
    """The replicas of all processes, as this process sees them.

    Args:
        connected: connects the processes.
        devices: this process's devices.
        options: `timeout` is for another process.
        transport: how gradients travel there; None: as they are.

    Attributes:
        first: the rank of this process's first replica.
        size: the number of all replicas.

    Raises:
        NotImplementedError: the devices are GPUs.
        ValueError: the processes have unequal numbers of devices, and share shards.
    """

    def __init__(
        self, connected: Processes, devices: Sequence[QueueDevice], options: Options, transport: Transport | None
    ) -> None:
        if devices[0].on_gpu:
            raise NotImplementedError(
                f"Several processes train together on virtual devices only, so far. Received: {list(devices)} in "
                f"process {connected.rank} of {connected.size}. Start one process per box without torchrun."
            )
        self.processes, self.timeout, self.transport = connected, options.timeout, transport
        counts = connected.gather(len(devices), "wrapping a model", self.timeout)
        self.bounds = [0, *accumulate(counts)]
        self.first, self.size = self.bounds[connected.rank], self.bounds[-1]
        self._here = len(devices)
        self.shards = options.shards
        if options.shards is not None and self.size != options.shards:
            raise ValueError(
                f"`shards` needs as many devices in each process. Received: shards={options.shards}, of which the "
                f"processes run {counts}. Give the same gpus= to each."
            )
        self.steps = 0
        if os.getpid() not in _seeded:  # unseeded scripts must draw alike
            every = connected.gather(read_generators(), "the random generators", self.timeout)
            write_generators(every[0])
            _seeded.add(os.getpid())

    def copy_first(self, flats: Sequence[FlatBuffers]) -> None:
        """Give these buffers the values that they have in process 0. Between steps."""
        buffers = [buffer for flat in flats for buffer in flat.buffers.values()]
        for wait in [self.processes.copy_first(buffer) for buffer in buffers]:
            wait(self.timeout, "the first values of a model")

    def check_equal(self, flats: Sequence[FlatBuffers]) -> None:
        """Compare the values of these buffers between the processes.

        Raises:
            RuntimeError: they differ.
        """
        mine = [zlib.crc32(np.asarray(buffer).tobytes()) for flat in flats for buffer in flat.buffers.values()]
        every = self.processes.gather(mine, "check_replicas", self.timeout)
        wrong = [rank for rank, theirs in enumerate(every) if theirs != every[0]]
        if wrong:
            raise RuntimeError(
                f"The variables or slots of process {wrong[0]} differ from those of process 0. Did the script of one "
                "process change weights alone? Otherwise this is a bug in fastdp or in the program's update."
            )

    def step(self, batch: Batch, kind: str, most: int, program: Program) -> StepAcross:
        """A step that begins. `most`: how many replicas may share it."""
        self.processes.recover(self.timeout)
        self.steps += 1
        return StepAcross(self, batch, kind, most, program.known_parts())


class StepAcross:
    """One step, as part of that of all processes. Made by `Across.step`.

    Attributes:
        shards: the rows of this process's replicas.
        first, size: the rank of the first of them, and the number of all replicas that share the batch.
    """

    def __init__(self, across: Across, batch: Batch, kind: str, most: int, known: Sequence[object]) -> None:
        self._across, self._processes = across, across.processes
        self._known = known
        self.bounds = _bounds(across, batch.rows, most)
        self.shared = self.bounds is not None
        every = batch.deal(min(most, across._here) if self.bounds is None else self.bounds[-1])
        self.first, last = 0, len(every)
        if self.bounds is not None:
            self.first, last = self.bounds[self._processes.rank : self._processes.rank + 2]
        self.size = len(every)
        self.shards: Sequence[Rows] = every[self.first : last]
        self._rows, self._number = batch.rows, across.steps
        self._trains = kind in ("train", "backward")
        self._what = f"a {kind} step of {batch.rows} rows"
        self._mark = _sample(batch.arrays)

    def rendezvous(self, timeout: float, names: Sequence[str], turns: Sequence[Turn | None]) -> Rendezvous:
        """Where the replicas that share the step meet."""
        if not self.shared:
            return Rendezvous(len(self.shards), timeout, names, turns)
        return ProcessesRendezvous(self._processes, len(self.shards), timeout, names, self._known, turns)

    @property
    def counts_here(self) -> bool:
        """Whether the gradients of this process count."""
        return self.shared or self._processes.rank == 0

    def everybody(self, results: list[Result]) -> list[Result]:
        """The results of all replicas that count, in rank order. Waits for the other processes.

        Raises:
            ValueError: they have other batches.
        """
        if not (self.shared or self._trains):
            return results
        mine = self._mark, ending.here, [(result.sums, result.notes) for result in results]
        every = self._processes.gather(mine, self._what, self._across.timeout, self._known)
        self._check([mark for mark, *_ in every])
        ending.agreed = ending.agreed or any(told for _, told, _ in every)
        found = [one for *_, theirs in every[: None if self.shared else 1] for one in theirs]
        return [Result([], sums, notes) for sums, notes in found]

    def _check(self, marks: Sequence[int]) -> None:
        wrong = [rank for rank, mark in enumerate(marks) if mark != marks[0]]
        if wrong:
            raise ValueError(
                f"Process {wrong[0]} has another batch than process 0 in {self._what}. Every process must make the "
                "same global batches, in the same order, of which fastdp gives it its rows: leave out a "
                "DistributedSampler, and seed what shuffles or augments alike on all processes."
            )

    def merger(self, devices: Sequence[QueueDevice], target: QueueDevice, *, on_host: bool) -> Merger:
        """What collects the outputs."""
        if not self.shared:
            return Merger(self.shards, devices, target, on_host=on_host)
        return _ProcessesMerger(self, devices, target, on_host=on_host)

    def reduction(self, gradients: Sequence[FlatBuffers], buckets: Sequence[Bucket]) -> ProcessReduction:
        """The reduction of this process's sums over all processes."""
        return ProcessReduction(self._across, gradients, buckets, self._what, self.bounds)

    @property
    def is_full(self) -> bool:
        """Whether all replicas of all processes have rows."""
        return self.size == self._across.size

    def fail(self, error: BaseException) -> None:
        """This process gives the step up."""
        self._processes.fail(error, self._number)


class _ProcessesMerger(Merger):
    """Merges the outputs of all processes, so that each has them whole. Arguments as of `Merger`."""

    def __init__(self, step: StepAcross, devices: Sequence[QueueDevice], target: QueueDevice, *, on_host: bool) -> None:
        super().__init__(step.shards, devices, target, on_host=on_host)
        self._step = step

    def result(self) -> list[np.ndarray]:
        """Waits for the rows of the other processes."""
        assert self._merged is not None, "no replica has written its outputs"
        across, what = self._step._across, f"the outputs of {self._step._what}"
        scalars = [parts for merged, parts in zip(self._merged, self._scalars, strict=True) if merged.ndim == 0]
        assert self._step.bounds is not None
        every = dealt_rows(self._shards[0].total, self._step.size)
        if scalars:
            gathered = across.processes.gather(scalars, what, across.timeout)
            everyone = iter([[part for one in gathered for part in one[i]] for i in range(len(scalars))])
        for merged in self._merged:
            if merged.ndim == 0:
                merged[...] = self._mean(next(everyone), every)
                continue
            per_row = merged.shape[0] // self._shards[0].total
            starts = [every[rank].start * per_row for rank in self._step.bounds[:-1]]
            across.processes.share(merged, [*starts, merged.shape[0]], across.timeout, what)
        return self._merged


class ProcessReduction:
    """Sums a process's gradients over all processes, bucket by bucket in one order, while later ones are computed.

    Args:
        across: the processes.
        gradients: of this process's replicas. The first has the sum of this process, which becomes that of all.
        buckets: all buckets.
        what: as in `Processes.gather`.
        bounds: where each process's replicas begin, and their number; None if the gradients of process 0 count.

    With shards, replicas have the sums of the branches of their tree, each in its first replica's memory; nothing is
    summed that is rounded to 16 bits.
    """

    def __init__(
        self,
        across: Across,
        gradients: Sequence[FlatBuffers],
        buckets: Sequence[Bucket],
        what: str,
        bounds: Sequence[int] | None,
    ) -> None:
        self._across, self._gradients, self._buckets, self._what = across, gradients, buckets, what
        self._bounds = bounds
        self._lock = threading.Lock()
        self._complete: set[int] = set()
        self._waits: list[Callable[[float, str], None]] = []
        self.early = 0

    def complete(self, number: int) -> None:
        """A bucket holds this process's sum. On any thread."""
        with self._lock:
            self._complete.add(number)
            while len(self._waits) in self._complete:
                self._start()
                self.early += 1

    def finish(self) -> None:
        """Sum the rest, and wait for all."""
        with self._lock:
            while len(self._waits) < len(self._buckets):
                self._start()
        for wait in self._waits:
            wait(self._across.timeout, f"the gradients of {self._what}")

    def _start(self) -> None:
        bucket, connected = self._buckets[len(self._waits)], self._across.processes
        part, transport = slice(bucket.start, bucket.stop), self._across.transport
        first = self._gradients[0].buffers[bucket.dtype][part]
        if self._across.shards is None:
            self._waits.append(connected.sum(first, bucket.dtype, transport=transport))
        elif self._bounds is None:
            self._waits.append(connected.copy_first(first))
        else:
            single = transport is not None or bucket.dtype in SIXTEEN_BITS
            every = [local_branches(self._bounds, rank, single=single) for rank in range(connected.size)]
            start = self._bounds[connected.rank]
            own = [self._gradients[at - start].buffers[bucket.dtype][part] for at, _ in every[connected.rank]]
            self._waits.append(connected.sum_branches(own, every, bucket.dtype, transport=transport))


def local_branches(bounds: Sequence[int], rank: int, *, single: bool = False) -> list[tuple[int, int]]:
    """The branches of the tree over all shards that a process has whole; or its shards one by one."""
    first, last = bounds[rank], bounds[rank + 1]
    return [(at, at + 1) for at in range(first, last)] if single else branches(bounds[-1], first, last)


def _bounds(across: Across, rows: int, most: int) -> list[int] | None:
    """Where the replicas of each process begin in a step, and their number; None if every process runs the whole batch.

    Raises:
        NotImplementedError: shards that have rows can neither be given to all processes nor run in one.
    """
    if min(rows, most) >= across.size:
        return across.bounds
    counts = [stop - start for start, stop in pairwise(across.bounds)]
    active = min(rows, most)
    if across.shards is None or active <= min(counts):
        return None
    if active < len(counts):
        raise NotImplementedError(
            f"`shards` across {len(counts)} processes needs a batch of at least {len(counts)} rows, or of at most "
            f"{min(counts)}. Received: {rows} rows. Leave the last rows out (drop_last=True), or use fewer processes."
        )
    while sum(counts) > active:  # the last process that has most gives one up
        counts[len(counts) - 1 - counts[::-1].index(max(counts))] -= 1
    return [0, *accumulate(counts)]


def _sample(arrays: Any) -> int:
    """A number that differs if the rows of host arrays differ: of some numbers of each row."""
    mark = 0
    for array in arrays if isinstance(arrays, (list, tuple)) else ():
        if isinstance(array, np.ndarray) and array.dtype != object and array.ndim:
            flat = array.reshape(array.shape[0], -1)
            step = max(1, flat.shape[1] // SAMPLED)
            mark = zlib.crc32(np.ascontiguousarray(flat[:, ::step]).tobytes(), mark)
    return mark
