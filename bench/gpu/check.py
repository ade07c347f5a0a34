"""Does fastdp work on the GPUs of this machine, and how fast? One command, one JSON file.

The stages of bench/gpu/stages.py run one after the other, each with its own time limit; if one fails, the others still
run. Results that a stage wrote before its limit count. The file is rewritten while a part runs and when it ends, so
that an interrupted run keeps its results. At the end the results are compared with the goals of bench/gpu/goals.py.

    python bench/gpu/check.py [--stage NAME ...] [--wheels FOLDER] [--seconds 570]

The exit status is 0 if everything passed, 1 if anything failed, 2 if nothing could be checked, as without a GPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from bench.gpu import goals as gpu_goals
from bench.gpu.stages import DEFAULT, STAGES, Part

ROOT = Path(__file__).parents[2]
SCRATCH = ROOT / "build" / "gpu-check"
WHEELS = ROOT / "build" / "gpu-wheels"
# Packages installed from a folder of wheels, and what each is imported as: Keras, and its dependencies that come with
# neither torch nor CuPy.
FROM_WHEELS = {
    "absl-py": "absl",
    "keras": "keras",
    "ml_dtypes": "ml_dtypes",
    "namex": "namex",
    "optree": "optree",
    "rich": "rich",
}
TAIL = 40
KILL_SECONDS = 5.0
SAVE_SECONDS = 5.0  # between two saves of a running part
LEAST_SECONDS = 15.0  # a part with less time left is not started


def main() -> int:
    """Run the requested stages, print, save; returns the exit status."""
    asked = _arguments()
    # On SIGTERM, the `finally` blocks write the file and end the running part with its child processes.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    SCRATCH.mkdir(parents=True, exist_ok=True)
    environment = dict(os.environ, PYTHONUNBUFFERED="1")
    paths = [str(ROOT)]
    if asked.wheels and (wheels := install_wheels(Path(asked.wheels))):
        paths.append(str(wheels))
    environment["PYTHONPATH"] = os.pathsep.join([*paths, *filter(None, [os.environ.get("PYTHONPATH")])])
    machine = describe_machine(environment)
    print(json.dumps(machine, indent=1), flush=True)
    if not machine.get("gpus"):
        print(f"\nNo GPU: {machine.get('reason', 'the machine could not be described')}. The tests will be skipped.")
    report = Report(machine, Path(asked.results))
    ends = time.monotonic() + asked.seconds
    try:
        for name in asked.stage:
            run_stage(name, STAGES[name], environment, report, ends)
    finally:
        path = report.write()
        print("\n" + table(report.stages))
        if any(name.startswith("bench") for name in report.stages):
            print("\n" + gpu_goals.table(report.goals()))
        print(f"\nWrote {path}", flush=True)
    return status_of(report.stages)


class Report:
    """The results of a run, in one file that is rewritten repeatedly.

    Args:
        machine: the result of `describe_machine`.
        folder: folder of the file if there is a card; else the file goes to build/gpu-check/.
    """

    def __init__(self, machine: Mapping[str, Any], folder: Path) -> None:
        self.machine = machine
        self.stages: dict[str, dict[str, Any]] = {}
        cards = machine.get("gpus") or []
        card = re.sub(r"[^a-z0-9]+", "-", cards[0]["name"].lower()).strip("-") if cards else "none"
        self.path = (folder if cards else SCRATCH) / f"gpu_{card}_{time.strftime('%Y%m%d-%H%M%S')}.json"
        self._began = time.monotonic()

    def goals(self) -> list[dict[str, Any]]:
        """The goals, evaluated with the measurements so far."""
        return gpu_goals.evaluate({"machine": self.machine, "stages": self.stages})

    def write(self) -> Path:
        """Write the file atomically: readers see the old or the new file, never a partial one."""
        seconds = round(time.monotonic() - self._began, 1)
        whole = {"machine": self.machine, "seconds": seconds, "stages": self.stages, "goals": self.goals()}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.path.with_suffix(".unfinished")
        unfinished.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
        unfinished.replace(self.path)
        return self.path


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--stage", nargs="*", default=[], metavar="NAME", help=f"of {', '.join(STAGES)}; {' '.join(DEFAULT)} by default"
    )
    parser.add_argument("--wheels", default="", help="a folder of wheels that holds Keras and what it needs")
    parser.add_argument("--seconds", type=float, default=3600.0, help="for all of it; what comes too late is left out")
    parser.add_argument("--results", default=str(ROOT / "bench" / "results"), help="where the JSON file goes")
    asked = parser.parse_args()
    unknown = [name for name in asked.stage if name not in STAGES]
    if unknown:
        parser.error(f"--stage: expected some of {', '.join(STAGES)}. Received: {', '.join(unknown)}")
    asked.stage = asked.stage or [name for name in DEFAULT if name in STAGES]
    return asked


def install_wheels(folder: Path) -> Path | None:
    """Install the missing packages of FROM_WHEELS from a folder of wheels, without a network.

    Returns: their folder, build/gpu-wheels; None if nothing is missing, or if there is no wheel that fits: then pip's
    reason is printed, and what needs Keras is skipped.
    """
    missing = [name for name, module in FROM_WHEELS.items() if importlib.util.find_spec(module) is None]
    shutil.rmtree(WHEELS, ignore_errors=True)
    if not missing:
        return None
    where = ["--no-index", "--find-links", str(folder), "--target", str(WHEELS)]
    # Without dependencies: --target would install a second NumPy, or fail if there is no wheel of it.
    how = ["--no-deps", "--no-cache-dir", "--disable-pip-version-check", "--quiet"]
    command = [sys.executable, "-m", "pip", "install", *how, *where, *missing]
    if subprocess.run(command, check=False).returncode:
        print(
            f"\nWithout Keras: {folder} lacks a wheel of {', '.join(missing)} that fits, as pip says above.", flush=True
        )
        return None
    return WHEELS


def describe_machine(environment: Mapping[str, str]) -> dict[str, Any]:
    """Cards, driver and versions, from a separate process, since this one never touches CUDA."""
    command = [sys.executable, str(ROOT / "bench" / "gpu" / "machine.py")]
    try:
        done = subprocess.run(
            command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=150, check=False
        )
    except subprocess.TimeoutExpired:
        return {"reason": "machine.py did not end within 150 seconds"}
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        return {"reason": f"machine.py ended with {done.returncode}: {done.stderr.strip()[-600:]}"}
    return dict(json.loads(lines[-1]))


# One stage.


def run_stage(
    name: str, parts: Sequence[Part], environment: Mapping[str, str], report: Report, ends: float
) -> dict[str, Any]:
    """Run the parts of a stage until `ends`; records the results in the report and returns them."""
    print(f"\n== {name}: at most {sum(part.seconds for part in parts):.0f} seconds", flush=True)
    began = time.monotonic()
    found: dict[str, Any] = {}
    stage = report.stages[name] = {"status": "running", "seconds": 0.0, "parts": found}
    for part in parts:
        left = ends - time.monotonic()
        if left < LEAST_SECONDS:
            found[part.name] = {"status": "skipped", "reason": "no time was left for it"}
        else:
            print(f"-- {name}/{part.name}", flush=True)

            def save(result: dict[str, Any], part: Part = part) -> None:
                found[part.name] = result
                report.write()

            save(run_part(name, part.within(left), environment, save))
        print(f"-- {name}/{part.name}: {summary(found[part.name])}", flush=True)
        stage["seconds"] = round(time.monotonic() - began, 1)
    states = [result["status"] for result in found.values()]
    stage["status"] = next((s for s in ("timed out", "failed", "passed") if s in states), "skipped")
    return stage


def run_part(
    stage: str,
    part: Part,
    environment: Mapping[str, str],
    save: Callable[[dict[str, Any]], None] = lambda result: None,
) -> dict[str, Any]:
    """Run one process within its limit, and gather the lines that it wrote, even if it was cut off.

    While the process runs, `save` is called with the results so far at intervals.
    """
    if part.needs and shutil.which(part.needs) is None:
        return {"status": "skipped", "reason": f"{part.needs} is not on the PATH"}
    log = SCRATCH / f"{stage}-{part.name}.jsonl"
    log.unlink(missing_ok=True)
    first = part.command[0]
    command = [*([sys.executable] if first.startswith("-") or first.endswith(".py") else []), *part.command]
    began = time.monotonic()
    variables = {**environment, **part.environment, "FASTDP_GPU_LOG": str(log)}
    if part.tests:  # take effect only before CUDA starts, and Keras may start CUDA before fastdp can set them
        variables.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")
        variables.setdefault("CUDA_MODULE_LOADING", "EAGER")
    # pytest_log.py skips tests that would start later than this, so that the part ends in time.
    variables["FASTDP_GPU_TEST_SECONDS"] = str(0.85 * part.seconds)

    def so_far() -> dict[str, Any]:
        seconds = round(time.monotonic() - began, 1)
        return {"status": "running", "seconds": seconds, **gathered(part, read_lines(log))}

    save(so_far())
    code, output = run_limited(command, variables, part.seconds, lambda: save(so_far()))
    result: dict[str, Any] = {"seconds": round(time.monotonic() - began, 1), "limit": part.seconds, "exit": code}
    if part.needs and any("Device not supported" in line for line in output):
        return {"status": "skipped", "reason": f"{part.needs} does not support this machine's GPU", **result}
    result.update(gathered(part, read_lines(log)))
    if part.tests:
        # pytest's exit status 5: no tests collected.
        failed = code not in (0, 5) or bool(result["failed"])
        nothing = "skipped" if not result["passed"] else "passed"
        result["status"] = "timed out" if code is None else "failed" if failed else nothing
    else:
        good = "passed" if result["measurements"] else "skipped"
        result["status"] = "timed out" if code is None else "failed" if code else good
    if result["status"] in ("failed", "timed out"):
        result["last_lines"] = output[-TAIL:]
    return result


def gathered(part: Part, lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The results that a part has written so far: counts of its tests, or the last measurement of each thing."""
    if part.tests:
        return count_tests(lines)
    return {
        "measurements": gpu_goals.latest(line for line in lines if "skipped" not in line),
        "skipped": [line for line in lines if "skipped" in line],
    }


def run_limited(
    command: Sequence[str],
    environment: Mapping[str, str],
    seconds: float,
    look: Callable[[], None] = lambda: None,
) -> tuple[int | None, list[str]]:
    """Run a command in its own process group, print its output as it comes, and call `look` at intervals.

    Returns: the exit status, None if the time limit ended the command, and the lines of its output.
    """
    output = SCRATCH / f"output-{os.getpid()}.txt"
    with output.open("wb") as file, output.open("rb") as shown:
        process = subprocess.Popen(
            list(command),
            env=dict(environment),
            cwd=ROOT,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        ends, code = time.monotonic() + seconds, None
        try:
            while code is None and time.monotonic() < ends:
                try:
                    code = process.wait(min(SAVE_SECONDS, max(0.0, ends - time.monotonic())))
                except subprocess.TimeoutExpired:
                    look()
                _show(shown.read())
        finally:
            _end(process)
        _show(shown.read())
    lines = output.read_text(encoding="utf-8", errors="replace").splitlines()
    output.unlink()
    return code, lines


def _show(data: bytes) -> None:
    """Print a part's output, with long lines cut: measurements are in the file."""
    for line in data.decode("utf-8", "replace").splitlines():
        print(line[:240], flush=True)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the remaining processes of a group, first with SIGTERM, so that CUDA frees its memory."""
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
    """The JSON objects of a file, one per line; an incomplete last line is ignored."""
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
    """Summarize the lines of pytest_log.py: counts, failures with their last lines, skips by reason."""
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


# Summaries.


def summary(part: Mapping[str, Any]) -> str:
    """A short summary of one part."""
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
    """The final table: one line per part, then the names of the failed tests."""
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


def status_of(stages: Mapping[str, Mapping[str, Any]]) -> int:
    """The exit status. 0: everything passed; 1: something failed; 2: nothing was checked."""
    states = {found["status"] for found in stages.values()}
    if states & {"failed", "timed out"}:
        return 1
    return 0 if "passed" in states else 2


if __name__ == "__main__":
    sys.exit(main())
