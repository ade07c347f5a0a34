"""Blocks as plain text: aligned columns, without colors, for files, pipes and logs."""

from __future__ import annotations

from collections.abc import Sequence

from fastdp.rendering.blocks import Block, Table


def as_text(blocks: Sequence[Block]) -> str:
    """The blocks, with an empty line between them."""
    return "\n\n".join(_table(block) if isinstance(block, Table) else block.text for block in blocks)


def _table(table: Table) -> str:
    """A title, aligned columns, and the note."""
    cells = [table.header, *table.rows]
    widths = [max(len(row[column]) for row in cells) for column in range(len(table.header))]
    words = [table.has_words(column) for column in range(len(table.header))]
    lines = [table.title]
    for row in cells:
        padded = [
            cell.ljust(width) if word else cell.rjust(width)
            for cell, width, word in zip(row, widths, words, strict=True)
        ]
        lines.append(("  " + "  ".join(padded)).rstrip())
    if table.note:
        lines.append(f"  {table.note}")
    return "\n".join(lines)
