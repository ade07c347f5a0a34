"""The timed parts run, and what was measured is written."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import pytest_benchmark  # noqa: F401  names the need, so that this file is left out without it

needs_keras = pytest.mark.skipif(importlib.util.find_spec("keras") is None, reason="Keras is not installed")
BENCH = Path(__file__).parents[2] / "bench"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCH / "run_parts.py"), "-q", "--benchmark-max-time=0.01", *arguments]
    # A process of pytest-xdist's measures nothing: this one is none, though one may have started it.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[str, Any]:
    """What a run of some parts has written."""
    folder = tmp_path_factory.mktemp("parts")
    done = run("--out", str(folder), "-k", "scatter or merge or feed", "--benchmark-min-rounds=1")
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = folder.glob("parts_*.json")
    return json.loads(path.read_text())


@needs_keras
def test_medians_of_the_parts_asked_for_are_written(found):
    steps = {f"{part}[{count}]" for part in ("scatter", "merge") for count in (1, 2, 4, 8)}
    assert {name for name in found["results"] if not name.startswith("feed[")} == steps
    assert all(one["median"] > 0 for one in found["results"].values())
    assert found["versions"]["pytest-benchmark"]


@needs_keras
def test_a_batch_is_fed_from_arrays_and_from_data_sets(found):
    ways = {f"feed[{way}]" for way in ("float_arrays", "data_set", "data_set_of_bytes")}
    assert {name for name in found["results"] if name.startswith("feed[")} == ways


def test_a_part_that_fails_fails_the_run_and_writes_nothing(tmp_path):
    models = [f"--ignore={BENCH / 'parts' / name}.py" for name in ("bench_feed", "bench_update")]
    done = run("--out", str(tmp_path), "-k", "no_such_part", *models)
    assert done.returncode != 0
    assert "no benchmarks have been run" in done.stdout + done.stderr
    assert list(tmp_path.iterdir()) == []
