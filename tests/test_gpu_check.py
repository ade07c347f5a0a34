"""The harness of `make gpu-check`, without a GPU: stages, limits, the JSON file, the table, the exit status."""

from __future__ import annotations

import json
import os
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))

import gpu_check
import scaling_model
from gpu_check import Part
from scaling_model import Link

BENCH = Path(__file__).parents[1] / "bench"

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
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(BENCH), str(BENCH.parent)])}


def planted(folder, *, sleep=0, skip="", seconds=60.0):
    file = folder / "test_planted.py"
    file.write_text(textwrap.dedent(TESTS.format(sleep=sleep, skip=skip)))
    command = ("-m", "pytest", "-q", "-c", str(folder / "none.ini"), "--rootdir", str(folder), "-p", "gpu_pytest_log")
    (folder / "none.ini").write_text("[pytest]\n")
    return Part("tests", (*command, str(file)), seconds)


def bench_part(name, program, seconds=30.0, **more):
    return Part(name, ("-c", program), seconds, tests=False, **more)


EMIT = "from gpu_card import emit; emit(what='copy', GBps=3.0); emit(skipped='jax', reason='not installed')"


def test_tests_are_counted_with_names_reasons_last_lines_and_measurements(scratch):
    result = gpu_check.run_part("kernels", planted(scratch), environment())
    assert (result["status"], result["passed"], result["failed"]) == ("failed", 2, 1)
    assert result["skipped"] == {"Skipped: no card here": 1}
    (failure,) = result["failures"]
    assert failure["test"].endswith("::test_bad")
    assert any("1 + 1" in line for line in failure["said"])
    assert [*result["measurements"].values()] == [{"GBps": 12.5}]
    assert any("1 failed, 2 passed, 1 skipped" in line for line in result["last_lines"])


def test_a_part_that_is_late_is_ended_and_what_it_found_counts(scratch):
    result = gpu_check.run_part("kernels", planted(scratch, sleep=600, seconds=8.0), environment())
    assert (result["status"], result["passed"], result["failed"], result["exit"]) == ("timed out", 1, 1, None)
    assert result["unfinished"][0].endswith("::test_late")
    assert "stopped in" in gpu_check.summary(result)


def test_what_a_late_part_started_is_ended_with_it(scratch):
    mark = scratch / "pid"
    program = f"""
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
open({str(mark)!r}, "w").write(str(child.pid))
time.sleep(600)
"""
    result = gpu_check.run_part("bench", bench_part("late", program, 3.0), environment())
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
    machine = {"gpus": list(gpus), "reason": "no driver"}
    monkeypatch.setattr(gpu_check, "describe_machine", lambda environment: machine)
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--results", str(folder / "results"), *arguments])
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
    lines = out[out.index("\nstage ") :].splitlines()
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
    nothing = (bench_part("parts", "from gpu_card import emit; emit(skipped='parts', reason='no card')"),)
    status, out = run_main(monkeypatch, capsys, scratch, {"bench": nothing})
    assert status == 2
    assert "No GPU: no driver" in out
    assert not (scratch / "results").exists()
    assert list(scratch.glob("gpu_none_*.json"))


def test_the_stages_stay_under_eight_minutes_and_name_files_that_exist():
    parts = [part for stage in gpu_check.STAGES.values() for part in stage]
    assert sum(part.seconds for part in parts) < 480
    files = [word for part in parts for word in part.command if word.endswith(".py") and "/" in word]
    assert len(files) >= 6
    for name in files:
        if not name.startswith(sys.prefix):
            assert (gpu_check.ROOT / name).is_file(), name


def test_the_machine_is_described_without_a_gpu():
    machine = gpu_check.describe_machine(environment())
    assert machine["versions"]["numpy"] == np.__version__
    assert machine["gpus"] or machine["reason"]


# The model of several GPUs.

FAST = Link(10e-6, 100e9, "made up")


def test_a_bucket_takes_its_latency_and_its_share_of_the_bandwidth():
    assert FAST.seconds(100_000_000, 1) == 0.0
    assert FAST.seconds(100_000_000, 2) == pytest.approx(10e-6 + 1e-3)
    assert FAST.seconds(100_000_000, 8) == pytest.approx(10e-6 + 1.75e-3)


def test_without_overlap_all_of_the_all_reduce_is_left():
    buckets = [50_000_000, 50_000_000]
    assert scaling_model.reduced_after(buckets, 1.0, 2, FAST, overlap=False) == pytest.approx(2 * 510e-6)
    assert scaling_model.reduced_after(buckets, 1.0, 1, FAST, overlap=True) == 0.0


def test_with_overlap_the_last_bucket_is_left_where_backward_is_long_and_all_where_it_is_short():
    buckets = [50_000_000, 50_000_000]
    assert scaling_model.reduced_after(buckets, 1.0, 2, FAST, overlap=True) == pytest.approx(510e-6)
    assert scaling_model.reduced_after(buckets, 0.0, 2, FAST, overlap=True) == pytest.approx(2 * 510e-6)
    # Half of backward is 100 us: the first ends at 610 us, the second at 1120, backward at 200.
    assert scaling_model.reduced_after(buckets, 200e-6, 2, FAST, overlap=True) == pytest.approx(920e-6)


def test_a_step_is_computing_or_the_host_whichever_is_longer_and_what_is_left():
    by_rows = {128: 8e-3, 64: 5e-3, 32: 3e-3, 16: 2e-3}
    step = lambda n, **more: scaling_model.step_seconds(by_rows, 128, n, [], FAST, **more)  # noqa: E731
    assert [step(n) for n in (1, 2, 4, 8)] == [8e-3, 5e-3, 3e-3, 2e-3]
    assert step(8, host=1e-3) == pytest.approx(8e-3)
    assert scaling_model.step_seconds(by_rows, 100, 3, [], FAST) == 5e-3  # 34 rows: measured for 64
    with pytest.raises(ValueError, match="expected a measurement of 256 rows or more"):
        scaling_model.step_seconds(by_rows, 256, 1, [])


def report_of(steps):
    lines = [
        {"what": "step", "model": "mlp", "way": way, "rows": rows, "milliseconds": {"median": ms}}
        for way, rows, ms in steps
    ]
    return {"stages": {"bench": {"parts": {"steps": {"measurements": lines}}}}}


def test_the_model_reads_a_results_file_and_says_that_it_is_a_model():
    steps = [("fastdp 1", 128, 4.0), ("fastdp 1, rows/2", 64, 3.0), ("fastdp 1, rows/4", 32, 2.0)]
    steps += [("fastdp 1, rows/8", 16, 1.5), ("fastdp 1, 1 row", 1, 1.0), ("fastdp 8", 128, 99.0)]
    found = scaling_model.predictions(report_of(steps), "mlp", 1000)
    assert found["what"] == "modelled, not measured"
    eight = found["as the engine is"]["8"]
    assert eight["bound_by_host"]
    assert eight["milliseconds"] == pytest.approx(8.04, abs=0.01)
    assert found["as the engine is"]["1"]["speedup"] == 1.0
    with pytest.raises(ValueError, match="run make gpu-check STAGE=bench"):
        scaling_model.predictions(report_of([]), "mlp", 1000)
