"""`fastdp.progress`: the items stay as they are, and the bar tells rates and closes however the loop ends."""

from __future__ import annotations

import io
import re
import sys

import numpy as np
import pytest

import fastdp
from fastdp import DataParallel, FunctionProgram
from fastdp.monitoring import rich_bars
from fastdp.monitoring.progress import rows_of
from fastdp.runtime.host.device import HostDevice

LINE = re.compile(r"(?P<name>[\w ]+: )?(?P<steps>\d+)(/(?P<total>\d+))? steps, (?P<rates>.+)")


def batches(count=3, rows=4):
    return [(np.full((rows, 2), number), np.zeros(rows)) for number in range(count)]


def last_line(capsys):
    return LINE.fullmatch(capsys.readouterr().err.splitlines()[-1])


def test_the_items_are_the_loaders_own(capsys):
    loader = batches()
    seen = list(fastdp.progress(loader))
    assert len(seen) == 3
    assert all(one is other for one, other in zip(seen, loader, strict=True))
    found = last_line(capsys)
    assert (found["steps"], found["total"]) == ("3", "3")
    assert re.search(r"[\d,]+ samples/s, input wait \d+%, [\d,]+ MB, 0:00:0\d in all$", found["rates"])


@pytest.mark.parametrize("total", [None, 3])
def test_a_loader_without_a_length_is_fine(capsys, total):
    bar = fastdp.progress((number for number in range(3)), total=total, description="one epoch")
    assert list(bar) == [0, 1, 2]
    found = last_line(capsys)
    assert (found["name"], found["total"]) == ("one epoch: ", total and "3")
    assert "steps/s" in found["rates"]
    if total is None:
        with pytest.raises(TypeError, match="has no len"):
            len(bar)
    else:
        assert len(bar) == 3


def test_each_loop_over_it_has_a_bar_of_its_own(capsys):
    bar = fastdp.progress(batches())
    for _ in range(2):
        assert len(list(bar)) == len(bar) == 3
    assert len(capsys.readouterr().err.splitlines()) == 2


class LoaderError(Exception):
    """A loader's own."""


def test_errors_of_the_loader_and_of_the_loop_pass_and_end_the_bar(capsys):
    def loader():
        yield 1
        raise LoaderError

    with pytest.raises(LoaderError):
        list(fastdp.progress(loader()))
    assert last_line(capsys)["steps"] == "1"

    def stops():
        for number in fastdp.progress([1, 2, 3]):
            if number == 2:
                raise LoaderError

    with pytest.raises(LoaderError):
        stops()
    assert last_line(capsys)["steps"] == "1"


def test_a_break_and_closing_the_iterator_end_the_bar(capsys):
    for number in fastdp.progress([1, 2, 3]):
        if number == 2:
            break
    assert last_line(capsys)["steps"] == "1"
    items = iter(fastdp.progress([1, 2, 3]))
    next(items)
    items.close()
    assert last_line(capsys)["steps"] == "0"


def test_waiting_for_the_loader_is_told_from_work(monkeypatch, capsys):
    now = [0.0]

    def loader():
        for number in range(4):
            now[0] += 3.0
            yield np.zeros((8, number + 1))

    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    for _ in fastdp.progress(loader(), total=4, every=6.0):
        now[0] += 1.0
    lines = capsys.readouterr().err.splitlines()
    assert "2/4 steps, 2 samples/s, input wait 75%" in lines[0]
    assert "0:00:08 left" in lines[0]
    assert "4/4 steps, 2 samples/s, input wait 75%" in lines[-1]
    assert lines[-1].endswith("0:00:16 in all")
    assert len(lines) == 3


@pytest.fixture
def engine():
    def train(parameters, batch):
        error = batch[0] @ parameters["w"]
        return (error**2).mean(), {"w": 2 * batch[0].T @ error / len(error)}, [error]

    program = FunctionProgram(
        {"w": np.zeros(2)},
        train,
        lambda parameters, slots, gradients: ({"w": parameters["w"] - 0.1 * gradients["w"]}, {}),
        lambda parameters, batch: [batch[0] @ parameters["w"]],
    )
    made = DataParallel(program, [HostDevice(index) for index in range(2)])
    yield made
    for device in made.devices:
        device.close()


def test_with_the_engine_it_tells_the_utilization_of_each_device(engine, capsys):
    for x, _ in fastdp.progress(batches(), parallel=engine):
        engine.train([x])
    assert re.search(r"utilization \d+% \d+%", last_line(capsys)["rates"])


def test_what_is_no_loader_or_no_parallel_model_is_an_error():
    with pytest.raises(TypeError, match=r"`loader` must be an iterable of batches. Received: a int"):
        fastdp.progress(3)
    with pytest.raises(TypeError, match=r"a function, which has no report\(\). Pass the parallel model"):
        fastdp.progress([], parallel=lambda: None)
    with pytest.raises(ValueError, match=r"`total` must not be negative\. Received: -1"):
        fastdp.progress([], total=-1)
    with pytest.raises(TypeError, match=r"`total` must be a whole number\. Received: '2', a str"):
        fastdp.progress([], total="2")
    with pytest.raises(TypeError, match=r"`total` must be a whole number\. Received: 1\.5, a float"):
        fastdp.progress([], total=1.5)
    with pytest.raises(TypeError, match=r"`every` must be seconds\. Received: None"):
        fastdp.progress([], every=None)
    assert len(fastdp.progress([], total=np.int64(2))) == 2


@pytest.mark.parametrize(
    ("item", "rows"),
    [
        (np.zeros((5, 2)), 5),
        (({"a": np.zeros(3)}, np.zeros(4)), 3),
        ([1, "text", np.zeros((7, 1))], 7),
        (np.float32(1), None),
        ("text", None),
        ([], None),
    ],
)
def test_the_rows_of_a_batch_are_those_of_its_first_array(item, rows):
    assert rows_of(item) == rows


def test_in_a_notebook_it_is_one_line_that_changes(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setitem(sys.modules, "ipykernel", sys)
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    for number in fastdp.progress([0, 1]):
        now[0] += 1.0 + 1e4 * number
    out, err = capsys.readouterr()
    first, *_, last = out.removeprefix("\r").split("\r")
    assert err == ""
    assert first.startswith("1/2 steps, 1.0 steps/s")
    assert last.startswith("2/2 steps, 0.0 steps/s")
    assert last.endswith("2:46:42 in all\n")
    assert out.count("\n") == 1


class Terminal(io.StringIO):
    def isatty(self):
        return True


def terminal(monkeypatch):
    """Make stderr a terminal from here on."""
    pytest.importorskip("rich")
    shown = Terminal()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr(sys, "stderr", shown)
    return shown


def test_in_a_terminal_it_is_a_bar_that_ends_with_the_last_loop(monkeypatch):
    shown, display = terminal(monkeypatch), rich_bars._display
    for _ in fastdp.progress([1, 2], description="epochs"):
        for _ in fastdp.progress(batches(), description="batches"):
            assert display.open == 2
    assert display.open == 0
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown.getvalue())
    assert "batches" in text
    assert "batches" not in text.splitlines()[-1]
    assert "3/3" in text
    assert "samples/s" in text
    assert "2/2" in text.splitlines()[-1]
    assert shown.getvalue().count("\x1b[?25l") == shown.getvalue().count("\x1b[?25h")  # the cursor is back


def test_a_bar_in_a_terminal_ends_after_an_error_too(monkeypatch):
    shown = terminal(monkeypatch)

    def fails():
        for _ in fastdp.progress(batches()):
            raise LoaderError

    with pytest.raises(LoaderError):
        fails()
    assert rich_bars._display.open == 0
    assert "\x1b[?25h" in shown.getvalue()
