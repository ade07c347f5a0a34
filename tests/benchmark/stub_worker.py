"""A way to train of a few lines, in a process of its own: `stub_worker.py REQUEST`, told by the request's optimizer."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from fastdp.benchmark.request import Prepared, Request, Round
from fastdp.benchmark.serve import serve

request = Request.from_json(sys.argv[1])
how = request.optimizer or "steady"
rounds = 0


def train(steps: int) -> Round:
    """Pretend: ten milliseconds a step on one device, 6 on two, more with a larger batch."""
    global rounds  # noqa: PLW0603  a script
    rounds += 1
    with Path(os.environ["TURNS"]).open("a", encoding="utf-8") as file:
        file.write(f"{request.devices} {request.batch} {steps}\n")
    if how == "dies" and rounds == 8:
        raise MemoryError("no room\nand more lines")
    if how == "hangs" and rounds == 8:
        os.fork() or time.sleep(600)
        time.sleep(600)
    return Round(steps, steps * (0.01 if request.devices == 1 else 0.006) * max(1.0, request.batch / 64))


def prepare() -> Prepared:
    """Pretend to build a model."""
    sys.stdout.write("printed, and no answer")
    if how == "rude":
        sys.stdout.flush()
        os.write(1, b"\xff\xfe is no text\n")
        if sys.stdin.read():
            raise AssertionError("it has read the driver's questions")
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  as scripts silence libraries
        os.close(1)
    if how == "orphans":
        os.fork() or time.sleep(600)
        os._exit(3)
    if how == "broken":
        sys.stderr.write("words on stderr\n")
        raise ValueError("cannot build")
    if how == "full" and request.batch > 100:
        raise MemoryError("CUDA out of memory")
    facts = {"parameters": 7, "title": "a stub", "inputs": [], "loss": "mse", "optimizer": how, "how": "stubbed"}
    trace = (lambda path: Path(path).write_text("{}")) if how == "traces" else None
    return Prepared(train, facts, report=lambda: {"between_seconds": 0.001 * rounds}, trace=trace)


serve(prepare)
