"""The command `bench report`: compares results of `fastdp bench` with the first of them."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from fastdp.benchmark.comparison import compare
from fastdp.benchmark.display import comparison_blocks, write
from fastdp.benchmark.html import comparison_page, report_page
from fastdp.benchmark.result import load

WRONG = 2
PAGE, REPORT, FILE = "comparison.html", "report.html", "comparison.json"


def run(files: Sequence[str], *, as_json: bool, output: Path | None) -> int:
    """Compare results and show how they differ; of one result, write its page. Returns 0, or 2 for wrong arguments.

    Args:
        files: results that `fastdp bench --output` or `--json` wrote, or their folders; the first is what the others
            are compared with.
        as_json: print the comparison as JSON, and nothing else, to standard output.
        output: a folder for the comparison as an HTML page and as JSON; None writes none.
    """
    try:
        results = [load(Path(file)) for file in files]
        if len(results) == 1 and output is not None and not as_json:
            path = Path(files[0])
            return _write(output, {REPORT: report_page(results[0], path if path.is_dir() else path.parent)})
        comparison = compare(results, files)
        if as_json:
            print(json.dumps(comparison.to_dict()))
        else:
            write(comparison_blocks(comparison))
        if output is None:
            return 0
        made = json.dumps(comparison.to_dict(), indent=1) + "\n"
        return _write(output, {PAGE: comparison_page(comparison), FILE: made})
    except FileNotFoundError as error:
        print(f"fastdp bench report: there is no file {error.filename}", file=sys.stderr)
        return WRONG
    except (OSError, ValueError) as error:
        print(f"fastdp bench report: {error}", file=sys.stderr)
        return WRONG


def _write(folder: Path, texts: dict[str, str]) -> int:
    """Write files into a folder and tell so."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (folder / name).write_text(text, "utf-8")
    print(f"Wrote {' and '.join(str(folder / name) for name in texts)}", file=sys.stderr)
    return 0
