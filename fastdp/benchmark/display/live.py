"""Draws a benchmark live in a terminal: the ways with their throughput, and the devices of the one that runs.

The picture is drawn when an event arrives, between two rounds, and by no thread of its own: drawing takes no time from
what is measured.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from fastdp.benchmark.display.output import encodable, is_unicode, write_blocks
from fastdp.benchmark.display.result import result_blocks
from fastdp.benchmark.display.state import State, Way
from fastdp.benchmark.entries import PARTS, VERBS, Device
from fastdp.benchmark.figures import count, duration, median_of, milliseconds, percent, plural, rate, relative_of, size
from fastdp.rendering.colors import color

# The verbs have the colors of reports.
COLORS = {"input": color(6), **{verb: color(place) for place, verb in enumerate(VERBS)}, "other": color(7)}
_LETTERS = dict(zip(PARTS, "iscmwkuo", strict=True))
_STATES = {"failed": "bold red", "measured": "green", "waiting": "dim"}


class LiveDisplay:
    """The live picture, and the final tables in its place. A context manager and a function of events."""

    def __init__(self, stream: TextIO, console: Console) -> None:
        self._stream, self._console = stream, console
        self._state = State()
        self._began = time.monotonic()
        # Text written meanwhile (warnings) goes above the picture.
        self._live = Live(console=console, auto_refresh=False, transient=True)

    def __enter__(self) -> LiveDisplay:
        self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._live.stop()

    def __call__(self, event: Mapping[str, Any]) -> None:
        """Take an event in and draw.

        Raises:
            ValueError: an event of no known kind.
        """
        self._state.apply(event)
        if event["event"] == "ended":
            self._live.stop()
            write_blocks(result_blocks(event["result"]), self._stream, self._console)
            return
        seconds = time.monotonic() - self._began
        self._live.update(picture(self._state, self._console, seconds), refresh=True)


def picture(state: State, console: Console, seconds: float) -> RenderableType:
    """The state as text for this console's width and height.

    Args:
        seconds: since the start.
    """
    devices = state.told.devices if state.told else ()
    below = len(devices) + 6 if devices else 0  # with its titles and legend, of which two may wrap
    ways = list(state.ways.values())
    shown = _window(ways, state.current, max(4, console.height - below - 6))
    done = sum(way.state in ("measured", "failed") for way in ways)
    head = Text.assemble(
        (encodable(state.title, console.encoding), "bold"),
        f"  {done} of {plural(len(ways), 'way')}, {duration(seconds)}",
    )
    parts: list[RenderableType] = [head, Text(), _ways(shown, state.current, console)]
    if state.batches:
        parts.append(Text(encodable(state.batches[-1], console.encoding), "dim"))
    if len(shown) < len(ways):
        parts.append(Text(f"and {len(ways) - len(shown)} more", "dim"))
    if state.told is not None:  # it stays while ways run that tell of no devices
        parts += [Text(), *_devices(state.told, console)]
    return Group(*parts)


def _window(ways: Sequence[Way], current: Way | None, height: int) -> Sequence[Way]:
    """As many ways as there are lines for, around the current one."""
    if len(ways) <= height:
        return ways
    middle = next((place for place, way in enumerate(ways) if way is current), 0)
    begin = max(0, min(middle - height // 2, len(ways) - height))
    return ways[begin : begin + height]


def _grid(*titles: str) -> Table:
    """A table without lines; the first column wraps, the others are never cut."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim", expand=False)
    for place, title in enumerate(titles):
        if place == 0:
            table.add_column(title, no_wrap=True, overflow="ellipsis", ratio=1)
        else:
            table.add_column(title, no_wrap=True, justify="right")
    return table


def _ways(ways: Sequence[Way], current: Way | None, console: Console) -> Table:
    table = _grid("way", "state", "samples/s", "spread")
    for way in ways:
        rounds = f"round {way.number} of {way.of}" if way.state == "measured" else way.state
        style = "bold" if way is current else ""
        table.add_row(
            Text(encodable(way.name, console.encoding), style),
            Text(rounds, _STATES.get(way.state, "")),
            Text(rate(median_of(way.rate)), style),
            Text(percent(relative_of(way.rate), 1)),
        )
    return table


def _devices(way: Way, console: Console) -> list[RenderableType]:
    """The devices of a way as rows: throughput, a bar of the parts of a step, memory, and what the colors mean."""
    parts = [_parts(way, device) for device in way.devices]
    longest = max((sum(one.values()) for one in parts), default=0.0)
    rows = sum(device.rows or 0 for device in way.devices)
    table = _grid("device", "rows", "samples/s", "step", "memory")
    table.columns[3].justify = "left"
    taken = max(len(device.name) for device in way.devices) + 6 + 10 + 9 + 12
    width = max(8, min(48, console.width - taken))
    for device, seconds in zip(way.devices, parts, strict=True):
        part = way.rates[-1] * (device.rows or 0) / rows if way.rates and rows else None
        table.add_row(
            Text(encodable(device.name, console.encoding)),
            count(device.rows),
            rate(part),
            bar(seconds, longest, width, blocks=is_unicode(console.encoding)),
            size(device.memory),
        )
    said = f": a step of {duration(longest)}" if longest else ""
    if longest and way.between_seconds:
        said += f", {milliseconds(way.between_seconds)} ms of it waiting for input"
    head = Text.assemble((encodable(way.name, console.encoding), "bold"), said)
    return [head, table, _legend(parts, console.width, blocks=is_unicode(console.encoding))]


def _parts(way: Way, device: Device) -> dict[str, float]:
    """Seconds of a step by part."""
    seconds = {"input": way.between_seconds or 0.0} | device.seconds
    return {part: seconds[part] for part in PARTS if seconds.get(part, 0.0) > 0}


def bar(seconds: Mapping[str, float], longest: float, width: int, *, blocks: bool = True) -> Text:
    """Parts of a step side by side, `width` characters for `longest` seconds; letters where blocks cannot be shown."""
    text, begun, drawn = Text(), 0.0, 0
    for part, taken in seconds.items():
        begun += taken
        end = round(width * begun / longest) if longest else 0
        text.append(("\u2588" if blocks else _LETTERS[part]) * (end - drawn), COLORS[part])
        drawn = end
    return text


def _legend(parts: Sequence[Mapping[str, float]], width: int, *, blocks: bool) -> Text:
    """The colors, or letters, of the parts that occur; a line ends between two of them."""
    text, column = Text(), 0
    for part in PARTS:
        if any(part in one for one in parts):
            if column + len(part) + 2 > width:
                text.append("\n")
                column = 0
            text.append("\u2588" if blocks else _LETTERS[part], COLORS[part])
            text.append(f" {part}  ")
            column += len(part) + 4
    return text
