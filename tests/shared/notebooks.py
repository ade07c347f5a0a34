"""Runs the notebooks of docs/tutorials cell by cell. Run as a program, it writes into them what their code prints."""

from __future__ import annotations

import contextlib
import io
import json
import os
import tempfile
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[2] / "docs" / "tutorials"


def load(name: str) -> dict[str, Any]:
    """A notebook by the name of its file, without the ending."""
    return json.loads((FOLDER / f"{name}.ipynb").read_text("utf-8"))


def code(notebook: dict[str, Any]) -> list[dict[str, Any]]:
    """The cells of code."""
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def printed(notebook: dict[str, Any]) -> list[str]:
    """Run all cells in one namespace, in the current folder; what each prints."""
    names: dict[str, Any] = {"__name__": "__main__"}
    found = []
    for cell in code(notebook):
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            exec(compile("".join(cell["source"]), "cell", "exec"), names)
        found.append(said.getvalue())
    return found


def kept(cell: dict[str, Any]) -> str:
    """What a cell printed when its notebook was written."""
    return "".join("".join(output["text"]) for output in cell["outputs"])


def main() -> None:
    """Run each notebook in a folder of its own, and write its outputs."""
    here = Path.cwd()
    for path in sorted(FOLDER.glob("*.ipynb")):
        notebook = load(path.stem)
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)
            told = printed(notebook)
            os.chdir(here)
        for number, (cell, text) in enumerate(zip(code(notebook), told, strict=True), 1):
            cell["execution_count"] = number
            output = {"name": "stdout", "output_type": "stream", "text": text.splitlines(keepends=True)}
            cell["outputs"] = [output] if text else []
        path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", "utf-8")


if __name__ == "__main__":
    main()
