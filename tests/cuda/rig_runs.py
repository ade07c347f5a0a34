"""Runs programs and tests on the cards of tests/cuda/rig, in copies of a process that has loaded their libraries."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path

import build_rig
from warm_python import WarmPython

ROOT = Path(__file__).parents[2]
SECONDS, SECONDS_OF_TESTS = 120.0, 300.0
HEAD = "import cupy, numpy as np, threading\nfrom cupy.cuda import driver, runtime as rt\n"
# Neither starts CUDA. fastdp is left to each program: it reads the environment as it is imported.
LIBRARIES = {"programs": ["cupy", "pytest"], "tests": ["cupy", "torch", "keras", "pytest"]}


class Rig:
    """The rig, and a process for each kind of what runs on it.

    Attributes:
        folder: where it was built.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._warm: dict[str, WarmPython] = {}

    def warm(self, kind: str) -> WarmPython:
        """The process that has loaded what programs or tests need; it starts when it is first asked for."""
        if kind not in self._warm:
            environment = build_rig.environment(self.folder, 1, KERAS_BACKEND="torch")
            self._warm[kind] = WarmPython(LIBRARIES[kind], environment, ROOT)
        return self._warm[kind]

    def close(self) -> None:
        """End these processes."""
        for one in self._warm.values():
            one.close()


def run_on(
    rig: Rig, scratch: Path, cards: int, command: list[str], seconds: float = SECONDS, **more: str
) -> tuple[str, str, list[str]]:
    """The output of a Python process with so many cards, its errors, and what CUDA forbids and does not detect."""
    violations = scratch / "violations"
    environment = build_rig.environment(rig.folder, cards, RIG_VIOLATIONS=str(violations), **more)
    kind = "tests" if command[:2] == ["-m", "pytest"] else "programs"
    done = rig.warm(kind).run(command, environment, seconds)
    errors = done.stderr + (f"exit status {done.returncode}" if done.returncode else "")
    return done.stdout, errors, violations.read_text(encoding="utf-8").splitlines() if violations.exists() else []


def said_by(rig: Rig, scratch: Path, program: str, cards: int = 2, **more: str) -> list[str]:
    """The lines that a program prints on so many cards; it must do nothing that CUDA forbids."""
    said, errors, violations = run_on(rig, scratch, cards, ["-c", HEAD + program], **more)
    assert (errors, violations) == ("", []), said
    return said.splitlines()


def run_tests(rig: Rig, scratch: Path, cards: int, files: list[str], at_least: int, **settings: str) -> set[str]:
    """Tests pass on so many cards, with torch in host memory, and do nothing that CUDA forbids.

    Returns the reasons for which others are skipped.
    """
    report = scratch / "report.xml"
    options = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", f"--junitxml={report}", "-o", "junit_family=xunit1"]
    settings |= {"RIG_QUERY_HOLD_MS": "20000", "FASTDP_GPU_COMPUTE": "host"}
    command = ["-m", "pytest", "-p", "torch_on_rig", *options, *files]
    said, errors, violations = run_on(rig, scratch, cards, command, SECONDS_OF_TESTS, **settings)
    assert report.exists(), said[-3000:] + errors[-3000:]
    cases = list(ET.parse(report).iter("testcase"))
    bad = [case.get("name") for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = [skip.get("message") for case in cases for skip in case.findall("skipped")]
    assert (bad, errors, violations) == ([], "", []), said[-6000:]
    assert len(cases) - len(skipped) >= at_least
    return {why or "" for why in skipped}
