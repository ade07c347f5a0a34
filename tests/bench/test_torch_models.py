"""The benchmark of seven torch models: what it holds against its goals, and the page that it writes."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))


@pytest.fixture(scope="module")
def bench():
    """bench/torch_models.py as a module."""
    return importlib.import_module("bench.torch_models")


def goals(bench, **seconds: float) -> list[str]:
    times = {way.replace("_", "-"): [value] for way, value in seconds.items()}
    return [goal.name for goal in bench.GOALS if goal.holds(times)]


def test_a_captured_step_is_held_against_plain_torch_only_where_inductor_helps(bench):
    assert "captured : torch" in goals(bench, torch=0.010, torch_compile=0.008, fastdp_1_captured=0.02)
    assert "captured : torch" not in goals(bench, torch=0.010, torch_compile=0.0095, fastdp_1_captured=0.02)


def test_two_devices_are_held_against_one_only_where_a_step_is_long(bench):
    assert goals(bench, torch=0.01, fastdp_1_step=0.010, fastdp_2_step=0.02)[-1] == "2 devices : 1 device"
    assert "2 devices : 1 device" not in goals(bench, torch=0.01, fastdp_1_step=0.009, fastdp_2_step=0.02)


def test_the_page_has_each_way_and_says_which_goals_are_met(bench):
    result = {
        "title": "MLP: small",
        "rounds": 3,
        "cores_busy_with_other_work": 0.1,
        "milliseconds": {"torch": {"median": 10.0}, "fastdp-1-step": {"median": 10.2}, "ddp-2": {"median": 5.0}},
        "time_to_torch": {"torch": 1.0, "fastdp-1-step": 1.02, "ddp-2": 0.5},
        "goals": [
            {"goal": "1 device, step : torch", "ratio": 1.02},
            {"goal": "2 devices, step : DDP", "ratio": 1.31},
        ],
        "failed": {"fastdp-1-loop": "ended with status 1"},
    }
    line = {
        "results": {"mlp": result},
        "hardware": {"cpu": "a", "cores": 2},
        "versions": {},
        "commit": "c",
        "date": "d",
    }
    page = bench.markdown(line)
    assert "| fastdp-1-step | 1.02 |" in page
    assert "| fastdp-1-loop | failed |" in page
    assert "| 1 device, step : torch, 1.05 | 1.02 met |" in page
    assert "| 2 devices, step : DDP, 1.0 | 1.31 NOT MET |" in page
    assert "- MLP: small: fastdp-1-loop failed: ended with status 1" in page


def test_every_model_has_an_example_with_batches_of_its_rows(bench):
    cases = importlib.import_module("bench.torch_model_cases")
    assert len(bench.CASES) == 7
    for name, case in bench.CASES.items():
        assert {"build", "loop", "train_step"} <= set(vars(cases.example(name)))
        batches = case.batches()
        assert {len(tensor) for batch in batches for tensor in batch} == {case.rows}
        assert all(isinstance(tensor, torch.Tensor) for tensor in batches[0])
