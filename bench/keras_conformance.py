"""Keras's own tests of its trainer, callbacks and models, with and without fastdp under them.

The tests ship in the Keras wheel. Each file runs with plain Keras on torch and with `fastdp run --virtual N -m pytest`.
The script compares outcomes per test and writes docs/conformance.md. The tests also import the packages in
bench/keras_conformance_requirements.txt.

    python bench/keras_conformance.py [--virtual 2] [--only trainer_test.py] [--write docs/conformance.md]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections import Counter
from dataclasses import dataclass, field
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = ("trainers", "trainers/data_adapters", "callbacks", "models")
# Reasons why tests that plain Keras passes do not pass under fastdp. A difference without a reason is a bug.
REASONS = ROOT / "bench" / "keras_conformance_reasons.json"

# Counts the engine's steps, so that a run without parallel steps cannot look like a pass.
PLUGIN = """
import atexit, json, os
from fastdp.engine.data_parallel import DataParallel

counts = {"train": 0, "predict": 0, "several replicas": 0}

def counted(name):
    original = getattr(DataParallel, name)
    def method(self, batch, **kwargs):
        counts[name] += 1
        counts["several replicas"] += len(self.replicas) > 1 and len(batch[0]) > 1
        return original(self, batch, **kwargs)
    setattr(DataParallel, name, method)

counted("train")
counted("predict")

def pytest_sessionfinish():
    with open(os.environ["FASTDP_CONFORMANCE_STEPS"], "w") as file:
        json.dump(counts, file)
"""


@dataclass
class Outcomes:
    """The result of each test according to pytest, and the number of engine steps."""

    tests: dict[str, tuple[str, str]] = field(default_factory=dict)
    steps: Counter[str] = field(default_factory=Counter)


def keras_test_files(only: list[str] | None) -> list[Path]:
    """The test files in the installed Keras wheel."""
    spec = find_spec("keras")
    assert spec is not None
    assert spec.origin is not None
    source = Path(spec.origin).parent / "src"
    files = [file for folder in FOLDERS for file in sorted((source / folder).glob("*_test.py"))]
    return [file for file in files if not only or file.name in only]


def run_tests(files: list[Path], virtual: int | None) -> Outcomes:
    """Run each test file in its own process, so that a crash does not affect the others."""
    outcomes = Outcomes()
    for file in files:
        with tempfile.TemporaryDirectory() as folder:
            report, steps = Path(folder, "report.xml"), Path(folder, "steps.json")
            Path(folder, "fastdp_conformance_plugin.py").write_text(PLUGIN)
            prefix = [] if virtual is None else ["-m", "fastdp", "run", "--always", "--virtual", str(virtual)]
            plugin = [] if virtual is None else ["-p", "fastdp_conformance_plugin"]
            command = [sys.executable, *prefix, "-m", "pytest", "-q", f"--junitxml={report}", "-p", "no:cacheprovider"]
            command += [*plugin, f"--rootdir={folder}", "-c", os.devnull, "--timeout=300", str(file)]
            environment = {
                **os.environ,
                "KERAS_BACKEND": "torch",
                "FASTDP_CONFORMANCE_STEPS": str(steps),
                "PYTHONPATH": os.pathsep.join([folder, str(ROOT)]),
                "CUDA_VISIBLE_DEVICES": "",
            }
            done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
            if not report.exists():
                outcomes.tests[file.name] = ("crashed", (done.stderr or done.stdout)[-300:])
                continue
            outcomes.tests |= read_report(report, file.name)
            if steps.exists():
                outcomes.steps.update(json.loads(steps.read_text()))
    return outcomes


def read_report(report: Path, file: str) -> dict[str, tuple[str, str]]:
    """Outcome and message by test id."""
    found = {}
    for case in ET.parse(report).iter("testcase"):
        name = f"{file}::{case.get('classname', '').rsplit('.', 1)[-1]}::{case.get('name')}"
        outcome, message = "passed", ""
        for kind in ("failure", "error", "skipped"):
            node = case.find(kind)
            if node is not None:
                outcome, message = {"failure": "failed"}.get(kind, kind), (node.get("message") or "")[:300]
        found[name] = (outcome, message)
    return found


def differences(plain: Outcomes, parallel: Outcomes) -> list[tuple[str, str, str]]:
    """Tests that pass with plain Keras and do not pass under fastdp: id, outcome, message."""
    return [
        (name, *parallel.tests.get(name, ("not run", "")))
        for name, (outcome, _) in plain.tests.items()
        if outcome == "passed" and parallel.tests.get(name, ("not run", ""))[0] != "passed"
    ]


def page(plain: Outcomes, parallel: Outcomes, virtual: int) -> str:
    """The text of docs/conformance.md."""
    reasons = json.loads(REASONS.read_text()) if REASONS.exists() else {}
    files = sorted({name.split("::")[0] for name in plain.tests})
    differing = differences(plain, parallel)
    lines = [
        "# Keras's own tests under fastdp",
        "",
        "Written by `make conformance` (`bench/keras_conformance.py`): the tests of trainers, callbacks and models",
        f"that ship in the wheel of Keras {version('keras')}, on torch {version('torch')}, run by plain Keras and by",
        f"`python -m fastdp run --virtual {virtual} -m pytest`. Every test that plain Keras passes counts.",
        "",
        f"- plain Keras passes {count(plain)} tests; under fastdp {count(plain) - len(differing)} of these pass.",
        f"- the engine made {parallel.steps['train']} training steps and {parallel.steps['predict']} forward steps, "
        f"{parallel.steps['several replicas']} of them on more than one device.",
        "",
        "| file | plain passes | passes under fastdp too | skipped or failing in plain Keras |",
        "|---|---|---|---|",
    ]
    for file in files:
        names = [name for name in plain.tests if name.startswith(file)]
        passing = [name for name in names if plain.tests[name][0] == "passed"]
        same = [name for name in passing if parallel.tests.get(name, ("",))[0] == "passed"]
        lines.append(f"| {file} | {len(passing)} | {len(same)} | {len(names) - len(passing)} |")
    lines += ["", "## Differences", ""]
    for name, outcome, message in differing:
        lines.append(
            f"- `{name}` {outcome}: {reasons.get(name.split('[')[0]) or 'no reason known: ' + message[:150]!r}"
        )
    lines += [] if differing else ["None."]
    lines += ["", "## Tests that pass", ""]
    for file in files:
        passing = [n for n in plain.tests if n.startswith(file) and parallel.tests.get(n, ("",))[0] == "passed"]
        if passing:
            lines += [f"**{file}**: " + ", ".join(f"`{n.split('::')[-1]}`" for n in passing), ""]
    return "\n".join(lines).rstrip() + "\n"


def count(outcomes: Outcomes) -> int:
    """The number of tests that passed."""
    return sum(outcome == "passed" for outcome, _ in outcomes.tests.values())


def main() -> int:
    """Run both, compare, write the page; returns 1 if a difference has no reason."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--virtual", type=int, default=2, help="how many virtual devices")
    parser.add_argument("--only", action="append", help="a test file's name; may be given again")
    parser.add_argument("--write", type=Path, help="write the page here")
    parser.add_argument("--plain", type=Path, help="keep plain Keras's outcomes here, and take them from here")
    options = parser.parse_args()
    files = keras_test_files(options.only)
    if options.plain and options.plain.exists():
        stored = json.loads(options.plain.read_text())
        names = {file.name for file in files}
        plain = Outcomes({n: tuple(o) for n, o in stored.items() if n.split("::")[0] in names})
    else:
        plain = run_tests(files, None)
        if options.plain:
            options.plain.write_text(json.dumps(plain.tests))
    parallel = run_tests(files, options.virtual)
    differing = differences(plain, parallel)
    reasons = json.loads(REASONS.read_text()) if REASONS.exists() else {}
    for name, outcome, message in differing:
        print(f"{name} {outcome}: {message}")
    print(
        f"plain Keras passes {count(plain)}, {len(differing)} of them not under fastdp; steps: {dict(parallel.steps)}"
    )
    if options.write:
        options.write.write_text(page(plain, parallel, options.virtual))
    return int(any(name.split("[")[0] not in reasons for name, _, _ in differing))


if __name__ == "__main__":
    sys.exit(main())
