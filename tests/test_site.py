"""The pages of the site: their code runs, notebooks too, every public name has a place, and no page is left out."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import keras
import notebooks
import numpy as np
import pytest
import sklearn  # noqa: F401  digits of the tutorials; names the need, so that this file is left out without it
import torch

import fastdp

DOCS = Path(__file__).parents[1] / "docs"
SETTINGS = (DOCS.parent / "mkdocs.yml").read_text(encoding="utf-8")
# Made by docs/site/hooks.py.
MADE = {"performance.md", "changelog.md", "contributing.md", "security.md"}


def code(page: str) -> list[str]:
    return re.findall(r"```python[^\n]*\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), re.DOTALL)


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    yield
    keras.mixed_precision.set_dtype_policy("float32")
    fastdp.set_virtual_devices(0)


@pytest.mark.parametrize("page", ["index.md", "install.md", "step.md", "mixed_precision.md"])
def test_the_code_of_a_page_runs_as_it_stands(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    blocks = code(page)
    assert blocks
    for block in blocks:
        exec(block, {})


def test_the_code_of_those_who_come_from_elsewhere_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    blocks = code("migration.md")
    assert len(blocks) == 6
    x, y = np.ones((64, 6), np.float32), np.ones((64, 1), np.float32)
    data = torch.utils.data.TensorDataset(torch.ones(128, 6), torch.zeros(128, dtype=torch.int64))
    fastdp.set_virtual_devices(4)
    for block in blocks:
        given: dict[str, Any] = {"fastdp": fastdp, "torch": torch, "DataLoader": torch.utils.data.DataLoader}
        model = keras.Sequential([keras.Input((6,)), keras.layers.Dense(1)])
        given |= {"model": model, "make_model": lambda model=model: model, "x": x, "y": y, "data": data}
        given |= {"module": torch.nn.Linear(6, 3), "criterion": torch.nn.CrossEntropyLoss()}
        given["loader"] = torch.utils.data.DataLoader(data, batch_size=64)
        before = given["module"].weight.detach().clone()
        exec(block, given)
        if "module" in block:
            assert not torch.equal(given["module"].weight, before)
    assert {path.name for path in tmp_path.iterdir()} == {"w.h5", "model.keras", "w.pt"}


@pytest.mark.parametrize("name", [path.stem for path in sorted(notebooks.FOLDER.glob("*.ipynb"))])
def test_a_notebook_runs_and_prints_as_much_as_it_shows(name: str) -> None:
    notebook = notebooks.load(name)
    told = notebooks.printed(notebook)
    shown = [notebooks.kept(cell) for cell in notebooks.code(notebook)]
    assert any(shown)
    assert [len(text.splitlines()) for text in told] == [len(text.splitlines()) for text in shown], (
        "python tests/shared/notebooks.py"
    )


def test_every_public_name_is_on_a_page_of_names() -> None:
    text = "".join(path.read_text(encoding="utf-8") for path in (DOCS / "api").glob("*.md"))
    listed = set(re.findall(r"^::: [\w.]*?(\w+)$", text, re.MULTILINE))
    modules = {"__version__", "callbacks", "data", "utils"}
    names = {*fastdp.__all__, *fastdp.utils.__all__, *fastdp.callbacks.__all__, *fastdp.backend.__all__}
    assert names - modules - listed - {"learning_phase", "multi_gpu_model"} == set()


def test_every_page_is_in_the_navigation() -> None:
    named = set(re.findall(r": ([\w/]+\.md)", SETTINGS))
    there = {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")}
    tutorials = {f"tutorials/{path.stem}.md" for path in notebooks.FOLDER.glob("*.ipynb")}
    assert named == there | tutorials | MADE
