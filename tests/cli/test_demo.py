"""The demo: N devices learn the same as one, and what it writes needs no fastdp."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import h5py
import keras
import numpy as np
import pytest
import sklearn  # noqa: F401  the demo's data; names the need, so that this file is left out without it

from fastdp.cli import demo as cli_demo
from fastdp.cli.demo import training
from fastdp.cli.demo.training import Run

TOO_FEW_EPOCHS = 2


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> tuple[subprocess.CompletedProcess[str], Path]:
    """One short run for programs, and its folder: too short to reach the accuracy of a whole one."""
    folder = tmp_path_factory.mktemp("demo") / "new" / "folder"
    arguments = [
        "demo",
        "--devices",
        "3",
        "--epochs",
        str(TOO_FEW_EPOCHS),
        "--batch-size",
        "100",
        "--out",
        str(folder),
        "--json",
    ]
    environment = {name: value for name, value in os.environ.items() if name != "FASTDP_VIRTUAL_DEVICES"}
    done = subprocess.run(
        [sys.executable, "-m", "fastdp", *arguments],
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert "Traceback" not in done.stderr
    return done, folder


@pytest.fixture(scope="module")
def result(demo) -> dict:
    assert demo[0].stdout.count("\n") == 1
    return json.loads(demo[0].stdout)


def test_the_only_line_is_json_with_the_result(result, demo):
    assert set(result) == {
        *("accuracy", "max_loss_difference", "samples_per_second", "devices", "versions", "seconds"),
        *("folder", "files", "problems"),
    }
    assert result["folder"] == str(demo[1])
    assert result["files"] == ["digits_data.h5", "digits.keras", "digits.h5", "curves.png"]
    assert result["devices"] == ["virtual:0", "virtual:1", "virtual:2"]
    assert set(result["samples_per_second"]) == {"1", "3"}
    assert min(result["samples_per_second"].values()) > 0
    assert result["versions"]["keras"] == keras.__version__


def test_three_devices_learn_with_the_losses_of_one(result):
    assert 0 <= result["max_loss_difference"] <= 1e-4
    assert result["accuracy"] > 0.3  # a guess is right one time in ten


def test_few_epochs_are_no_failure(demo, result):
    done, _ = demo
    assert result["accuracy"] < 0.97
    assert (done.returncode, result["problems"]) == (0, [])
    assert "The accuracy is not judged: 10 epochs" in done.stderr


def test_no_library_warns_in_between(demo):
    assert "WARNING" not in demo[0].stderr
    assert "warn" not in demo[0].stderr.lower()


def runs_with(accuracy: float) -> list[Run]:
    return [Run(None, {"loss": [1.0] * 10}, accuracy, 1.0, [], "") for _ in range(2)]


def test_too_low_an_accuracy_after_enough_epochs_is_a_problem():
    (problem,) = cli_demo._check(runs_with(0.96), judged=True)
    assert problem == "test accuracy is 0.9600 after 10 epochs, expected at least 0.97."
    assert len(cli_demo._check(runs_with(float("nan")), judged=True)) == 1
    assert cli_demo._check(runs_with(0.96), judged=False) == cli_demo._check(runs_with(0.97), judged=True) == []


def test_losses_that_differ_are_a_problem_however_few_the_epochs():
    runs = runs_with(0.99)
    runs[0].history["loss"][3] = 1.001
    (problem,) = cli_demo._check(runs, judged=False)
    assert problem.startswith("the training losses of the runs differ by 1.0e-03")


def test_the_speed_is_that_of_the_later_half_of_the_steps():
    """The first steps trace and compile: 400 times slower here."""
    clock = training._clock(4)
    clock.set_model(SimpleNamespace(engine=SimpleNamespace(times=SimpleNamespace(latest_work=[0.1]))))
    now = iter([0.0, 4.0, 8.0, 8.01, 8.02, 99.0])  # the last batch is short, and left out
    clock.on_train_begin()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training.time, "perf_counter", lambda: next(now))
        clock.on_epoch_begin(0)
        for batch in range(5):
            clock.on_train_batch_end(batch)
    assert clock.seconds == pytest.approx([4.0, 4.0, 0.01, 0.01])
    assert training.warm_speed(64, clock.seconds) == pytest.approx(6400)


def test_the_table_names_the_rows_of_each_device(demo):
    lines = [line for line in demo[0].stderr.splitlines() if "3 devices" in line and "virtual:" in line]
    assert [line.split("│")[3].strip() for line in lines] == ["34", "33", "33"]


def test_the_data_file_holds_all_digits(demo):
    with h5py.File(demo[1] / "digits_data.h5") as file:
        assert file["x"].shape == (1797, 8, 8, 1)
        assert file["x"].dtype == np.uint8
        assert np.bincount(file["y"][:]).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]


@pytest.mark.parametrize("name", ["digits.keras", "digits.h5"])
def test_the_files_load_in_plain_keras_with_the_accuracy_of_the_run(demo, result, name):
    with h5py.File(demo[1] / "digits_data.h5") as file:
        x, y = file["x"][1500:] / np.float32(16), file["y"][1500:]
    model = keras.models.load_model(demo[1] / name)
    assert type(model) is keras.Sequential
    found = (model.predict(x, verbose=0).argmax(axis=1) == y).mean()
    assert found == pytest.approx(result["accuracy"], abs=1e-4)


def test_the_files_hold_the_optimizer_of_the_run(demo):
    optimizer = keras.models.load_model(demo[1] / "digits.keras").optimizer
    assert isinstance(optimizer, keras.optimizers.SGD)
    assert int(optimizer.iterations) == TOO_FEW_EPOCHS * 15
    assert any(np.any(np.asarray(momentum)) for momentum in optimizer.momentums)


def test_the_curves_are_a_picture(demo):
    assert (demo[1] / "curves.png").read_bytes().startswith(b"\x89PNG\r\n")
