"""Blocks as a piece of HTML for notebooks, on light and dark pages; it loads nothing and runs nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape

from fastdp.rendering.blocks import Block, Paragraph, Table
from fastdp.rendering.colors import color

# Colors come from the page: text inherits, lines are half transparent.
_STYLE = """
.fastdp-report { color: inherit; font-size: 13px; line-height: 1.45; max-width: 1100px; text-align: left; }
.fastdp-report p { margin: 0 0 10px; }
.fastdp-report p.fastdp-warns { border-left: 3px solid #e08a2e; padding-left: 8px; }
.fastdp-report .fastdp-wide { overflow-x: auto; margin: 0 0 14px; }
.fastdp-report table { border-collapse: collapse; margin: 0; background: transparent; color: inherit; font-size: 13px; }
.fastdp-report caption { caption-side: top; text-align: left; font-weight: 600; padding: 0 0 4px; color: inherit;
  white-space: nowrap; }
.fastdp-report tr, .fastdp-report tr:nth-child(odd), .fastdp-report tr:hover { background: transparent; }
.fastdp-report th, .fastdp-report td { border: 0; border-bottom: 1px solid rgba(128, 128, 128, .3);
  padding: 3px 10px 3px 0; text-align: right; vertical-align: top; white-space: nowrap; background: transparent;
  color: inherit; font-variant-numeric: tabular-nums; }
.fastdp-report th { font-weight: 600; }
.fastdp-report th.fastdp-words, .fastdp-report td.fastdp-words { text-align: left; }
.fastdp-report td.fastdp-words { white-space: normal; }
.fastdp-report .fastdp-bar { display: flex; width: 160px; height: 12px; margin-top: 3px; border-radius: 2px;
  overflow: hidden; }
.fastdp-report .fastdp-key { display: inline-block; width: 9px; height: 9px; border-radius: 2px; margin-right: 4px; }
.fastdp-report .fastdp-note { opacity: .75; margin: 4px 0 0; }
"""


def as_html(blocks: Sequence[Block]) -> str:
    """The blocks as one `<div>` with its style. All text is escaped."""
    parts = [_table(block) if isinstance(block, Table) else _paragraph(block) for block in blocks]
    return f'<div class="fastdp-report"><style>{_STYLE}</style>{"".join(parts)}</div>'


def _paragraph(block: Paragraph) -> str:
    css = ' class="fastdp-warns"' if block.warns else ""
    return f"<p{css}>{escape(block.text)}</p>"


def _table(table: Table) -> str:
    """A table that scrolls by itself where the page is narrow. The bar stands second, so that it is always seen."""
    words = [' class="fastdp-words"' if table.has_words(column) else "" for column in range(len(table.header))]
    head = [f"<th{css}>{_key(table, name)}{escape(name)}</th>" for name, css in zip(table.header, words, strict=True)]
    head[1:1] = ["<th></th>"] if table.parts else []
    rows = []
    for row in table.rows:
        cells = [f"<td{css}>{escape(cell)}</td>" for cell, css in zip(row, words, strict=True)]
        cells[1:1] = [_bar(table, row)]
        rows.append(f"<tr>{''.join(cells)}</tr>")
    note = f'<p class="fastdp-note">{escape(table.note)}</p>' if table.note else ""
    return (
        f'<div class="fastdp-wide"><table><caption>{escape(table.title)}</caption>'
        f"<thead><tr>{''.join(head)}</tr></thead><tbody>{''.join(rows)}</tbody></table>{note}</div>"
    )


def _key(table: Table, name: str) -> str:
    """The color of a part, before its name."""
    if name not in table.parts:
        return ""
    return f'<span class="fastdp-key" style="background: {color(table.parts.index(name))}"></span>'


def _bar(table: Table, row: Sequence[str]) -> str:
    """The cell with the bar of a row; empty for a table without parts."""
    if not table.parts:
        return ""
    return f'<td><div class="fastdp-bar">{"".join(_pieces(table, row))}</div></td>'


def _pieces(table: Table, row: Sequence[str]) -> Iterator[str]:
    """The parts of a bar, each as wide as its share."""
    for index, share in enumerate(table.shares(row)):
        title = escape(f"{table.parts[index]}: {share:.0%}")
        yield f'<span style="width: {100 * share:.2f}%; background: {color(index)}" title="{title}"></span>'
