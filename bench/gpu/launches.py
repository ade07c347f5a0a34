"""What launches cost the host, when nothing waits: kernels, graphs by their number of nodes, a graph for each replica.

Each launch is timed separately, with an empty queue before it, so that the call is measured and not the card.
"""

from __future__ import annotations

import importlib
import importlib.util
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from bench.gpu.card import Card, emit
from fastdp import launch
from fastdp.benchmark.rounds import spread
from fastdp.launch import SIGNALS_NBYTES, PeerGroup
from fastdp.launch.args import PACK_NBYTES

NODES = (1, 10, 100, 1000, 5000)
LAUNCHES = 40  # timed launches per round


class Nodes:
    """Minimal work on a card, as single kernels or as a graph with a chain of kernels."""

    def __init__(self, card: Card) -> None:
        self.card = card
        sizes = (2 * PACK_NBYTES, SIGNALS_NBYTES, 4, 4)
        self._held = [card.device.zeros((size,), np.dtype(np.uint8)) for size in sizes]
        staging, signals, error, self._at = map(card.address, self._held)
        self._alone = PeerGroup(0, (staging,), 2 * PACK_NBYTES, (signals,), error, 1, threads=32)

    def kernel(self, stream: int | None = None) -> None:
        """One kernel on one element: an all-reduce of one rank, with arguments as long as those of most kernels."""
        at, stream = self._at, self.card.stream if stream is None else stream
        launch.all_reduce_one_shot(
            self.card.device.kernels, self._alone, x=at, y=at, n=1, dtype="float32", stream=stream
        )

    def graph(self, nodes: int) -> int:
        """A launchable graph with a chain of `nodes` kernels; the caller destroys it."""
        runtime, stream = self.card.runtime, self.card.stream
        self.kernel()  # loads it
        self.card.device._wait_for(stream)
        runtime.capture_begin(stream)
        for _ in range(nodes):
            self.kernel()
        graph = runtime.capture_end(stream)
        made: int = runtime.graph_instantiate(graph)
        runtime.graph_destroy(graph)
        return made


def host_seconds(card: Card, work: Callable[[], object], wait: Callable[[], object]) -> list[float]:
    """Seconds of a call that enqueues and returns: the median of a round's calls, one value per round."""
    found = []
    for _ in range(card.rounds + 1):
        values = []
        for _ in range(LAUNCHES):
            began = time.perf_counter()
            work()
            values.append(time.perf_counter() - began)
            wait()
        found.append(sorted(values)[len(values) // 2])
    return found[1:]


def launches(card: Card) -> None:
    """Measure a kernel of fastdp and an operation of torch."""
    nodes = Nodes(card)
    works: dict[str, Callable[[], object]] = {"a kernel of fastdp": nodes.kernel}
    with card.current():
        nodes.kernel()
        torch: Any = importlib.import_module("torch") if importlib.util.find_spec("torch") else None
        if torch is not None and torch.cuda.is_available():
            x = torch.zeros(1, device="cuda")
            works["an operation of torch"] = lambda: x.mul_(1.0)
        for name, work in works.items():
            seconds = host_seconds(card, work, lambda: card.device._wait_for(card.stream))
            emit(what=f"host time: {name}", microseconds=_microseconds(seconds), clock="wall, unwaited")


def replays(card: Card, nodes: int) -> None:
    """Measure the launch of a graph with a chain of `nodes` kernels, like a captured step of one replica."""
    with card.current():
        graph = Nodes(card).graph(nodes)
        replay = lambda: card.runtime.graph_launch(graph, card.stream)  # noqa: E731
        replay()  # the first launch uploads the graph
        card.device._wait_for(card.stream)
        seconds = host_seconds(card, replay, lambda: card.device._wait_for(card.stream))
        card.runtime.graph_exec_destroy(graph)
    emit(what="host time: replay", nodes=nodes, microseconds=_microseconds(seconds), clock="wall, unwaited")


def launches_of_replicas(card: Card, replicas: int, nodes: int = 100) -> None:
    """Measure one thread that launches one graph per replica, each on its own stream."""
    runtime = card.runtime
    with card.current():
        work = [Nodes(card) for _ in range(replicas)]
        graphs = [one.graph(nodes) for one in work]
        streams = [runtime.stream_create(card.device.ordinal) for _ in range(replicas)]

        def launch_all() -> None:
            for graph, stream in zip(graphs, streams, strict=True):
                runtime.graph_launch(graph, stream)

        def wait() -> None:
            for stream in streams:
                card.device._wait_for(stream)

        launch_all()
        wait()
        seconds = host_seconds(card, launch_all, wait)
        for graph, stream in zip(graphs, streams, strict=True):
            runtime.graph_exec_destroy(graph)
            runtime.stream_destroy(stream)
    emit(
        what="host time: a graph for each replica",
        replicas=replicas,
        nodes=nodes,
        microseconds=_microseconds(seconds),
        clock="wall, unwaited",
    )


def _microseconds(seconds: list[float]) -> dict[str, float]:
    return spread([1e6 * value for value in seconds], 4)
