"""How long would a step take on 2 to 8 real GPUs? MODELLED, NOT MEASURED: arithmetic over parts measured on one.

    python bench/gpu/scaling_model.py bench/results/gpu_<card>_*.json

Models each case of bench/gpu/cases.py that the files measure (MLP, ResNet50, Xception and the encoder), for n GPUs that
share the case's batch and for n GPUs with such a batch each. A step of n GPUs on a global batch of B rows takes

    max(t(B / n), n h) + e

t(r) is the measured step of one device on r rows. h is the host's time to issue a step, measured on one device with one
row, which is almost no work for the GPU. One Python process issues the work of all replicas, so their h add up. e is
the part of the all-reduce that remains after backward. A bucket takes l + 2 (n-1)/n bytes / w, with l and w published
for 8 GPUs on NVSwitch and used unchanged for fewer. Two bounds are given: the whole all-reduce after backward, and
with overlap, where a bucket starts when its part of backward is done and the previous bucket is reduced.

The model ignores differences between GPUs, slower links, and simultaneous copies of a batch to several GPUs.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from bench.gpu.goals import GOAL_CASES, Found, measurements
from bench.gpu.results import merged
from fastdp.shard import BUCKET_NBYTES, FIRST_BUCKET_NBYTES

MARK = "modelled, not measured"
COUNTS = (1, 2, 4, 8)
# Whether the global batch grows with the number of GPUs.
SHARINGS = {"one batch for all": False, "a batch for each": True}


@dataclass(frozen=True)
class Link:
    """An all-reduce between GPUs: latency in seconds, and bus bandwidth in bytes per second."""

    latency: float
    bandwidth: float
    source: str

    def seconds(self, nbytes: int, gpus: int) -> float:
        """Seconds to all-reduce one bucket."""
        if gpus == 1:
            return 0.0
        return self.latency + 2 * (gpus - 1) / gpus * nbytes / self.bandwidth


# Peak bus bandwidth of nccl-tests on 8 H200, NCCL 2.20.3 with NVLink SHARP: github.com/NVIDIA/nccl-tests/issues/272;
# NVIDIA states about 480 GB/s for 8 H100 in issue 212 there. The latency is a round figure for small sizes.
NVSWITCH = Link(40e-6, 475e9, "nccl-tests issue 272, 8 x H200 on NVSwitch: 475 GB/s; latency of 40 us assumed")


def reduced_after(buckets: Sequence[int], backward: float, gpus: int, link: Link, *, overlap: bool) -> float:
    """Seconds of the all-reduce that remain after backward.

    Args:
        buckets: bytes per bucket, in the order in which backward fills them; fill times are proportional to bytes.
        backward: seconds of the backward pass.
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
    by_rows: Mapping[int, float],
    rows: int,
    gpus: int,
    buckets: Sequence[int],
    link: Link = NVSWITCH,
    *,
    host: float = 0.0,
    overlap: bool = False,
    backward_share: float = 2 / 3,
) -> float:
    """A modelled step of `gpus` GPUs on a global batch.

    Args:
        by_rows: measured seconds of a step of one device, by rows.
        rows: rows of the global batch; the smallest measurement with at least a replica's rows is used.
        host: seconds that the host needs to issue one replica's step.
        backward_share: fraction of a step's compute time that is backward.

    Raises:
        ValueError: no measurement has as many rows as a replica.
    """
    share = -(-rows // gpus)
    fitting = [measured for measured in by_rows if measured >= share]
    if not fitting:
        raise ValueError(f"by_rows={sorted(by_rows)}: expected a measurement of {share} rows or more")
    computing = by_rows[min(fitting)]
    left = reduced_after(buckets, backward_share * computing, gpus, link, overlap=overlap)
    return max(computing, gpus * host) + left


def bucket_sizes(nbytes: int, first: int = FIRST_BUCKET_NBYTES, cap: int = BUCKET_NBYTES) -> list[int]:
    """Bucket sizes for `nbytes` of gradients, as if parameters could be split anywhere; the first bucket is small."""
    sizes = [min(first, nbytes)] if nbytes else []
    left = nbytes - sum(sizes)
    return [*sizes, *(min(cap, left - start) for start in range(0, left, cap))]


def measured_parts(found: Found, case: str) -> tuple[dict[int, float], float, int]:
    """The measured parts of a case: (seconds of a step of one device by rows, host seconds, bytes of fp32 gradients).

    Raises:
        ValueError: fastdp's steps on one device with full and partial batches, or the parameter count, are missing.
    """
    how = found.best(case)
    ones = [
        line
        for line in found.named("step", case=case, library="fastdp", devices=1, how=how)
        if not line["way"].endswith((", fed", ", resident", ", bare"))
    ]
    by_rows = {line["rows"]: line["milliseconds"]["median"] / 1e3 for line in ones}
    parameters = found.ready(case, f"fastdp 1 {how}").get("parameters")
    if len(by_rows) < 2 or parameters is None:
        raise ValueError(f"no steps of fastdp on one device with {case!r}: run make gpu-check with its bench stage")
    return {rows: seconds for rows, seconds in by_rows.items() if rows > 1}, by_rows.get(1, 0.0), 4 * parameters


def _predicted(
    by_rows: Mapping[int, float],
    rows: int,
    gpus: int,
    buckets: Sequence[int],
    host: float,
    *,
    grows: bool,
    overlap: bool,
) -> dict[str, Any]:
    """A step of `gpus` GPUs: time, throughput, and speedup over one GPU."""
    total = rows * gpus if grows else rows
    seconds = step_seconds(by_rows, total, gpus, buckets, host=host, overlap=overlap)
    one = step_seconds(by_rows, rows, 1, buckets, host=host, overlap=overlap)
    share = min(r for r in by_rows if r >= -(-total // gpus))
    return {
        "milliseconds": round(1e3 * seconds, 4),
        "samples_per_second": round(total / seconds, 1),
        "speedup": round(total / seconds / (rows / one), 2),
        "bound_by_host": gpus * host > by_rows[share],
    }


def predictions(found: Found, case: str) -> dict[str, Any]:
    """Modelled steps of a case on 1 to 8 GPUs that share its batch.

    Raises:
        ValueError: measurements are missing.
    """
    by_rows, host, nbytes = measured_parts(found, case)
    rows, buckets = max(by_rows), bucket_sizes(nbytes)
    modelled: dict[str, Any] = {}
    for title, grows in SHARINGS.items():
        for overlap in (False, True):
            modelled[f"{title}, {'with' if overlap else 'without'} overlap"] = {
                str(n): _predicted(by_rows, rows, n, buckets, host, grows=grows, overlap=overlap) for n in COUNTS
            }
    facts = {"case": case, "rows": rows, "gradient_nbytes": nbytes, "buckets": len(buckets)}
    return {"what": MARK, **facts, "link": NVSWITCH.source, **modelled}


def table(predicted: Mapping[str, Any]) -> str:
    """One case's predictions as plain text, marked as a model in every line."""
    lines = []
    for title, by_gpus in predicted.items():
        for n, one in by_gpus.items() if isinstance(by_gpus, Mapping) else ():
            bound = ", bound by the host" if one["bound_by_host"] else ""
            lines.append(
                f"[{MARK}] {predicted['case']}, {n} GPUs, {title}: {one['milliseconds']} ms, "
                f"{one['samples_per_second']:,} samples/s, speedup {one['speedup']}{bound}"
            )
    return "\n".join(lines)


def main() -> int:
    """Print the predictions for result files; returns 1 if no case has enough measurements."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", type=Path, help="JSON files of make gpu-check")
    report = merged([json.loads(path.read_text(encoding="utf-8")) for path in sorted(parser.parse_args().results)])
    found = Found(measurements(report), report["machine"])
    print(f"*** {MARK} ***")
    said = 0
    for case in GOAL_CASES:
        try:
            predicted = predictions(found, case)
        except ValueError as error:
            print(f"{case}: {error}")
            continue
        said += 1
        print(table(predicted))
        print(json.dumps(predicted))
    return 0 if said else 1


if __name__ == "__main__":
    sys.exit(main())
