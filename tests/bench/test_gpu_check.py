"""The harness of `make gpu-check`, without a GPU: stages, limits, the JSON file, the table, the exit status."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))

from bench.gpu import check as gpu_check
from bench.gpu import stages as gpu_stages
from bench.gpu.cases import CASES
from bench.gpu.check import Part

BENCH = Path(__file__).parents[2] / "bench"

TESTS = """
import pytest
{skip}
def test_good(record_property):
    record_property("GBps", 12.5)
def test_bad():
    assert 1 + 1 == 3
def test_left_out():
    pytest.skip("no card here")
def test_late():
    import time
    time.sleep({sleep})
"""


@pytest.fixture
def scratch(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "SCRATCH", tmp_path)
    return tmp_path


def environment():
    """A process finds the checkout; its pytest loads no plugin but the one that is asked for."""
    return {**os.environ, "PYTHONPATH": str(BENCH.parent), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}


@pytest.fixture
def time_is_over_once(monkeypatch):
    """`time_is_over_once(seen)`: a part's time is over when `seen()` is true, and it has all the time until then."""

    def start(seen):
        def monotonic():
            return time.monotonic() + (1e6 if seen() else 0.0)

        monkeypatch.setattr(gpu_check, "SAVE_SECONDS", 0.05)
        monkeypatch.setattr(gpu_check, "time", SimpleNamespace(monotonic=monotonic, strftime=time.strftime))

    return start


def planted(folder, *, sleep=0, skip="", seconds=60.0):
    file = folder / "test_planted.py"
    file.write_text(textwrap.dedent(TESTS.format(sleep=sleep, skip=skip)))
    command = (
        "-m",
        "pytest",
        "-q",
        "-c",
        str(folder / "none.ini"),
        "--rootdir",
        str(folder),
        "-p",
        "bench.gpu.pytest_log",
    )
    (folder / "none.ini").write_text("[pytest]\n")
    return Part("tests", (*command, str(file)), seconds)


def bench_part(name, program, seconds=30.0, **more):
    return Part(name, ("-c", program), seconds, tests=False, **more)


EMIT = "from bench.gpu.card import emit; emit(what='copy', GBps=3.0); emit(skipped='jax', reason='not installed')"


def test_tests_are_counted_with_names_reasons_last_lines_and_measurements(scratch):
    result = gpu_check.run_part("kernels", planted(scratch), environment())
    assert (result["status"], result["passed"], result["failed"]) == ("failed", 2, 1)
    assert result["skipped"] == {"Skipped: no card here": 1}
    (failure,) = result["failures"]
    assert failure["test"].endswith("::test_bad")
    assert any("1 + 1" in line for line in failure["said"])
    assert [*result["measurements"].values()] == [{"GBps": 12.5}]
    assert any("1 failed, 2 passed, 1 skipped" in line for line in result["last_lines"])


def test_a_part_that_is_late_is_ended_and_what_it_found_counts(scratch, time_is_over_once):
    log = scratch / "kernels-tests.jsonl"
    time_is_over_once(lambda: any("test_late" in line["test"] for line in gpu_check.read_lines(log)))
    result = gpu_check.run_part("kernels", planted(scratch, sleep=600), environment())
    assert (result["status"], result["passed"], result["failed"], result["exit"]) == ("timed out", 1, 1, None)
    assert result["unfinished"][0].endswith("::test_late")
    assert "stopped in" in gpu_check.summary(result)


def test_what_a_late_part_started_is_ended_with_it(scratch, time_is_over_once):
    mark = scratch / "pid"
    time_is_over_once(lambda: mark.exists() and mark.read_text())
    program = f"""
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
open({str(mark)!r}, "w").write(str(child.pid))
time.sleep(600)
"""
    result = gpu_check.run_part("bench", bench_part("late", program, 60.0), environment())
    assert result["status"] == "timed out"
    deadline = time.monotonic() + 20
    while alive(mark.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(mark.read_text())


def alive(pid):
    """Whether a process runs; one that ended and that nobody waited for does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_a_test_file_that_cannot_be_imported_fails(scratch):
    result = gpu_check.run_part("kernels", planted(scratch, skip="import no_such_module"), environment())
    assert result["status"] == "failed"
    assert "no_such_module" in str(result["failures"])


def test_tests_that_were_all_skipped_prove_nothing(scratch):
    skip = "pytestmark = pytest.mark.skip(reason='needs 1 GPU(s): no GPU')"
    result = gpu_check.run_part("kernels", planted(scratch, skip=skip), environment())
    assert result["status"] == "skipped"
    assert "4 skipped: Skipped: needs 1 GPU(s): no GPU" in gpu_check.summary(result)


def test_measurements_and_what_was_left_out(scratch):
    result = gpu_check.run_part("bench", bench_part("parts", EMIT), environment())
    assert result["status"] == "passed"
    assert result["measurements"] == [{"what": "copy", "GBps": 3.0}]
    assert result["skipped"] == [{"skipped": "jax", "reason": "not installed"}]
    crashed = gpu_check.run_part("bench", bench_part("parts", EMIT + "; raise SystemExit('broken')"), environment())
    assert (crashed["status"], crashed["exit"], len(crashed["measurements"])) == ("failed", 1, 1)
    assert crashed["last_lines"][-1] == "broken"


def test_a_program_that_is_missing_skips_its_part(scratch):
    result = gpu_check.run_part("kernels", bench_part("memcheck", EMIT, needs="no-such-sanitizer"), environment())
    assert result == {"status": "skipped", "reason": "no-such-sanitizer is not on the PATH"}


def run_main(monkeypatch, capsys, folder, stages, *arguments, gpus=()):
    monkeypatch.setattr(gpu_check, "STAGES", stages)
    monkeypatch.setattr(gpu_check, "DEFAULT", tuple(stages))
    monkeypatch.setattr(gpu_check.signal, "signal", lambda *given: None)
    machine = {"gpus": list(gpus), "reason": "no driver"}
    monkeypatch.setattr(gpu_check, "describe_machine", lambda environment: machine)
    monkeypatch.setattr(sys, "argv", ["check.py", "--results", str(folder / "results"), *arguments])
    status = gpu_check.main()
    return status, capsys.readouterr().out


GOOD = (bench_part("parts", EMIT),)
BAD = (bench_part("parts", "raise SystemExit(3)"), bench_part("more", EMIT))


def test_a_failing_stage_does_not_keep_the_next_from_running(scratch, monkeypatch, capsys):
    card = {"name": "NVIDIA H100 80GB HBM3"}
    status, out = run_main(monkeypatch, capsys, scratch, {"kernels": BAD, "bench": GOOD}, gpus=[card])
    assert status == 1
    (path,) = (scratch / "results").glob("*.json")
    assert path.name.startswith("gpu_nvidia-h100-80gb-hbm3_20")
    report = json.loads(path.read_text())
    assert report["machine"]["gpus"] == [card]
    assert {name: stage["status"] for name, stage in report["stages"].items()} == {
        "kernels": "failed",
        "bench": "passed",
    }
    assert report["stages"]["kernels"]["parts"]["more"]["status"] == "passed"
    lines = out[out.index("\nstage ") : out.index("\ngoal ")].splitlines()
    assert [line.split()[:2] for line in lines if "/" in line and "Wrote" not in line] == [
        ["kernels/parts", "failed"],
        ["kernels/more", "passed"],
        ["bench/parts", "passed"],
    ]


def test_stages_are_chosen_by_name(scratch, monkeypatch, capsys):
    stages = {"kernels": BAD, "bench": GOOD}
    status, out = run_main(monkeypatch, capsys, scratch, stages, "--stage", "bench", gpus=[{"name": "card"}])
    assert status == 0
    assert "kernels" not in out
    with pytest.raises(SystemExit):
        run_main(monkeypatch, capsys, scratch, stages, "--stage", "bensch")
    assert "expected some of kernels, bench. Received: bensch" in capsys.readouterr().err


def test_without_a_gpu_nothing_is_proven_and_nothing_goes_among_the_results(scratch, monkeypatch, capsys):
    nothing = (bench_part("parts", "from bench.gpu.card import emit; emit(skipped='parts', reason='no card')"),)
    status, out = run_main(monkeypatch, capsys, scratch, {"bench": nothing})
    assert status == 2
    assert "No GPU: no driver" in out
    assert not (scratch / "results").exists()
    assert list(scratch.glob("gpu_none_*.json"))


def test_the_stages_that_run_by_default_stay_under_eight_minutes_and_each_fits_a_run_of_ten():
    default = [part for name in gpu_stages.DEFAULT for part in gpu_stages.STAGES[name]]
    assert sum(part.seconds for part in default) < 480
    for name, parts in gpu_stages.STAGES.items():
        assert sum(part.seconds for part in parts) < 600, name


def test_stages_name_files_and_cases_that_exist():
    parts = [part for stage in gpu_stages.STAGES.values() for part in stage]
    files = [word for part in parts for word in part.command if word.endswith(".py") and "/" in word]
    assert len(files) >= 6
    for name in files:
        if not name.startswith(sys.prefix):
            assert (gpu_check.ROOT / name).is_file(), name
    measured = {word for part in parts for word in part.command if word in CASES}
    assert measured == {name for name in CASES if not name.startswith("tiny-")}


def names_of(path):
    """What a module defines or imports at its top, and the modules beside a package's __init__.py."""
    found = {one.stem for one in path.parent.iterdir()} if path.name == "__init__.py" else set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            found.update(alias.asname or alias.name for alias in node.names)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
    return found


def test_what_runs_on_a_gpu_alone_imports_names_that_exist():
    """Those files are imported here in part only, and an import inside a test would first fail on a card."""
    missing, seen = [], 0
    for file in [*gpu_check.ROOT.glob("tests/gpu/*.py"), *gpu_check.ROOT.glob("bench/gpu/*.py")]:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not (isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "fastdp"):
                continue
            stem = gpu_check.ROOT / node.module.replace(".", "/")
            module = stem / "__init__.py" if stem.is_dir() else stem.with_suffix(".py")
            names = names_of(module) if module.exists() else set()
            missing += [f"{file.name}: {node.module}.{one.name}" for one in node.names if one.name not in names]
            seen += 1
    assert seen > 20
    assert missing == []


def test_the_page_names_every_stage_with_its_limit():
    text = (gpu_check.ROOT / "docs" / "hardware.md").read_text(encoding="utf-8")
    for name, parts in gpu_stages.STAGES.items():
        (row,) = [line for line in text.splitlines() if line.startswith(f"| `{name}` |")]
        assert f"| {sum(part.seconds for part in parts):.0f} s |" in row
        assert row.endswith("| yes |") == (name in gpu_stages.DEFAULT)


def test_a_benchmark_plans_to_be_over_before_its_limit():
    part = Part("steps", ("bench/gpu/steps.py", "--seconds", "{seconds}"), 100, tests=False)
    assert part.within(300).command[-1] == "92.0"
    assert part.within(300).seconds == 100
    assert (part.within(40).seconds, part.within(40).command[-1]) == (40, "32.0")


LATE = """
import time
from bench.gpu.card import emit
emit(what="copy", GBps=3.0)
time.sleep(600)
"""


def test_what_a_run_has_found_is_in_the_file_while_it_still_runs(scratch, monkeypatch, capsys, time_is_over_once):
    seen = []
    time_is_over_once(lambda: any(one["status"] == "running" and one["measurements"] for one in seen))
    write = gpu_check.Report.write

    def noted(report):
        path = write(report)
        seen.append(json.loads(path.read_text())["stages"]["bench"]["parts"]["late"])
        return path

    monkeypatch.setattr(gpu_check.Report, "write", noted)
    stages = {"bench": (bench_part("late", LATE, 60.0),)}
    status, _ = run_main(monkeypatch, capsys, scratch, stages, gpus=[{"name": "card"}])
    assert status == 1
    running = [one for one in seen if one["status"] == "running"]
    assert [{"what": "copy", "GBps": 3.0}] in [one["measurements"] for one in running]
    assert seen[-1]["status"] == "timed out"
    assert seen[-1]["measurements"] == [{"what": "copy", "GBps": 3.0}]


def test_parts_that_come_too_late_for_the_whole_run_are_left_out(scratch, monkeypatch, capsys):
    stages = {"kernels": GOOD, "bench": GOOD}
    status, out = run_main(monkeypatch, capsys, scratch, stages, "--seconds", "5", gpus=[{"name": "card"}])
    assert status == 2
    assert out.count("no time was left for it") == 4  # as each comes, and in the table


def test_a_run_that_is_ended_ends_what_it_started_and_leaves_its_file(scratch):
    mark = scratch / "pid"
    program = f"""
import os, sys
sys.path.insert(0, {str(BENCH.parent)!r})
from pathlib import Path
from bench.gpu import check as gpu_check
from bench.gpu.stages import Part
late = "import os, time; open({str(mark)!r}, 'w').write(str(os.getpid())); time.sleep(600)"
gpu_check.SCRATCH = Path({str(scratch)!r})
gpu_check.STAGES = {{"bench": (Part("late", ("-c", late), 500.0, tests=False),)}}
gpu_check.DEFAULT = ("bench",)
gpu_check.describe_machine = lambda environment: {{"gpus": [{{"name": "card"}}]}}
sys.argv = ["check.py", "--results", {str(scratch / "results")!r}]
sys.exit(gpu_check.main())
"""
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (mark.exists() and mark.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.terminate()
    assert process.wait(30) == 143
    assert not alive(mark.read_text())
    (path,) = (scratch / "results").glob("*.json")
    assert json.loads(path.read_text())["stages"]["bench"]["parts"]["late"]["status"] == "running"


def test_tests_that_would_begin_too_late_are_skipped_and_the_run_ends_by_itself(scratch):
    file = scratch / "test_late.py"
    first = "def test_first(): pytest_log._began -= 1000.0"  # as if it took so long
    file.write_text(f"from bench.gpu import pytest_log\n{first}\ndef test_second(): raise AssertionError\n")
    command = planted(scratch).command[:-1]
    environment_ = {**environment(), "FASTDP_GPU_TEST_SECONDS": "500", "FASTDP_GPU_LOG": str(scratch / "log")}
    subprocess.run([sys.executable, *command, str(file)], env=environment_, check=True, timeout=60, cwd=scratch)
    found = gpu_check.count_tests(gpu_check.read_lines(scratch / "log"))
    assert (found["passed"], found["failed"], found["skipped"]) == (1, 0, {"Skipped: no time was left for it": 1})


def test_only_what_is_missing_is_installed_from_wheels(scratch, monkeypatch):
    asked = []
    monkeypatch.setattr(gpu_check, "WHEELS", scratch / "wheels")

    def run(command, check):
        asked.append(command)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(gpu_check.subprocess, "run", run)
    lacking = {"optree", "absl"}
    monkeypatch.setattr(gpu_check.importlib.util, "find_spec", lambda name: None if name in lacking else object())
    assert gpu_check.install_wheels(scratch) == scratch / "wheels"
    assert asked[0][-2:] == ["absl-py", "optree"]
    assert not {"keras", "rich"} & set(asked[0])
    monkeypatch.setattr(gpu_check.importlib.util, "find_spec", lambda name: object())
    assert gpu_check.install_wheels(scratch) is None
    assert len(asked) == 1


@pytest.mark.skipif(importlib.util.find_spec("keras") is None, reason="Keras is not installed")
def test_all_that_keras_imports_comes_from_the_wheels():
    """As its wheel has it, less what torch, CuPy and fastdp need themselves."""
    needed = {re.split(r"[^\w-]", line)[0] for line in importlib.metadata.requires("keras")}
    theirs = {"numpy", "h5py", "packaging"}
    assert {name.replace("-", "_") for name in needed - theirs} <= {n.replace("-", "_") for n in gpu_check.FROM_WHEELS}


def test_a_wheel_that_is_missing_leaves_out_keras_and_nothing_else(scratch, monkeypatch, capfd):
    monkeypatch.setattr(gpu_check, "WHEELS", scratch / "wheels")
    monkeypatch.setattr(gpu_check.importlib.util, "find_spec", lambda name: None if name == "optree" else object())
    assert gpu_check.install_wheels(scratch / "nothing here") is None
    assert "Without Keras" in capfd.readouterr().out


def test_the_machine_is_described_without_a_gpu():
    machine = gpu_check.describe_machine(environment())
    assert machine["versions"]["numpy"] == np.__version__
    assert machine["gpus"] or machine["reason"]
    assert machine["pcie_generation"] is None or machine["pcie_generation"] > 0


def test_files_without_git_get_their_commit_from_the_environment(tmp_path):
    program = "from bench import report\nfrom bench.gpu import machine as gpu_machine\n"
    program += "report._commit = lambda: 'unknown'; print(gpu_machine._of_result_line()['commit'])"
    for given, want in (({}, "unknown"), ({"FASTDP_COMMIT": "abc1234"}, "abc1234")):
        how = {"cwd": tmp_path, "capture_output": True, "text": True, "timeout": 60}
        done = subprocess.run([sys.executable, "-c", program], env={**environment(), **given}, check=True, **how)
        assert done.stdout.strip() == want
