"""Mutated files end in right values, or in a documented error that names the file, within bounds of time and memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import file_fuzzer
import pytest

TRIES = 40
TARGETS = ["load_model", "load_weights", "by_name", "HDF5Matrix", "convert", "get_file"]


@pytest.fixture(scope="module")
def counts() -> dict[str, dict[str, int]]:
    """How the tries of each target ended, in a process of bounded memory."""
    command = [sys.executable, file_fuzzer.__file__, ",".join(TARGETS), str(TRIES)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, dict[str, int]] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("target", TARGETS)
def test_mutated_files_end_as_documented(counts: dict[str, dict[str, int]], target: str) -> None:
    found = counts[target]
    assert sum(found.values()) >= TRIES
    errors = {"get_file": {"DamagedArchiveError"}}.get(target, set()) | {"ValueError", "OSError", "right"}
    errors |= {"load_model": {"TypeError"}, "HDF5Matrix": {"KeyError"}}.get(target, set())
    assert set(found) <= errors
    assert min(found.get("right", 0), TRIES - found.get("right", 0)) > 0, "mutations are neither nothing nor everything"


@pytest.mark.parametrize(
    ("target", "fault", "said"),
    [
        ("by_name", KeyError("x"), "KeyError is not documented"),
        ("by_name", ValueError("x"), "names no file"),
        ("by_name", file_fuzzer.FaultError("a value of a file outside was read"), "outside was read"),
    ],
)
def test_what_is_not_documented_is_found(
    target: str, fault: Exception, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(path: Path) -> None:
        raise fault

    monkeypatch.setitem(file_fuzzer.TARGETS, target, read)
    with pytest.raises(file_fuzzer.FaultError, match=said):
        file_fuzzer.read(target, tmp_path / "file.h5")


def test_an_allocation_that_the_system_refused_is_a_fault_even_behind_a_documented_error() -> None:
    error = ValueError("documented")
    error.__cause__ = MemoryError()
    with pytest.raises(file_fuzzer.FaultError, match="more memory"):
        file_fuzzer.check_memory(error)
    file_fuzzer.check_memory(ValueError("documented"))
