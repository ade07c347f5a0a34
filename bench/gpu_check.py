"""Does fastdp work on the GPUs of this machine, and how fast? One command, one JSON file.

Stages run one after the other, each with its own time limit, and the others go on when one fails: `kernels` (each
kernel against its NumPy twin, memory and streams; then under compute-sanitizer, where it is installed), `engine`,
`keras` (models against plain Keras and torch on the same card) and `bench`. What a stage found before its limit counts.

    python bench/gpu_check.py [--stage NAME ...] [--wheels FOLDER]

The status is 0 if all was well, 1 if anything failed, 2 if there was nothing to check, as without a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
SCRATCH = ROOT / "build" / "gpu-check"
WHEELS = ROOT / "build" / "gpu-wheels"
# What is installed from a folder of wheels: Keras and what it imports that comes with neither torch nor CuPy.
FROM_WHEELS = ("keras", "namex", "optree", "rich")
TAIL = 40
KILL_SECONDS = 5.0


@dataclass(frozen=True)
class Part:
    """One process of a stage.

    Attributes:
        name: within the stage.
        command: what is run, after the interpreter where it begins with "-" or with a .py file.
        seconds: its time limit.
        tests: whether it is pytest, whose results come through gpu_pytest_log.py.
        needs: a program that must be on the PATH; the part is skipped, and says so, where it is not.
        environment: on top of this process's own.
    """

    name: str
    command: tuple[str, ...]
    seconds: float
    tests: bool = True
    needs: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)


def _pytest(*arguments: str) -> tuple[str, ...]:
    """pytest on `gpu` tests: warnings do not fail them, and stacks are shown where one hangs."""
    quiet = ("-m", "gpu", "-q", "-W", "default", "-p", "no:cacheprovider", "-p", "gpu_pytest_log")
    return ("-m", "pytest", *quiet, "-o", "faulthandler_timeout=60", *arguments)


def _sanitizer(tool: str) -> Part:
    """The kernel tests at small sizes under one tool of compute-sanitizer."""
    tests = ("tests/gpu/test_kernels.py", "-k", "784 or 130 or out_of_range", "-x")
    command = ("compute-sanitizer", "--tool", tool, "--error-exitcode", "86", sys.executable, *_pytest(*tests))
    return Part(tool, command, 45, needs="compute-sanitizer", environment={"FASTDP_GPU_SMALL": "1"})


STAGES: dict[str, tuple[Part, ...]] = {
    "kernels": (
        Part("tests", _pytest("tests/gpu/test_runtime.py", "tests/gpu/test_kernels.py"), 70),
        _sanitizer("memcheck"),
        _sanitizer("racecheck"),
    ),
    "engine": (Part("tests", _pytest("tests/gpu/test_engine.py"), 80),),
    "keras": (Part("tests", _pytest("tests/gpu/test_models.py"), 90),),
    "bench": (
        Part("parts", ("bench/gpu_parts.py",), 40, tests=False),
        Part("steps", ("bench/gpu_steps.py",), 100, tests=False),
    ),
}


def main() -> int:
    """Run the stages asked for, print, save; the exit status."""
    asked = _arguments()
    SCRATCH.mkdir(parents=True, exist_ok=True)
    environment = dict(os.environ, PYTHONUNBUFFERED="1")
    paths = [str(ROOT), str(ROOT / "bench")]
    if asked.wheels:
        paths.append(str(install_wheels(Path(asked.wheels))))
    environment["PYTHONPATH"] = os.pathsep.join([*paths, *filter(None, [os.environ.get("PYTHONPATH")])])
    machine = describe_machine(environment)
    print(json.dumps(machine, indent=1), flush=True)
    if not machine.get("gpus"):
        print(f"\nNo GPU: {machine.get('reason', 'the machine could not be described')}. The tests will be skipped.")
    began = time.monotonic()
    stages = {name: run_stage(name, STAGES[name], environment) for name in asked.stage}
    report = {"machine": machine, "seconds": round(time.monotonic() - began, 1), "stages": stages}
    path = write_report(report, Path(asked.results))
    print("\n" + table(stages))
    print(f"\nWrote {path}")
    return status_of(stages)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--stage", nargs="*", default=[], metavar="NAME", help=f"of {', '.join(STAGES)}; all by default"
    )
    parser.add_argument("--wheels", default="", help="a folder of wheels that holds Keras and what it needs")
    parser.add_argument("--results", default=str(ROOT / "bench" / "results"), help="where the JSON file goes")
    asked = parser.parse_args()
    unknown = [name for name in asked.stage if name not in STAGES]
    if unknown:
        parser.error(f"--stage: expected some of {', '.join(STAGES)}. Received: {', '.join(unknown)}")
    asked.stage = asked.stage or list(STAGES)
    return asked


def install_wheels(folder: Path) -> Path:
    """Install Keras from a folder of wheels, without a network, into build/gpu-wheels.

    Raises:
        subprocess.CalledProcessError: pip found no wheel that fits.
    """
    shutil.rmtree(WHEELS, ignore_errors=True)
    where = ["--no-index", "--find-links", str(folder), "--target", str(WHEELS)]
    # Without dependencies: --target would bring a second NumPy, or fail for want of one.
    how = ["--no-deps", "--no-cache-dir", "--disable-pip-version-check", "--quiet"]
    subprocess.run([sys.executable, "-m", "pip", "install", *how, *where, *FROM_WHEELS], check=True)
    return WHEELS


def describe_machine(environment: Mapping[str, str]) -> dict[str, Any]:
    """Cards, driver and versions, found out by a process of its own: this one never touches CUDA."""
    command = [sys.executable, str(ROOT / "bench" / "gpu_machine.py")]
    try:
        done = subprocess.run(
            command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
        )
    except subprocess.TimeoutExpired:
        return {"reason": "gpu_machine.py did not end within 60 seconds"}
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        return {"reason": f"gpu_machine.py ended with {done.returncode}: {done.stderr.strip()[-600:]}"}
    return dict(json.loads(lines[-1]))


# One stage.


def run_stage(name: str, parts: Sequence[Part], environment: Mapping[str, str]) -> dict[str, Any]:
    """Run the parts of a stage; what came of them."""
    print(f"\n== {name}: at most {sum(part.seconds for part in parts):.0f} seconds", flush=True)
    began = time.monotonic()
    found = {}
    for part in parts:
        print(f"-- {name}/{part.name}", flush=True)
        found[part.name] = run_part(name, part, environment)
        print(f"-- {name}/{part.name}: {summary(found[part.name])}", flush=True)
    states = [result["status"] for result in found.values()]
    worst = next((s for s in ("timed out", "failed", "passed") if s in states), "skipped")
    return {"status": worst, "seconds": round(time.monotonic() - began, 1), "parts": found}


def run_part(stage: str, part: Part, environment: Mapping[str, str]) -> dict[str, Any]:
    """Run one process within its limit, and gather what it wrote line by line, even where it was cut off."""
    if part.needs and shutil.which(part.needs) is None:
        return {"status": "skipped", "reason": f"{part.needs} is not on the PATH"}
    log = SCRATCH / f"{stage}-{part.name}.jsonl"
    log.unlink(missing_ok=True)
    first = part.command[0]
    command = [*([sys.executable] if first.startswith("-") or first.endswith(".py") else []), *part.command]
    began = time.monotonic()
    code, output = run_limited(command, {**environment, **part.environment, "FASTDP_GPU_LOG": str(log)}, part.seconds)
    result: dict[str, Any] = {"seconds": round(time.monotonic() - began, 1), "limit": part.seconds, "exit": code}
    if part.needs and any("Device not supported" in line for line in output):
        return {"status": "skipped", "reason": f"{part.needs} does not support this machine's GPU", **result}
    lines = read_lines(log)
    if part.tests:
        result.update(count_tests(lines))
        # 5: nothing collected, by pytest's own numbers.
        failed = code not in (0, 5) or bool(result["failed"])
        nothing = "skipped" if not result["passed"] else "passed"
        result["status"] = "timed out" if code is None else "failed" if failed else nothing
    else:
        result["measurements"] = [line for line in lines if "skipped" not in line]
        result["skipped"] = [line for line in lines if "skipped" in line]
        good = "passed" if result["measurements"] else "skipped"
        result["status"] = "timed out" if code is None else "failed" if code else good
    if result["status"] in ("failed", "timed out"):
        result["last_lines"] = output[-TAIL:]
    return result


def run_limited(command: Sequence[str], environment: Mapping[str, str], seconds: float) -> tuple[int | None, list[str]]:
    """Run a command in a process group of its own, its output shown as it comes.

    Returns: its exit status, None where it was ended for its time limit, and its output's lines.
    """
    output = SCRATCH / f"output-{os.getpid()}.txt"
    with output.open("wb") as file:
        process = subprocess.Popen(
            list(command),
            env=dict(environment),
            cwd=ROOT,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        code: int | None
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _end(process)
    lines = output.read_text(encoding="utf-8", errors="replace").splitlines()
    output.unlink()
    print("\n".join(lines[-TAIL:]), flush=True)
    return code, lines


def _end(process: subprocess.Popen[bytes]) -> None:
    """End what is left of a process group, gently first: CUDA gives memory back."""
    for how, seconds in ((signal.SIGTERM, KILL_SECONDS), (signal.SIGKILL, KILL_SECONDS)):
        try:
            os.killpg(process.pid, how)
        except ProcessLookupError:
            break
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            continue
    process.wait(KILL_SECONDS)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON objects of a file, one a line; a last line that was cut off is left out."""
    if not path.exists():
        return []
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return found


def count_tests(lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What gpu_pytest_log.py wrote, put together: counts, failures with their last lines, skips by reason."""
    ended = [line for line in lines if "outcome" in line]
    done = {line["test"] for line in ended}
    reasons: dict[str, int] = {}
    for line in ended:
        if line["outcome"] == "skipped":
            reasons[line["reason"]] = reasons.get(line["reason"], 0) + 1
    return {
        "passed": sum(line["outcome"] == "passed" for line in ended),
        "failed": sum(line["outcome"] == "failed" for line in ended),
        "skipped": reasons,
        "failures": [{"test": line["test"], "said": line["said"]} for line in ended if line["outcome"] == "failed"],
        "unfinished": [line["test"] for line in lines if "began" in line and line["test"] not in done],
        "measurements": {line["test"]: line["measured"] for line in ended if line.get("measured")},
        "slowest": {line["test"]: line["seconds"] for line in sorted(ended, key=lambda one: -one["seconds"])[:5]},
    }


# What came of it.


def summary(part: Mapping[str, Any]) -> str:
    """One part in a few words."""
    said = [part["status"]]
    if "passed" in part:
        said.append(f"{part['passed']} passed, {part['failed']} failed, {sum(part['skipped'].values())} skipped")
    elif "measurements" in part:
        said.append(f"{len(part['measurements'])} measurements, {len(part['skipped'])} left out")
    if part.get("unfinished"):
        said.append(f"stopped in {part['unfinished'][-1]}")
    said += [f"{count} skipped: {reason}" for reason, count in part["skipped"].items()] if "passed" in part else []
    return ", ".join([*said, *filter(None, [part.get("reason")])])


def table(stages: Mapping[str, Mapping[str, Any]]) -> str:
    """The closing table: a line for each part, then the names of the tests that failed."""
    rows = [["stage", "result", "seconds", ""]]
    failures = []
    for stage, found in stages.items():
        for name, part in found["parts"].items():
            rows.append([f"{stage}/{name}", part["status"], str(part.get("seconds", "")), summary(part)])
            failures += [f"FAILED {one['test']}" for one in part.get("failures", [])]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    lines = [
        "  ".join([*(cell.ljust(width) for cell, width in zip(row[:3], widths, strict=True)), row[3]]) for row in rows
    ]
    return "\n".join([*(line.rstrip() for line in lines), *failures])


def write_report(report: Mapping[str, Any], folder: Path) -> Path:
    """The JSON file: among the results where there is a card, in build/ where there is none to speak of."""
    cards = report["machine"].get("gpus") or []
    card = re.sub(r"[^a-z0-9]+", "-", cards[0]["name"].lower()).strip("-") if cards else "none"
    folder = folder if cards else SCRATCH
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"gpu_{card}_{time.strftime('%Y%m%d')}.json"
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return path


def status_of(stages: Mapping[str, Mapping[str, Any]]) -> int:
    """0: all was well; 1: something failed; 2: nothing was checked."""
    states = {found["status"] for found in stages.values()}
    if states & {"failed", "timed out"}:
        return 1
    return 0 if "passed" in states else 2


if __name__ == "__main__":
    sys.exit(main())
