"""A killed process is started again and the run ends as one that was not; errors name the process that failed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import process_runs
import pytest
from torchrun import torchrun

import fastdp

SCRIPT = Path(process_runs.__file__)


def _found(folder: Path, name: str, processes: int) -> list[dict[str, list[float]]]:
    return [json.loads((folder / f"{name}-{rank}.json").read_text()) for rank in range(processes)]


@pytest.mark.parametrize(("name", "processes", "devices"), [("torch", 2, 1), ("keras", 2, 2)])
def test_a_killed_process_is_started_again_and_the_run_ends_with_the_weights_of_one_device(
    name, processes, devices, tmp_path
):
    ended = torchrun(SCRIPT, name, tmp_path, devices, processes=processes, restarts=1)
    assert ended.returncode == 0, ended.stderr
    assert "SIGKILL" in ended.stderr or "exitcode: -9" in ended.stderr  # it was killed
    fastdp.set_virtual_devices(1)
    alone = tmp_path / "alone"
    alone.mkdir()
    expected = getattr(process_runs, f"{name}_run")(alone, 1)
    for found in _found(tmp_path, name, processes):
        for key, value in expected.items():
            np.testing.assert_allclose(found[key], value, rtol=2e-5, atol=1e-6, err_msg=key)
    if name == "keras":
        assert sorted(file.name for file in (tmp_path / "keras").iterdir()) == [
            "1.keras",
            "2.keras",
            "3.keras",
            "end.keras",
        ]
        assert ended.stdout.count("Epoch 3/3") == 1  # progress of process 0 alone


def test_errors_name_the_process_that_failed_differs_or_hangs(tmp_path):
    ended = torchrun(SCRIPT, "faults", tmp_path, 1, processes=3)
    first, second, third = _found(tmp_path, "faults", 3)
    assert ended.returncode == 0, ended.stderr
    for other in (first, third):
        kind, text, seconds = other["failed"]
        assert kind == "ProcessError"
        assert "process 1 failed in step 2" in text
        assert "the label 7" in text
        assert seconds < 60  # of a busy machine
        kind, text, seconds = other["hangs"]
        assert kind == "ProcessError"
        assert "process 1 does not answer" in text
        assert seconds < 60  # of a busy machine
    assert second["failed"][0] == "ReplicaKeyError"
    for one in (first, second, third):
        assert "Process 2 has another batch than process 0" in one["other batch"][1]
        assert one["after"] == first["after"]
