"""NCCL in the simulated CUDA: communicators of one process, groups, collectives that meet on their streams."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
from simulated_memory import Range, SimulationError, view
from simulation import CUDARuntimeError, Meeting, Op, Simulation, site

from fastdp.launch import reference as twins

DTYPES = [np.int8, np.uint8, np.int32, np.uint32, np.int64, np.uint64, np.float16, np.float32, np.float64, np.uint16]
BFLOAT16 = 9


class NcclError(RuntimeError):
    """As CuPy's, which knows no names for 7 and 8."""

    NAMES: ClassVar = {
        1: "NCCL_ERROR_UNHANDLED_CUDA_ERROR",
        2: "NCCL_ERROR_SYSTEM_ERROR",
        3: "NCCL_ERROR_INTERNAL_ERROR",
        4: "NCCL_ERROR_INVALID_ARGUMENT",
        5: "NCCL_ERROR_INVALID_USAGE",
        6: "NCCL_ERROR_REMOTE_ERROR",
    }

    def __init__(self, status: int) -> None:
        self.status = status
        super().__init__(f"{self.NAMES[status]}: simulated")


class Gathering:
    """Ranks that do the same things in the same order: the n-th of one meets the n-th of all."""

    def __init__(self, ranks: int) -> None:
        self._counts = [0] * ranks
        self._meetings: dict[int, Meeting] = {}

    def meet(
        self, sim: Simulation, rank: int, op: Op, signature: object, run: Callable[[dict[int, Op]], None]
    ) -> Meeting:
        number = self._counts[rank]
        self._counts[rank] += 1
        meeting = self._meetings.setdefault(number, Meeting(len(self._counts), signature, run))
        if meeting.signature != signature:
            others = ", ".join(other.name for other in meeting.ops.values())
            sim.fail(SimulationError(f"{op.name}: {signature}; other ranks: {meeting.signature} ({others})"))
        meeting.ops[rank] = op
        if len(meeting.ops) == meeting.size:
            del self._meetings[number]
        return meeting


@dataclass(eq=False)
class Clique:
    """The communicators of one initAll."""

    size: int
    gathering: Gathering
    # Outside a group: which communicators each thread has used.
    ungrouped: dict[int, set[int]] = field(default_factory=dict)
    cards: list[int] = field(default_factory=list)


@dataclass(eq=False)
class Comm:
    """One rank."""

    sim: Simulation
    clique: Clique
    rank: int
    device: int
    closed: bool = False
    async_error: int = 0

    def collective(
        self, kind: str, reads: list[Range], writes: list[Range], shape: tuple, reduce: Callable, stream: int
    ) -> None:
        """Enqueue it now, or at the end of the thread's group."""
        sim = self.sim
        if self.closed:
            raise NcclError(4)
        found = sim.streams.get(stream)
        if found is None or found.device != self.device:
            raise NcclError(1)
        place = site()

        def meet(op: Op) -> Meeting:
            def run(ops: dict[int, Op]) -> None:
                reduce([ops[rank] for rank in range(self.clique.size)])

            return self.clique.gathering.meet(sim, self.rank, op, (kind, *shape), run)

        def enqueue() -> None:
            if found.capture is None and sim.in_graphs(self):
                sim.fail(SimulationError(f"{kind} at {place} is eager, on a communicator that is in a graph"))
            name = f"{kind} of rank {self.rank}, called at {place},"
            sim.submit(stream, name, reads, writes, lambda: None, meet=meet, comm=self)

        if sim.thread.group_depth:
            sim.thread.group.append(enqueue)
            return
        used = self.clique.ungrouped.setdefault(threading.get_ident(), set())
        used.add(self.rank)
        if len(used) > 1:
            sim.fail(
                SimulationError(
                    f"{kind} at {place}: one thread calls the collectives of ranks {sorted(used)} outside a group: "
                    "the first may wait for the second for ever"
                )
            )
        enqueue()

    def drop(self) -> None:
        """What has not started yet never will."""
        for stream in self.sim.streams.values():
            for op in stream.queue:
                if isinstance(op, Op) and op.meeting is not None and op.meeting.ops.get(self.rank) is op:
                    op.meeting.dropped = True


def element(datatype: int) -> np.dtype:
    return np.dtype(DTYPES[datatype])


def total(pieces: list[np.ndarray], datatype: int) -> np.ndarray:
    """The sum over ranks, the same bits for all."""
    if datatype in (6, 7, BFLOAT16):
        return twins.all_reduce(pieces)
    return np.sum(pieces, axis=0, dtype=pieces[0].dtype)


def overlap(a: Range, b: Range) -> bool:
    return a[0] < b[0] + b[1] and b[0] < a[0] + a[1]


def only_in_place(send: Range, recv: Range, shift: int) -> None:
    """NCCL takes overlapping buffers only where recv lies `shift` bytes past send."""
    if overlap(send, recv) and recv[0] != send[0] + shift:
        raise NcclError(4)


def make_communicator(sim: Simulation) -> type:
    """The class NcclCommunicator of the simulated module."""

    class NcclCommunicator:
        def __init__(self, ndev, commId, rank):
            sim.called("NcclCommunicator")
            sim.unsafe("ncclCommInitRank")
            if not sim.thread.group_depth:
                sim.fail(SimulationError(f"a rank at {site()} waits for the others, which this thread is to make"))
            device = sim.thread.device
            sim.enter(device)
            clique = sim.cliques.setdefault(commId, Clique(ndev, Gathering(ndev)))
            clique.cards.append(device)
            if clique.cards.count(device) > sim.ranks_on_a_card:
                raise NcclError(5)
            self._comm = Comm(sim, clique, rank, device)
            sim.comms.append(self._comm)

        @classmethod
        def _of(cls, comm: Comm):
            made = cls.__new__(cls)
            made._comm = comm
            return made

        @staticmethod
        def initAll(devices):
            sim.called("initAll")
            sim.unsafe("ncclCommInitAll")
            if len(set(devices)) != len(devices):
                raise NcclError(5)
            clique = Clique(len(devices), Gathering(len(devices)))
            comms = [Comm(sim, clique, rank, sim.device(device)) for rank, device in enumerate(devices)]
            for device in devices:
                sim.enter(device)
            sim.comms += comms
            return [NcclCommunicator._of(comm) for comm in comms]

        def allReduce(self, sendbuf, recvbuf, count, datatype, op, stream):
            with sim.lock:
                sim.called("allReduce")
                dtype = element(datatype)
                send, recv = (sendbuf, count * dtype.itemsize), (recvbuf, count * dtype.itemsize)
                only_in_place(send, recv, 0)

                def reduce(ops):
                    result = total([view(o.reads[0][0], count, dtype) for o in ops], datatype) if count else None
                    for o in ops:
                        view(o.writes[0][0], count, dtype)[:] = result

                self._comm.collective(
                    "allReduce", [send], [recv], (count, datatype, op), reduce if count else _nothing, stream
                )

        def reduceScatter(self, sendbuf, recvbuf, recvcount, datatype, op, stream):
            with sim.lock:
                sim.called("reduceScatter")
                dtype, size = element(datatype), self._comm.clique.size
                nbytes = recvcount * dtype.itemsize
                send, recv = (sendbuf, size * nbytes), (recvbuf, nbytes)
                only_in_place(send, recv, self._comm.rank * nbytes)

                def reduce(ops):
                    result = total([view(o.reads[0][0], size * recvcount, dtype) for o in ops], datatype)
                    for rank, o in enumerate(ops):
                        view(o.writes[0][0], recvcount, dtype)[:] = result[rank * recvcount : (rank + 1) * recvcount]

                shape = (recvcount, datatype, op)
                self._comm.collective("reduceScatter", [send], [recv], shape, reduce if recvcount else _nothing, stream)

        def allGather(self, sendbuf, recvbuf, count, datatype, stream):
            with sim.lock:
                sim.called("allGather")
                dtype, size = element(datatype), self._comm.clique.size
                nbytes = count * dtype.itemsize
                send, recv = (sendbuf, nbytes), (recvbuf, size * nbytes)
                only_in_place(send, recv, -self._comm.rank * nbytes)

                def gather(ops):
                    result = np.concatenate([view(o.reads[0][0], count, dtype) for o in ops])
                    for o in ops:
                        view(o.writes[0][0], size * count, dtype)[:] = result

                self._comm.collective(
                    "allGather", [send], [recv], (count, datatype), gather if count else _nothing, stream
                )

        def broadcast(self, sendbuff, recvbuff, count, datatype, root, stream):
            with sim.lock:
                sim.called("broadcast")
                dtype = element(datatype)
                send, recv = (sendbuff, count * dtype.itemsize), (recvbuff, count * dtype.itemsize)
                only_in_place(send, recv, 0)
                is_root = self._comm.rank == root

                def copy(ops):
                    result = view(ops[root].reads[0][0], count, dtype).copy()
                    for o in ops:
                        view(o.writes[0][0], count, dtype)[:] = result

                reads = [send] if is_root else []
                shape = (count, datatype, root)
                self._comm.collective("broadcast", reads, [recv], shape, copy if count else _nothing, stream)

        def check_async_error(self):
            if self._comm.async_error:
                raise NcclError(self._comm.async_error)

        def abort(self):
            with sim.lock:
                sim.called("abort")
                self._outlives_its_graphs()
                self._comm.drop()
                self._comm.closed = True

        def _outlives_its_graphs(self):
            if sim.in_graphs(self._comm):
                sim.fail(SimulationError(f"a communicator is given up at {site()}, and waits for its graphs for ever"))

        def destroy(self):
            with sim.lock:
                sim.called("destroy")
                self._outlives_its_graphs()
                if not self._comm.closed and any(
                    isinstance(op, Op) and op.meeting is not None and op.meeting.ops.get(self._comm.rank) is op
                    for stream in sim.streams.values()
                    for op in stream.queue
                ):
                    sim.fail(SimulationError(f"a communicator is destroyed at {site()} before its collectives ran"))
                self._comm.closed = True

        def rank_id(self):
            return self._comm.rank

        def device_id(self):
            return self._comm.device

        def size(self):
            return self._comm.clique.size

    return NcclCommunicator


def _nothing(ops: list[Op]) -> None:
    """A collective of no elements."""


def group_start(sim: Simulation) -> None:
    sim.called("groupStart")
    sim.thread.group_depth += 1
    sim.groups[threading.get_ident()] += 1


def group_end(sim: Simulation) -> None:
    with sim.lock:
        sim.called("groupEnd")
        if not sim.thread.group_depth:
            sim.violations.append(SimulationError(f"groupEnd without groupStart at {site()}"))
            raise NcclError(5)
        sim.thread.group_depth -= 1
        sim.groups[threading.get_ident()] -= 1
        if sim.thread.group_depth:
            return
        calls, sim.thread.group = sim.thread.group, []
        held, sim.held = sim.held, True  # all are enqueued before one runs
        try:
            for call in calls:
                call()
        finally:
            sim.held = held
        if not held:
            sim._advance()


__all__ = ["CUDARuntimeError", "Comm", "Gathering", "NcclError", "group_end", "group_start", "make_communicator"]
