"""README: its code runs when pasted, without a warning; its links lead somewhere; its picture is of a real step."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import keras
import pytest
import torch

from fastdp.benchmark.html.step_trace import read_step

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")
CODE = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
WROTE = {"keras": "model.keras", "torch": "weights.pt"}


def fresh_python(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run Python as a newcomer does: no variable of this project or of Keras is set."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("FASTDP_", "KERAS_", "PYTEST"))}
    kept["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=folder, env=kept, capture_output=True, text=True, timeout=200, check=False)


@pytest.mark.parametrize(("code", "wrote"), list(zip(CODE, WROTE.values(), strict=True)), ids=list(WROTE))
def test_a_snippet_runs_when_pasted_and_no_library_warns(code: str, wrote: str, tmp_path: Path) -> None:
    done = fresh_python("-c", code, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    # fastdp's own hint, given where so small a model is slower on two devices, depends on the machine.
    lines = [line for line in done.stderr.splitlines() if "devices are slower than one would be" not in line]
    assert [line for line in lines if "Warning" in line] == []
    assert (tmp_path / wrote).is_file()
    if wrote == "model.keras":
        assert keras.models.load_model(tmp_path / wrote).optimizer is not None
    else:
        assert set(torch.load(tmp_path / wrote)) == {"0.weight", "0.bias", "2.weight", "2.bias"}


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) < 250


@pytest.mark.parametrize("page", PAGES)
def test_each_link_leads_to_a_file_and_a_heading(page: str) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]+))?\)", (ROOT / page).read_text(encoding="utf-8"))
    assert links
    for file, heading in links:
        path = ROOT / (file or page)
        assert path.exists(), f"{page} points to {file}"
        if heading:
            text = path.read_text(encoding="utf-8")
            assert heading in {anchor(title) for title in re.findall(r"^#+ (.*)$", text, re.MULTILINE)}


def anchor(title: str) -> str:
    """The anchor that GitHub and MkDocs make of a heading."""
    return re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", title.lower()).strip())


def test_the_picture_shows_the_step_of_the_trace_beside_it() -> None:
    folder = ROOT / "docs" / "pictures"
    step, picture = read_step(folder / "step.json"), (folder / "step.svg").read_text(encoding="utf-8")
    lanes = {name.split(" ")[0].rstrip(":") for name, _ in step.lanes}
    assert lanes == {"host", "virtual:0", "virtual:1"}
    runs = [
        span for _, spans in step.lanes for span in spans if span.name == "run" and span.seconds > step.seconds / 10
    ]
    assert len(runs) == 2
    said = [f"run {span.seconds * 1e3:.1f} ms" for span in runs]
    assert [text for text in [*lanes, *said] if f">{text}<" not in picture] == [], "python bench/step_picture.py --draw"


def test_the_version_and_the_license_are_the_same_everywhere() -> None:
    version = (ROOT / "fastdp" / "_version.py").read_text(encoding="utf-8").split('"')[-2]
    cited = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {version}\n" in cited
    assert f"\n## {version}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert "license: Apache-2.0" in cited
    assert 'license = "Apache-2.0"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert "Apache License" in (ROOT / "LICENSE").read_text(encoding="utf-8")[:300]
