"""Rounds that take turns, their spread and ratios, and the end of warm-up told from measurement."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

WINDOW = 3  # rounds of warm-up that are compared with as many before them
TOLERANCE = 0.04  # they are alike if their medians differ by less than this part


def alternate(steps: Mapping[Any, Callable[[], object]], *, rounds: int, seconds: float) -> dict[Any, list[float]]:
    """Seconds per call of each step, one value per round.

    In every round each step runs for about `seconds` (at least once), one step after the other, so that
    other load on the machine affects all of them. The first round warms up and is dropped.
    """
    times: dict[Any, list[float]] = {name: [] for name in steps}
    for _ in range(rounds + 1):
        for name, step in steps.items():
            began, count = time.perf_counter(), 0
            while not count or time.perf_counter() - began < seconds:
                step()
                count += 1
            times[name].append((time.perf_counter() - began) / count)
    return {name: values[1:] for name, values in times.items()}


def turns(ways: Collection[Any], rounds: int) -> Iterator[tuple[int, Any]]:
    """The number of the round, from 1, and the way whose turn it is.

    Every second round runs backwards, so that a machine that gets slower or faster treats all ways alike. A way that
    the caller takes out of `ways` gets no further turn.
    """
    for number in range(1, rounds + 1):
        order = list(ways)
        for way in order if number % 2 else reversed(order):
            if way in ways:
                yield number, way


def spread(values: Sequence[float], digits: int = 6) -> dict[str, float]:
    """Median, quartiles and extremes."""
    quarters = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    named = {"min": min(values), "q1": quarters[0], "median": quarters[1], "q3": quarters[2], "max": max(values)}
    return {name: float(f"{value:.{digits}g}") for name, value in named.items()}


def ratio(slow: Sequence[float], base: Sequence[float]) -> float:
    """The median over rounds of `slow / base`, each pair from the same round."""
    return round(statistics.median(a / b for a, b in zip(slow, base, strict=True)), 3)


@dataclass(frozen=True)
class WarmUp:
    """What was trained until the time of a step stayed the same.

    Attributes:
        steps: how many steps.
        seconds: their time.
        step_seconds: the median time of the last of them.
        steady: False where the time ran out before the step times stayed the same.
    """

    steps: int
    seconds: float
    step_seconds: float
    steady: bool


def warm_up(
    run: Callable[[int], float],
    *,
    seconds: float,
    limit: float,
    settled: Callable[[], bool] = lambda: True,
    patience: float = 0.0,
) -> WarmUp:
    """Train short rounds until the latest three take as long per step as the three before them.

    Args:
        run: trains so many steps and returns their seconds.
        seconds: about how long one short round takes; it has one step at least.
        limit: seconds of training after which warm-up ends in any case, after two rounds at least.
        settled: False while steps are still to change, such as by a compiler in the background.
        patience: seconds of training after which warm-up no longer waits for `settled`, if that is more than `limit`.
    """
    times: list[float] = []
    steps, passed, count = 0, 0.0, 1
    while True:
        taken = run(count)
        steps, passed = steps + count, passed + taken
        times.append(taken / count)
        latest = statistics.median(times[-WINDOW:])
        done = settled()
        steady = done and len(times) >= 2 * WINDOW and _alike(times)
        if steady or (passed >= (limit if done else max(limit, patience)) and len(times) >= 2):
            return WarmUp(steps, passed, latest, steady)
        count = steps_in(seconds, latest)


def _alike(times: Sequence[float]) -> bool:
    """Whether the latest rounds take as long as those before them, as far as the rounds' own spread tells."""
    latest, before = times[-WINDOW:], times[-2 * WINDOW : -WINDOW]
    middle = statistics.median(before)
    own = (max(before) - min(before)) / 2
    return abs(statistics.median(latest) - middle) <= max(TOLERANCE * middle, min(own, 2 * TOLERANCE * middle))


def steps_in(seconds: float, step_seconds: float) -> int:
    """How many steps take about so many seconds; one at least."""
    return max(1, round(seconds / max(step_seconds, 1e-9)))
