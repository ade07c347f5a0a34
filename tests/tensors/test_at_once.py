"""Parts of an operation's rows are computed at once, each on one core."""

from __future__ import annotations

import threading

import pytest
import torch

from fastdp.runtime.host.job_threads import JobThreads
from fastdp.tensors import at_once as module
from fastdp.tensors.threads import openmp


@pytest.fixture
def two_threads(monkeypatch):
    monkeypatch.setattr(module, "_THREADS", JobThreads(2, "fastdp-rows"))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)


@pytest.mark.parametrize(
    ("rows", "work", "parts"),
    [(64, 1 << 30, 2), (64, 1 << 25, 2), (64, (1 << 25) - 1, 1), (16, 1 << 30, 2), (15, 1 << 30, 1), (0, 0, 1)],
)
def test_there_are_as_many_parts_as_cores_where_each_has_enough_to_do(rows, work, parts, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert module.parts_of(rows, work) == parts


def test_one_core_leaves_one_part(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert module.parts_of(1 << 10, 1 << 40) == 1


def test_parts_run_at_once_each_on_one_core_and_come_in_order(two_threads):
    both, cores = threading.Barrier(2, timeout=60), openmp("omp_get_max_threads") or torch.get_num_threads
    before = cores()

    def part(number):
        both.wait()
        return number, threading.get_ident(), cores()

    found = module.at_once(part, 2)
    assert [number for number, _, _ in found] == [0, 1]
    assert len({thread for _, thread, _ in found}) == 2
    assert [given for _, _, given in found] == [1, 1]
    assert cores() == before


def test_no_more_parts_run_at_once_than_torch_has_cores_now(two_threads, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert set(module.at_once(lambda part: threading.get_ident(), 3)) == {threading.get_ident()}


@pytest.mark.parametrize("one_core", [True, False])
def test_a_single_part_has_one_core_or_all(one_core):
    cores = openmp("omp_get_max_threads") or torch.get_num_threads
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert module.at_once(lambda part: (part, cores()), 1, one_core=one_core) == [(0, 1 if one_core else 2)]
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("rows", "units", "small"), [(64, 64, True), (64, 128, False), (63, 128, True)])
def test_a_time_step_is_small_below_four_million_multiply_adds(rows, units, small):
    assert module.is_small(rows, units) is small


def test_an_error_of_a_part_is_raised_and_the_cores_come_back(two_threads):
    before = torch.get_num_threads()

    def part(number):
        raise ValueError(f"part {number}")

    with pytest.raises(ValueError, match=r"part [01]"):
        module.at_once(part, 2)
    assert torch.get_num_threads() == before
