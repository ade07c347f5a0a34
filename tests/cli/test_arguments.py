"""Any arguments: never a traceback; status 2 and a message that names what is wrong; help that fits its terminal."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import fastdp.cli
from fastdp.cli import COMMANDS, arguments, main, output, status
from fastdp.cli.run import _gpus, _module_exists

ROOT = Path(fastdp.cli.__file__).parents[2]
OPTIONS = ["--json", "--gpus", "--virtual", "--epochs", "--devices", "--batch-size", "--out", "--verbose", "--measure"]
VALUES = [
    "",
    "-1",
    "0",
    "1e20",
    "9" * 5000,
    "auto",
    "0,",
    ",",
    "1,2",
    "²",
    "nan",
    "a\nb",
    "%s",
    "{}",
    "\udcff",
    "--",
    "-",
]
words = st.sampled_from([*COMMANDS, *OPTIONS, *VALUES, "-m", "-h", "--version", ".x"]) | st.text(max_size=5)


def parsed(words_of_a_line: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int | None, str]:
    """The status of parsing (None: these arguments are fine), and what was said on the error stream."""
    capsys.readouterr()
    parser, parsers = fastdp.cli._parser()
    try:
        options, unknown = parser.parse_known_args(words_of_a_line)
        if unknown:
            parsers.get(options.command, parser).error(f"unrecognized arguments: {' '.join(unknown)}")
    except SystemExit as end:
        return end.code, capsys.readouterr().err
    return None, ""


@given(line=st.lists(words, max_size=6))
def test_any_arguments_are_fine_or_a_usage_error(line):
    """Parsed only: what is fine would train."""
    with pytest.MonkeyPatch.context() as patch:
        said: list[str] = []
        patch.setattr(sys.stderr, "write", lambda text: said.append(text) or len(text))
        patch.setattr(sys.stdout, "write", len)
        parser, _ = fastdp.cli._parser()
        code = None
        try:
            parser.parse_known_args(line)
        except SystemExit as end:
            code = end.code
    assert code in (None, 0, 2)
    assert (": error: " in "".join(said)) == (code == 2)


@pytest.mark.parametrize(
    ("line", "names"),
    [
        (["train"], "COMMAND"),
        (["demo", "--epochs", "many"], "argument --epochs: must be a whole number from 1 to 1000, got 'many'"),
        (["demo", "--devices", "1"], "argument --devices"),
        (["demo", "--devices", "9" * 5000], "argument --devices"),
        (["demo", "--verbose", "3"], "argument --verbose"),
        (["demo", "--epo", "3"], "unrecognized arguments: --epo 3"),
        (["run", "--gpus", ""], "argument --gpus: must be a number, ordinals such as 0,2, or auto, got ''"),
        (["run", "--gpus", ","], "argument --gpus"),
        (["run", "--virtual", "1e20"], "argument --virtual: must be a whole number from 1 to 1024, got '1e20'"),
        (["run", "--graph", "fast", "a.py"], "argument --graph"),
        (["devices", "extra"], "fastdp devices: error: unrecognized arguments: extra"),
        (["convert", "one.h5"], "destination"),
        (["--colour"], "unrecognized arguments: --colour"),
    ],
)
def test_a_wrong_argument_is_named_with_what_was_expected(line, names, capsys):
    code, said = parsed(line, capsys)
    assert code == 2
    assert names in said
    assert len(said) < 1000


@pytest.mark.parametrize(
    ("text", "gpus"), [("auto", "auto"), (" auto ", "auto"), ("2", 2), ("0,2", [0, 2]), ("1,", [1]), ("-1", -1)]
)
def test_gpus_of_the_command_line(text, gpus):
    assert _gpus(text) == gpus


@pytest.mark.parametrize(
    "name", ["", ".", ".x", "..", "a..b", "json.", "no_such", "no_such.part", "json.no_such", "%s"]
)
def test_a_module_that_cannot_be_is_not_found(name):
    assert not _module_exists(name)
    assert _module_exists("json.tool")


@pytest.mark.parametrize("columns", [60, 80])
@pytest.mark.parametrize("command", [None, *(name for name in COMMANDS if name != "bench")])  # that has its own tests
def test_help_has_examples_and_fits_the_terminal(command, columns, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    with pytest.raises(SystemExit, match="0"):
        main([*([command] if command else []), "--help"])
    text = capsys.readouterr().out
    assert re.search(rf"^ +(FASTDP_\w+=\d )?fastdp {command or 'run'}\b", text, re.MULTILINE), "no example"
    wide = [line for line in text.splitlines() if len(line) > columns]
    assert wide == []


def test_fastdp_alone_prints_its_help(capsys):
    with pytest.raises(SystemExit, match="0"):
        main([])
    text = capsys.readouterr().out
    assert text.startswith("usage: fastdp")
    assert all(command in text for command in COMMANDS)
    assert "Exit status:" in text
    assert "FASTDP_VIRTUAL_DEVICES" in text


def test_a_wrong_variable_ends_every_command_but_help_with_status_2(monkeypatch, capsys):
    monkeypatch.setenv("FASTDP_VIRTUAL_DEVICES", "abc")
    for line in (["devices"], ["demo"], ["run", "a.py"], ["convert", "a", "b"]):
        assert main(line) == 2
        said = capsys.readouterr().err
        assert said.startswith(f"fastdp {line[0]}: The environment variable FASTDP_VIRTUAL_DEVICES must be")
        assert said.count("\n") == 1
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])


def fastdp_process(*line: str, **pipes: int) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen([sys.executable, "-m", "fastdp", *line], env=environment, text=True, **pipes)


@pytest.mark.parametrize(("line", "ends"), [(["devices"], {141}), (["--help"], {0, 141})])  # argparse may hide it
def test_a_reader_that_goes_away_is_no_traceback(line, ends):
    read, write = os.pipe()
    os.close(read)
    process = fastdp_process(*line, stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    _, said = process.communicate(timeout=60)
    assert process.returncode in ends
    assert said == ""


def test_signals_end_a_command_with_their_status_and_without_a_traceback(capsys):
    def wait(number: int) -> int:
        os.kill(os.getpid(), number)
        time.sleep(5)
        raise AssertionError("no signal came")

    before = signal.getsignal(signal.SIGTERM)
    assert status.ended("demo", lambda: wait(signal.SIGINT)) == status.INTERRUPTED == 130
    assert capsys.readouterr().err == "fastdp demo: interrupted.\n"
    with pytest.raises(SystemExit) as end:
        status.ended("demo", lambda: wait(signal.SIGTERM))
    assert end.value.code == status.TERMINATED == 143
    assert signal.getsignal(signal.SIGTERM) is before


def test_what_a_user_can_mend_is_one_line(capsys):
    def fail(error: Exception) -> int:
        raise error

    assert status.ended("demo", lambda: fail(OSError(28, "No space left", "x.h5"))) == status.FAILED
    assert status.ended("demo", lambda: fail(status.WrongUseError("argument --out: no"))) == status.WRONG_USE
    assert capsys.readouterr().err == (
        "fastdp demo: [Errno 28] No space left: 'x.h5'\nfastdp demo: argument --out: no\n"
    )
    with pytest.raises(ZeroDivisionError):  # a bug of ours is not hidden
        status.ended("demo", lambda: 1 // 0)


def test_json_has_no_numbers_that_json_lacks(capsys):
    output.print_json({"a": float("nan"), 1: [float("inf"), (1.5, None)]})
    assert capsys.readouterr().out == '{"a": null, "1": [null, [1.5, null]]}\n'


def test_while_json_is_wanted_the_output_is_kept_for_it(capsys):
    with output.only_json(True):
        sys.stdout.write("progress\n")
    with output.only_json(False):
        sys.stdout.write("result\n")
    assert capsys.readouterr() == ("result\n", "progress\n")


@pytest.mark.parametrize("text", ["0", "-1", "nan", "inf", "", "x", "1e999"])
def test_a_number_is_within_its_limits(text):
    with pytest.raises(arguments.argparse.ArgumentTypeError, match=r"must be a number of ms from 0\.5 to 1e\+09, got"):
        arguments.number("ms", 0.5, 1e9)(text)
    assert arguments.number("parameters", 1, 1e12)("25.6e6") == 25_600_000


@pytest.mark.parametrize("text", ["", "0", "9", "1,", "a", "1,,2", "-1"])
def test_counts_are_whole_numbers_within_their_limits(text):
    with pytest.raises(arguments.argparse.ArgumentTypeError, match="must be whole numbers from 1 to 8"):
        arguments.counts(8)(text)
    assert arguments.counts(8)("8,1, 2,1") == [1, 2, 8]


@pytest.mark.parametrize("text", ["0", "-1", "nan", "inf", "", "x", "1e999"])
def test_a_positive_number_is_finite_and_above_zero(text):
    with pytest.raises(arguments.argparse.ArgumentTypeError, match="must be a number of ms above 0"):
        arguments.positive("ms")(text)
    assert arguments.positive("ms", zero=True)("0") == 0.0
