"""The plan as text of at most 60 columns, and as one object for JSON; each line of both says that it is a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastdp._version import __version__
from fastdp.benchmark.plan.boxes import Box
from fastdp.benchmark.plan.model import JITTER, MARK, predicted
from fastdp.benchmark.plan.profile import Profile

_COLUMNS = f"{'':8}{'GPUs':>4}{'rows':>8}{'ms':>9}{'rows/s':>10}{'times':>6}{'eff. %':>7}{'best %':>7}"
_BOUND = {
    "all-reduce": ("a", "a tenth of the step or more is waiting for the all-reduce"),
    "host": ("h", "the host issues work for all GPUs more slowly than they do it"),
}
SHARINGS = {"weak": "a batch for each GPU", "strong": "one batch for all GPUs"}


def plan(profile: Profile, box: Box, counts: Sequence[int], jitter: float = JITTER) -> dict[str, Any]:
    """The modelled steps of a model on a box, for each number of GPUs: weak and strong scaling."""
    work, link = profile.work, box.link
    rows = {
        sharing: [predicted(work, link, profile.rows, n, grows=sharing == "weak", jitter=jitter) for n in counts]
        for sharing in SHARINGS
    }
    return {
        "what": MARK,
        "fastdp": __version__,
        "model": profile.name,
        "box": {
            "name": box.name,
            "title": box.title,
            "bus_bytes_per_second": {str(n): link.bandwidth(n) for n in counts if n > 1},
            "latency_seconds": link.latency,
            "source": link.source,
        },
        "rows_per_gpu": profile.rows,
        "parameters": profile.parameters,
        "gradients": profile.gradients,
        "buckets": list(work.buckets),
        "host_seconds": work.host or None,
        "jitter": jitter,
        "backward_share": work.backward_share,
        "assumptions": [*profile.basis, f"{box.title}: {link.source}", *_assumed(profile, jitter)],
        **rows,
    }


def _assumed(profile: Profile, jitter: float) -> list[str]:
    """What the model takes for granted, one sentence each."""
    return [
        f"backward is {100 * profile.work.backward_share:.0f} % of a step",
        f"devices differ by {100 * jitter:.1f} % from step to step, and the slowest counts; at best they do not",
        "input is never late, and an all-reduce slows no kernel beside it",
    ]


def lines(planned: dict[str, Any]) -> list[tuple[str, bool]]:
    """The plan as lines, and whether each may be broken to the width of a terminal."""
    found = [(f"{MARK}: {planned['model']} on {planned['box']['name']}", True)]
    for sharing, title in SHARINGS.items():
        found += [("", False), (f"{MARK}: {title} ({sharing} scaling)", True)]
        found.append((_COLUMNS, False))
        found += [(_row(one), False) for one in planned[sharing]]
    notes = [f"modelled: {note}." for note in planned["assumptions"]]
    bound = {one["bound_by"] for sharing in SHARINGS for one in planned[sharing]}
    notes += [f"modelled: {mark}: {what}." for kind, (mark, what) in _BOUND.items() if kind in bound]
    return [*found, ("", False), *((note, True) for note in notes)]


def _row(one: dict[str, Any]) -> str:
    bound, _ = _BOUND.get(one["bound_by"], ("", ""))
    return (
        f"modelled{one['gpus']:>4}{one['rows']:>8}{1e3 * one['step_seconds']:>9.2f}"
        f"{one['samples_per_second']:>10,.0f}{one['speedup']:>6.2f}"
        f"{100 * one['efficiency']:>7.1f}{100 * one['efficiency_at_best']:>7.1f}{bound}"
    )
