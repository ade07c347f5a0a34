"""Fingerprints of runs: a line of hashes for each step, in a file, and the first step where two runs part.

A file is lines of JSON. A line that begins a run (or its part in one process) tells what could change bits, and the
hash of the weights before its first step. The lines behind it are its steps. A run that goes on from a checkpoint
appends a new part to its file, and so may have steps twice: `read` puts the parts together by the hashes of the
weights.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

FORMAT = 1
# What is hashed of a step, in the order of cause and effect.
HASHED = ("batch", "losses", "gradients", "weights")
_MOST_LINE = 1 << 20


def digest(arrays: Iterable[np.ndarray]) -> str:
    """16 hexadecimal digits of the SHA-256 of arrays: their dtypes, shapes and bytes."""
    found = hashlib.sha256()
    for array in arrays:
        found.update(f"{array.dtype.str}{array.shape}".encode())
        found.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return found.hexdigest()[:16]


def append(path: Path, line: Mapping[str, Any]) -> None:
    """Add a line to a file."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


@dataclass
class Fingerprint:
    """What a file tells of a run.

    Attributes:
        facts: what was told at its beginning: versions, devices, shards.
        steps: its steps, in order.
        parts: how many times it has begun or gone on.
    """

    facts: dict[str, Any]
    steps: list[dict[str, Any]] = field(default_factory=list)
    parts: int = 1


def read(path: Path) -> Fingerprint:
    """The run that a file tells of. The end of a line that a kill has cut off is left out.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no file of fingerprints, or its parts are of different runs.
    """
    parts: list[Fingerprint] = []
    for number, line in enumerate(_lines(path), 1):
        if "format" in line:
            if line["format"] != FORMAT:
                raise ValueError(f"{path} has format {line['format']}, and this fastdp reads {FORMAT}.")
            parts.append(Fingerprint(line))
        elif not parts or not {"kind", *HASHED} <= line.keys():
            raise ValueError(f"{path} is no file of fingerprints: line {number} is not of one.")
        else:
            parts[-1].steps.append(line)
    if not parts:
        raise ValueError(f"{path} is no file of fingerprints: it is empty.")
    run = parts[0]
    for part in parts[1:]:
        _go_on(run, part, path)
    return run


def _lines(path: Path) -> Iterable[dict[str, Any]]:
    with path.open("rb") as file:
        while line := file.readline(_MOST_LINE):
            if not line.endswith(b"\n"):
                if len(line) == _MOST_LINE:
                    raise ValueError(f"{path} is no file of fingerprints: a line is too long.")
                return
            try:
                found = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path} is no file of fingerprints: {error}.") from error
            if not isinstance(found, dict):
                raise ValueError(f"{path} is no file of fingerprints: a line is no object.")
            yield found


def _go_on(run: Fingerprint, part: Fingerprint, path: Path) -> None:
    """Put a part behind the step whose checkpoint it has gone on from; the steps that it repeats are there once.

    Raises:
        ValueError: it begins with weights that the run never had.
    """
    before = [run.facts["weights"], *[step["weights"] for step in run.steps]]
    places = [place for place, weights in enumerate(before) if weights == part.facts["weights"]]
    if not places and part.facts.get("process") == run.facts.get("process"):  # another model of one script
        run.steps += part.steps
        return
    if not places:
        raise ValueError(
            f"{path} has several runs: one begins with weights that the one before it never had. Give each run a file "
            "of its own."
        )
    # Steps that only accumulate leave the weights alone. The part repeats the steps behind the right one.
    repeated = (place for place in places if run.steps[place:] == part.steps[: len(run.steps) - place])
    del run.steps[next(repeated, places[-1]) :]
    run.steps += part.steps
    run.parts += 1


@dataclass(frozen=True)
class Parting:
    """Where two runs part.

    Attributes:
        step: the first step that differs, counted from 0; the number of common steps if one run ends there.
        what: the first of `HASHED` that differs, "rows" or "kind"; "weights before the first step"; "length" if one run
            ends while the other goes on.
    """

    step: int
    what: str


def first_parting(one: Fingerprint, other: Fingerprint) -> Parting | None:
    """Where two runs part; None if all their steps are the same. What was not hashed in either is not compared."""
    for at, (mine, theirs) in enumerate(zip(one.steps, other.steps, strict=False)):
        for name in ("kind", "rows", *HASHED):
            if None not in (mine.get(name), theirs.get(name)) and mine[name] != theirs[name]:
                begins = at == 0 and name != "batch" and one.facts["weights"] != other.facts["weights"]
                return Parting(at, "weights before the first step" if begins else name)
    if len(one.steps) != len(other.steps):
        return Parting(min(len(one.steps), len(other.steps)), "length")
    return None


def differing_facts(one: Fingerprint, other: Fingerprint) -> dict[str, tuple[Any, Any]]:
    """What was told at the beginning of both runs, and differs."""
    names = dict.fromkeys([*one.facts, *other.facts])
    pairs = {name: (one.facts.get(name), other.facts.get(name)) for name in names if name not in ("weights", "process")}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
