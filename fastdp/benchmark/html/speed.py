"""The sections of a report on speed: throughput by devices with the ideal line, and what comes before it."""

from __future__ import annotations

from collections.abc import Sequence
from xml.etree.ElementTree import Element

from fastdp.benchmark.entries import Entry
from fastdp.benchmark.figures import MISSING, count, duration, median_of, milliseconds, percent, rate
from fastdp.benchmark.html.charts import Series, color, scaling, stacked
from fastdp.benchmark.html.elements import Child, table, tag


def section(entries: Sequence[Entry]) -> Element:
    """Throughput of all ways: a picture and a table."""
    series = series_of(entries)
    picture: Element | None = None
    words = ""
    if any(len(one.points) > 1 for one in series):
        words = "Medians of all rounds; a bar through a point spans the middle half of its rounds."
        picture = scaling(series, _described(series))
    elif series:
        words = "Medians of all rounds."
        picture = _bars(entries)
    return tag("section", tag("h2", "Throughput"), tag("p", words, class_="soft"), picture, _table(entries))


def series_of(entries: Sequence[Entry]) -> list[Series]:
    """The entries that differ only in the number of devices, put together; the fastest where two have one number."""
    kinds: dict[str, set[str]] = {}
    for entry in entries:
        kinds.setdefault(entry.series, set()).add(entry.kind)
    found: dict[str, dict[int, Entry]] = {}
    for entry in entries:
        if entry.rate is None or entry.devices < 1:
            continue
        name = entry.series if len(kinds[entry.series]) == 1 else f"{entry.series}, {entry.kind}"
        points = found.setdefault(name, {})
        other = points.get(entry.devices)
        if other is None or other.rate is None or other.rate.median < entry.rate.median:
            points[entry.devices] = entry
    return [
        Series(name, tuple((devices, entry.rate) for devices, entry in sorted(points.items()) if entry.rate))
        for name, points in found.items()
    ]


def _described(series: Sequence[Series]) -> str:
    """The picture in words."""
    said = []
    for one in series:
        points = ", ".join(f"{rate(spread.median)} on {devices}" for devices, spread in one.points)
        said.append(f"{one.name}: {points}")
    return f"Samples per second by number of devices. {'; '.join(said)}. The table below has all figures."


def _bars(entries: Sequence[Entry]) -> Element:
    """A bar for each way, where no series has two numbers of devices."""
    known = [(entry, entry.rate.median) for entry in entries if entry.rate is not None]
    longest = max(median for _, median in known)
    rows = [(entry.name, {"rate": median}, rate(median)) for entry, median in known]
    return tag("figure", stacked(rows, longest, {"rate": color(0)}))


def _table(entries: Sequence[Entry]) -> Element:
    best = max((entry.rate.median for entry in entries if entry.rate), default=None)
    rows: list[list[Child]] = []
    for entry in entries:
        median = entry.rate.median if entry.rate else None
        middle = f"{rate(entry.rate.q1)} to {rate(entry.rate.q3)}" if entry.rate else MISSING
        row: list[Child] = [
            entry.name,
            count(entry.batch),
            rate(median),
            middle,
            percent(median / best) if median is not None and best else MISSING,
            milliseconds(median_of(entry.step)),
            percent(entry.efficiency),
            percent(entry.mean_utilization),
            milliseconds(entry.joules_per_sample),
        ]
        rows.append(row)
    header = [
        "way",
        "batch",
        "samples/s",
        "middle half",
        "of fastest",
        "step ms",
        "efficiency",
        "GPU use",
        "mJ/sample",
    ]
    caption = "Efficiency is the throughput of a device over that of the same way on one device."
    return table(caption, *without_empty(header, rows))


def start_section(entries: Sequence[Entry]) -> Element:
    """What each way takes before its steps are fast, and how they run."""
    rows: list[list[Child]] = []
    for entry in entries:
        steps = None if entry.warm_up_steps is None else f"{entry.warm_up_steps:,.0f}"
        row: list[Child] = [
            entry.name,
            duration(entry.first_step_seconds),
            duration(entry.capture_seconds),
            duration(entry.compile_seconds),
            steps or MISSING,
            duration(entry.warm_up_seconds),
        ]
        rows.append(row)
    header = ["way", "first step", "capture", "compile", "warm-up steps", "warm-up"]
    how = [[entry.name, entry.how or MISSING, entry.why or MISSING] for entry in entries if entry.how or entry.why]
    return tag(
        "section",
        tag("h2", "Before steps are fast"),
        tag("p", "Once per model and shape of batch; not part of the throughput above.", class_="soft"),
        table("Time to the first step and to full speed", *without_empty(header, rows)),
        table("How steps run", *without_empty(["way", "how", "why"], how), words=range(3)) if how else None,
    )


def without_empty(header: Sequence[str], rows: Sequence[Sequence[Child]]) -> tuple[list[str], list[list[Child]]]:
    """A table without the columns of which no figure is known; the first stays."""
    kept = [place for place in range(len(header)) if not place or any(row[place] != MISSING for row in rows)]
    return [header[place] for place in kept], [[row[place] for place in kept] for row in rows]
