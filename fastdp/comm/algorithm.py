"""Chooses the algorithm of a collective by size and links: our kernels, NCCL or the host."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from fastdp import settings

# Limits from published figures for eight GPUs on NVLink (docs/log.md), for GPUs that were not measured. One-shot reads
# every rank's whole bucket, two-shot reads twice the rank's own part, and NCCL wins from a few MiB on.
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


@dataclass(frozen=True, slots=True)
class Limits:
    """The most bytes that our one-shot and two-shot kernels reduce where NCCL could too; -1 for none."""

    one_shot: int
    two_shot: int

    def way(self, nbytes: int) -> str:
        """The algorithm where all three are there."""
        return "one-shot" if nbytes <= self.one_shot else "two-shot" if nbytes <= self.two_shot else "nccl"


def built_in() -> Limits:
    """The limits for GPUs that were not measured."""
    return Limits(ONE_SHOT_NBYTES, TWO_SHOT_NBYTES)


def way_to_all_reduce(dtype: str, nbytes: int, *, kernels: bool, nccl: bool, limits: Limits | None = None) -> str:
    """How a bucket is all-reduced: "one-shot", "two-shot", "nccl", or "host" if nothing else supports it.

    Args:
        dtype: the dtype of the bucket's elements.
        nbytes: the bucket's size.
        kernels: whether the ranks can access each other's memory, as our kernels need.
        nccl: whether NCCL has connected the ranks.
        limits: None for the built-in ones. Without NCCL the kernels share sizes as the built-in limits say.
    """
    kernels = kernels and dtype in KERNEL_DTYPES
    nccl = nccl and dtype in NCCL_DTYPES
    if kernels and nccl:
        return (limits or built_in()).way(nbytes)
    if kernels:
        return "one-shot" if nbytes <= ONE_SHOT_NBYTES else "two-shot"
    return "nccl" if nccl else "host"


def way_to_reduce_scatter(dtype: str, nbytes: int, *, kernels: bool, nccl: bool, limits: Limits | None = None) -> str:
    """How a bucket is reduce-scattered: "kernel", "nccl" or "host". Arguments as in `way_to_all_reduce`."""
    way = way_to_all_reduce(dtype, nbytes, kernels=kernels, nccl=nccl, limits=limits)
    return "kernel" if way in ("one-shot", "two-shot") else way


def way_to_all_gather(nbytes: int, *, nccl: bool) -> str:
    """How a bucket is gathered: "nccl", or "copies" between the ranks. Nothing is added up, so any dtype works."""
    return "nccl" if nccl and nbytes > TWO_SHOT_NBYTES else "copies"


class Choice:
    """Which algorithm reduces which bucket on some devices.

    Args:
        kernels: whether the ranks can access each other's memory, as our kernels need.
        nccl: whether NCCL has connected the ranks.
        apart: whether each rank has a card of its own. Parts of a card are not measured: they are for tests.

    Attributes:
        asked: the choice that the user asks for by FASTDP_ALL_REDUCE.
        limits: what it goes by; None for the built-in limits.

    Raises:
        ValueError: the environment variable FASTDP_ALL_REDUCE is none of the choices.
    """

    def __init__(self, *, kernels: bool, nccl: bool, apart: bool) -> None:
        self._kernels, self._nccl, self._apart = kernels, nccl, apart
        self.asked = settings.all_reduce()
        asked = {"kernels": Limits(ONE_SHOT_NBYTES, sys.maxsize), "nccl": Limits(-1, -1)}
        self.limits = asked.get(self.asked)
        self._made = self.asked != "measured"

    def how(self, dtype: str, nbytes: int) -> str:
        """The way to all-reduce a bucket; "host" if it is summed in host memory."""
        return way_to_all_reduce(dtype, nbytes, kernels=self._kernels, nccl=self._nccl, limits=self.limits)

    def how_to_scatter(self, dtype: str, nbytes: int) -> str:
        """The way to reduce-scatter a bucket."""
        return way_to_reduce_scatter(dtype, nbytes, kernels=self._kernels, nccl=self._nccl, limits=self.limits)

    def how_to_gather(self, nbytes: int) -> str:
        """The way to gather a bucket."""
        return way_to_all_gather(nbytes, nccl=self._nccl)

    @property
    def ways(self) -> list[str]:
        """The algorithms by which float32 can be all-reduced here."""
        kernels = ["one-shot", "two-shot"] if self._kernels else []
        return [*kernels, *(["nccl"] if self._nccl else [])] or ["host"]

    @property
    def tunable(self) -> bool:
        """Whether there are algorithms to choose among by what they take on these devices."""
        return self._apart and self._kernels and self._nccl

    @property
    def untuned(self) -> bool:
        """Whether there is a choice that neither the user nor `use` has made."""
        return self.tunable and not self._made

    def use(self, limits: Limits | None) -> None:
        """Choose by these limits from now on, None for the built-in ones, if the user has not. Between steps only."""
        if self.asked == "measured":
            self.limits, self._made = limits, True
