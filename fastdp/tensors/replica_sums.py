"""Sums over replicas in the middle of a step, as eager steps make them and as an operation of captured ones.

A captured step's graph has the operation `fastdp::sum_over_replicas`. A replay names the exchange of its replica
(`exchanging`), through which the operation meets the other replicas' operations, at the same place of their graphs.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.fx import Graph

Exchange = Callable[[Any, object], Sequence[Any]]
# Adds up a tensor of all replicas, in rank order: of the replica's own tensor, and a name of the place.
ReplicaSum = Callable[[torch.Tensor, str], torch.Tensor]

_LIBRARY = torch.library.Library("fastdp", "FRAGMENT")
_LIBRARY.define("sum_over_replicas(Tensor value, str place) -> Tensor")


class _Thread(threading.local):
    """The exchange of the replica that this thread replays; None outside of a replay."""

    exchange: Exchange | None = None


_thread = _Thread()


def by_exchange(exchange: Exchange) -> ReplicaSum:
    """The sum through an exchange that returns the values of all replicas in rank order."""

    def summed(value: torch.Tensor, place: str) -> torch.Tensor:
        first, *others = exchange(value, place)
        return sum(others[1:], first + others[0]) if others else first.clone()

    return summed


def of_one(value: torch.Tensor, place: str) -> torch.Tensor:
    """The sum over one replica."""
    return value.clone()


def in_graph(value: torch.Tensor, place: str) -> torch.Tensor:
    """The sum as an operation of the graph that is being traced."""
    found: torch.Tensor = torch.ops.fastdp.sum_over_replicas.default(value, place)
    return found


def meets(graph: Graph) -> bool:
    """Whether replicas meet in a graph."""
    return bool(graph.find_nodes(op="call_function", target=torch.ops.fastdp.sum_over_replicas.default))


@contextmanager
def exchanging(exchange: Exchange) -> Iterator[None]:
    """Let the sums of a graph that this thread runs meet those of other replicas through an exchange."""
    before, _thread.exchange = _thread.exchange, exchange
    try:
        yield
    finally:
        _thread.exchange = before


def _sum(value: torch.Tensor, place: str) -> torch.Tensor:
    exchange = _thread.exchange
    if exchange is None:
        raise RuntimeError(f"A graph came to {place} on a thread that replays no replica, which is a bug in fastdp.")
    return by_exchange(exchange)(value, place)


for _key in ("CPU", "CUDA"):
    _LIBRARY.impl("sum_over_replicas", _sum, _key)
_LIBRARY.impl("sum_over_replicas", lambda value, place: torch.empty_like(value), "Meta")
