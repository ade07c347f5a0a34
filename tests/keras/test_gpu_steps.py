"""bench/gpu_steps.py trains each way on virtual devices in host memory; what needs a GPU is left out with a reason."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

import fastdp

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))

import gpu_steps


@pytest.fixture
def lines(tmp_path, monkeypatch):
    log = tmp_path / "log.jsonl"
    monkeypatch.setenv("FASTDP_GPU_LOG", str(log))
    return lambda: [json.loads(line) for line in log.read_text().splitlines()]


@pytest.fixture
def _two_devices():
    fastdp.set_virtual_devices(2, kind="host")
    yield
    fastdp.set_virtual_devices(0)


@pytest.mark.usefixtures("_two_devices")
def test_ways_that_work_are_measured_and_the_others_left_out_with_a_reason(lines, monkeypatch):
    monkeypatch.setattr(gpu_steps, "COUNTS", (1, 2))
    wanted = (
        "Keras torch",
        "fastdp 1",
        "fastdp 2",
        "fastdp 1, rows/2",
        "fastdp torch 1",
        "fastdp torch 8",
        "torch eager",
    )
    makers = {title: make for title, make in gpu_steps.ways("mlp", 2).items() if title in wanted}
    assert list(makers) == sorted(makers, key=wanted.index)
    gpu_steps.compare("mlp", makers, 2, rounds=1)
    steps = {line["way"]: line for line in lines() if line.get("what") == "step"}
    expected = {"Keras torch", "fastdp 1", "fastdp 2", "fastdp 1, rows/2", "fastdp torch 1"}
    assert set(steps) == expected | ({"torch eager"} if torch.cuda.is_available() else set())
    assert steps["fastdp 1, rows/2"]["rows"] == 64
    assert steps["Keras torch"]["times_the_base"] == 1.0
    left_out = [line["skipped"] for line in lines() if "skipped" in line]
    assert "mlp: fastdp torch 8" in left_out  # there are two devices
    assert [line for line in lines() if line.get("what") == "report"]


def test_jax_is_left_out_where_it_is_not_installed(lines, monkeypatch):
    monkeypatch.setattr(gpu_steps.importlib.util, "find_spec", lambda name: None)
    gpu_steps.jax("mlp", 2, 1)
    assert lines() == [{"skipped": "mlp: Keras JAX", "reason": "keras and jax not installed"}]
