"""Shows a running benchmark: lines in a pipe, and the table at its end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TextIO


def make_display(stream: TextIO, *, width: int | None = None) -> Callable[[dict[str, Any]], None]:
    """A function that shows the events of `fastdp.benchmark.run`, which tells what they hold.

    Args:
        stream: where to write; results for programs go elsewhere.
        width: columns; None for those of the terminal.
    """

    def show(event: dict[str, Any]) -> None:
        kind = event["event"]
        if kind == "ready":
            stream.write(f"{event['way']}: ready\n")
        elif kind == "round":
            rate = event["samples_per_second"]
            stream.write(f"{event['way']}: round {event['number']} of {event['of']}: {rate:,.0f} samples/s\n")
        elif kind == "failed":
            stream.write(f"{event['way']}: failed: {event['reason']}\n")
        elif kind == "ended":
            for entry in event["result"]["entries"]:
                stream.write(f"{entry['name']}: {entry['samples_per_second']['median']:,.1f} samples/s\n")
        stream.flush()

    return show
