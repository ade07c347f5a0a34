"""Writes blocks to a stream: by rich in the width of the terminal, or as plain text where rich is not installed."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, TextIO

from fastdp.rendering.blocks import Block, Paragraph
from fastdp.rendering.terminal import renderables
from fastdp.rendering.text import as_text


def console_of(stream: TextIO, environ: Mapping[str, str], width: int | None = None) -> Any:
    """A console of rich on a stream; None where rich is not installed."""
    if importlib.util.find_spec("rich") is None:
        return None
    make = importlib.import_module("rich.console").Console
    # In a notebook rich would hand each line to the notebook instead of writing it.
    return make(file=stream, highlight=False, width=width, force_jupyter=False, _environ=environ)


def write_blocks(blocks: Sequence[Block], stream: TextIO, console: Any) -> None:
    """Write blocks, each followed by an empty line or the table's own. Characters that the stream lacks become `?`.

    Args:
        stream: where to write.
        console: a console of rich on this stream, or None.
    """
    encoding = console.encoding if console is not None else getattr(stream, "encoding", None)
    shown = [_encodable(block, encoding) for block in blocks]
    if console is None:
        stream.write(as_text(shown) + "\n")
        return
    with nullcontext() if console.is_terminal else console.capture() as captured:
        for renderable in renderables(shown, console.width):
            console.print(renderable)
    if captured is not None:  # files need no spaces at the ends of lines
        stream.write("".join(f"{line.rstrip()}\n" for line in captured.get().split("\n")[:-1]))


def encodable(text: str, encoding: str | None) -> str:
    """Text with `?` in place of what an encoding lacks."""
    return text if is_unicode(encoding) else text.encode(encoding or "utf-8", "replace").decode(encoding or "utf-8")


def is_unicode(encoding: str | None) -> bool:
    """Whether an encoding has all characters; a stream without one takes text."""
    return encoding is None or encoding.lower().startswith("utf")


def _encodable(block: Block, encoding: str | None) -> Block:
    """A block whose text the encoding has; bars are left out where it has no blocks to draw them with."""
    if is_unicode(encoding):
        return block
    if isinstance(block, Paragraph):
        return replace(block, text=encodable(block.text, encoding))
    header = [encodable(name, encoding) for name in block.header]
    rows = [[encodable(cell, encoding) for cell in row] for row in block.rows]
    title, note = encodable(block.title, encoding), encodable(block.note, encoding)
    return replace(block, title=title, header=header, rows=rows, note=note, parts=())
