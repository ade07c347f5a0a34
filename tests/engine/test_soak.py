"""A short soak, and runs that are killed in each verb: `python tests/shared/soak.py` is the long one."""

from __future__ import annotations

import gc

import pytest
import soak
from faults import VERBS

import fastdp


def kept() -> int:
    """How many objects of steps are there, and frames of errors."""
    gc.collect()
    kinds = ("Step", "Rendezvous", "Batch", "Result", "traceback", "frame")
    return sum(type(one).__name__ in kinds for one in gc.get_objects())


@pytest.fixture
def all_devices():
    fastdp.set_virtual_devices(6 * soak.DEVICES)
    yield
    fastdp.set_virtual_devices(0)


@pytest.mark.filterwarnings("ignore:fastdp. virtual")
def test_random_faults_lose_nothing_and_leave_threads_and_files_as_they_were(all_devices):
    run = soak.Soak(1, ("functions", "functions that survive"))
    run.run(60)
    before, kept_before = soak.resources(), kept()
    run.run(160)
    after = soak.resources()
    run.close()
    assert run.counts["faults"] > 40
    assert run.counts["devices that came back"] > 3
    assert run.counts["steps in parts"] > 0
    assert (after["threads"], after["files"]) == (before["threads"], before["files"])
    assert kept() <= kept_before + 4  # of steps; their times are kept, of the latest 200


def test_a_run_that_is_killed_in_any_verb_goes_on_bit_for_bit():
    end = soak.kill("functions", "", None, 0)
    for step, verb in enumerate(VERBS, 1):
        device = None if verb in ("reduce", "update") else f"virtual:{step % soak.DEVICES}"
        soak.kill("functions", verb, device, step, end)
