"""Self-contained HTML pages of results and comparisons: no network, no script, light and dark."""

from __future__ import annotations

import html
import os
from pathlib import Path

from fastdp.benchmark.html.comparison import comparison_page
from fastdp.benchmark.html.report import report_page

__all__ = ["Page", "comparison_page", "report_page"]


class Page:
    """A page that a notebook shows when it is the value of a cell.

    Example:
        Page(report_page(result)).save("report.html")
    """

    def __init__(self, text: str) -> None:
        self.text = text

    def __str__(self) -> str:
        return self.text

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the page to a file, in UTF-8.

        Raises:
            OSError: the file cannot be written.
        """
        Path(path).write_text(self.text, "utf-8")

    def _repr_html_(self) -> str:
        """A frame, so that styles of the page and of the notebook keep apart; without scripts."""
        return (
            f'<iframe title="fastdp bench" sandbox srcdoc="{html.escape(self.text)}" '
            'style="width:100%;height:80vh;border:0"></iframe>'
        )
