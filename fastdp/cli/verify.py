"""The command `verify`: compares two runs bit by bit, by their checkpoints or by the fingerprints of their steps.

    fastdp verify run-a run-b
    fastdp verify run-a/step-00001000 run-b/step-00001000
    fastdp verify a.jsonl b.jsonl
    fastdp verify a.jsonl

Two checkpoints (folders of fastdp.Checkpoint; of a run's folder the newest) or files of weights (.keras, .h5, .npz,
.pt): names the first tensor that differs, and by how many units in the last place (ulps).

Two files of fingerprints, which runs write with wrap(..., fingerprint="a.jsonl") or where the environment variable
FASTDP_FINGERPRINT names a file: finds the first step that differs, and whether its batch, its losses, its gradients or
its weights came first.

One of either: prints its fingerprint.

Ends with 0 if all bits are equal, 1 if some differ, and 2 if something cannot be read. Logs of callbacks, and how steps
were captured, are left out: they tell of the clock.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from fastdp.checkpoint import compare, contents, fingerprints
from fastdp.checkpoint.contents import Numbers
from fastdp.checkpoint.fingerprints import HASHED, Fingerprint
from fastdp.cli.arguments import add_json
from fastdp.cli.output import print_json
from fastdp.cli.status import OK, WrongUseError

DIFFERENT = 1
MOST_SHOWN = 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the two runs and `--json`."""
    parser.add_argument("first", type=Path, help="a checkpoint, a run's folder, a file of weights or of fingerprints")
    parser.add_argument("second", type=Path, nargs="?", help="another of the same kind; without it the first is shown")
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    """Compare two runs, or show one; returns 1 if they differ.

    Raises:
        WrongUseError: something cannot be read, or they are of different kinds.
    """
    paths = [path for path in (options.first, options.second) if path is not None]
    try:
        runs = [_read(path) for path in paths]
    except (OSError, ValueError, ImportError) as error:
        raise WrongUseError(str(error)) from error
    if len(runs) == 1:
        _show(paths[0], runs[0], as_json=options.json)
        return OK
    first, second = runs
    if isinstance(first, Fingerprint) and isinstance(second, Fingerprint):
        lines, result = _of_fingerprints(first, second)
    elif isinstance(first, Numbers) and isinstance(second, Numbers):
        lines, result = _of_numbers(first, second)
    else:
        raise WrongUseError("A checkpoint and a file of fingerprints cannot be compared: give two of one kind.")
    if options.json:
        print_json(result)
    else:
        print("\n".join(lines))
    return OK if result["same"] else DIFFERENT


def _read(path: Path) -> Fingerprint | Numbers:
    """What a path holds. Lines of JSON are fingerprints."""
    if path.is_file():
        with path.open("rb") as file:
            begins = file.read(1)
        if begins == b"{":
            return fingerprints.read(path)
    return contents.read(path)


def _of_fingerprints(first: Fingerprint, second: Fingerprint) -> tuple[list[str], dict[str, Any]]:
    """What is said of two fingerprints, for people and as JSON."""
    parting = fingerprints.first_parting(first, second)
    facts = fingerprints.differing_facts(first, second)
    lengths = [len(first.steps), len(second.steps)]
    result: dict[str, Any] = {"same": parting is None, "steps": lengths, "began differently": facts}
    told = [f"At the beginning `{name}` was {one!r} and {other!r}." for name, (one, other) in facts.items()]
    if parting is None:
        return [f"The same in all {lengths[0]} steps.", *told], result
    step, what = parting.step, parting.what
    result |= {"step": step, "what": what}
    if what == "length":
        ends = f"The same in {step} steps, where one run ends: they have {lengths[0]} and {lengths[1]}."
        return [ends, *told], result
    lines = [f"The first step that differs is {step} (counted from 0), first in its {what}."]
    before = HASHED[: HASHED.index(what)] if what in HASHED else ()
    lines += [f"Still the same in it: {', '.join(before)}."] if before else []
    return [*lines, *told], result


def _of_numbers(first: Numbers, second: Numbers) -> tuple[list[str], dict[str, Any]]:
    """What is said of two checkpoints, for people and as JSON."""
    found, total = compare.differences(first, second), len(first.keys() | second.keys())
    shown = [compare.as_json(one) for one in found]
    result = {"same": not found, "values": total, "differ": len(found), "differences": shown}
    if not found:
        return [f"The same: {total} values, to the last bit."], result
    lines = [f"{len(found)} of {total} values differ. The first:"]
    lines += [f"  {_in_words(one)}" for one in found[:MOST_SHOWN]]
    more = len(found) - MOST_SHOWN
    return [*lines, *([f"  and {more} more (--json has all)"] if more > 0 else [])], result


def _in_words(one: compare.Difference) -> str:
    if not one.count:
        return f"{one.name} {one.what}"
    by = f" by up to {one.ulps:,} ulps" if one.ulps is not None else ""
    place = f", first at {list(one.place)}" if one.place else ""
    return f"{one.name} differs{by} (at most {one.largest:.3g}) in {one.count:,} of {one.total:,} numbers{place}"


def _show(path: Path, run: Fingerprint | Numbers, *, as_json: bool) -> None:
    """Print what one fingerprint or checkpoint says."""
    if isinstance(run, Fingerprint):
        last = run.steps[-1]["weights"] if run.steps else run.facts["weights"]
        result = {**run.facts, "steps": len(run.steps), "parts": run.parts, "last": last}
        text = f"{path}: {len(run.steps)} steps in {run.parts} part(s); weights at the end: {last}"
    else:
        hashed = fingerprints.digest(_as_arrays(run))
        result = {"values": len(run), "fingerprint": hashed}
        text = f"{path}: {len(run)} values; fingerprint: {hashed}"
    if as_json:
        print_json(result)
    else:
        print(text)


def _as_arrays(numbers: Numbers) -> list[np.ndarray]:
    """Names and values as arrays, for a hash."""
    arrays = []
    for name, value in numbers.items():
        arrays.append(np.frombuffer(name.encode(), np.uint8))
        known = isinstance(value, (np.ndarray, np.generic))
        arrays.append(np.asarray(value) if known else np.frombuffer(repr(value).encode(), np.uint8))
    return arrays
