"""A simulated CUDA: streams, events, peers, capture, and the order that they promise.

Work runs on host memory, as soon as nothing holds it back (seed=None) or at some later time that CUDA allows
(a seed): then a missing wait gives wrong numbers too, not only a RaceError. Either way vector clocks prove
every access ordered. What is wrong with a use of CUDA raises a SimulationError and is kept in `violations`, since
the code under test may catch it.
"""

from __future__ import annotations

import itertools
import random
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import numpy as np
from clocks import Clock, HostClocks, join, tick
from simulated_memory import Allocation, Memory, PeerError, Range, SimulationError

HERE = str(Path(__file__).parent)
HIDDEN = (*(f"runtime/cuda/cupy_{name}.py" for name in ("api", "nccl", "timing")), "/contextlib.py")


class CUDARuntimeError(RuntimeError):
    """As CuPy's: `status` and CUDA's name for it."""

    NAMES: ClassVar = {
        1: "cudaErrorInvalidValue",
        2: "cudaErrorMemoryAllocation",
        101: "cudaErrorInvalidDevice",
        400: "cudaErrorInvalidResourceHandle",
        600: "cudaErrorNotReady",
        700: "cudaErrorIllegalAddress",
        704: "cudaErrorPeerAccessAlreadyEnabled",
        719: "cudaErrorLaunchFailure",
        900: "cudaErrorStreamCaptureUnsupported",
        901: "cudaErrorStreamCaptureInvalidated",
        902: "cudaErrorStreamCaptureMerge",
        903: "cudaErrorStreamCaptureUnmatched",
        904: "cudaErrorStreamCaptureUnjoined",
        905: "cudaErrorStreamCaptureIsolation",
        907: "cudaErrorCapturedEvent",
        908: "cudaErrorStreamCaptureWrongThread",
    }

    def __init__(self, status: int) -> None:
        self.status = status
        super().__init__(f"{self.NAMES.get(status, f'cudaError{status}')}: simulated")


@dataclass(eq=False)
class Op:
    """Work on a stream: what it touches, and how to run it."""

    name: str
    stream: Stream
    reads: Sequence[Range]
    writes: Sequence[Range]
    run: Callable[[], None]
    # Of work that several streams do together: called when it is enqueued, gives where they meet.
    meet: Callable[[Op], Meeting] | None = None
    comm: object = None  # the communicator whose collective it is
    clock: Clock = field(default_factory=dict)
    meeting: Meeting | None = None
    graph: GraphRun | None = None
    node: int = 0


@dataclass(eq=False)
class Meeting:
    """Ops of several ranks that start together."""

    size: int
    signature: object
    run: Callable[[dict[int, Op]], None]
    ops: dict[int, Op] = field(default_factory=dict)
    dropped: bool = False

    def ready(self) -> bool:
        arrived = len(self.ops) == self.size
        return self.dropped or (arrived and all(op.stream.queue[0] is op for op in self.ops.values()))


@dataclass(eq=False)
class Record:
    """One recording of an event."""

    clock: Clock = field(default_factory=dict)  # of the thread that recorded; then of the stream
    executed: bool = False
    capture: Capture | None = None
    frontier: frozenset[int] = frozenset()
    seconds: float = 0.0  # when it was executed


@dataclass(eq=False)
class Wait:
    """One wait of a stream."""

    record: Record
    clock: Clock


@dataclass(eq=False)
class Stream:
    handle: int
    device: int
    priority: int
    site: str
    clock: Clock = field(default_factory=dict)
    queue: deque[Op | Record | Wait] = field(default_factory=deque)
    capture: Capture | None = None

    def __str__(self) -> str:
        return f"stream {self.handle:#x} of GPU {self.device}"


@dataclass(eq=False)
class Event:
    handle: int
    device: int
    site: str
    timed: bool = False
    record: Record | None = None


@dataclass(eq=False)
class Capture:
    """A recording of a graph under way."""

    origin: Stream
    mode: int
    thread: threading.Thread
    nodes: list[tuple[Op, frozenset[int]]] = field(default_factory=list)
    frontiers: dict[Stream, frozenset[int]] = field(default_factory=dict)
    valid: bool = True


class GraphRun:
    """One launch of a graph: nodes are ordered by their edges alone."""

    def __init__(self, handle: int, nodes: list[tuple[Op, frozenset[int]]]) -> None:
        self.handle, self.nodes = handle, nodes
        self.clocks: dict[int, Clock] = {}
        self.base: Clock | None = None

    def enter(self, op: Op) -> Clock:
        if self.base is None:
            self.base = dict(op.stream.clock)
        clock = self.clocks[op.node] = dict(self.base)
        for node in self.nodes[op.node][1]:
            join(clock, self.clocks[node])
        return clock

    def leave(self, op: Op) -> None:
        if len(self.clocks) == len(self.nodes):
            for clock in self.clocks.values():
                join(op.stream.clock, clock)


class _Thread(threading.local):
    device = 0
    context = False
    group_depth = 0

    def __init__(self) -> None:
        self.group: list = []


def site() -> str:
    """Where the code under test stands."""
    frame = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if not file.endswith(HIDDEN) and (not file.startswith(HERE) or Path(file).name.startswith("test_")):
            return f"{Path(file).name}:{frame.f_lineno}"
        frame = frame.f_back
    return "?"


class Simulation:
    """What one process sees of CUDA.

    Args:
        count: GPUs.
        seed: None runs work at once; a number at random times that CUDA allows.

    What CUDA itself answers (errors, contexts, cards that do not reach each other, a full card) is the rig's to show.
    Stricter than CUDA on purpose, since fastdp does none of it: a stream is destroyed when it is idle, a graph is not
    launched into a recording, copies between GPUs want peer access and those of the host pinned memory.
    """

    def __init__(
        self,
        count: int = 2,
        *,
        seed: int | None = None,
    ) -> None:
        self.count = count
        self.violations: list[SimulationError] = []
        self.calls: Counter[str] = Counter()
        self.failures: dict[str, int] = {}  # the next call of this name fails with this status
        self.held = False  # while True no work runs
        self.contexts: set[int] = set()
        self.peers: set[tuple[int, int]] = set()
        self.memory = Memory()
        self.streams: dict[int, Stream] = {}
        self.events: dict[int, Event] = {}
        self.graphs: dict[int, list[tuple[Op, frozenset[int]]]] = {}
        self.execs: dict[int, list[tuple[Op, frozenset[int]]]] = {}
        self.uploaded: set[int] = set()
        self.driver: Any = None  # the driver's library
        self.modules: dict[int, tuple[int, bytes]] = {}
        self.functions: dict[int, tuple[int, str]] = {}
        self.comms: list = []
        self.cliques: dict = {}  # of ranks that are made one by one, by their unique id
        self.ranks_on_a_card = 1  # that NCCL takes
        self.groups: Counter[int] = Counter()  # open ones, by thread
        self.kernel_ranks: dict = {}
        self.captures: list[Capture] = []
        self.lock = threading._PyRLock()
        self.hosts = HostClocks()
        self.completed: Clock = {}
        self.thread = _Thread()
        self._random = None if seed is None else random.Random(seed)
        self._handles = itertools.count(0x1000, 0x10)

    # What the modules of fake_cupy.py call.

    def handle(self) -> int:
        return next(self._handles)

    def fail(self, error: SimulationError) -> NoReturn:
        """Keep it, then raise it."""
        self.violations.append(error)
        raise error

    def called(self, name: str) -> None:
        """Count a call; fail it where a test wants that."""
        self.calls[name] += 1
        if name in self.failures:
            raise CUDARuntimeError(self.failures.pop(name))

    def device(self, ordinal: int) -> int:
        if not 0 <= ordinal < self.count:
            raise CUDARuntimeError(101)
        return ordinal

    def enter(self, device: int) -> None:
        """Give the thread this device's context."""
        self.device(device)
        self.contexts.add(device)
        self.thread.context = True

    def unsafe(self, name: str) -> None:
        """A call that a capture under way forbids."""
        for capture in self.captures:
            if capture.mode == 0 or (capture.mode == 1 and capture.thread is threading.current_thread()):
                capture.valid = False
                self.violations.append(SimulationError(f"{name} at {site()} while a stream is being captured"))
                raise CUDARuntimeError(900)

    def stream(self, handle: int, *, current: bool) -> Stream:
        """The stream of a handle; `current`: its device must be the thread's."""
        if not handle:  # the default stream of the current device
            self.enter(self.thread.device)
            handle = -1 - self.thread.device
            self.streams.setdefault(handle, Stream(handle, self.thread.device, 0, "CUDA itself"))
        stream = self.streams.get(handle)
        if stream is None or (current and stream.device != self.thread.device):
            raise CUDARuntimeError(400)
        return stream

    def allocate(self, nbytes: int, *, pinned: bool) -> int:
        """malloc on the thread's device, or hostAlloc."""
        name = "hostAlloc" if pinned else "malloc"
        self._synchronizing(name)
        device = None if pinned else self.thread.device
        self.enter(self.thread.device)
        return self.memory.allocate(nbytes, device, site()).lo

    def release(self, address: int, *, pinned: bool) -> None:
        self._synchronizing("freeHost" if pinned else "free")
        for stream in self.streams.values():
            for op in stream.queue:
                if isinstance(op, Op) and any(
                    self.memory._find(lo) is self.memory._find(address) for lo, _ in (*op.reads, *op.writes)
                ):
                    self.fail(SimulationError(f"memory is freed at {site()} while {op.name} is still to run"))
        try:
            self.memory.release(address, not pinned, self.completed, site())
        except SimulationError as error:
            self.fail(error)

    def _synchronizing(self, name: str) -> None:
        """A call that waits for all GPUs: deadly while one of them waits for work that is not there yet."""
        self.unsafe(name)
        for stream in self.streams.values():
            head = stream.queue[0] if stream.queue else None
            if isinstance(head, Op) and head.meeting is not None and not head.meeting.ready():
                self.fail(SimulationError(f"{name} at {site()} while {head.name} waits for other ranks"))

    # Enqueuing.

    def submit(
        self,
        handle: int,
        name: str,
        reads: Iterable[Range],
        writes: Iterable[Range],
        run: Callable[[], None],
        *,
        current: bool = False,
        meet: Callable[[Op], Meeting] | None = None,
        comm: object = None,
    ) -> None:
        """Enqueue work that touches these (address, nbytes) ranges. Tests may do it for a library of theirs."""
        stream = self.stream(handle, current=current)
        reads, writes = [r for r in reads if r[1]], [w for w in writes if w[1]]
        op = Op(f"{name} on {stream} at {site()}", stream, reads, writes, run, meet, comm)
        for piece in (*reads, *writes):
            self._reachable(op, piece)
        if stream.capture is not None:
            capture = self._valid(stream.capture)
            capture.nodes.append((op, capture.frontiers[stream]))
            capture.frontiers[stream] = frozenset((len(capture.nodes) - 1,))
            return
        self._push(op)

    def _reachable(self, op: Op, piece: Range) -> Allocation:
        try:
            found = self.memory.find(piece, op.name)
        except SimulationError as error:
            self.fail(error)
        device = op.stream.device
        if found.device not in (None, device) and (device, found.device) not in self.peers:
            self.fail(PeerError(f"{op.name} touches {found.place} without peer access of GPU {device} to it"))
        return found

    def _push(self, op: Op) -> None:
        op.clock = dict(self.hosts.own())
        if op.meet is not None:
            op.meeting = op.meet(op)
        op.stream.queue.append(op)
        self._advance()

    def record(self, event_handle: int, handle: int) -> None:
        event, stream = self.events.get(event_handle), self.stream(handle, current=False)
        if event is None or event.device != stream.device:
            raise CUDARuntimeError(400)
        if stream.capture is not None:
            capture = self._valid(stream.capture)
            event.record = Record(capture=capture, frontier=capture.frontiers[stream])
            return
        event.record = Record(dict(self.hosts.own()))
        stream.queue.append(event.record)
        self._advance()

    def wait(self, handle: int, event_handle: int) -> None:
        event, stream = self.events.get(event_handle), self.stream(handle, current=False)
        if event is None:
            raise CUDARuntimeError(400)
        record = event.record
        captured = None if record is None else record.capture
        if captured is not None:
            self._valid(captured)
            if stream.capture is not None and stream.capture is not captured:
                raise CUDARuntimeError(902)
            stream.capture = captured
            captured.frontiers[stream] = captured.frontiers.get(stream, frozenset()) | record.frontier
        elif stream.capture is not None:
            if record is not None:
                stream.capture.valid = False
                raise CUDARuntimeError(905)
        elif record is not None:
            stream.queue.append(Wait(record, dict(self.hosts.own())))
            self._advance()

    def query(self, event_handle: int) -> bool:
        """Whether the event is done; the thread then knows what happened before it."""
        event = self.events.get(event_handle)
        if event is None:
            raise CUDARuntimeError(400)
        if event.record is not None and event.record.capture is not None:
            event.record.capture.valid = False
            raise CUDARuntimeError(907)
        self.unsafe("eventQuery")
        self._advance(at_least=1)
        if event.record is None:
            return True
        if event.record.executed:
            self._learn(event.record.clock)
        return event.record.executed

    def elapsed(self, start: int, end: int) -> float:
        """eventElapsedTime: milliseconds, a 32-bit float."""
        events = [self.events.get(event) for event in (start, end)]
        self.unsafe("eventElapsedTime")
        if any(event is None or not event.timed or event.record is None for event in events):
            raise CUDARuntimeError(400)
        if events[0].device != events[1].device:
            raise CUDARuntimeError(400)
        for event in events:
            if event.record.capture is not None:
                raise CUDARuntimeError(907)
            if not event.record.executed:
                raise CUDARuntimeError(600)
        return float(np.float32(1e3 * (events[1].record.seconds - events[0].record.seconds)))

    def is_capturing(self, handle: int) -> bool:
        """streamIsCapturing. As CuPy, it raises for a recording that has become invalid."""
        capture = self.stream(handle, current=False).capture
        if capture is not None and not capture.valid:
            raise RuntimeError("the stream was capturing, but an error has invalidated the capture sequence")
        return capture is not None

    def _learn(self, clock: Clock) -> None:
        join(self.hosts.own(), clock)
        join(self.completed, clock)

    def synchronize(self, handle: int) -> None:
        """streamSynchronize."""
        stream = self.stream(handle, current=False)
        self.unsafe("streamSynchronize")
        self.settle()
        if stream.queue:
            self.fail(SimulationError(f"{stream} is synchronized at {site()} and never becomes idle"))
        self._learn(stream.clock)

    # Running.

    def settle(self) -> None:
        """Run all that can run. The host learns nothing by it."""
        while not self.held and self._step():
            pass

    def _advance(self, at_least: int = 0) -> None:
        if self._random is None:
            self.settle()
            return
        for _ in range(self._random.randint(at_least, at_least + 2)):
            if self.held or not self._step():
                return

    def _ready(self, stream: Stream) -> bool:
        if not stream.queue:
            return False
        head = stream.queue[0]
        if isinstance(head, Wait):
            return head.record.executed
        return not (isinstance(head, Op) and head.meeting is not None) or head.meeting.ready()

    def _step(self) -> bool:
        """Run one thing that may run now."""
        ready = [stream for stream in self.streams.values() if self._ready(stream)]
        if not ready:
            return False
        stream = ready[0] if self._random is None else self._random.choice(ready)
        head = stream.queue[0]
        if isinstance(head, Op):
            self._run(head)
            return True
        stream.queue.popleft()
        join(stream.clock, head.clock)
        if isinstance(head, Wait):
            join(stream.clock, head.record.clock)
        else:
            head.clock, head.executed, head.seconds = dict(stream.clock), True, time.perf_counter()
        return True

    def _run(self, head: Op) -> None:
        meeting = head.meeting
        together = [head] if meeting is None or meeting.dropped else list(meeting.ops.values())
        for op in together:
            op.stream.queue.popleft()
        clocks: dict[Op, Clock] = {}
        for op in together:
            join(op.stream.clock, op.clock)
            clocks[op] = op.stream.clock if op.graph is None else op.graph.enter(op)
        everything: Clock = {}
        for clock in clocks.values():
            join(everything, clock)
        try:
            for op, clock in clocks.items():
                join(clock, everything)
                actor: Hashable = op.stream.handle if op.graph is None else (op.graph.handle, op.node)
                tick(clock, actor)
                for write, pieces in ((False, op.reads), (True, op.writes)):
                    for piece in pieces:
                        self.memory.touch(piece, write, actor, clock, op.name)
        except SimulationError as error:
            self.fail(error)
        finally:
            for op in together:
                if op.graph is not None:
                    op.graph.leave(op)
        if meeting is None:
            head.run()
        elif not meeting.dropped:
            meeting.run(meeting.ops)

    # Host memory that the host itself touches.

    def host_access(self, address: int, nbytes: int, *, write: bool) -> None:
        """The calling thread reads or writes pinned memory: a race unless it has waited for the GPUs."""
        with self.lock:
            clock, actor = self.hosts.own(), ("host", threading.get_ident())
            self.completed[actor] = tick(clock, actor)
            pending = [
                op
                for stream in self.streams.values()
                for op in stream.queue
                if isinstance(op, Op)
                for lo, n in ((*op.reads, *op.writes) if write else op.writes)
                if lo < address + nbytes and address < lo + n
            ]
            try:
                if pending:
                    raise SimulationError(f"the host at {site()} does not wait for {pending[0].name}")
                self.memory.touch((address, nbytes), write, actor, clock, f"the host at {site()}")
            except SimulationError as error:
                self.fail(error)

    # Capture and graphs.

    def _valid(self, capture: Capture) -> Capture:
        if not capture.valid:
            raise CUDARuntimeError(901)
        return capture

    def capture_begin(self, handle: int, mode: int) -> None:
        stream = self.stream(handle, current=False)
        if stream.capture is not None:
            raise CUDARuntimeError(1)
        stream.capture = Capture(stream, mode, threading.current_thread(), frontiers={stream: frozenset()})
        self.captures.append(stream.capture)

    def capture_end(self, handle: int) -> int:
        stream = self.stream(handle, current=False)
        capture = stream.capture
        if capture is None or capture.origin is not stream:
            raise CUDARuntimeError(903)
        if capture.mode != 2 and capture.thread is not threading.current_thread():
            raise CUDARuntimeError(908)
        self.captures.remove(capture)
        for forked in capture.frontiers:
            forked.capture = None
        self._valid(capture).valid = False  # events recorded in it are good for nothing now
        seen, todo = set(), list(capture.frontiers[stream])
        while todo:
            node = todo.pop()
            if node not in seen:
                seen.add(node)
                todo += capture.nodes[node][1]
        if len(seen) != len(capture.nodes):
            raise CUDARuntimeError(904)
        graph = self.handle()
        self.graphs[graph] = capture.nodes
        return graph

    def in_graphs(self, comm: object) -> bool:
        """Whether a graph holds collectives of a communicator."""
        graphs = (*self.graphs.values(), *self.execs.values())
        return any(op.comm is comm for nodes in graphs for op, _ in nodes)

    def graph_launch(self, graph_exec: int, handle: int) -> None:
        nodes, stream = self.execs.get(graph_exec), self.stream(handle, current=True)
        if nodes is None:
            raise CUDARuntimeError(400)
        if stream.capture is not None:
            raise CUDARuntimeError(900)
        run = GraphRun(graph_exec, nodes)
        for index, (node, _) in enumerate(nodes):
            op = Op(
                f"{node.name}, of a graph launched at {site()}",
                stream,
                node.reads,
                node.writes,
                node.run,
                node.meet,
                node.comm,
            )
            op.graph, op.node = run, index
            for piece in (*op.reads, *op.writes):
                self._reachable(node, piece)  # from the device that it was captured on
            self._push(op)

    # The end.

    def check_end(self) -> list[str]:
        """What is left behind; empty where all is well."""
        self.held = False
        self.settle()
        left = [f"never ran: {item.name}" for s in self.streams.values() for item in s.queue if isinstance(item, Op)]
        left += [f"{a.nbytes} bytes of {a.place} from {a.site}, never freed" for a in self.memory.alive()]
        left += [
            f"{stream} from {stream.site}, never destroyed" for stream in self.streams.values() if stream.handle > 0
        ]
        left += [f"an event of GPU {event.device} from {event.site}, never destroyed" for event in self.events.values()]
        left += [f"a graph, never destroyed ({len(nodes)} nodes)" for nodes in self.graphs.values()]
        left += [f"a launchable graph, never destroyed ({len(nodes)} nodes)" for nodes in self.execs.values()]
        left += ["a group of collectives was never ended" for depth in self.groups.values() if depth]
        left += [f"communicator of GPU {comm.device} never destroyed" for comm in self.comms if not comm.closed]
        return left
