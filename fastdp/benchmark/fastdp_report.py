"""Turns the report of a parallel model into what a result of `fastdp bench` keeps of it."""

from __future__ import annotations

from typing import Any


def report_of(parallel: Any) -> dict[str, Any]:
    """The fields that `Prepared.report` may have, of a Keras or torch parallel model."""
    report = parallel.report().to_dict()
    entries = report["steps"] or [{"how": "eager", "why": ""}]
    latest = max(entries, key=lambda entry: entry.get("steps", 0))
    engine = getattr(parallel, "engine", None) or getattr(parallel, "_engine", None)
    return {
        "how": latest["how"],
        "why": latest.get("why", ""),
        "capture_seconds": _sum(entries, "trace_seconds", "record_seconds"),
        "compile_seconds": _sum(entries, "compile_seconds", "load_seconds"),
        "verbs": [
            {
                "device": device["name"],
                "rows": device["rows"],
                "seconds": device["seconds"],
                "nbytes": device["nbytes"],
                "peak_nbytes": device["peak_nbytes"],
            }
            for device in report["devices"]
        ],
        "between_seconds": report["between_seconds"],
        "overhead_seconds": report["overhead_seconds"],
        "peak_host_nbytes": report["peak_nbytes"],
        "buckets": [bucket.nbytes for bucket in engine.group.buckets] if engine is not None else [],
    }


def _sum(entries: list[dict[str, Any]], *keys: str) -> float | None:
    """The seconds under these keys of all batch shapes; None where there are none."""
    found = [float(entry[key]) for entry in entries for key in keys if entry.get(key)]
    return sum(found) if found else None
