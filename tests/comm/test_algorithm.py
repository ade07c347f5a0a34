"""Which collectives run by which way, and whether NCCL connects ranks that share a card."""

from __future__ import annotations

import pytest

from fastdp.comm.algorithm import (
    ONE_SHOT_NBYTES,
    TWO_SHOT_NBYTES,
    nccl_connects,
    way_to_all_gather,
    way_to_all_reduce,
    way_to_reduce_scatter,
)

LARGE = 16 << 20


@pytest.mark.parametrize("cards", [[0, 1], [2, 0, 1], list(range(8))])
@pytest.mark.parametrize(("version", "variable"), [(20500, None), (22907, None), (22907, "1"), (23003, None)])
def test_a_card_for_each_rank_needs_any_nccl(cards, version, variable):
    assert nccl_connects(cards, version, variable)


@pytest.mark.parametrize(
    ("cards", "version", "variable", "expected"),
    [
        ([0, 0], 23003, "1", True),
        ([0, 0, 1, 1], 23100, " 1 ", True),
        ([0, 1, 0, 1], 23003, "1", True),
        ([0, 1, 1], 23003, "1", True),
        ([0, 0], 23002, "1", False),
        ([0, 0], 22907, "1", False),
        ([0, 0], 23003, "0", False),
        ([0, 0], 23003, "", False),
        ([0, 0], 23003, None, False),
        ([0, 0, 0], 23003, "1", False),
        ([0, 1, 0, 1, 0], 23003, "1", False),
    ],
)
def test_two_ranks_on_a_card_need_a_late_nccl_that_was_told_so(cards, version, variable, expected):
    assert nccl_connects(cards, version, variable) is expected


def test_nothing_is_connected_without_nccl_or_with_one_rank():
    assert not nccl_connects([0, 1], 0, "1")
    assert not nccl_connects([0], 23003, "1")


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_kernels_take_small_buckets_and_nccl_large_ones(dtype):
    both = {"kernels": True, "nccl": True}
    assert way_to_all_reduce(dtype, ONE_SHOT_NBYTES, **both) == "one-shot"
    assert way_to_all_reduce(dtype, ONE_SHOT_NBYTES + 1, **both) == "two-shot"
    assert way_to_all_reduce(dtype, TWO_SHOT_NBYTES, **both) == "two-shot"
    assert way_to_all_reduce(dtype, TWO_SHOT_NBYTES + 1, **both) == "nccl"
    assert way_to_all_reduce(dtype, LARGE, kernels=True, nccl=False) == "two-shot"
    assert way_to_all_reduce(dtype, 4, kernels=False, nccl=True) == "nccl"
    assert way_to_all_reduce(dtype, 4, kernels=False, nccl=False) == "host"


@pytest.mark.parametrize("nbytes", [4, LARGE])
def test_what_kernels_do_not_add_goes_to_nccl_or_the_host(nbytes):
    assert way_to_all_reduce("float64", nbytes, kernels=True, nccl=True) == "nccl"
    assert way_to_all_reduce("float64", nbytes, kernels=True, nccl=False) == "host"
    assert way_to_all_reduce("int16", nbytes, kernels=True, nccl=True) == "host"


def test_a_reduce_scatter_has_one_kernel_where_an_all_reduce_has_two():
    for nbytes, expected in ((4, "kernel"), (TWO_SHOT_NBYTES, "kernel"), (LARGE, "nccl")):
        assert way_to_reduce_scatter("float32", nbytes, kernels=True, nccl=True) == expected
    assert way_to_reduce_scatter("float32", LARGE, kernels=True, nccl=False) == "kernel"
    assert way_to_reduce_scatter("float64", 4, kernels=True, nccl=False) == "host"


def test_only_large_buckets_are_gathered_by_nccl():
    assert way_to_all_gather(TWO_SHOT_NBYTES, nccl=True) == "copies"
    assert way_to_all_gather(LARGE, nccl=True) == "nccl"
    assert way_to_all_gather(LARGE, nccl=False) == "copies"
