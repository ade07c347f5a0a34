"""The timed parts run, and what was measured is written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest_benchmark  # noqa: F401  names the need, so that this file is left out without it

BENCH = Path(__file__).parents[2] / "bench"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCH / "run_parts.py"), "-q", "--benchmark-max-time=0.01", *arguments]
    # A process of pytest-xdist's measures nothing: this one is none, though one may have started it.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)


def test_medians_of_the_parts_asked_for_are_written(tmp_path):
    done = run("--out", str(tmp_path), "-k", "scatter or merge", "--benchmark-min-rounds=1")
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = tmp_path.glob("parts_*.json")
    line = json.loads(path.read_text())
    assert set(line["results"]) == {f"{part}[{count}]" for part in ("scatter", "merge") for count in (1, 2, 4, 8)}
    assert all(found["median"] > 0 for found in line["results"].values())
    assert line["versions"]["pytest-benchmark"]


def test_a_batch_is_fed_from_arrays_and_from_data_sets(tmp_path):
    done = run("--out", str(tmp_path), "-k", "feed", "--benchmark-min-rounds=1")
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = tmp_path.glob("parts_*.json")
    ways = ("float_arrays", "data_set", "data_set_of_bytes")
    assert set(json.loads(path.read_text())["results"]) == {f"feed[{way}]" for way in ways}


def test_a_part_that_fails_fails_the_run_and_writes_nothing(tmp_path):
    done = run("--out", str(tmp_path), "-k", "no_such_part")
    assert done.returncode != 0
    assert list(tmp_path.iterdir()) == []
