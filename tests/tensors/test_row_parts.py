"""Parts of an operation's rows are computed at once, each on one core."""

from __future__ import annotations

import threading

import pytest
import torch

from fastdp.runtime.host.job_threads import JobThreads
from fastdp.tensors import row_parts
from fastdp.tensors.threads import openmp


@pytest.fixture
def two_threads(monkeypatch):
    monkeypatch.setattr(row_parts, "_THREADS", JobThreads(2, "fastdp-rows"))


@pytest.mark.parametrize(
    ("rows", "work", "parts"),
    [(64, 1 << 30, 2), (64, 1 << 25, 2), (64, (1 << 25) - 1, 1), (16, 1 << 30, 2), (15, 1 << 30, 1), (0, 0, 1)],
)
def test_there_are_as_many_parts_as_cores_where_each_has_enough_to_do(rows, work, parts, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert row_parts.parts_of(rows, work) == parts


def test_one_core_leaves_one_part(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert row_parts.parts_of(1 << 10, 1 << 40) == 1


def test_parts_run_at_once_each_on_one_core_and_come_in_order(two_threads):
    both, cores = threading.Barrier(2, timeout=60), openmp("omp_get_max_threads") or torch.get_num_threads
    before = cores()

    def part(number):
        both.wait()
        return number, threading.get_ident(), cores()

    found = row_parts.at_once(part, 2)
    assert [number for number, _, _ in found] == [0, 1]
    assert len({thread for _, thread, _ in found}) == 2
    assert [given for _, _, given in found] == [1, 1]
    assert cores() == before


def test_a_single_part_has_all_cores():
    assert row_parts.at_once(lambda part: (part, threading.get_ident(), torch.get_num_threads()), 1) == [
        (0, threading.get_ident(), torch.get_num_threads())
    ]


def test_an_error_of_a_part_is_raised_and_the_cores_come_back(two_threads):
    before = torch.get_num_threads()

    def part(number):
        raise ValueError(f"part {number}")

    with pytest.raises(ValueError, match=r"part [01]"):
        row_parts.at_once(part, 2)
    assert torch.get_num_threads() == before
