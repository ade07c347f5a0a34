"""fastdp in a notebook that runs headless: reports as HTML, commands, progress, and a benchmark's page."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from typing import Any

import pytest

MISSING = [name for name in ("nbclient", "ipykernel", "keras", "torch") if importlib.util.find_spec(name) is None]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"needs {', '.join(MISSING)}")

CELLS = (
    """
import fastdp, keras, sys
import numpy as np

fastdp.set_virtual_devices(2)
model = keras.Sequential([keras.Input((6,)), keras.layers.Dense(2)])
parallel = fastdp.wrap(model, gpus=2)
parallel.compile("sgd", "mse")
parallel.fit(np.ones((32, 6)), np.ones((32, 2)), batch_size=8, verbose=0)
parallel.report()
""",
    "!{sys.executable} -m fastdp devices --json",
    "!{sys.executable} -m fastdp bench mlp:width=8 --virtual 1 --rounds 2 --steps 3 --mode eager --output result",
    """
from IPython.display import HTML
from pathlib import Path

HTML(next(Path("result").glob("*.html")).read_text("utf-8"))
""",
    """
for batch in fastdp.progress(range(3)):
    pass
""",
)


# Runs in a process of its own: nbclient brings IPython's kernel in, by which fastdp knows that it is in a notebook.
RUN = """
import asyncio, sys
import nbformat
from nbclient import NotebookClient

path, folder = sys.argv[1:]
notebook = nbformat.read(path, 4)
asyncio.run(NotebookClient(notebook, timeout=120, resources={"metadata": {"path": folder}}).async_execute())
nbformat.write(notebook, path)
"""


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> list[list[Any]]:
    """The outputs of each cell."""
    folder = tmp_path_factory.mktemp("notebook")
    path = folder / "test.ipynb"
    empty = {"cell_type": "code", "execution_count": None, "metadata": {}, "outputs": []}
    cells = [empty | {"id": f"cell-{i}", "source": cell.strip()} for i, cell in enumerate(CELLS)]
    path.write_text(json.dumps({"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}), "utf-8")
    own = ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR")
    environment = os.environ | {name: str(folder / name) for name in own}
    command = [sys.executable, "-c", RUN, str(path), str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return [cell["outputs"] for cell in json.loads(path.read_text("utf-8"))["cells"]]


def text_of(cell: list[Any]) -> str:
    return "".join("".join(output["text"]) for output in cell if output["output_type"] == "stream")


def shown_by(cell: list[Any], kind: str) -> str:
    (shown,) = [output["data"] for output in cell if output["output_type"] == "execute_result"]
    return "".join(shown[kind])


def test_a_report_is_html_and_text(outputs: list[list[Any]]) -> None:
    assert "<table" in shown_by(outputs[0], "text/html")
    assert "virtual:1" in shown_by(outputs[0], "text/html")
    assert "virtual:1" in shown_by(outputs[0], "text/plain")
    assert text_of(outputs[0]) == "", "a library's noise"


def test_commands_print_plain_lines(outputs: list[list[Any]]) -> None:
    assert isinstance(json.loads(text_of(outputs[1])), dict)
    said = text_of(outputs[2])
    assert "samples/s" in said
    assert "Traceback" not in said


def test_a_benchmarks_page_shows_in_a_cell(outputs: list[list[Any]]) -> None:
    assert "fastdp, 1 device" in shown_by(outputs[3], "text/html")


def test_progress_ends_with_all_batches(outputs: list[list[Any]]) -> None:
    said = "".join(str(output.get("text", output.get("data", ""))) for output in outputs[4])
    assert "3/3" in said
