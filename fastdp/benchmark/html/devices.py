"""The sections of a report on devices: where the time of a step goes, a timeline of one step, and memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePath
from xml.etree.ElementTree import Element

from fastdp.benchmark.entries import PARTS, Entry
from fastdp.benchmark.figures import count, duration, milliseconds, plural, size
from fastdp.benchmark.headings import clock_words
from fastdp.benchmark.html.charts import Span, color, lanes, part_legend, stacked
from fastdp.benchmark.html.elements import Child, table, tag
from fastdp.benchmark.html.speed import without_empty
from fastdp.benchmark.html.step_trace import StepTrace, read_step

_PART_COLORS = {part: f"var(--{part})" for part in PARTS}
# More ways than this are folded: a reader opens those of interest.
_OPEN = 8


def time_section(entries: Sequence[Entry]) -> Element | None:
    """Stacked bars of the parts of a step for each way and device, on one scale."""
    shown = _timed(entries)
    if not shown:
        return None
    parts = [[entry.parts(device) for device in entry.per_device] for entry in shown]
    longest = max(sum(one.values()) for each in parts for one in each)
    groups = []
    for entry, each in zip(shown, parts, strict=True):
        rows = [
            (device.name, one, f"{milliseconds(sum(one.values()))} ms")
            for device, one in zip(entry.per_device, each, strict=True)
        ]
        figures: list[list[Child]] = [
            [device.name, count(device.rows), *(milliseconds(one.get(part)) for part in PARTS)]
            for device, one in zip(entry.per_device, each, strict=True)
        ]
        numbers = table(f"{entry.name}: milliseconds", *without_empty(["device", "rows", *PARTS], figures))
        figures_below = tag("details", tag("summary", "Figures"), numbers)
        groups.append((entry.name, [stacked(rows, longest, _PART_COLORS), figures_below]))
    words = (
        "Median milliseconds of each part of a step, all ways on one scale. Input is the time between steps; wait is "
        f"the time until the slowest device is done; other is what no clock covers. {clock_words(shown)}"
    )
    all_parts = [one for each in parts for one in each]
    return tag("section", tag("h2", "Where the time goes"), tag("p", words, class_="soft"), part_legend(all_parts),
               *_folded(groups))  # fmt: skip


def _timed(entries: Sequence[Entry]) -> list[Entry]:
    """The entries that tell where the time of a step goes."""
    return [entry for entry in entries if any(device.seconds for device in entry.per_device)]


def _folded(groups: Sequence[tuple[str, list[Element]]]) -> list[Element]:
    """Each group under its name; the later ones folded where there are many."""
    return [
        tag("div", tag("h3", name), *inside)
        if place < _OPEN or len(groups) <= _OPEN + 1
        else tag("details", tag("summary", name), *inside)
        for place, (name, inside) in enumerate(groups)
    ]


def timeline_section(entries: Sequence[Entry], folder: Path | None) -> Element | None:
    """One step of each way that has a trace, the fastest first; without traces one put together from its parts.

    Args:
        folder: where the traces lie; None has none.
    """
    fastest = sorted(entries, key=lambda entry: -(entry.rate.median if entry.rate else 0.0))
    steps, notes = [], []
    for entry in fastest:
        if folder is None or entry.trace is None:
            continue
        trace, problem = _read(folder, entry.trace)
        if trace is not None:
            steps.append((entry.name, _traced(entry, trace)))
        else:
            notes.append(tag("p", problem, class_="note warn"))
    if not steps:
        steps = [(entry.name, _modelled(entry)) for entry in _timed(fastest)[:1]]
    if not steps:
        return None
    others = [tag("details", tag("summary", name), step) for name, step in steps[1:]]
    return tag("section", tag("h2", "One step"), *notes, steps[0][1], *others)


def _modelled(entry: Entry) -> Element:
    """The parts of a step one after another, for an entry whose devices tell some."""
    parts = [entry.parts(device) for device in entry.per_device]
    longest = max(sum(one.values()) for one in parts) or 1.0
    rows = []
    for device, one in zip(entry.per_device, parts, strict=True):
        spans, begin = [], 0.0
        for part, taken in one.items():
            spans.append(Span(part, begin, taken, _PART_COLORS[part]))
            begin += taken
        rows.append((device.name, spans))
    words = f"{entry.name}. Put together from the median times above, one after another: not a recording. With "
    said = tag("p", words, tag("code", "--profile"), " the step is recorded.", class_="soft")
    return tag("div", said, tag("figure", lanes(rows, longest)), part_legend(parts))


def _read(folder: Path, name: str) -> tuple[StepTrace | None, str | None]:
    """The step in the trace file of this name beside the result, or why there is none.

    The folder may have moved since, and a result may name any file: its folders are left out.
    """
    try:
        return read_step(folder / PurePath(name).name), None
    except (OSError, ValueError) as error:
        return None, f"The trace was not read: {error}"


def _traced(entry: Entry, trace: StepTrace) -> Element:
    """A recorded step."""
    total: dict[str, float] = {}
    rows: list[list[Child]] = []
    for lane, spans in trace.lanes:
        total.clear()
        for span in spans:
            total[span.name] = total.get(span.name, 0.0) + span.seconds
        longest = sorted(total.items(), key=lambda item: -item[1])[:5]
        rows.append([lane, "; ".join(f"{name} {duration(seconds)}" for name, seconds in longest)])
    words = f"{entry.name}. A recorded step of {duration(trace.seconds)}; {entry.trace} opens in Perfetto."
    if trace.left_out:
        words += f" The {plural(trace.left_out, 'shortest span')} are not drawn."
    used = {span.color for _, spans in trace.lanes for span in spans}
    known = [{part: 1.0 for part in PARTS if _PART_COLORS[part] in used}]
    figures = tag("details", tag("summary", "Figures"),
                  table("The longest spans of each lane", ["lane", "spans"], rows, words=range(2)))  # fmt: skip
    picture = tag("figure", lanes(trace.lanes, trace.seconds))
    return tag("div", tag("p", words, class_="soft"), picture, part_legend(known), figures)


def memory_section(entries: Sequence[Entry]) -> Element | None:
    """Memory of each device by kind, and the peak where it is known."""
    shown = [entry for entry in entries if any(device.memory is not None for device in entry.per_device)]
    hosts = [entry for entry in entries if entry.peak_host_nbytes is not None]
    if not shown and not hosts:
        return None
    kinds = list(dict.fromkeys(kind for entry in shown for device in entry.per_device for kind in device.nbytes))
    colors = {kind: color(place) for place, kind in enumerate(kinds)} | {"peak, the rest": "var(--other)"}
    groups = []
    longest = max((device.memory or 0.0 for entry in shown for device in entry.per_device), default=0.0)
    rows: list[list[Child]] = []
    for entry in shown:
        bars = []
        for device in entry.per_device:
            pieces = {kind: value for kind, value in device.nbytes.items() if value > 0}
            rest = (device.peak_nbytes or 0.0) - sum(pieces.values())
            if rest > 0:
                pieces["peak, the rest"] = rest
            bars.append((device.name, pieces, size(device.memory)))
            known = [size(device.nbytes.get(kind)) for kind in kinds]
            rows.append(
                [f"{entry.name}: {device.name}", *known, size(device.peak_nbytes), size(entry.peak_host_nbytes)]
            )
        groups.append((entry.name, [stacked(bars, longest, colors)]))
    rows += [
        [entry.name, *("-" for _ in kinds), "-", size(entry.peak_host_nbytes)] for entry in hosts if entry not in shown
    ]
    present = dict.fromkeys(piece for entry in shown for device in entry.per_device for piece in device.nbytes)
    if any(device.peak_nbytes for entry in shown for device in entry.per_device):
        present["peak, the rest"] = None
    legend = tag("ul", *(tag("li", tag("i", style=f"background:{colors[kind]}"), kind) for kind in present),
                 class_="legend")  # fmt: skip
    header = ["device", *kinds, "peak", "host peak"]
    figures = tag("details", tag("summary", "Figures"), table("Memory", *without_empty(header, rows)))
    words = "What the engine holds for the model on each device. The peak, where it is known, has activations as well."
    return tag("section", tag("h2", "Memory"), tag("p", words, class_="soft"), legend, *_folded(groups), figures)
