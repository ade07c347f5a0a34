"""`fastdp run --restarts`: a script that fails is started again in a new process, and ends for good when told to."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

SCRIPT = """
import os, signal, sys, time
folder, how = sys.argv[1:]
start = len(os.listdir(folder))
open(os.path.join(folder, str(start)), "w").close()
print("start", start, flush=True)
assert not [name for name in os.environ if "SUPERVISOR" in name]
if how == "wait":
    time.sleep(60)
if start == 0:
    os.kill(os.getpid(), signal.SIGKILL)
if start == 1 or how == "always":
    raise RuntimeError("CUDA error: an illegal memory access")
sys.exit(int(how))
"""


def command(tmp_path, restarts, how):
    script, folder = tmp_path / "train.py", tmp_path / "starts"
    script.write_text(SCRIPT)
    folder.mkdir()
    given = ["run", "--virtual", "2", "--restarts", str(restarts), str(script), str(folder), how]
    return [sys.executable, "-m", "fastdp", *given]


@pytest.mark.parametrize(
    ("how", "restarts", "starts", "status"),
    [("0", 3, 3, 0), ("2", 3, 3, 2), ("130", 3, 3, 130), ("always", 2, 3, 1), ("0", 0, 1, -9)],
)
def test_a_script_is_started_again_until_it_ends_well_or_for_good(tmp_path, how, restarts, starts, status):
    done = subprocess.run(command(tmp_path, restarts, how), capture_output=True, text=True, timeout=90, check=False)
    assert done.stdout.split() == [word for n in range(starts) for word in ("start", str(n))]
    assert done.returncode == status
    if restarts:
        assert "ended with status 137; it is started again (1 of " in done.stderr
        assert "ended with status 1; it is started again (2 of " in done.stderr
    if how == "always":
        assert "ended with status 1, after 2 restarts." in done.stderr


def test_sigterm_ends_the_script_and_no_other_is_started(tmp_path):
    process = subprocess.Popen(command(tmp_path, 3, "wait"), stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "start 0\n"
        time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 143
        assert os.listdir(tmp_path / "starts") == ["0"]
    finally:
        process.kill()
        process.communicate()


def test_a_number_that_is_none_is_refused(tmp_path):
    done = subprocess.run(command(tmp_path, -1, "0"), capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "argument --restarts: must be a whole number from 0 to 1000" in done.stderr
