"""Computes the launch of an all-reduce over peer memory for one rank among its peers. Integers only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fastdp.launch import args as ka
from fastdp.shard import rank_range

__all__ = ["PeerGroup", "all_reduce_launch", "coresident_blocks", "reduce_scatter_launch"]


@dataclass(frozen=True)
class PeerGroup:
    """One rank's view of the ranks it all-reduces with. kernels/peer_signals.cuh describes the protocol.

    Attributes:
        rank: this rank.
        staging: each rank's staging buffer, in rank order: cudaMalloc memory that all ranks may access.
        staging_nbytes: the size of each buffer. Half of it must hold the staged elements, see the two functions.
        signals: each rank's SIGNALS_NBYTES bytes of such memory, zeroed once before the first launch.
        error: a uint32 of this rank, zeroed before the first launch; nonzero after a time-out.
        max_blocks: the most blocks of a launch, the same on all ranks; see coresident_blocks.
        threads: threads per block, at most 512; the same on all ranks.
        spin_limit: polls before a wait gives up.
        tree: whether the ranks' values are added in a binary tree, as those of shards are, instead of in rank order.
    """

    rank: int
    staging: tuple[int, ...]
    staging_nbytes: int
    signals: tuple[int, ...]
    error: int
    max_blocks: int
    threads: int = 512
    spin_limit: int = 50_000_000
    tree: bool = False

    def __post_init__(self) -> None:
        ranks = len(self.signals)
        if not (1 <= ranks <= ka.MAX_RANKS and 0 <= self.rank < ranks and len(self.staging) == ranks):
            raise ValueError(
                f"rank={self.rank} with {len(self.staging)} staging buffers and {ranks} signals: expected a "
                f"rank of 1 to {ka.MAX_RANKS}, and one of each per rank; use NCCL for more ranks"
            )
        if any(address % ka.PACK_NBYTES for address in self.staging):
            raise ValueError(f"staging={self.staging}: expected addresses aligned to {ka.PACK_NBYTES} bytes")
        if not (1 <= self.max_blocks <= ka.MAX_SIGNAL_BLOCKS and 1 <= self.threads <= 512 and self.error):
            raise ValueError(
                f"max_blocks={self.max_blocks}, threads={self.threads}, error={self.error:#x}: expected 1 to "
                f"{ka.MAX_SIGNAL_BLOCKS} blocks, 1 to 512 threads and the address of an error flag"
            )

    @property
    def half_nbytes(self) -> int:
        """Bytes of one half of a staging buffer, in whole packs."""
        return self.staging_nbytes // 2 // ka.PACK_NBYTES * ka.PACK_NBYTES


def all_reduce_launch(
    group: PeerGroup, inputs: Sequence[int], y: int, *, n: int, staged_n: int, dtype: str, scale: float
) -> tuple[int, ka.AllReduceArgs]:
    """The (grid, argument) of either all-reduce; `staged_n` elements go through staging.

    Raises:
        ValueError: a staging buffer that is too small.
    """
    staged_nbytes = staged_n * ka.ITEMSIZE[dtype]
    if staged_nbytes > group.half_nbytes:
        raise ValueError(
            f"staging_nbytes={group.staging_nbytes} for {n} elements of {dtype}: expected at least "
            f"{2 * ka.ceil_div(staged_nbytes, ka.PACK_NBYTES) * ka.PACK_NBYTES}"
        )
    args = ka.AllReduceArgs(
        output=y,
        error=group.error,
        n=n,
        staging_half_bytes=group.half_nbytes,
        scale=scale,
        rank=group.rank,
        ranks=len(group.signals),
        spin_limit=group.spin_limit,
        tree=group.tree,
    )
    for rank, (x, staging, signals) in enumerate(zip(inputs, group.staging, group.signals, strict=True)):
        args.inputs[rank], args.staging[rank], args.signals[rank] = x, staging, signals
    return min(group.max_blocks, ka.ceil_div(staged_nbytes, ka.PACK_NBYTES * group.threads)), args


def reduce_scatter_launch(
    group: PeerGroup, inputs: Sequence[int], y: int, *, n: int, dtype: str, scale: float
) -> tuple[int, ka.AllReduceArgs]:
    """The (grid, argument) of a reduce-scatter. Nothing is staged. The grid fits the last part, the longest one."""
    _, args = all_reduce_launch(group, inputs, y, n=n, staged_n=0, dtype=dtype, scale=scale)
    ranks = len(group.signals)
    first, last = rank_range(n, ranks - 1, ranks, ka.PART_NBYTES // ka.ITEMSIZE[dtype])
    nbytes = (last - first) * ka.ITEMSIZE[dtype]
    return min(group.max_blocks, ka.ceil_div(nbytes, ka.PACK_NBYTES * group.threads)), args


def coresident_blocks(sm_count: int, ranks_on_card: int = 1) -> int:
    """The most blocks per rank of a peer all-reduce with which all ranks' blocks are resident at once.

    Args:
        sm_count: multiprocessors of the card.
        ranks_on_card: ranks that share the card; 1 if each has its own.

    Counts one block per multiprocessor, which is safe whatever a block needs. All ranks must use the minimum over
    their cards. kernels/peer_signals.cuh says what else virtual GPUs on one card need.

    Raises:
        ValueError: more ranks share the card than it has multiprocessors.
    """
    if not 1 <= ranks_on_card <= sm_count:
        raise ValueError(
            f"ranks_on_card={ranks_on_card} on a card of {sm_count} multiprocessors: expected 1 to "
            f"{sm_count}, since the ranks' blocks wait for each other and must all be resident"
        )
    return min(ka.MAX_SIGNAL_BLOCKS, sm_count // ranks_on_card)
