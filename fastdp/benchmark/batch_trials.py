"""Tries batch sizes of a run in worker processes of their own, and takes over the fastest one."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from fastdp.benchmark.batches import BatchSearch, Tried
from fastdp.benchmark.machine import free_nbytes
from fastdp.benchmark.process import Process, WayError, for_want_of_memory
from fastdp.benchmark.request import Request
from fastdp.benchmark.rounds import steps_in, warm_up
from fastdp.benchmark.settings import Settings
from fastdp.benchmark.ways import environment
from fastdp.benchmark.worker import command

ROUNDS = 3
ROUND_SECONDS = 0.5
WARM_UP_LIMIT = 15.0


def find_batch(settings: Settings, emit: Callable[[dict[str, Any]], None]) -> tuple[Settings, dict[str, Any]]:
    """Search with the way of most devices, and return the settings with the batch of the best throughput.

    Each batch is a process of its own, which leaves no memory behind. Emits an event "batch" for each, with `way`,
    `batch`, and `samples_per_second` or `reason`.

    Returns: the settings, unchanged where no batch ran; and for the result the `way` and what
    `fastdp.benchmark.batches.BatchSearch.run` found.
    """
    first = settings.ways[0]
    alike = [one for one in settings.ways if (one.library, one.mode) == (first.library, first.mode)]
    way = max(alike, key=lambda one: one.devices)

    def attempt(batch: int) -> Tried:
        found = _attempt(replace(way, batch=batch), settings.timeout)
        emit({"event": "batch", "way": way.name, **found.to_dict()})
        return found

    search = BatchSearch(attempt, step=way.devices, free_nbytes=None if way.kind == "gpu" else free_nbytes())
    found = {"way": way.name, **search.run(way.batch)}
    if found["best"] is None:
        return settings, found
    return settings.with_batch(found["best"] // way.devices if settings.per_device else found["best"]), found


def _attempt(request: Request, timeout: float) -> Tried:
    """Train a few short rounds with the batch of a request."""
    try:
        process = Process(command(request), environment(request), timeout)
    except WayError as error:
        return _failed(request, error)
    try:
        warmed = warm_up(
            lambda steps: process.round(steps, timeout).seconds, seconds=ROUND_SECONDS / 5, limit=WARM_UP_LIMIT
        )
        steps = steps_in(ROUND_SECONDS, warmed.step_seconds)
        rounds = [process.round(steps, timeout) for _ in range(ROUNDS)]
    except WayError as error:
        return _failed(request, error)
    finally:
        process.close(5.0)
    seconds = statistics.median(one.seconds / one.steps for one in rounds)
    peak = None if request.kind == "gpu" else rounds[-1].report.get("peak_host_nbytes")
    return Tried(request.batch, request.batch / seconds, step_seconds=seconds, nbytes=peak)


def _failed(request: Request, error: WayError) -> Tried:
    return Tried(request.batch, reason=str(error), no_memory=for_want_of_memory(str(error)))
