"""`fastdp bench` from end to end: models of the user's own, data from a file, what comes out, and wrong use."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import h5py
import keras  # noqa: F401  the commands need it: names the need, so that this file is left out without it
import numpy as np
import pytest

from fastdp.benchmark.result import check, load
from fastdp.cli import main

QUICK = ("--rounds", "2", "--seconds", "0.05")
MODULE = """
from torch import nn
def make_model():
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
"""
WRONG = """
def fails():
    raise RuntimeError("no weights here")
def other():
    return 7
"""


@pytest.fixture
def bench(tmp_path):
    """`fastdp bench` in a process of its own, in a folder with the user's files."""
    (tmp_path / "my_file.py").write_text(MODULE)
    (tmp_path / "wrong.py").write_text(WRONG)

    def run(*arguments: str, timeout: float = 200.0):
        return subprocess.run(
            [sys.executable, "-m", "fastdp", "bench", *arguments],
            cwd=tmp_path,
            env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    return run


@pytest.mark.slow
def test_a_module_of_the_user_on_two_devices_and_plain_with_data_from_a_file(bench, tmp_path):
    with h5py.File(tmp_path / "d.h5", "w") as file:
        file["x"], file["y"] = np.ones((20, 6), np.float32), np.arange(20) % 3
    line = ("my_file.py:make_model", "--virtual", "2", "--batch", "8", "--mode", "eager", "--data", "d.h5")
    done = bench(*line, "--compare", "torch", *QUICK, "--output", "out", "--profile", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    check(result, "the output")
    assert load(tmp_path / "out") == result
    assert (tmp_path / "out" / "report.html").read_text("utf-8").startswith("<!doctype html>")
    names = [entry["name"] for entry in result["entries"]]
    assert names == ["fastdp torch, 2 devices, eager", "torch, 1 device, eager"]
    assert result["target"]["parameters"] == 6 * 8 + 8 + 8 * 3 + 3
    assert result["command"][:3] == ["fastdp", "bench", "my_file.py:make_model"]
    two, plain = result["entries"]
    assert [device["rows"] for device in two["verbs"]] == [4, 4]
    assert [len(entry["samples_per_second"]["rounds"]) for entry in result["entries"]] == [2, 2]
    assert plain["trace"] is None
    events = json.loads((tmp_path / "out" / two["trace"]).read_text("utf-8"))
    assert events["traceEvents"]


@pytest.mark.slow
def test_a_keras_model_with_a_way_that_cannot_train_it(bench):
    done = bench("mlp:width=8", "--batch", "4", "--mode", "traced", "--compare", "keras-tensorflow", *QUICK)
    assert done.returncode == 1, done.stderr  # nothing to compare with
    lines = done.stdout.splitlines()
    assert "fastdp, 1 device, traced: round 2 of 2" in done.stdout
    assert any(line.startswith("Keras TF, 1 device: failed: not installed here") for line in lines)


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("wrong.py:fails", "RuntimeError: no weights here"),
        (
            "wrong.py:other",
            "must return a keras.Model or a torch.nn.Module, or a pair of it and a loss. Received: int",
        ),
        ("wrong.py:absent", "has no function 'absent'. It has: fails, other"),
    ],
)
def test_a_function_that_makes_no_model_is_a_failure_with_its_reason(bench, target, said):
    done = bench(target)
    assert done.returncode == 1
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (["no_such_model"], "neither a built-in model"),
        (["mlp:depth=3"], "mlp has no size 'depth'"),
        (["mlp", "cnn"], "one model at a time: mlp. Received also: cnn"),
        (["mlp", "--mode", "graph"], "none without GPUs"),
        (["report", "no.json"], "cannot read no.json"),
    ],
)
def test_wrong_use_is_told_in_one_line(line, said, capsys, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert main(["bench", *line]) == 2
    output = capsys.readouterr()
    assert output.err.startswith("fastdp bench: ")
    assert said in output.err
    assert output.out == ""


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--batch", "0"),
        ("--rounds", "many"),
        ("--rounds", "1000000"),
        ("--seconds", "-1"),
        ("--seconds", "1e20"),
        ("--timeout", "1e20"),
        ("--precision", "int8"),
        ("--framework", "jax"),
    ],
)
def test_values_out_of_range_are_usage_errors(option, value, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["bench", "mlp", option, value])
    assert option in capsys.readouterr().err


def test_a_place_where_no_result_can_be_written_is_told_before_anything_is_measured(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("fastdp.cli.bench.measure", lambda *_: pytest.fail("it was measured"))
    taken = tmp_path / "taken"
    taken.write_text("a file")
    assert main(["bench", "mlp", "--virtual", "1", "--output", str(taken)]) == 2
    said = capsys.readouterr().err
    assert "argument --output: must be a folder that can be written to" in said
    assert str(taken) in said
