"""fastdp in a notebook that runs headless: reports as HTML, commands, progress, and a benchmark's page."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

TIMEOUT = 120
CELLS = (
    """
import fastdp, keras, json
import numpy as np

fastdp.set_virtual_devices(2)
model = keras.Sequential([keras.Input((6,)), keras.layers.Dense(2)])
parallel = fastdp.wrap(model, gpus=2)
parallel.compile("sgd", "mse")
parallel.fit(np.ones((32, 6)), np.ones((32, 2)), batch_size=8, verbose=0)
parallel.report()
""",
    "!fastdp devices --json",
    "!fastdp bench mlp:features=8,width=8 --virtual 1 --batch 8 --rounds 2 --steps 3 --mode eager --output result",
    """
from IPython.display import HTML

HTML(next(Path("result").glob("*.html")).read_text("utf-8"))
""",
    """
for batch in fastdp.progress(range(3)):
    pass
""",
)


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> list[list[Any]]:
    """The outputs of each cell."""
    folder = tmp_path_factory.mktemp("notebook")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR"):
            patch.setenv(name, str(folder / name))
        notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell.strip()) for cell in CELLS])
        client = NotebookClient(notebook, timeout=TIMEOUT, resources={"metadata": {"path": str(folder)}})
        asyncio.run(client.async_execute())
    return [cell.outputs for cell in notebook.cells]


def text_of(cell: list[Any]) -> str:
    return "".join(output.text for output in cell if output.output_type == "stream")


def test_a_report_is_html_and_text(outputs: list[list[Any]]) -> None:
    (shown,) = [output.data for output in outputs[0] if output.output_type == "execute_result"]
    assert "<table" in shown["text/html"]
    assert "virtual:1" in shown["text/html"]
    assert "virtual:1" in shown["text/plain"]
    assert text_of(outputs[0]) == "", "a library's noise"


def test_commands_print_plain_lines(outputs: list[list[Any]]) -> None:
    assert isinstance(json.loads(text_of(outputs[1])), dict)
    said = text_of(outputs[2])
    assert "samples/s" in said
    assert "Traceback" not in said


def test_a_benchmarks_page_shows_in_a_cell(outputs: list[list[Any]]) -> None:
    (shown,) = [output.data for output in outputs[3] if output.output_type == "execute_result"]
    assert "fastdp, 1 device" in shown["text/html"]


def test_progress_ends_with_all_batches(outputs: list[list[Any]]) -> None:
    said = "".join(str(output.get("text", output.get("data", ""))) for output in outputs[4])
    assert "3/3" in said
