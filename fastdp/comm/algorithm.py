"""Chooses the algorithm of a collective by size and links: our kernels, NCCL or the host."""

from __future__ import annotations

from collections.abc import Sequence

# Thresholds from published figures for eight GPUs on NVLink (docs/log.md), not measured here. One-shot reads every
# rank's whole bucket, two-shot reads twice the rank's own part, and NCCL wins from a few MiB on.
ONE_SHOT_NBYTES = 256 << 10
TWO_SHOT_NBYTES = 2 << 20
KERNEL_DTYPES = ("float32", "float16", "bfloat16")
NCCL_DTYPES = (*KERNEL_DTYPES, "float64", "int8", "uint8", "int32", "int64", "uint32", "uint64")

# Before 2.30.3, NCCL refuses two ranks on one card ("Duplicate GPU detected"). From that version on it accepts two if
# this variable is set to 1.
MULTI_RANK_VERSION = 23003
MULTI_RANK_VARIABLE = "NCCL_MULTI_RANK_GPU_ENABLE"
MULTI_RANK_MOST = 2


def nccl_connects(cards: Sequence[int], version: int, multi_rank: str | None) -> bool:
    """Whether NCCL can be expected to connect ranks on these cards.

    Args:
        cards: the CUDA ordinal of each rank.
        version: the version of the loaded NCCL, such as 22907; 0 if none is loaded.
        multi_rank: the value of the environment variable NCCL_MULTI_RANK_GPU_ENABLE; None if it is not set.

    Example:
        >>> nccl_connects([0, 1], 22907, None), nccl_connects([0, 0], 23003, None), nccl_connects([0, 0], 23003, "1")
        (True, False, True)
    """
    if not version or len(cards) < 2:
        return False
    shared = max(cards.count(card) for card in cards)
    allowed = version >= MULTI_RANK_VERSION and (multi_rank or "").strip() == "1"
    return shared <= (MULTI_RANK_MOST if allowed else 1)


def way_to_all_reduce(dtype: str, nbytes: int, *, kernels: bool, nccl: bool) -> str:
    """How a bucket is all-reduced: "one-shot", "two-shot", "nccl", or "host" if nothing else supports it.

    Args:
        dtype: the dtype of the bucket's elements.
        nbytes: the bucket's size.
        kernels: whether the ranks can access each other's memory, as our kernels need.
        nccl: whether NCCL has connected the ranks.
    """
    kernels = kernels and dtype in KERNEL_DTYPES
    nccl = nccl and dtype in NCCL_DTYPES
    if kernels and nbytes <= ONE_SHOT_NBYTES:
        return "one-shot"
    if kernels and (nbytes <= TWO_SHOT_NBYTES or not nccl):
        return "two-shot"
    return "nccl" if nccl else "host"


def way_to_reduce_scatter(dtype: str, nbytes: int, *, kernels: bool, nccl: bool) -> str:
    """How a bucket is reduce-scattered: "kernel", "nccl" or "host". Arguments as in `way_to_all_reduce`."""
    way = way_to_all_reduce(dtype, nbytes, kernels=kernels, nccl=nccl)
    return "kernel" if way in ("one-shot", "two-shot") else way


def way_to_all_gather(nbytes: int, *, nccl: bool) -> str:
    """How a bucket is gathered: "nccl", or "copies" between the ranks. Nothing is added up, so any dtype works."""
    return "nccl" if nccl and nbytes > TWO_SHOT_NBYTES else "copies"
