"""Tests for GPUs, and of exactness, on the cards of tests/cuda/rig: the real CuPy on a CUDA of our own."""

from __future__ import annotations

import importlib.util

import pytest
from rig_runs import run_on, run_tests

pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("keras", "torch")), reason="Keras or torch is not installed"
)
# Why tests of tests/gpu may be skipped on the rig.
SKIPPED = {
    "this torch is built without CUDA, or finds no GPU",
    "needs 2 GPU(s): 1 GPU here",
    "NCCL wants a card for each of 4 ranks",
    "NCCL wants a card for each of 8 ranks",
}

FAILING_CALLS = "tests/gpu/test_recorded.py::test_a_call_that_fails_wherever_it_is_leaves_no_step_half_done"

# By the number of cards: of how many devices tests run, of which models, how late streams are, how many tests pass.
CARDS = {
    1: ("1 4", "mlp recurrent", 0, 150),
    2: ("2 4", "cnn", 150, 60),
    4: ("4", "attention mlp", 50, 40),
    8: ("8", "mlp", 50, 35),
}


@pytest.mark.parametrize("cards", CARDS)
def test_the_tests_for_gpus_pass_with_the_real_cupy(rig, tmp_path, cards):
    """All of tests/gpu on one card, with torch in host memory, and on several what depends on their number."""
    counts, models, delay, at_least = CARDS[cards]
    settings = {"RIG_DELAY_US": str(delay), "RIG_COUNTS": counts, "RIG_MODELS": models, "FASTDP_GPU_SMALL": "1"}
    skipped = run_tests(rig, tmp_path, cards, [f"--deselect={FAILING_CALLS}", "tests/gpu"], at_least, **settings)
    assert skipped <= SKIPPED


def test_what_knows_the_cards_runs_on_ten_of_them(rig, tmp_path):
    """The tests in the rig's own folder, and the one that holds the simulation's names to CuPy's.

    Two pairs of the cards do not reach each other, one of which says it does.
    """
    settings = {"RIG_DELAY_US": "20", "RIG_APART": "7-9", "RIG_FALSELY": "8-9", "CUDA_MODULE_LOADING": "EAGER"}
    names = "tests/cuda/test_fake.py::test_the_simulation_has_cupys_names_and_parameters"
    run_tests(rig, tmp_path, 10, ["tests/cuda/rig", names], 50, **settings)


def test_n_cards_equal_one_device(rig, tmp_path):
    """Tests of exactness that know nothing of GPUs."""
    files = [f"tests/exactness/{name}.py" for name in ("test_side_effects", "test_batch_norm")]
    settings = {"RIG_DELAY_US": "20", "FASTDP_VIRTUAL_KIND": "gpu", "CUDA_MODULE_LOADING": "EAGER"}
    run_tests(rig, tmp_path, 8, files, 40, CUDA_DEVICE_MAX_CONNECTIONS="32", **settings)


def test_a_call_of_a_captured_step_that_fails_leaves_no_step_half_done(rig, tmp_path):
    """Where queries of events are not held back: ranks wait for others that a failure has left out."""
    settings = {"RIG_DELAY_US": "20", "FASTDP_GPU_COMPUTE": "host", "FASTDP_GPU_SMALL": "1"}
    command = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", FAILING_CALLS]
    said, errors, violations = run_on(rig, tmp_path, 2, command, **settings)
    assert (errors, violations) == ("", []), said[-6000:]
    assert "8 passed" in said
