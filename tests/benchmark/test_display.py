"""The display of a benchmark: what it says in a terminal, in a pipe and without rich, and that nothing is cut."""

from __future__ import annotations

import io
import re

import benchmark_results
import pytest
from rich.console import Console

from fastdp.benchmark.comparison import compare
from fastdp.benchmark.display import comparison_blocks, open_display, output, result_blocks, write
from fastdp.benchmark.display.lines import Lines
from fastdp.benchmark.display.live import LiveDisplay, bar, picture
from fastdp.benchmark.display.state import State
from fastdp.benchmark.entries import entries_of
from fastdp.benchmark.figures import milliseconds, rate
from fastdp.benchmark.headings import headings

RESULTS = {
    "several": benchmark_results.result,
    "gpus": benchmark_results.gpu_result,
    "one": lambda: benchmark_results.result([benchmark_results.entry()]),
    "many": benchmark_results.many,
    "nothing": lambda: benchmark_results.result([]),
    "no figures": benchmark_results.without_figures,
    "all failed": lambda: benchmark_results.result([]) | {"failed": [{"name": "fastdp", "reason": "no device " * 30}]},
    "hostile": benchmark_results.hostile,
}
CODES = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")


def events(result):
    """The events of a run that has this result."""
    names = [one["name"] for one in result["entries"]]
    yield {"event": "started", "ways": names, "target": "mlp"}
    for one in result["entries"]:
        yield {"event": "starting", "way": one["name"]}
        facts = {key: one[key] for key in ("first_step_seconds", "compile_seconds", "how", "why")}
        yield {"event": "ready", "way": one["name"], "facts": {"parameters": 1234567, **facts}}
        yield {"event": "warm", "way": one["name"], "steps": 40, "seconds": 1.25}
    yield {"event": "batch", "way": "fastdp", "batch": 512, "samples_per_second": 1234.0}
    yield {"event": "batch", "way": "fastdp", "batch": 1024, "reason": "no memory"}
    for number in (1, 2, 3):
        for one in result["entries"]:
            report = {"verbs": one["verbs"], "between_seconds": one["between_seconds"]}
            yield {
                "event": "round",
                "way": one["name"],
                "number": number,
                "of": 3,
                "samples_per_second": one["samples_per_second"]["rounds"][number],
                "report": report,
            }
    for one in result["failed"]:
        yield {"event": "failed", "way": one["name"], "reason": one["reason"]}
    yield {"event": "ended", "result": result}


def printed(result, width, **options):
    """The final tables as text."""
    stream = io.StringIO()
    output.write_blocks(result_blocks(result), stream, Console(file=stream, width=width, **options))
    return stream.getvalue()


@pytest.mark.parametrize("width", [60, 80])
@pytest.mark.parametrize("name", RESULTS)
def test_the_final_tables_fit_the_width(name, width):
    lines = printed(RESULTS[name](), width).split("\n")
    assert max(map(len, lines)) <= width


@pytest.mark.parametrize("width", [60, 80])
@pytest.mark.parametrize("name", ["several", "gpus", "many"])
def test_no_figure_is_cut(name, width):
    result = RESULTS[name]()
    text = printed(result, width)
    assert "…" not in text
    for entry in entries_of(result):
        assert rate(entry.rate.median) in text
        assert milliseconds(entry.step.median) in text


def test_the_tables_are_tables_at_60_columns():
    header = next(line for line in printed(RESULTS["gpus"](), 60).split("\n") if "samples/s" in line)
    assert header.split() == ["way", "samples/s", "spread", "%", "step", "ms", "efficiency", "%"]


def test_the_result_names_the_fastest_way_failures_batches_and_the_noise():
    text = " ".join(printed(RESULTS["gpus"](), 80).split())
    assert "The fastest is fastdp, 8 devices, graph." in text
    assert "Failed: keras-jax, 8 devices: ModuleNotFoundError: no module named 'jax'" in text
    assert "The largest batch that ran has 512 rows; the fastest is 512." in text
    assert "The machine was quiet. The idle loop beside the measurement varied by 3.0%." in text


def test_a_noisy_machine_is_named_with_the_reason():
    result = benchmark_results.result()
    result["noise"]["verdict"] = "noisy: other programs keep 1.7 of 2 cores busy"
    assert "The machine was noisy: other programs keep 1.7 of 2 cores busy." in printed(result, 80)


def test_times_per_device_of_many_ways_are_those_of_the_fastest():
    text = printed(RESULTS["many"](), 80)
    assert text.count("milliseconds of a step") == 1
    assert "fastdp, 5 devices, jax: milliseconds of a step" in text
    assert "the fastest of 40 ways" in text


@pytest.mark.parametrize("force_terminal", [True, False])
def test_hostile_text_is_neither_markup_nor_control(force_terminal):
    result = benchmark_results.hostile()
    text = printed(result, 80, force_terminal=force_terminal)
    shown = CODES.sub("", text) if force_terminal else text
    assert not set(shown) & set("\x1b\x07\r\u202e\ud800\u2028")
    assert "[bold red]no[/]" in shown
    lines = io.StringIO()
    with Lines(lines, None) as display:
        for event in events(result):
            display(event)
    assert not set(lines.getvalue()) & set("\x1b\x07\r\u202e\ud800\u2028")


@pytest.mark.parametrize("width", [60, 80])
def test_the_live_picture_fits_the_terminal(width):
    console = Console(file=io.StringIO(), width=width, height=24, force_terminal=True, record=True)
    state = State()
    for event in events(benchmark_results.gpu_result()):
        state.apply(event)
    assert state.told.name == "fastdp, 8 devices, graph"  # the last to tell of its devices
    state.current = state.ways["fastdp, 8 devices, graph"]
    console.print(picture(state, console, 83.0))
    lines = console.export_text().rstrip("\n").split("\n")
    assert len(lines) <= 24
    assert max(map(len, lines)) <= width
    text = "\n".join(lines)
    assert "9 of 9 ways, 83.0 s" in text
    assert re.search(r"cuda:7 +32 +2,3\d\d +█+ +31.0 GB", text)
    assert re.search(r"fastdp, 8 devices, graph +round 3 of 3 +18,[67]\d\d", text)
    for word in ("scatter", "compute", "communication", "update", "waiting for input"):
        assert word in " ".join(text.split())


def test_devices_that_tell_of_memory_alone_have_no_bar_and_those_that_tell_nothing_are_not_shown():
    console = Console(file=io.StringIO(), width=80, height=24, force_terminal=True, record=True)
    state = State()
    state.apply({"event": "started", "ways": ["ddp", "torch"]})
    silent = {"device": "cpu", "rows": 8, "seconds": {}, "nbytes": {}, "peak_nbytes": None}
    for name, device in (("ddp", silent | {"device": "cuda:0", "peak_nbytes": 3_000_000}), ("torch", silent)):
        report = {"verbs": [device]}
        round_of = {"event": "round", "way": name, "number": 1, "of": 2, "samples_per_second": 10.0, "report": report}
        state.apply(round_of)
    console.print(picture(state, console, 1.0))
    text = console.export_text()
    assert re.search(r"^ddp *\n", text, re.MULTILINE)
    assert re.search(r"cuda:0 +8 +10.0 +3.00 MB", text)
    assert "cpu" not in text
    assert "a step of" not in text


def test_a_picture_of_many_ways_shows_those_around_the_current_one():
    console = Console(file=io.StringIO(), width=80, height=24, force_terminal=True, record=True)
    state = State()
    for event in events(benchmark_results.many()):
        state.apply(event)
    console.print(picture(state, console, 1.0))
    lines = console.export_text().rstrip("\n").split("\n")
    assert len(lines) <= 24
    assert any(line.startswith("fastdp, 5 devices, jax") for line in lines)
    assert any(re.fullmatch(r"and \d+ more", line.strip()) for line in lines)


def test_the_bar_of_a_step_has_its_parts_in_their_shares():
    seconds = {"scatter": 0.1, "compute": 0.6, "update": 0.1}
    drawn = bar(seconds, 1.0, 40)
    assert len(drawn.plain) == 32
    assert [(span.end - span.start) for span in drawn.spans] == [4, 24, 4]
    assert bar(seconds, 1.0, 10, blocks=False).plain == "scccccc" + "u"


def test_a_pipe_gets_a_line_for_each_event_and_the_tables():
    stream = io.StringIO()
    with open_display(stream, environ={}) as display:
        assert isinstance(display, Lines)
        for event in events(benchmark_results.gpu_result()):
            display(event)
    lines = stream.getvalue().split("\n")
    assert lines[0] == "fastdp bench mlp: 8 ways to train, taking turns"
    way = "fastdp, 8 devices, graph"
    assert f"{way}: starting" in lines
    assert f"{way}: ready, 1,234,567 parameters, first step 310 ms, graph" in lines
    assert f"{way}: warm after 40 steps, 1.25 s" in lines
    assert f"{way}: round 2 of 3, 18,700 samples/s" in lines
    assert "batch 512: 1,234 samples/s" in lines
    assert "batch 1024: no memory" in lines
    assert "keras-jax, 8 devices: failed: ModuleNotFoundError: no module named 'jax'" in lines
    assert any(line.strip() == "Speed" for line in lines)
    assert "\x1b" not in stream.getvalue()


class Terminal(io.StringIO):
    """A stream that says that it is a terminal."""

    def isatty(self):
        return True


@pytest.mark.parametrize(
    "environ", [{"TERM": "dumb"}, {"TERM": "xterm", "NO_COLOR": "1"}, {"TERM": "xterm", "JPY_PARENT_PID": "7"}]
)
def test_simple_terminals_and_commands_of_notebooks_get_lines(environ):
    assert isinstance(open_display(Terminal(), environ=environ), Lines)


def test_forced_colors_make_no_terminal_of_a_pipe():
    assert isinstance(open_display(io.StringIO(), environ={"FORCE_COLOR": "1", "TERM": "xterm"}), Lines)


def test_a_kernel_of_a_notebook_gets_text_on_its_stream(monkeypatch):
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    stream = io.StringIO()
    with open_display(stream, environ={}) as display:
        for event in events(benchmark_results.result()):
            display(event)
    assert "38,450" in stream.getvalue()
    assert "\x1b" not in stream.getvalue()


def test_a_terminal_gets_the_live_picture_and_its_cursor_back():
    stream = Terminal()
    result = benchmark_results.result()
    with open_display(stream, environ={"TERM": "xterm-256color", "COLUMNS": "80", "LINES": "24"}) as display:
        assert isinstance(display, LiveDisplay)
        for event in events(result):
            display(event)
    text = stream.getvalue()
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")
    assert "38,450" in text[text.rindex("Speed") :]


def test_a_failure_while_the_picture_is_shown_gives_the_cursor_back():
    stream = Terminal()
    with (
        pytest.raises(ValueError, match="unknown"),
        open_display(stream, environ={"TERM": "xterm-256color"}) as display,
    ):
        display({"event": "unknown"})
    assert "\x1b[?25l" in stream.getvalue()
    assert stream.getvalue().rindex("\x1b[?25h") > stream.getvalue().rindex("\x1b[?25l")


def test_without_rich_the_tables_are_plain_text(monkeypatch):
    monkeypatch.setattr(output.importlib.util, "find_spec", lambda name: None)
    stream = Terminal()
    with open_display(stream, environ={"TERM": "xterm"}) as display:
        for event in events(benchmark_results.result()):
            display(event)
    assert "38,450" in stream.getvalue()
    assert "\x1b" not in stream.getvalue()


def test_a_stream_without_unicode_gets_ascii():
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, "ascii")
    result = benchmark_results.result([benchmark_results.entry()])
    result["target"]["title"] = "Modell für Ärzte"
    with open_display(stream, environ={}, width=100) as display:
        for event in events(result):
            display(event)
    assert b"Modell f?r ?rzte" in raw.getvalue()
    stream.detach()


def test_an_unknown_event_is_an_error():
    with pytest.raises(ValueError, match=r"must be one of started, starting, .* got 'unknown'"):
        State().apply({"event": "unknown"})


@pytest.mark.parametrize("width", [60, 80])
def test_a_comparison_fits_the_width_and_says_first_what_differs(width, capsys):
    after = benchmark_results.result()
    after["versions"]["torch"] = "2.14.0"
    write(comparison_blocks(compare([benchmark_results.result(), after], ["a.json", "b.json"])), width=width)
    text = capsys.readouterr().out
    assert max(map(len, text.split("\n"))) <= width
    assert text.index("A: a.json") < text.index("2.14.0") < text.index("1.000")
    assert "noise" in text


def test_a_batch_of_each_device_is_called_so():
    result = benchmark_results.result()
    assert "batch 256," in headings(result)[0]
    result["settings"]["per_device"] = True
    assert "batch 256 per device," in headings(result)[0]
