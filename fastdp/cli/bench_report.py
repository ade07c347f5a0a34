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
from fastdp.cli.status import OK, WrongUseError

PAGE, REPORT, FILE = "comparison.html", "report.html", "comparison.json"


def run(files: Sequence[str], *, as_json: bool, output: Path | None) -> int:
    """Compare results and show how they differ; of one result, write its page anew. Returns 0.

    Args:
        files: results that `fastdp bench --output` or `--json` wrote, or their folders; the first is what the others
            are compared with.
        as_json: print the comparison as JSON, and nothing else, to standard output.
        output: a folder for the comparison as an HTML page and as JSON; None writes none.

    Raises:
        WrongUseError: a file is no result, or there is only one and no folder for its page.
        OSError: a file cannot be written.
    """
    try:
        results = [load(Path(file)) for file in files]
        one = len(results) == 1 and output is not None
        comparison = None if one else compare(results, files)
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        raise WrongUseError(f"cannot read {error.filename}: {error.strerror}") from error
    except ValueError as error:
        raise WrongUseError(str(error)) from error
    if comparison is None:
        path = Path(files[0])
        texts = {REPORT: report_page(results[0], path if path.is_dir() else path.parent)}
    else:
        found = comparison.to_dict()
        texts = {PAGE: comparison_page(comparison), FILE: json.dumps(found, indent=1) + "\n"}
        if as_json:
            print(json.dumps(found))
        else:
            write(comparison_blocks(comparison))
    if output is not None:
        _write(output, texts)
    return OK


def _write(folder: Path, texts: dict[str, str]) -> None:
    """Write files into a folder and tell so."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (folder / name).write_text(text, "utf-8")
    print(f"Wrote {' and '.join(str(folder / name) for name in texts)}", file=sys.stderr)
