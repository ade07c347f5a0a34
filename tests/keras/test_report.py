"""`report()` of Keras and torch models, and where it is printed."""

from __future__ import annotations

import warnings

import keras
import numpy as np
import pytest
import torch

import fastdp
from fastdp.engine.report import ENOUGH_STEPS, Report


@pytest.fixture(autouse=True)
def two_devices():
    fastdp.set_virtual_devices(2)
    yield
    fastdp.set_virtual_devices(0)


def parallel(**options):
    model = keras.Sequential(
        [keras.layers.Input((8,)), keras.layers.Dense(4, activation="tanh"), keras.layers.Dense(1)]
    )
    made = fastdp.wrap(model, gpus=2, **options)
    made.compile("adam", "mse")
    return made


X, Y = np.ones((30, 8), np.float32), np.ones((30, 1), np.float32)


def test_before_the_first_step_there_are_no_devices():
    report = parallel().report()
    assert isinstance(report, Report)
    assert list(report) == [{"how": "eager", "why": "no step yet"}]
    assert report.line == "fastdp: no step has run yet."
    assert report.devices == []
    assert "no step has run yet" in str(report)


def test_after_fit_it_tells_steps_memory_and_how_the_optimizer_runs():
    made = parallel(compile="trace")
    made.fit(X, Y, batch_size=10, epochs=2, verbose=0)
    report = made.report()
    assert report.trained == 6
    assert [entry["how"] for entry in report] == ["traced"]
    assert [device.rows for device in report.devices] == [5, 5]
    numbers = 8 * 4 + 4 + 4 * 1 + 1
    for device in report.devices:
        assert device.nbytes["variables"] >= 4 * numbers
        assert device.nbytes["gradients"] >= 4 * numbers
    assert report.devices[0].nbytes["slots"] >= 2 * 4 * numbers  # Adam's
    assert report.optimizer == made.engine.program.update_how
    assert report.optimizer in str(report)
    assert report.to_dict()["update"] == "first"
    assert report.peak_nbytes is None or report.peak_nbytes > 1e7


@pytest.mark.parametrize(("verbose", "times"), [(2, 1), (1, 0), (0, 0)])
def test_fit_prints_one_line_of_it_at_the_end_with_verbose_2(capsys, verbose, times):
    made = parallel()
    made.fit(X, Y, batch_size=10, epochs=3, verbose=verbose)
    lines = capsys.readouterr().out.splitlines()
    found = [line for line in lines if "fastdp" in line]
    assert found == [made.report().line] * times
    if times:
        assert lines[-1].startswith("fastdp: 2 devices, 9 training steps; 10 rows in ")
        assert "samples/s" in lines[-1]
        assert "eager" in lines[-1]


def test_an_engine_reports_itself_with_why_its_steps_are_eager():
    made = parallel(compile=None)
    made.fit(X, Y, batch_size=10, verbose=0)
    assert list(made.engine.report()) == list(made.report()) == [{"how": "eager", "why": "compile=None"}]
    assert made.engine.report().trained == 3


def test_fit_warns_once_of_work_that_is_too_small(monkeypatch):
    made = parallel()
    made.fit(X, Y, batch_size=10, verbose=0)
    monkeypatch.setattr(type(made.engine.times), "overhead", 1e3)
    monkeypatch.setattr(type(made.engine.times), "timed", ENOUGH_STEPS)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        for _ in range(2):
            made.fit(X, Y, batch_size=10, verbose=0)
    (said,) = [one for one in found if one.category is UserWarning]
    assert "2 devices are slower than one would be on batches of 10 rows" in str(said.message)
    assert said.filename == __file__


def test_a_torch_model_has_one_too():
    dp = fastdp.wrap(torch.nn.Linear(8, 1), gpus=2)
    assert dp.report().devices == []
    step = dp.train_step(torch.nn.MSELoss(), torch.optim.Adam)
    for _ in range(3):
        step(torch.ones(6, 8), torch.ones(6, 1))
    report = dp.report()
    assert report.trained == 3
    assert [device.rows for device in report.devices] == [3, 3]
    assert [entry["how"] for entry in report] == ["eager"]
