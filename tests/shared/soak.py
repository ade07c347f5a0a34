"""Trains with random faults for thousands of steps: python tests/shared/soak.py MINUTES [SEED] [KILLS], by hand.

Each model has a twin that meets no fault. After every step both must be equal to the last bit. One in three steps meets
a fault: an exception, out of memory, a delay, a NaN, or Ctrl-C. Models are wrapped anew now and then. Some models
survive: they run rows in parts when a device is full, and go on without one that is lost. One has a sharded optimizer,
its twin has not. Batches of the models are read ahead by a thread, those of the twins are not. Threads, files, objects
and resident memory are measured, and must stay flat. KILLS processes more are killed at a random place, and go on from
their checkpoint.
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
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from faults import VERBS, Fault, injected
from trained_kinds import KINDS, Kind, rows_of

import fastdp
from fastdp.data import prefetch

DEVICES = 3
_KINDS_OF_FAULT = ("raise", "memory", "delay", "corrupt", "interrupt")
_SURVIVES = {"on_oom": "split", "on_device_loss": "continue", "shards": 2 * DEVICES, "dtype": "float64"}
# By number: of models that do not survive, of the twins of those that do, and of each of those that do, since a lost
# device is lost for all who have it.
_groups = [list(range(first, first + DEVICES)) for first in range(0, 6 * DEVICES, DEVICES)]


@dataclass(frozen=True)
class Variant:
    """A kind of model with options. `own` are the model's alone, `both` also its twin's."""

    kind: str
    own: dict[str, Any] = field(default_factory=dict)
    both: dict[str, Any] = field(default_factory=dict)
    group: int = 0

    @property
    def survives(self) -> bool:
        """Whether it goes on without a lost device, and with rows in parts."""
        return "on_oom" in self.both

    def make(self) -> tuple[Kind, Kind]:
        """A model and its twin."""
        devices = (_groups[self.group], _groups[1]) if self.survives else (_groups[0], _groups[0])
        return KINDS[self.kind](devices[0], **self.own, **self.both), KINDS[self.kind](devices[1], **self.both)


VARIANTS = {name: Variant(name) for name in KINDS}
VARIANTS["functions that survive"] = Variant("functions", {}, _SURVIVES, 2)
for _group, _name in enumerate(("torch step", "torch loop", "keras"), 3):
    _options = {**_SURVIVES, "sync_batch_norm": True, "normalizes": _name == "torch step"}
    VARIANTS[f"{_name} that survives"] = Variant(_name, {}, _options, _group)
VARIANTS["keras with a sharded optimizer"] = Variant("keras", {"shard_optimizer": True})


class Soak:
    """A run of random steps.

    Args:
        seed: of all choices.

    Attributes:
        counts: steps and faults, by kind.
    """

    def __init__(self, seed: int, names: tuple[str, ...] = tuple(VARIANTS)) -> None:
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
        if before is not None:
            before[0].rows.close()  # type: ignore[attr-defined]
        del before
        pair = VARIANTS[name].make()
        for one in pair if state is not None else ():
            one.load(state or [])
        pair[0].rows = _ReadAhead(self._numbers[name])  # type: ignore[method-assign]
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
            self._step(name, 0.35)
        for name in self._pairs:  # all devices are back, and all threads there
            self._rejoin(name)
            self._step(name, 0.0)

    def close(self) -> None:
        """End the threads that read ahead."""
        for model, _ in self._pairs.values():
            model.rows.close()  # type: ignore[attr-defined]

    def _rejoin(self, name: str) -> None:
        if VARIANTS[name].survives:
            self.counts["devices that came back"] += len(_parallel_of(self._pairs[name][0]).rejoin_devices())

    def _step(self, name: str, faults: float) -> None:
        model, twin = self._pairs[name]
        number = self._numbers[name]
        if self._random.random() < 0.5:
            self._rejoin(name)
        self._numbers[name] += 1
        if self._random.random() < faults:
            self._faulty(name, model, number)
        else:
            model.step(number)
        twin.step(number)
        self.counts["steps"] += 1
        self._check(name, number)

    def _faulty(self, name: str, model: Kind, number: int) -> None:
        """A step with a fault, and again without one if it was lost."""
        survives = VARIANTS[name].survives
        verb = self._random.choice(model.verbs)
        kind = self._random.choice((*_KINDS_OF_FAULT, *(["lose"] if survives else [])))
        on_host = "update" not in model.verbs  # Ctrl-C in an optimizer that steps on the host is the caller's own
        if (kind == "corrupt" and verb not in model.corruptible) or (kind == "interrupt" and on_host):
            kind = "raise"
        if kind == "lose":
            self._rejoin(name)  # the last one cannot be lost
        if VARIANTS[name].own and verb == "update":
            kind = "delay"  # others have updated their parts by then, and the model refuses to go on
        every = 1 if verb in ("reduce", "update") else DEVICES
        number_of_device = _groups[VARIANTS[name].group][self._random.randrange(every)]
        device = None if verb == "reduce" else f"virtual:{number_of_device}{' (part 0)' * survives}"
        before = model.state()
        with injected(Fault(verb, device, kind)) as fault:
            try:
                model.step(number)
            except (fastdp.ReplicaError, KeyboardInterrupt):
                lost = True
            else:
                lost = False
        assert not lost or kind not in ("delay", "lose"), f"{name} did not go on after {kind} in {verb}, step {number}"
        self.counts[f"{kind} survived"] += fault.struck
        self.counts["faults"] += fault.struck
        after = model.state()
        if lost and _equal(before, after):
            model.step(number)
        else:  # Ctrl-C came when the step could not be taken back any more, or there was only a delay
            assert not lost or kind == "interrupt", f"{name} changed by {kind} in {verb} on {device}, step {number}"

    def _check(self, name: str, number: int) -> None:
        """Both must have the same bits; after a step in parts, whose sums have another order, they get them."""
        model, twin = self._pairs[name]
        engine = _engine_of(model)
        if not engine.deal.cuts:
            assert _equal(model.state(), twin.state()), f"{name} differs after step {number}"
            return
        for one, other in zip(model.state(), twin.state(), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-7, err_msg=f"{name}, step {number}")
        engine._roster.set_cuts({})  # rows are whole again from the next step on
        twin.load(model.state())
        self.counts["steps in parts"] += 1


class _ReadAhead:
    """Batches that a thread makes ahead, from a step on. A batch may be asked for again."""

    def __init__(self, first: int) -> None:
        self._next, self._latest = first, None
        self._batches: Iterator[Any] | None = None

    def __call__(self, number: int, dtype: str) -> Any:
        if number == self._next:
            if self._batches is None:
                batches = (rows_of(n, dtype) for n in itertools.count(number))
                self._batches = iter(prefetch(batches, trust=True))  # nothing is drawn from generators of the process
            self._latest, self._next = next(self._batches), number + 1
        return self._latest if number == self._next - 1 and self._latest is not None else rows_of(number, dtype)

    def close(self) -> None:
        """End the thread."""
        if self._batches is not None:
            self._batches.close()


def _parallel_of(model: Any) -> Any:
    """The model that the user has, or the engine where that is it."""
    return model.parallel if hasattr(model, "parallel") else model.engine


def _engine_of(model: Any) -> Any:
    """The engine of any kind of model."""
    parallel = _parallel_of(model)
    calls = getattr(parallel, "_calls", None)
    return (
        calls.engine
        if calls is not None
        else getattr(parallel, "_engine", None) or getattr(parallel, "engine", parallel)
    )


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
    warnings.filterwarnings("ignore", "fastdp: virtual", UserWarning)  # a device was lost, or is full
    began = time.monotonic()
    fastdp.set_virtual_devices(len(_groups) * DEVICES)
    soak = Soak(seed)
    soak.run(200)  # what is allocated once
    seen = [resources()]
    while time.monotonic() < began + 60 * minutes:
        soak.run(100)
        seen.append(resources())
        if len(seen) % 10 == 0:
            print(json.dumps({"steps": soak.counts["steps"], **seen[-1]}), flush=True)  # noqa: T201
    assert all(one["files"] == seen[0]["files"] for one in seen), seen
    # Devices that take shards of a lost one have a thread more for each, and keep it.
    assert max(one["threads"] for one in seen) <= seen[0]["threads"] + 8 * DEVICES, seen
    soak.close()
    found = {"seed": seed, **soak.counts, "first": seen[0], "last": seen[-1], "rss": [one["rss_kib"] for one in seen]}
    found["minutes"] = round((time.monotonic() - began) / 60, 1)
    print(json.dumps(found), flush=True)  # noqa: T201
    print(json.dumps({"kills": kills(killed, seed)}))  # noqa: T201


if __name__ == "__main__":
    main(float(sys.argv[1]), *map(int, sys.argv[2:]))
