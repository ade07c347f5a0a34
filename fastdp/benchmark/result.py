"""The result of `fastdp bench` as one JSON file: its schema, saved, loaded and checked."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

SCHEMA = 1
FILE = "result.json"  # inside the folder of --output

NUMBER: Any = (int, float)
MAYBE: Any = (int, float, type(None))
TEXT: Any = (str, type(None))
_SPREAD = {"median": NUMBER, "q1": NUMBER, "q3": NUMBER, "rounds": [NUMBER]}
_ARRAY = {"name": str, "shape": [int], "dtype": str}

# What each field holds: a type or several, a list of one kind of element, a dict with fields of its own, or `dict` for
# any. A result may have further fields: newer releases add some.
FIELDS: dict[str, Any] = {
    "schema": int,
    "fastdp": str,
    "date": str,
    "command": [str],
    "machine": {
        "cpu": str,
        "cores": int,
        "memory_nbytes": MAYBE,
        "system": str,
        "gpus": [{"name": str, "memory_nbytes": MAYBE, "compute_capability": (list, type(None))}],
        "driver": TEXT,
    },
    "versions": dict,
    "noise": {
        "idle_loop": {"median_seconds": NUMBER, "q1": NUMBER, "q3": NUMBER},
        "relative_spread": NUMBER,
        "verdict": str,
    },
    "target": {
        "name": str,
        "title": str,
        "framework": str,
        "parameters": MAYBE,
        "inputs": [_ARRAY],
        "loss": str,
        "optimizer": str,
    },
    "settings": {
        "batch": int,
        "precision": str,
        "data": str,
        "steps": (int, type(None)),
        "seconds": MAYBE,
        "rounds": int,
        "seed": int,
    },
    "entries": [
        {
            "name": str,
            "library": str,
            "devices": int,
            "kind": str,
            "mode": str,
            "batch": int,
            "samples_per_second": _SPREAD,
            "step_seconds": _SPREAD,
            "efficiency": MAYBE,
            "warm_up": {"steps": int, "seconds": NUMBER},
            "first_step_seconds": MAYBE,
            "capture_seconds": MAYBE,
            "compile_seconds": MAYBE,
            "how": str,
            "why": str,
            "verbs": [
                {"device": str, "rows": int, "seconds": dict, "nbytes": dict, "peak_nbytes": MAYBE},
            ],
            "between_seconds": MAYBE,
            "overhead_seconds": MAYBE,
            "peak_host_nbytes": MAYBE,
            "buckets": [NUMBER],
            "utilization": (list, type(None)),
            "joules_per_sample": MAYBE,
            "trace": TEXT,
        }
    ],
    "failed": [{"name": str, "reason": str}],
    "batches": (dict, type(None)),
}


def save(result: Mapping[str, Any], path: Path) -> None:
    """Write a result as a JSON file of UTF-8.

    Raises:
        ValueError: it is no result: a mistake in the program.
        OSError: the file cannot be written.
    """
    check(result, "the result")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def load(path: Path) -> dict[str, Any]:
    """Read a result that `save` wrote, or `fastdp bench --json` printed; of a folder, the file inside.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is none; the message says where it differs, and how to make one.
    """
    path = path / FILE if path.is_dir() else path
    remedy = "Make one with: fastdp bench MODEL --output FOLDER"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no result of `fastdp bench`: it is not JSON ({error}). {remedy}") from error
    try:
        check(found, str(path))
    except ValueError as error:
        raise ValueError(f"{error}. {remedy}") from None
    return dict(found)


def check(result: Any, what: str) -> None:
    """Check that all fields are there and hold what they should.

    Raises:
        ValueError: a field is missing or holds something else.
    """
    if not isinstance(result, Mapping) or "schema" not in result:
        raise ValueError(f"{what} is no result of `fastdp bench`: it has no field `schema`")
    if result["schema"] != SCHEMA:
        raise ValueError(f"{what} has the schema {result['schema']!r}, and this release of fastdp reads {SCHEMA}")
    for problem in _problems(result, FIELDS, ""):
        raise ValueError(f"{what} is no result of `fastdp bench`: {problem}")


def _problems(value: Any, kind: Any, place: str) -> Iterator[str]:
    """Where a value differs from what a field holds."""
    shown = place or "the file"
    if isinstance(kind, dict):
        if not isinstance(value, Mapping):
            yield f"`{shown}` must be an object, got {value!r:.80}"
            return
        for name, inner in kind.items():
            where = f"{place}.{name}" if place else name
            if name not in value:
                yield f"`{where}` is missing"
            else:
                yield from _problems(value[name], inner, where)
    elif isinstance(kind, list):
        if not isinstance(value, list):
            yield f"`{shown}` must be a list, got {value!r:.80}"
            return
        for number, element in enumerate(value):
            yield from _problems(element, kind[0], f"{place}[{number}]")
    elif not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        yield f"`{shown}` must be {_words(kind)}, got {value!r:.80}"


def _words(kind: Any) -> str:
    """The name of a type, or of several."""
    names = {
        str: "text",
        int: "a whole number",
        float: "a number",
        dict: "an object",
        list: "a list",
        type(None): "null",
    }
    kinds = list(kind) if isinstance(kind, tuple) else [kind]
    if float in kinds and int in kinds:
        kinds.remove(int)
    return " or ".join(names[one] for one in kinds)
