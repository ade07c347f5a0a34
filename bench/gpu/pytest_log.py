"""A pytest plugin: each test's beginning and end as lines of JSON, so that a run that is cut off still tells.

The environment variable FASTDP_GPU_LOG names the file; tests record measurements by `record_property`. Tests that
would start more than FASTDP_GPU_TEST_SECONDS after the beginning are skipped, so that the run ends by itself.
"""

from __future__ import annotations

import json
import os
import time
from typing import Any

import pytest

LINES = 25
_phases: dict[str, list[pytest.TestReport]] = {}
_began = time.monotonic()


def _write(**line: Any) -> None:
    path = os.environ.get("FASTDP_GPU_LOG")
    if path:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line, default=str) + "\n")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip the test if the time is over."""
    seconds = os.environ.get("FASTDP_GPU_TEST_SECONDS")
    if seconds and time.monotonic() - _began > float(seconds):
        pytest.skip("no time was left for it")


def pytest_runtest_logstart(nodeid: str) -> None:
    """Log that a test begins."""
    _write(test=nodeid, began=True)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Collect the reports of setup, call and teardown, and log the test after its teardown."""
    phases = _phases.setdefault(report.nodeid, [])
    phases.append(report)
    if report.when != "teardown":
        return
    del _phases[report.nodeid]
    failed = [phase for phase in phases if phase.failed]
    skipped = [phase for phase in phases if phase.skipped]
    line: dict[str, Any] = {
        "test": report.nodeid,
        "outcome": "failed" if failed else "skipped" if skipped else "passed",
        "seconds": round(sum(phase.duration for phase in phases), 3),
        "measured": dict(report.user_properties),
    }
    if failed:
        line["said"] = failed[0].longreprtext.splitlines()[-LINES:]
    elif skipped:
        where = skipped[0].longrepr
        line["reason"] = where[2] if isinstance(where, tuple) else str(where)
    _write(**line)


def pytest_collectreport(report: pytest.CollectReport) -> None:
    """Log a file that cannot be imported as a failure."""
    if report.failed:
        said = str(report.longrepr).splitlines()[-LINES:]
        _write(test=report.nodeid, outcome="failed", seconds=0.0, measured={}, said=said)
