"""Compares results of `fastdp bench`: what differs between them is said first, then ratios with their uncertainty."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from fastdp.benchmark.entries import Entry, entries_of
from fastdp.benchmark.figures import MISSING, Spread, number, percent, plain, plural, size

# Resamplings of the rounds; a fixed seed, so that the same files give the same words.
_RESAMPLINGS = 4000
_CONFIDENCE = 0.95
# Below so many rounds on a side, resampling says little: the extremes of all rounds are the interval instead.
_ENOUGH_ROUNDS = 5
# Idle loops that differ by more than this, and by more than their noise, are said to be machines of different speed.
_IDLE_LOOPS_DIFFER = 0.05


@dataclass(frozen=True, slots=True)
class Difference:
    """Something that is not the same in all results, with its value in each."""

    what: str
    values: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Ratio:
    """Throughput of one result over that of the first, with the interval that holds it with 95 % confidence.

    `low` and `high` are None where a side has one round. `noise` is the part of one by which the machines varied.
    """

    ratio: float
    low: float | None
    high: float | None
    noise: float

    @property
    def verdict(self) -> str:
        """What may be said: faster, slower, no difference beyond the noise, or not known."""
        if self.low is None or self.high is None:
            return "one round: the noise is not known"
        if self.low <= 1 <= self.high or abs(self.ratio - 1) <= self.noise:
            return "no difference beyond the noise"
        return f"{percent(abs(self.ratio - 1), 1)} {'faster' if self.ratio > 1 else 'slower'}"

    @property
    def words(self) -> str:
        """The ratio with its interval."""
        if self.low is None or self.high is None:
            return f"{self.ratio:.3f}"
        return f"{self.ratio:.3f} ({self.low:.3f} to {self.high:.3f})"


@dataclass(frozen=True, slots=True)
class Row:
    """A way to train in all results; None where a result does not have it. The ratio of the first is None."""

    name: str
    rates: tuple[Spread | None, ...]
    ratios: tuple[Ratio | None, ...]


@dataclass(frozen=True, slots=True)
class Comparison:
    """Results side by side: their names, what differs, and a row for each way to train.

    `cautions` say what makes the ratios worth less.
    """

    names: tuple[str, ...]
    differences: tuple[Difference, ...]
    rows: tuple[Row, ...]
    cautions: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """The comparison as plain lists, dicts, numbers and strings, for JSON."""
        rows = [
            asdict(row)
            | {
                "ratios": [
                    None if ratio is None else asdict(ratio) | {"verdict": ratio.verdict} for ratio in row.ratios
                ]
            }
            for row in self.rows
        ]
        return {
            "results": list(self.names),
            "differences": [{"what": one.what, "values": list(one.values)} for one in self.differences],
            "cautions": list(self.cautions),
            "rows": rows,
        }


def compare(results: Sequence[Mapping[str, Any]], names: Sequence[str]) -> Comparison:
    """Compare results with the first.

    Args:
        results: at least two, as `fastdp bench --json` writes them.
        names: what to call each, such as its file; made different by numbers where they are equal.

    Raises:
        ValueError: fewer than two results, or not a name for each.
    """
    if len(results) < 2:
        raise ValueError(
            f"there must be at least two results to compare, such as: fastdp bench report A.json B.json. "
            f"Received: {len(results)}"
        )
    if len(names) != len(results):
        raise ValueError(f"names must be one for each of {len(results)} results, got {len(names)}")
    found = _by_key([entries_of(result) for result in results])
    noises = [number((result.get("noise") or {}).get("relative_spread")) or 0.0 for result in results]
    rows = []
    for key in dict.fromkeys(itertools.chain(*found)):
        entries = [one.get(key) for one in found]
        rates = tuple(entry.rate if entry is not None else None for entry in entries)
        others = zip(rates[1:], noises[1:], strict=True)
        ratios = [None, *(_ratio(rates[0], rate, max(noises[0], noise)) for rate, noise in others)]
        rows.append(Row(next(entry.name for entry in entries if entry is not None), rates, tuple(ratios)))
    return Comparison(_apart(names), tuple(_differences(results)), tuple(rows), tuple(_cautions(results)))


def ratio_of(first: Spread, second: Spread, noise: float = 0.0) -> Ratio:
    """The ratio of two medians, second over first, with its interval.

    The interval is the percentile bootstrap of the ratio of medians (Efron and Tibshirani, An Introduction to the
    Bootstrap, 1993, chapter 13) over the rounds of both sides, which are independent: the runs were at different times.

    Args:
        first, second: medians with their rounds; `first.median` is not zero.
        noise: the part of one by which the machines varied; a difference within it is none.
    """
    ratio = second.median / first.median
    one, two = (np.asarray(spread.rounds or (spread.q1, spread.q3)) for spread in (first, second))
    if min(len(one), len(two)) < 2 or min(one.min(), two.min()) <= 0:
        return Ratio(ratio, None, None, noise)
    if min(len(one), len(two)) < _ENOUGH_ROUNDS:
        return Ratio(ratio, float(two.min() / one.max()), float(two.max() / one.min()), noise)
    random = np.random.default_rng(0)
    medians = [
        np.median(side[random.integers(len(side), size=(_RESAMPLINGS, len(side)))], axis=1) for side in (one, two)
    ]
    tail = (1 - _CONFIDENCE) / 2
    low, high = np.quantile(medians[1] / medians[0], [tail, 1 - tail])
    return Ratio(ratio, min(float(low), ratio), max(float(high), ratio), noise)


def _ratio(first: Spread | None, second: Spread | None, noise: float) -> Ratio | None:
    return None if first is None or second is None or first.median <= 0 else ratio_of(first, second, noise)


def _by_key(results: Sequence[Sequence[Entry]]) -> list[dict[tuple[object, ...], Entry]]:
    """The entries of each result by what makes them the same way to train.

    The batch counts only where a result has several: otherwise it is a difference of settings, and said as one.
    """
    keys = [Counter(_key(entry) for entry in entries) for entries in results]
    several = any(count > 1 for one in keys for count in one.values())
    found = []
    for entries in results:
        seen: Counter[tuple[object, ...]] = Counter()
        by_key = {}
        for entry in entries:
            key = (*_key(entry), entry.batch) if several else _key(entry)
            again = (*key, seen[key])  # the same again is compared with the same again
            by_key[again] = entry
            seen[key] += 1
        found.append(by_key)
    return found


def _key(entry: Entry) -> tuple[object, ...]:
    return entry.library, entry.devices, entry.kind, entry.mode


def _apart(names: Sequence[str]) -> tuple[str, ...]:
    """The names as text of one line, with a number where several are equal."""
    shown = [plain(name) for name in names]
    return tuple(name if shown.count(name) == 1 else f"{name} ({place + 1})" for place, name in enumerate(shown))


# Each thing that two results may differ in: its words, and the keys on the way to it.
_THINGS = {
    "fastdp": ("fastdp",),
    "processor": ("machine", "cpu"),
    "cores": ("machine", "cores"),
    "memory": ("machine", "memory_nbytes"),
    "system": ("machine", "system"),
    "GPUs": ("machine", "gpus"),
    "driver": ("machine", "driver"),
    "model": ("target", "name"),
    "framework": ("target", "framework"),
    "parameters": ("target", "parameters"),
    "inputs": ("target", "inputs"),
    "loss": ("target", "loss"),
    "optimizer": ("target", "optimizer"),
}


def _differences(results: Sequence[Mapping[str, Any]]) -> Iterator[Difference]:
    """What is not the same in all results: machine, versions, model, settings."""
    things = dict(_THINGS)
    for group in ("settings", "versions"):
        names = dict.fromkeys(itertools.chain(*(result.get(group) or {} for result in results)))
        things |= {plain(name).replace("_", " "): (group, name) for name in names}
    for what, keys in things.items():
        found = [_at(result, keys) for result in results]
        if any(one != found[0] for one in found[1:]):
            yield Difference(what, tuple(_shown(keys[-1], one) for one in found))


def _at(result: Mapping[str, Any], keys: Sequence[str]) -> Any:
    """The value on this way into a result; None where it ends before."""
    value: Any = result
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _shown(key: str, value: Any) -> str:
    """A value of a result in words."""
    if value is None:
        return MISSING
    if key == "memory_nbytes":
        return size(number(value))
    if key == "gpus":
        names = [plain(gpu.get("name")) for gpu in value]
        return ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names)) or "none"
    if key == "inputs":
        return ", ".join(
            f"{plain(one.get('name'))} {plain(one.get('shape'))} {plain(one.get('dtype'))}" for one in value
        )
    return plain(value if isinstance(value, str | int | float) else json.dumps(value))


def _cautions(results: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """What makes the ratios worth less: noisy machines, and machines whose idle loops differ in speed."""
    noisy = [
        place
        for place, result in enumerate(results, 1)
        if not str((result.get("noise") or {}).get("verdict") or "").startswith("quiet")
    ]
    if noisy:
        which = ", ".join(map(str, noisy))
        yield f"The machine was noisy, or its noise is not known, in {plural(len(noisy), 'result')} (number {which})."
    loops = [number(_at(result, ("noise", "idle_loop", "median_seconds"))) for result in results]
    known = [loop for loop in loops if loop]
    limit = max([_IDLE_LOOPS_DIFFER, *(number(_at(one, ("noise", "relative_spread"))) or 0.0 for one in results)])
    if known and max(known) / min(known) - 1 > limit:
        apart = percent(max(known) / min(known) - 1)
        yield (
            f"The same idle loop took up to {apart} longer in one result than in another: the processors ran at "
            "different speeds, and ratios hold that as well."
        )
