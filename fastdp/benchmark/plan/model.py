"""The model of a step of n GPUs: the slowest one's computing, and what of the all-reduce is left after it.

A step of n GPUs on a batch of B rows takes `max(c t(B / n), n h) + e`.

- t(r) is the step of one device on r rows (`fastdp.benchmark.plan.compute`).
- c is 1 + d(n) times the jitter: devices differ from step to step, and the slowest one counts. d(n) is the expected
  largest of n standard normal numbers (L. H. C. Tippett, Biometrika 17, 1925). The jitter is a fraction of a step.
- h is the host's time to issue the work of one replica. One process issues that of all, so their h add up.
- e is what of the all-reduce remains after backward. A bucket starts when its part of backward is done and the bucket
  before it is reduced.

The model ignores input that is late, links that the box's figures do not describe, and what an all-reduce takes from
kernels that run beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastdp.benchmark.plan.boxes import Link
from fastdp.benchmark.plan.compute import Compute
from fastdp.shard import BUCKET_NBYTES, FIRST_BUCKET_NBYTES

MARK = "modelled, not measured"
# The standard deviation of a device's step, as a fraction of it. With it the model gives the scaling of ResNet50 in
# TF32 on 2, 4 and 8 A100 that NVIDIA publishes for MXNet (docs/plan.md).
JITTER = 0.013
BACKWARD_SHARE = 2 / 3
_LARGEST_OF = (0.0, 0.5642, 0.8463, 1.0294, 1.1630, 1.2672, 1.3522, 1.4236)


@dataclass(frozen=True)
class Work:
    """What a step computes and reduces.

    Attributes:
        compute: seconds of a device's step.
        buckets: bytes of each bucket of gradients, in the order in which backward fills them.
        host: seconds that the host needs to issue one replica's step; 0 if unknown.
        backward_share: the fraction of a step's computing that is backward.
    """

    compute: Compute
    buckets: Sequence[int]
    host: float = 0.0
    backward_share: float = BACKWARD_SHARE


def bucket_sizes(nbytes: int, first: int = FIRST_BUCKET_NBYTES, cap: int = BUCKET_NBYTES) -> list[int]:
    """Bucket sizes for `nbytes` of gradients, as if parameters could be split anywhere; the first bucket is small.

    Example:
        >>> bucket_sizes(100, first=10, cap=60)
        [10, 60, 30]
    """
    sizes = [min(first, nbytes)] if nbytes else []
    left = nbytes - sum(sizes)
    return [*sizes, *(min(cap, left - start) for start in range(0, left, cap))]


def reduced_after(buckets: Sequence[int], backward: float, gpus: int, link: Link, *, overlap: bool = True) -> float:
    """Seconds of the all-reduce that remain after backward.

    Args:
        buckets: bytes per bucket, in the order in which backward fills them; fill times are proportional to bytes.
        backward: seconds of the backward pass.
        gpus: number of GPUs.
        link: what connects them.
        overlap: whether buckets are reduced while backward goes on.
    """
    if gpus == 1 or not buckets:
        return 0.0
    if not overlap:
        return sum(link.seconds(nbytes, gpus) for nbytes in buckets)
    total, filled, ended = sum(buckets), 0, 0.0
    for nbytes in buckets:
        filled += nbytes
        ended = max(ended, backward * filled / total) + link.seconds(nbytes, gpus)
    return ended - backward


def step_seconds(
    work: Work, link: Link, rows: int, gpus: int, *, jitter: float = JITTER, overlap: bool = True
) -> float:
    """A modelled step of `gpus` GPUs on a global batch of `rows` rows. With fewer rows than GPUs, fewer run."""
    gpus = min(gpus, rows)
    computing = work.compute.seconds(-(-rows // gpus))
    left = reduced_after(work.buckets, work.backward_share * computing, gpus, link, overlap=overlap)
    return max(computing * (1 + _LARGEST_OF[gpus - 1] * jitter), gpus * work.host) + left


def predicted(work: Work, link: Link, rows: int, gpus: int, *, grows: bool, jitter: float = JITTER) -> dict[str, Any]:
    """A modelled step of `gpus` GPUs, its throughput, and its scaling over one GPU.

    Args:
        work: what a step computes and reduces.
        link: what connects the GPUs.
        rows: rows of the batch of one GPU.
        gpus: number of GPUs.
        grows: whether each GPU has such a batch (weak scaling), or all share one (strong scaling).
        jitter: see above.

    Returns:
        `efficiency` is the speedup divided by `gpus`; `efficiency_at_best` is that of devices without jitter.
        `bound_by` is "compute", "host", or "all-reduce" where a tenth of the step and more is spent waiting for it.
    """
    total = rows * gpus if grows else rows
    one = rows / step_seconds(work, link, rows, 1)
    seconds = step_seconds(work, link, total, gpus, jitter=jitter)
    best = step_seconds(work, link, total, gpus, jitter=0.0)
    active = min(gpus, total)
    computing = work.compute.seconds(-(-total // active))
    left = reduced_after(work.buckets, work.backward_share * computing, active, link)
    bound = "host" if active * work.host > computing else "all-reduce" if left >= 0.1 * seconds else "compute"
    return {
        "what": MARK,
        "gpus": gpus,
        "rows": total,
        "step_seconds": seconds,
        "samples_per_second": total / seconds,
        "speedup": total / seconds / one,
        "efficiency": total / seconds / one / gpus,
        "efficiency_at_best": total / best / one / gpus,
        "all_reduce_seconds": reduced_after(work.buckets, 0.0, active, link, overlap=False),
        "all_reduce_seconds_after_backward": left,
        "bound_by": bound,
    }
