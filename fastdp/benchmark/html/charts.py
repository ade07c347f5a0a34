"""Pictures of a report, drawn by hand in HTML and SVG: positions are percent, so text keeps its size at any width."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from xml.etree.ElementTree import Element

from fastdp.benchmark.entries import PARTS
from fastdp.benchmark.figures import Spread, duration, rate
from fastdp.benchmark.html.elements import tag

# Shapes beside colors tell series apart, around the origin in pixels.
_SHAPES = (
    "M-5,0a5,5 0 1,0 10,0a5,5 0 1,0 -10,0z",
    "M-4.5,-4.5h9v9h-9z",
    "M0,-6L6,5H-6z",
    "M0,-6.5L6.5,0L0,6.5L-6.5,0z",
    "M0,6L6,-5H-6z",
    "M-2,-6h4v4h4v4h-4v4h-4v-4h-4v-4h4z",
)
_COLORS = 8
# An ideal line higher than so many times the best measurement leaves the picture instead of flattening it.
_ROOM = 2.0


@dataclass(frozen=True, slots=True)
class Series:
    """Throughput by number of devices: what the points have in common, and a spread for each number, rising."""

    name: str
    points: tuple[tuple[int, Spread], ...]

    def ideal(self, devices: float) -> float:
        """Throughput with this many devices if each were as fast as in the first point."""
        first, spread = self.points[0]
        return spread.median * devices / first


def color(place: int) -> str:
    """The color of the series at this place."""
    return f"var(--s{place % _COLORS})"


def scaling(series: Sequence[Series], described: str) -> Element:
    """Throughput by number of devices, with the ideal line of each series that has several points."""
    counts = sorted({devices for one in series for devices, _ in one.points})
    best = max(max(spread.q3, spread.median) for one in series for _, spread in one.points)
    ideals = _with_ideal(series)
    wanted = max([best, *(one.ideal(counts[-1]) for one in ideals)])
    ticks = nice_ticks(min(wanted, _ROOM * best))
    across, up = counts[-1] * 1.04, ticks[-1]
    drawing = tag("svg", role="img", aria_label=described)
    drawing.extend(_axes(counts, ticks, across))
    for one in ideals:
        end = min(counts[-1], up / one.ideal(1))
        drawing.append(_line(0, 0, end / across, one.ideal(end) / up, "ideal", color(list(series).index(one))))
    for place, one in enumerate(series):
        drawing.extend(_points(one, place, across, up))
    return tag("figure", tag("div", drawing, class_="plot"), _series_legend(series, ideals))


def _with_ideal(series: Sequence[Series]) -> Sequence[Series]:
    """The series that get an ideal line: those with several points; of more than two, the one that got fastest.

    One that begins with fewer devices goes before: its line tells more.
    """
    scaled = [one for one in series if len(one.points) > 1]
    if len(scaled) <= 2:
        return scaled
    return [max(scaled, key=lambda one: (-one.points[0][0], max(spread.median for _, spread in one.points)))]


def _axes(counts: Sequence[int], ticks: Sequence[float], across: float) -> list[Element]:
    """Lines and numbers of both axes."""
    drawn = []
    for tick in ticks:
        y = _percent(1 - tick / ticks[-1])
        drawn.append(tag("line", x1="0", x2="100%", y1=y, y2=y, class_="grid" if tick else "base"))
        drawn.append(tag("text", rate(tick), x="-10", y=y, dy="0.35em", text_anchor="end"))
    shown = -math.inf
    for devices in counts:
        x = devices / across
        if x - shown < 0.06:  # numbers would touch
            continue
        shown = x
        drawn.append(tag("text", devices, x=_percent(x), y="100%", dy="1.5em", text_anchor="middle"))
    drawn.append(tag("text", "devices", x="50%", y="100%", dy="2.9em", text_anchor="middle"))
    drawn.append(tag("text", "samples/s", x="-44", y="0", dy="-1.2em"))
    return drawn


def _points(series: Series, place: int, across: float, up: float) -> list[Element]:
    """Points of a series with their quartiles, and lines between them."""
    drawn = []
    for (devices, spread), (after, next_one) in itertools.pairwise(series.points):
        ends = (devices / across, spread.median / up, after / across, next_one.median / up)
        drawn.append(_line(*ends, "link", color(place)))
    for devices, spread in series.points:
        x = devices / across
        drawn.append(_line(x, spread.q1 / up, x, spread.q3 / up, "reach", color(place)))
        shape = tag("path", d=_SHAPES[place % len(_SHAPES)], style=f"fill:{color(place)}")
        shape.append(tag("title", f"{series.name}, {devices}: {rate(spread.median)} samples/s"))
        drawn.append(tag("svg", shape, x=_percent(x), y=_percent(1 - spread.median / up), overflow="visible"))
    return drawn


def _line(x1: float, y1: float, x2: float, y2: float, kind: str, stroke: str) -> Element:
    """A line between points given as parts of the width and of the height, from the bottom left."""
    ends = {"x1": _percent(x1), "y1": _percent(1 - y1), "x2": _percent(x2), "y2": _percent(1 - y2)}
    return tag("line", **ends, class_=kind, style=f"stroke:{stroke}")


def _series_legend(series: Sequence[Series], ideals: Sequence[Series]) -> Element:
    items = []
    for place, one in enumerate(series):
        shape = tag("path", d=_SHAPES[place % len(_SHAPES)], style=f"fill:{color(place)}")
        mark = tag("svg", shape, width="14", height="14", viewBox="-7 -7 14 14", aria_hidden="true")
        items.append(tag("li", mark, one.name))
    if ideals:
        of = f" of {ideals[0].name}" if len(ideals) < sum(len(one.points) > 1 for one in series) else ""
        said = f"ideal{of}: each device as fast as in the first point"
        items.append(tag("li", tag("i", class_="dash"), said))
    return tag("ul", *items, class_="legend")


def nice_ticks(largest: float) -> list[float]:
    """Round numbers from 0 to `largest` or a little beyond, about five."""
    if largest <= 0:
        return [0.0, 1.0]
    rough = largest / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    return [step * place for place in range(math.ceil(largest / step - 1e-9) + 1)]


def part_legend(parts: Sequence[Mapping[str, float]]) -> Element:
    """What the colors of the parts of a step mean, for the parts that occur."""
    known = [part for part in PARTS if any(part in one for one in parts)]
    return tag("ul", *(tag("li", tag("i", style=f"background:var(--{part})"), part) for part in known), class_="legend")


def stacked(rows: Sequence[tuple[str, Mapping[str, float], str]], longest: float, colors: Mapping[str, str]) -> Element:
    """A stacked bar for each row: its name, its parts, and the figure at its end; `longest` fills the width."""
    grid = tag("div", class_="bars", aria_hidden="true")  # a table says the same
    for name, parts, value in rows:
        pieces = [
            tag("i", style=f"width:{_percent(taken / longest if longest else 0)};background:{colors[part]}", title=part)
            for part, taken in parts.items()
        ]
        grid.append(tag("div", name, class_="name"))
        grid.append(tag("div", *pieces, class_="bar"))
        grid.append(tag("div", value, class_="value"))
    return grid


@dataclass(frozen=True, slots=True)
class Span:
    """A piece of a lane, in seconds from the start of the step."""

    name: str
    begin: float
    seconds: float
    color: str


def lanes(rows: Sequence[tuple[str, Sequence[Span]]], seconds: float) -> Element:
    """A lane for each row with its spans, over a common axis of time that is `seconds` long."""
    grid = tag("div", class_="bars", aria_hidden="true")
    for name, spans in rows:
        pieces = []
        for span in spans:
            place = f"left:{_percent(span.begin / seconds)};width:{_percent(span.seconds / seconds)}"
            style = f"{place};background:{span.color}"
            pieces.append(tag("i", style=style, title=f"{span.name}: {duration(span.seconds)}"))
        grid.append(tag("div", name, class_="name"))
        grid.append(tag("div", *pieces, class_="lane"))
        grid.append(tag("div", class_="value"))
    marks = [tag("span", duration(seconds * part), style=f"left:{_percent(part)}") for part in (0.0, 0.5, 1.0)]
    grid.append(tag("div"))
    grid.append(tag("div", *marks, class_="axis"))
    grid.append(tag("div"))
    return grid


def _percent(part: float) -> str:
    return f"{100 * min(max(part, -1.0), 2.0):.2f}%"
