"""Worker processes of fastdp bench take libraries from where they are installed, not from the current folder."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from fastdp.benchmark.describe import framework_of


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed")
def test_worker_processes_look_for_libraries_in_the_current_folder_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("shutil", "json", "queue"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'planted')!r}, 'w').close()\n")
    (tmp_path / "helpers.py").write_text("WIDTH = 1\n")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "model.py").write_text(
        "import shutil\nimport helpers, torch\nshutil.which\n\n"
        "def build():\n    return torch.nn.Linear(1, helpers.WIDTH)\n"
    )
    monkeypatch.chdir(tmp_path)
    assert framework_of(f"{tmp_path / 'elsewhere' / 'model.py'}:build") == "torch"
    assert not (tmp_path / "planted").exists()
