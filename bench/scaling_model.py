"""How long would a step take on 2 to 8 real GPUs? MODELLED, NOT MEASURED: arithmetic over parts measured on one.

    python bench/scaling_model.py bench/results/gpu_<card>_<date>.json

A step of n GPUs on a global batch of B rows is taken to last

    max(t(B / n), n h) + e

t(r) is the measured step of one device on r rows. h is the host's time to issue a step: that of one device on one row,
whose work on the GPU is next to nothing. All replicas are issued by one Python process, so their h add up. e is what is
left of the all-reduce when backward is over. Bucket by bucket it takes l + 2 (n-1)/n bytes / w, with l and w published
for 8 GPUs on NVSwitch and used for fewer as they are. The engine of today reduces after backward, so e is all of it
(`overlap=False`); with overlap a bucket starts when its part of backward is over and the bucket before it is reduced.

The model leaves out: the spread between GPUs, slower links, the copies of a batch to several GPUs at once.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastdp.buckets import BUCKET_NBYTES

MARK = "modelled, not measured"
COUNTS = (1, 2, 4, 8)


@dataclass(frozen=True)
class Link:
    """An all-reduce between GPUs: seconds of a small one, and bytes per second of bus bandwidth of a large one."""

    latency: float
    bandwidth: float
    source: str

    def seconds(self, nbytes: int, gpus: int) -> float:
        """One bucket."""
        if gpus == 1:
            return 0.0
        return self.latency + 2 * (gpus - 1) / gpus * nbytes / self.bandwidth


# Peak bus bandwidth of nccl-tests on 8 H200, NCCL 2.20.3 with NVLink SHARP: github.com/NVIDIA/nccl-tests/issues/272;
# NVIDIA names about 480 GB/s for 8 H100 in issue 212 there. The latency is a round figure for small sizes.
NVSWITCH = Link(40e-6, 475e9, "nccl-tests issue 272, 8 x H200 on NVSwitch: 475 GB/s; latency of 40 us assumed")


def reduced_after(buckets: Sequence[int], backward: float, gpus: int, link: Link, *, overlap: bool) -> float:
    """Seconds of the all-reduce that are left when backward is over.

    Args:
        buckets: their bytes, in the order in which backward fills them, each in time in proportion to its bytes.
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
        rows: of the global batch; the measurement with the fewest rows that holds a replica's share counts.
        host: seconds that the host needs to issue one replica's step.
        backward_share: of a step's computing that is backward.

    Raises:
        ValueError: no measurement holds a replica's rows.
    """
    share = -(-rows // gpus)
    fitting = [measured for measured in by_rows if measured >= share]
    if not fitting:
        raise ValueError(f"by_rows={sorted(by_rows)}: expected a measurement of {share} rows or more")
    computing = by_rows[min(fitting)]
    left = reduced_after(buckets, backward_share * computing, gpus, link, overlap=overlap)
    return max(computing, gpus * host) + left


def measured_parts(report: Mapping[str, Any], model: str) -> tuple[dict[int, float], float]:
    """(seconds of a step of one device by rows, seconds of the host alone) from a file of gpu_check.py.

    Raises:
        ValueError: the file has no steps of fastdp on one device with this model.
    """
    parts = report["stages"].get("bench", {"parts": {}})["parts"].get("steps", {"measurements": []})
    lines = [line for line in parts["measurements"] if line["what"] == "step" and line["model"] == model]
    ones = [line for line in lines if line["way"] == "fastdp 1" or line["way"].startswith("fastdp 1, ")]
    by_rows = {line["rows"]: line["milliseconds"]["median"] / 1e3 for line in ones}
    if not by_rows:
        raise ValueError(f"no step of fastdp on one device with {model!r}: run make gpu-check STAGE=bench with Keras")
    return {rows: seconds for rows, seconds in by_rows.items() if rows > 1}, by_rows.get(1, 0.0)


def predictions(report: Mapping[str, Any], model: str, nbytes: int, bucket: int = BUCKET_NBYTES) -> dict[str, Any]:
    """Modelled steps of a model with so many bytes of gradients, on 1 to 8 GPUs."""
    by_rows, host = measured_parts(report, model)
    rows = max(by_rows)
    buckets = [min(bucket, nbytes - start) for start in range(0, nbytes, bucket)]
    found: dict[str, Any] = {}
    for overlap in (False, True):
        seconds = {n: step_seconds(by_rows, rows, n, buckets, host=host, overlap=overlap) for n in COUNTS}
        found["with overlap" if overlap else "as the engine is"] = {
            str(n): {
                "milliseconds": round(1e3 * value, 4),
                "speedup": round(seconds[1] / value, 2),
                "bound_by_host": n * host > by_rows[min(r for r in by_rows if r >= -(-rows // n))],
            }
            for n, value in seconds.items()
        }
    return {"what": MARK, "model": model, "rows": rows, "gradient_nbytes": nbytes, "link": NVSWITCH.source, **found}


# Bytes of fp32 gradients: MLP 784-512-512-10, and keras.applications' ResNet50 with 10 classes (trainable only).
GRADIENTS = {"mlp": 4 * 669_706, "resnet50": 4 * 23_555_082}


def main() -> int:
    """Print what the model says of a results file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="a JSON file of make gpu-check")
    report = json.loads(parser.parse_args().results.read_text(encoding="utf-8"))
    print(f"*** {MARK} ***")
    for model, nbytes in GRADIENTS.items():
        try:
            print(json.dumps(predictions(report, model, nbytes), indent=1))
        except ValueError as error:
            print(f"{model}: {error}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
