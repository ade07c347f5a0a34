"""The goals that fastdp has on a card, and what a run of check.py measured of each.

A goal is met, not met, or "not measured" if a measurement that it needs is missing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from bench.gpu.cases import CASES

Line = Mapping[str, Any]

LARGE = 64_000_000  # bytes from which a kernel is compared with a copy on the card
KERNELS = ("slice_rows", "slice_rows shuffled", "concat_rows", "all_reduce two-shot")
PCIE = 5
MLP = (("torch eager", 5.0), ("Keras torch", 15.0), ("Keras JAX", 2.0))
RESNET = (("torch eager", 1.3), ("Keras torch", 2.0), ("Keras JAX", 1.0))
GOAL_CASES = [name for name in CASES if not name.startswith("tiny-")]


def measurements(report: Mapping[str, Any]) -> list[Line]:
    """All measurements of a report's bench stages, the last one of each thing."""
    parts = [part for stage in report["stages"].values() for part in stage["parts"].values()]
    lines = [line for part in parts for line in part.get("measurements", []) if isinstance(line, Mapping)]
    return latest(lines)


def latest(lines: Iterable[Line]) -> list[Line]:
    """The last line about each thing, in the order of first appearance."""
    found: dict[tuple[Any, ...], Line] = {}
    for line in lines:
        found[tuple(line.get(key) for key in ("what", "case", "way", "nbytes", "nodes", "replicas"))] = line
    return list(found.values())


class Found:
    """Looks up the measurements of a run for the goals."""

    def __init__(self, lines: Sequence[Line], machine: Mapping[str, Any]) -> None:
        self.lines, self.machine = lines, machine

    def named(self, what: str, **fields: Any) -> list[Line]:
        """Lines whose `what` starts with the given text and whose fields match."""
        return [
            line
            for line in self.lines
            if str(line.get("what", "")).startswith(what) and all(line.get(k) == v for k, v in fields.items())
        ]

    def milliseconds(self, case: str, way: str) -> float | None:
        """The median step of a way."""
        found = self.named("step", case=case, way=way)
        return float(found[-1]["milliseconds"]["median"]) if found else None

    def fastest(self, case: str) -> tuple[str, float] | None:
        """fastdp's fastest way on one device, with full batches through Keras's loop."""
        steps = [
            (line["way"], float(line["milliseconds"]["median"]))
            for line in self.named("step", case=case, library="fastdp", devices=1)
            if line["rows"] == line["of"] and "," not in line["way"]
        ]
        return min(steps, key=lambda one: one[1]) if steps else None

    def best(self, case: str, devices: int = 1) -> str | None:
        """The kind of step that this number of devices was measured with: graph, else traced, else eager."""
        hows = {line["how"] for line in self.named("step", case=case, library="fastdp", devices=devices)}
        return next((how for how in ("graph", "traced", "eager") if how in hows), None)

    def ready(self, case: str, way: str) -> Line:
        """The facts of a way."""
        found = self.named("ready", case=case, way=way)
        return found[-1] if found else {}


def goal(what: str, needed: str, measured: str | None, met: bool | None) -> dict[str, Any]:
    """One row; `met` becomes None if nothing was measured."""
    if measured is None:
        return {"goal": what, "needed": needed, "measured": "not measured", "met": None}
    return {"goal": what, "needed": needed, "measured": measured, "met": met}


def evaluate(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Each goal with the needed and the measured value, and whether it is met (None: not measured)."""
    found = Found(measurements(report), report.get("machine", {}))
    parts: tuple[Callable[[Found], Iterator[dict[str, Any]]], ...] = (
        _kernels, _links, _feeding, _launches, _speeds, _bare, _replicas, _captures, _memory,
    )  # fmt: skip
    return [row for part in parts for row in part(found)]


def _kernels(found: Found) -> Iterator[dict[str, Any]]:
    """Each kernel at its slowest size from 64 MB."""
    for kernel in KERNELS:
        large = [
            line
            for line in found.named(kernel)
            if line["nbytes"] >= LARGE and (line["what"] == kernel or kernel.startswith("all_reduce"))
        ]
        worst = min(large, key=lambda line: line["of_copy"], default=None)
        what = f"{kernel} beside the card's copy, from 64 MB on"
        if worst is None:
            yield goal(what, ">= 0.9", None, None)
        else:
            said = f"{worst['of_copy']:.2f} ({worst['GBps']['median']:.0f} GB/s, {worst['nbytes'] / 1e6:.0f} MB)"
            yield goal(what, ">= 0.9", said, worst["of_copy"] >= 0.9)


def _links(found: Found) -> Iterator[dict[str, Any]]:
    """Pinned memory to the card; a goal only on PCIe 5."""
    what, needed = f"pinned memory to the card, on PCIe {PCIE}", ">= 50 GB/s"
    rates = [line["GBps"]["median"] for line in found.named("pinned to card")]
    generation = found.machine.get("pcie_generation")
    if not rates or generation is None or generation < PCIE:
        row = goal(what, needed, None, None)
        if rates:
            row["measured"] += f" ({max(rates):.1f} GB/s on a link of PCIe {generation or 'of unknown generation'})"
        yield row
    else:
        yield goal(what, needed, f"{max(rates):.1f} GB/s", max(rates) >= 50)


def _feeding(found: Found) -> Iterator[dict[str, Any]]:
    """The engine's step on a batch in host memory, compared with a batch on the card."""
    for case in GOAL_CASES:
        best = found.best(case)
        fed, there = (found.milliseconds(case, f"fastdp 1 {best}, {how}") for how in ("fed", "resident"))
        cost = fed / there - 1 if fed and there else None
        said = f"{100 * cost:.1f} % ({there} to {fed} ms)" if cost is not None else None
        yield goal(f"{case}: what feeding costs a step", "<= 3 %", said, cost is not None and cost <= 0.03)


def _launches(found: Found) -> Iterator[dict[str, Any]]:
    """Replays of one replica's graph, at the slowest number of nodes; one graph for each of 8 replicas."""
    replays = [(line["nodes"], line["microseconds"]["median"]) for line in found.named("host time: replay")]
    what, needed = "host time of a replay", "<= 10 us + 5 ns per node"
    if replays:
        nodes, took = max(replays, key=lambda one: one[1] / (10 + 0.005 * one[0]))
        yield goal(what, needed, f"{took:.1f} us at {nodes} nodes", took <= 10 + 0.005 * nodes)
    else:
        yield goal(what, needed, None, None)
    eight = found.named("host time: a graph for each replica", replicas=8)
    took = eight[-1]["microseconds"]["median"] if eight else None
    yield goal(
        "8 graphs launched by one thread",
        "<= 80 us",
        f"{took:.1f} us" if took is not None else None,
        took is not None and took <= 80,
    )


def _speeds(found: Found) -> Iterator[dict[str, Any]]:
    """fastdp's fastest steps on one device, compared with its peers."""
    wanted = [("mlp", way, times) for way, times in MLP]
    wanted += [("resnet50-bf16-32", way, times) for way, times in RESNET]
    wanted.append(("resnet50-bf16-256", "torch eager", 0.99))
    for case, way, times in wanted:
        ours, theirs = found.fastest(case), found.milliseconds(case, way)
        ratio = theirs / ours[1] if ours and theirs else None
        said = f"{ratio:.2f} ({ours[0]})" if ratio is not None and ours else None
        yield goal(f"{case}: times as fast as {way}", f">= {times:g}", said, ratio is not None and ratio >= times)


def _bare(found: Found) -> Iterator[dict[str, Any]]:
    """The engine's step of one replica, compared with the bare replay of its graphs."""
    for case in GOAL_CASES:
        step, bare = (found.milliseconds(case, f"fastdp 1 graph, {how}") for how in ("resident", "bare"))
        over = step / bare - 1 if step and bare else None
        said = f"{100 * over:.2f} % ({bare} to {step} ms)" if over is not None else None
        yield goal(
            f"{case}: one replica over its bare captured step", "<= 1 %", said, over is not None and over <= 0.01
        )


def _replicas(found: Found) -> Iterator[dict[str, Any]]:
    """8 virtual replicas, which share the card, compared with 8 steps of one device on an eighth of the rows."""
    for case in GOAL_CASES:
        best = found.best(case, 8)
        eight = found.milliseconds(case, f"fastdp 8 {best}")
        part = found.milliseconds(case, f"fastdp 1 {best}, rows/8")
        over = eight / (8 * part) - 1 if eight and part else None
        said = f"{100 * over:.1f} % ({8 * part:.3f} to {eight:.3f} ms)" if over is not None and eight and part else None
        yield goal(
            f"{case}: 8 virtual replicas over the sum of their parts", "<= 5 %", said, over is not None and over <= 0.05
        )


def _captures(found: Found) -> Iterator[dict[str, Any]]:
    """Seconds to capture a step, for the kind of step that the case is measured with."""
    for case in GOAL_CASES:
        seconds = found.ready(case, f"fastdp 1 {found.best(case)}").get("capture_seconds") or None
        yield goal(
            f"{case}: capture",
            "<= 5 s",
            f"{seconds:.1f} s" if seconds is not None else None,
            seconds is not None and seconds <= 5,
        )


def held(ready: Line) -> tuple[int, str] | None:
    """Bytes of card memory that a way holds, and the source of that number."""
    memory = ready.get("memory", {})
    if memory.get("held_nbytes"):
        return int(memory["held_nbytes"]), "NVML"
    if memory.get("torch_reserved_peak_nbytes"):
        own = [sum(device["nbytes"].values()) for device in ready.get("report", {}).get("devices", [])]
        return int(memory["torch_reserved_peak_nbytes"]) + sum(own), "torch's allocator and fastdp's report"
    return None


def _memory(found: Found) -> Iterator[dict[str, Any]]:
    """Card memory of a process, compared with torch eager."""
    for case in GOAL_CASES:
        ours, theirs = (held(found.ready(case, way)) for way in (f"fastdp 1 {found.best(case)}", "torch eager"))
        known = ours is not None and theirs is not None and ours[1] == theirs[1]
        ratio = ours[0] / theirs[0] if known and ours and theirs else None
        said = f"{ratio:.2f} ({ours[0] / 1e6:.0f} MB, by {ours[1]})" if ratio is not None and ours else None
        yield goal(f"{case}: memory beside torch eager's", "<= 1.15", said, ratio is not None and ratio <= 1.15)


def words(met: bool | None) -> str:
    """A goal's state as text."""
    return {True: "met", False: "NOT MET", None: "not measured"}[met]


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The goals as plain text."""
    cells = [["goal", "needed", "measured", ""]]
    cells += [[row["goal"], row["needed"], row["measured"], words(row["met"])] for row in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(3)]
    lines = ["  ".join([*(c.ljust(w) for c, w in zip(row, widths, strict=False)), row[3]]).rstrip() for row in cells]
    counts = {name: sum(words(row["met"]) == name for row in rows) for name in ("met", "NOT MET", "not measured")}
    return "\n".join([*lines, ", ".join(f"{count} {name}" for name, count in counts.items())])
