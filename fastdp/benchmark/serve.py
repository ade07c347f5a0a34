"""How a worker process talks with the driver, line by line: it is ready, and then answers each line that it gets."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from fastdp.benchmark.request import Prepared

PREFIX = "fastdp-bench: "  # marks answers, since libraries print on stdout too


def serve(prepare: Callable[[], Prepared]) -> None:
    """Prepare a way, say that it is ready with its facts, then answer each line of stdin until there are no more.

    Lines are JSON objects:

        {"round": 20}            train 20 steps; the answer has the fields of `Round`
        {"settled": true}        whether steps run as they will from now on
        {"trace": "step.json"}   write a Chrome trace of a few steps
    """
    began = time.perf_counter()
    way = prepare()
    try:
        _say({"ready_seconds": time.perf_counter() - began, **way.facts})
        for line in sys.stdin:
            _say(_answer(way, json.loads(line)))
    finally:
        way.close()


def _answer(way: Prepared, asked: dict[str, Any]) -> dict[str, Any]:
    """The answer to one line."""
    if "round" in asked:
        done = way.round(int(asked["round"]))
        done.report = way.report()
        return asdict(done)
    if "settled" in asked:
        return {"settled": way.settled()}
    if way.trace is None:
        return {"trace": None}
    way.trace(asked["trace"])
    return {"trace": asked["trace"]}


def _say(answer: dict[str, Any]) -> None:
    """Print one answer on its own line, even after an unfinished line."""
    sys.stdout.write(f"\n{PREFIX}{json.dumps(answer)}\n")
    sys.stdout.flush()
