"""Trains with random faults for thousands of steps: python tests/shared/soak.py MINUTES [SEED] [KILLS], by hand.

Each model of `trained_kinds` has a twin that meets no fault. After every step both must be equal to the last bit. One
in three steps meets a fault: an exception, out of memory, a delay, a NaN, or Ctrl-C. Models are wrapped anew now and
then. Threads, files, objects and resident memory are measured, and must stay flat. KILLS processes more are killed at a
random place, and go on from their checkpoint.
"""

from __future__ import annotations

import gc
import itertools
import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import threading
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from faults import VERBS, Fault, injected
from trained_kinds import KINDS, Kind

import fastdp

DEVICES = 3
_KINDS_OF_FAULT = ("raise", "memory", "delay", "corrupt", "interrupt")


class Soak:
    """A run of random steps.

    Args:
        seed: of all choices.

    Attributes:
        counts: steps and faults, by kind.
    """

    def __init__(self, seed: int, names: tuple[str, ...] = tuple(KINDS)) -> None:
        self._random = random.Random(seed)
        self._pairs: dict[str, tuple[Kind, Kind]] = {}
        self._numbers = dict.fromkeys(names, 0)
        self.counts: Counter[str] = Counter()
        for name in names:
            self._wrap(name)

    def _wrap(self, name: str) -> None:
        """Make a model and its twin, with the state of those before."""
        before = self._pairs.pop(name, None)
        state = before[0].state() if before is not None else None
        del before
        pair = KINDS[name](DEVICES), KINDS[name](DEVICES)
        for one in pair if state is not None else ():
            one.load(state or [])
        self._pairs[name] = pair
        self.counts["wraps"] += 2

    def run(self, steps: int) -> None:
        """Make so many steps of random models.

        Raises:
            AssertionError: something was lost.
        """
        for _ in range(steps):
            name = self._random.choice(list(self._pairs))
            if self._random.random() < 0.02:
                self._wrap(name)
            self._step(name)

    def _step(self, name: str) -> None:
        model, twin = self._pairs[name]
        number = self._numbers[name]
        self._numbers[name] += 1
        if self._random.random() < 0.35:
            self._faulty(name, model, number)
        else:
            model.step(number)
        twin.step(number)
        self.counts["steps"] += 1
        assert _equal(model.state(), twin.state()), f"{name} differs after step {number}"

    def _faulty(self, name: str, model: Kind, number: int) -> None:
        """A step with a fault, and again without one if it was lost."""
        verb, kind = self._random.choice(model.verbs), self._random.choice(_KINDS_OF_FAULT)
        on_host = "update" not in model.verbs  # Ctrl-C in an optimizer that steps on the host is the caller's own
        if (kind == "corrupt" and verb not in model.corruptible) or (kind == "interrupt" and on_host):
            kind = "raise"
        every = 1 if verb in ("reduce", "update") else DEVICES
        device = None if verb == "reduce" else f"virtual:{self._random.randrange(every)}"
        before = model.state()
        with injected(Fault(verb, device, kind)) as fault:
            try:
                model.step(number)
            except (fastdp.ReplicaError, KeyboardInterrupt):
                lost = True
            else:
                lost = False
        assert kind != "delay" or not lost
        self.counts[f"{kind} survived"] += fault.struck
        self.counts["faults"] += fault.struck
        after = model.state()
        if lost and _equal(before, after):
            model.step(number)
        else:  # Ctrl-C came when the step could not be taken back any more, or there was only a delay
            assert not lost or kind == "interrupt", f"{name} changed by {kind} in {verb} on {device}, step {number}"


def _equal(one: list[Any], other: list[Any]) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(one, other, strict=False))


def resources() -> dict[str, int]:
    """Threads, open files, objects of Python, and KiB of resident memory."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {
        "threads": threading.active_count(),
        "files": len(os.listdir("/proc/self/fd")),
        "objects": len(gc.get_objects()),
        "rss_kib": pages * os.sysconf("SC_PAGE_SIZE") // 1024,
    }


# Kills.


def _train(name: str, folder: str, result: str, fault: tuple[int, str, str | None] | None) -> None:
    """Six steps from the checkpoint that is there. A fault kills the process in one of them."""
    fastdp.set_virtual_devices(DEVICES)
    model = KINDS[name](DEVICES)
    with fastdp.Checkpoint(folder, every_steps=1, keep=2, **model.parts()) as checkpoint:
        checkpoint.restore()
        while checkpoint.position.step < 6:
            number = checkpoint.position.step
            if fault is not None and number == fault[0]:
                with injected(Fault(fault[1], fault[2], "kill")):
                    model.step(number)
            else:
                model.step(number)
            checkpoint.step()
    np.savez(result, *model.state())


def kill(name: str, verb: str, device: str | None, step: int, expected: list[Any] | None = None) -> list[Any]:
    """Kill a run at a place, let it go on, and compare its end with that of one that was never killed.

    Returns:
        The state at the end.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["numpy", "fastdp", *([] if name == "functions" else ["torch", "fastdp.torch"])])
    with tempfile.TemporaryDirectory() as folder:
        result = str(Path(folder) / "end.npz")
        where = None if expected is None else (step, verb, device)
        for fault, status in ((where, -signal.SIGKILL), (None, 0))[expected is None :]:
            process = context.Process(target=_train, args=(name, str(Path(folder) / "run"), result, fault))
            process.start()
            process.join(120)
            assert process.exitcode == status, f"{name} ended with {process.exitcode} by a kill in {verb} of {step}"
            process.close()
        with np.load(result) as file:
            end = [file[key] for key in file.files]
    assert expected is None or _equal(end, expected), f"{name}: {verb} on {device}, step {step}"
    return end


def kills(count: int, seed: int, names: tuple[str, ...] = ("functions", "torch step")) -> int:
    """Kill so many runs at random places. Returns how many."""
    chosen = random.Random(seed)
    ends = {name: kill(name, "", None, 0) for name in names}
    places = list(itertools.product(names, VERBS, range(DEVICES)))
    for number in range(count):
        name, verb, device = places[number % len(places)]
        place = None if verb in ("reduce", "update") else f"virtual:{device}"
        kill(name, verb, place, chosen.randrange(1, 6), ends[name])
    return count


def main(minutes: float, seed: int = 0, killed: int = 0) -> None:
    """Run for so many minutes, then kill, and print a line of JSON."""
    warnings.simplefilter("error", UserWarning)
    began = time.monotonic()
    fastdp.set_virtual_devices(DEVICES)
    soak = Soak(seed)
    soak.run(200)  # what is allocated once
    seen = [resources()]
    while time.monotonic() < began + 60 * minutes:
        soak.run(100)
        seen.append(resources())
        if len(seen) % 10 == 0:
            print(json.dumps({"steps": soak.counts["steps"], **seen[-1]}), flush=True)  # noqa: T201
    assert all(one["threads"] == seen[0]["threads"] and one["files"] == seen[0]["files"] for one in seen), seen
    found = {"seed": seed, **soak.counts, "first": seen[0], "last": seen[-1], "rss": [one["rss_kib"] for one in seen]}
    found["minutes"] = round((time.monotonic() - began) / 60, 1)
    print(json.dumps(found), flush=True)  # noqa: T201
    print(json.dumps({"kills": kills(killed, seed)}))  # noqa: T201


if __name__ == "__main__":
    main(float(sys.argv[1]), *map(int, sys.argv[2:]))
