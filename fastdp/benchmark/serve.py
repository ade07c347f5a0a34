"""How a worker process talks with the driver, line by line: it is ready, and then answers each line that it gets."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import IO, Any

from fastdp.benchmark.request import Prepared

PREFIX = "fastdp-bench: "  # marks answers, since C libraries may have printed on stdout before


def serve(prepare: Callable[[], Prepared]) -> None:
    """Prepare a way, say that it is ready with its facts, then answer each line of stdin until there are no more.

    Lines are JSON objects:

        {"round": 20}            train 20 steps; the answer has the fields of `Round`
        {"settled": true}        whether steps run as they will from now on
        {"trace": "step.json"}   write a Chrome trace of a few steps
    """
    questions, answers = private_streams()
    began = time.perf_counter()
    way = prepare()
    try:
        say(answers, {"ready_seconds": time.perf_counter() - began, **way.facts})
        for line in questions:
            say(answers, _answer(way, json.loads(line)))
    finally:
        way.close()


def private_streams() -> tuple[IO[str], IO[str]]:
    """Take stdin and stdout for the driver alone, as streams that last as long as the process.

    A user's code may then print, ask, close or replace both: what it prints goes to stderr, and it reads an empty file.
    """
    sys.stdout.flush()
    questions, answers = os.fdopen(os.dup(0), encoding="utf-8"), os.fdopen(os.dup(1), "w", encoding="utf-8")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    return questions, answers


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


def say(answers: IO[str], answer: dict[str, Any]) -> None:
    """Write one answer on its own line, even after an unfinished line."""
    answers.write(f"\n{PREFIX}{json.dumps(answer)}\n")
    answers.flush()
