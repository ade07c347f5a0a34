"""The report of a parallel model: times by verb, memory, and the warning that the work is too small."""

from __future__ import annotations

import io
import json
import sys
import warnings

import numpy as np
import pytest

from fastdp import DataParallel, FunctionProgram
from fastdp.engine.make_report import SmallWorkWarning, make_report
from fastdp.engine.report import ENOUGH_STEPS
from fastdp.engine.timing import LATEST, VERBS, Timings, Watch
from fastdp.runtime.host.device import HostDevice


def watch(compute: list[float], *, before: float = 0.0, reduce: float = 0.0, update: float = 0.0) -> Watch:
    """A step of two devices whose parts took these seconds; the first updates, and copies in 1 s."""
    made = Watch([3, 2], 2)
    made.began = made.scattering = 100.0
    made.scattered = 100.0 + before
    made.compute_began = [made.scattered] * 2
    made.compute_ended = [made.scattered + seconds for seconds in compute]
    made.arrived = max(made.compute_ended)
    made.update_began[0] = made.arrived + reduce
    made.update_ended[0] = made.update_began[0] + update
    made.finished = made.update_ended[0] + 1.0
    return made


def timed(*watches: Watch) -> Timings:
    """Timings of steps that ended when their devices did."""
    timings = Timings()
    for one in watches:
        timings.add(one)
        one.ended = one.finished
    return timings


def test_the_seconds_of_a_step_add_up_by_verb():
    one = watch([5.0, 3.0], before=2.0, reduce=4.0, update=7.0)
    one.merging = [0.5, 0.0]
    assert one.seconds(0) == {
        "scatter": 2.0, "compute": 4.5, "merge": 0.5, "wait": 0.0, "communication": 5.0, "update": 7.0,
    }  # fmt: skip
    assert one.seconds(1) == {
        "scatter": 2.0, "compute": 3.0, "merge": 0.0, "wait": 2.0, "communication": 5.0, "update": 0.0,
    }  # fmt: skip
    assert sum(one.seconds(0).values()) == one.finished - one.began


def test_medians_are_of_the_latest_steps():
    timings = timed(*[watch([9.0, 9.0])] * 3, *[watch([1.0, 2.0]) for _ in range(LATEST)])
    assert (timings.timed, timings.steps) == (LATEST, LATEST + 3)
    assert [timings.device(rank).seconds["compute"] for rank in (0, 1)] == [1.0, 2.0]
    assert [timings.device(rank).rows for rank in (0, 1)] == [3, 2]
    assert timings.step == 3.0
    assert timings.overhead == 1.0


def engine(devices: int) -> DataParallel:
    """A least-squares program, not run yet."""

    def train(parameters, batch):
        error = batch[0] @ parameters["w"]
        return (error**2).mean(), {"w": 2 * batch[0].T @ error / len(error)}, [error]

    program = FunctionProgram(
        {"w": np.zeros(256)},
        train,
        lambda parameters, slots, gradients: ({"w": parameters["w"] - 0.1 * gradients["w"]}, {}),
        lambda parameters, batch: [batch[0] @ parameters["w"]],
    )
    return DataParallel(program, [HostDevice(index) for index in range(devices)])


@pytest.fixture
def three():
    made = engine(3)
    yield made
    for device in made.devices:
        device.close()


def test_steps_are_timed_on_every_device_and_predictions_are_not(three):
    for _ in range(4):
        three.train([np.ones((8, 256))])
    three.predict([np.ones((8, 256))])
    report = make_report(three, [])
    assert (report.trained, report.timed) == (4, 4)
    assert [device.rows for device in report.devices] == [3, 3, 2]
    for device in report.devices:
        assert set(device.seconds) == set(VERBS)
        assert all(seconds >= 0 for seconds in device.seconds.values())
        assert device.seconds["compute"] > 0
        assert sum(device.seconds.values()) <= 4 * report.step_seconds
    assert [device.seconds["update"] > 0 for device in report.devices] == [True, False, False]
    assert report.between_seconds > 0


def test_a_device_without_rows_has_no_times(three):
    three.train([np.ones((2, 256))])
    last = make_report(three, []).devices[2]
    assert (last.rows, set(last.seconds.values())) == (0, {0.0})


def test_a_failed_step_is_not_timed(three):
    three.train([np.ones((8, 256))])
    with pytest.raises(ValueError, match="matmul"):
        three.train([np.ones((8, 255))])
    assert make_report(three, []).trained == 1


def test_memory_is_that_of_the_buffers(three):
    devices = make_report(three, []).devices
    assert [device.nbytes["variables"] for device in devices] == [2048] * 3
    assert [device.nbytes["gradients"] for device in devices] == [2048] * 3
    assert [device.nbytes["spare"] for device in devices] == [2048, 0, 0]  # of the variables: there are no slots


def test_the_report_is_a_sequence_of_entries_and_goes_into_json(three):
    three.train([np.ones((8, 256))])
    entries = [{"how": "eager", "why": "compile=None"}]
    report = make_report(three, entries)
    assert (list(report), len(report), report[0]) == (entries, 1, entries[0])
    found = json.loads(json.dumps(report.to_dict()))
    assert found["steps"] == entries
    assert [device["rows"] for device in found["devices"]] == [3, 3, 2]


def test_printed_it_is_tables(three):
    assert "no step has run" in str(make_report(None, []))
    three.train([np.ones((8, 256))])
    lines = str(make_report(three, [{"how": "traced", "rows": 3, "why": "reasons"}])).splitlines()
    assert lines[0] == "fastdp: 3 devices, 1 training step."
    (header,) = [line for line in lines if "scatter" in line]
    assert header.split() == ["device", "rows", *VERBS]
    (row,) = [line for line in lines if line.split()[:2] == ["virtual:2", "2"]]
    assert all(float(cell) >= 0 for cell in row.split()[2:])
    assert any(line.split() == ["traced", "3", "reasons"] for line in lines)


def with_times(made: DataParallel, one: Watch, steps: int) -> DataParallel:
    made.times = timed(*[one] * steps)
    return made


@pytest.fixture
def two():
    made = engine(2)
    yield made
    for device in made.devices:
        device.close()


def test_work_that_is_too_small_is_warned_of_once_with_a_remedy(two):
    with_times(two, watch([0.5, 0.75]), ENOUGH_STEPS)  # 1 s of copies, to save the 0.5 s of one device
    once = SmallWorkWarning()
    with pytest.warns(
        UserWarning, match=r"batches of 5 rows: in a step, all but the slowest compute for 500\.00 ms.*1000\.00 ms"
    ):
        once.check(two)
    assert "larger batch_size" in make_report(two, []).too_small
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        once.check(two)


@pytest.mark.parametrize(("one", "steps"), [(watch([2.0, 2.0]), ENOUGH_STEPS), (watch([0.5, 0.5]), ENOUGH_STEPS - 1)])
def test_work_that_pays_or_is_not_known_yet_is_not_warned_of(two, one, steps):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SmallWorkWarning().check(with_times(two, one, steps))
    assert make_report(two, []).too_small == ""


def test_an_engine_of_functions_reports_itself(three):
    three.train([np.ones((8, 256))])
    report = three.report()
    assert list(report) == [{"how": "eager", "why": "functions run as they are"}]
    assert (report.trained, [device.rows for device in report.devices]) == (1, [3, 3, 2])
    assert str(three.report()).splitlines()[0] == "fastdp: 3 devices, 1 training step."


def test_the_line_has_devices_steps_times_and_how_they_run(two):
    with_times(two, watch([2.0, 3.0]), 4).times._between.clear()
    line = make_report(two, [{"how": "traced"}, {"how": "eager", "why": "last batch"}, {"how": "traced"}]).line
    assert line == (
        "fastdp: 2 devices, 4 training steps; 5 rows in 4000.00 ms, 0.00 ms between steps: 1 samples/s; "
        "traced, eager. More: report()."
    )
    assert make_report(None, []).line == "fastdp: no step has run yet."


def test_shown_it_is_text_in_a_pipe_a_table_in_a_terminal_and_html_in_a_notebook(two, monkeypatch, capsys):
    report = make_report(with_times(two, watch([2.0, 3.0]), 4), [{"how": "<b>", "why": "x < y & z"}])
    assert repr(report) == str(report)
    report.show()
    assert capsys.readouterr().out == f"{report}\n"
    page = report._repr_html_()
    assert "<b>" not in page
    assert "&lt;b&gt;" in page
    assert "x &lt; y &amp; z" in page
    rich = pytest.importorskip("rich.console")
    console = rich.Console(file=io.StringIO(), width=120, force_terminal=True)
    console.print(report)
    for words in ("traced in s", "virtual:0", "2000.00", "communication", "Memory of the model, MB"):
        assert (words in console.file.getvalue()) == (words != "traced in s")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(type(sys.stdout), "isatty", lambda self: True)
    assert "\x1b[" in repr(report)
    assert "\x1b[" not in str(report)
