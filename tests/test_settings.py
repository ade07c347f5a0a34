"""The FASTDP_* environment variables: what each may be, and that a wrong one never ends in a traceback of its own."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastdp import private_files, settings

PACKAGE = Path(settings.__file__).parent


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch):
    for name in settings.MEANINGS:
        monkeypatch.delenv(name, raising=False)


def test_without_variables_there_are_the_defaults():
    assert (settings.virtual_devices(), settings.virtual_kind(), settings.all_reduce()) == (0, None, "measured")
    assert settings.cache_dir() is None
    assert settings.problems() == settings.misspelt() == []


@pytest.mark.parametrize(("text", "count"), [("8", 8), (" 8 ", 8), ("0", 0), ("", 0), ("1024", 1024), ("008", 8)])
def test_a_number_of_virtual_devices(monkeypatch, text, count):
    monkeypatch.setenv(settings.VIRTUAL_DEVICES, text)
    assert settings.virtual_devices() == count
    assert settings.problems() == []


WRONG = [
    (settings.VIRTUAL_DEVICES, "abc"),
    (settings.VIRTUAL_DEVICES, "-1"),
    (settings.VIRTUAL_DEVICES, "1e20"),
    (settings.VIRTUAL_DEVICES, "1025"),
    (settings.VIRTUAL_DEVICES, "9" * 6000),  # Python refuses to convert so many digits
    (settings.VIRTUAL_DEVICES, "٣"),  # a digit, of another script
    (settings.VIRTUAL_KIND, "tpu"),
    (settings.ALL_REDUCE, "ring"),
    (settings.CACHE_DIR, __file__),
]


@pytest.mark.parametrize(("name", "text"), WRONG)
def test_a_wrong_value_names_the_variable_what_is_expected_and_what_came(monkeypatch, name, text):
    monkeypatch.setenv(name, text)
    (problem,) = settings.problems()
    assert problem.startswith(f"The environment variable {name} must be ")
    assert f"Received: {text[:40]!r}"[:-1] in problem
    assert problem.endswith("Correct it, or unset it.")
    assert len(problem) < 400


def test_a_name_that_is_nearly_one_is_told(monkeypatch):
    monkeypatch.setenv("FASTDP_VIRTUAL_DEVICE", "8")
    monkeypatch.setenv("FASTDP_SOMETHING_ELSE", "8")
    assert settings.misspelt() == [
        "FASTDP_VIRTUAL_DEVICE is no variable of fastdp. Did you mean FASTDP_VIRTUAL_DEVICES?"
    ]


@given(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=30))
def test_any_text_is_a_value_or_a_problem(text):
    with pytest.MonkeyPatch.context() as patch:
        for name in settings.MEANINGS:
            patch.setenv(name, text)
        for problem in settings.problems():
            assert re.match(r"The environment variable FASTDP_\w+ must be ", problem)


def test_every_variable_that_the_package_reads_is_checked_here():
    read = re.compile(r"(?:environ(?:\.get)?[\[(]|getenv\()\s*[\"'](FASTDP_\w+)")
    elsewhere = {name for path in PACKAGE.rglob("*.py") for name in read.findall(path.read_text("utf-8"))}
    assert elsewhere <= set(settings.MEANINGS), "add it to fastdp/settings.py"
    assert not elsewhere, "read it through fastdp/settings.py"


@pytest.mark.parametrize("value", ["abc", "9" * 6000])
def test_importing_fastdp_survives_a_wrong_number_of_devices(value):
    done = python("import fastdp", FASTDP_VIRTUAL_DEVICES=value)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_user_without_a_home_folder_can_import_fastdp_and_has_no_cache(monkeypatch):
    """No HOME, and no entry in the system's list of users."""
    no_user = "import os, pwd; os.getuid = lambda: 54321\n"
    code = "from fastdp import private_files as files; print(files.cache_folder(), os.environ['KERAS_BACKEND'])"
    done = python(no_user + code, HOME=None, KERAS_BACKEND=None, XDG_CACHE_HOME=None)
    assert (done.stdout, done.stderr) == ("/dev/null/no-home-folder torch\n", "")
    with pytest.raises(OSError, match="Not a directory"):
        (Path("/dev/null/no-home-folder") / "x").mkdir(parents=True)
    monkeypatch.setenv(settings.CACHE_DIR, "/tmp/elsewhere")
    assert private_files.cache_folder() == Path("/tmp/elsewhere")


def python(code: str, **environment: str | None) -> subprocess.CompletedProcess[str]:
    """A process with these variables, or without those that are None."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.delenv(name, raising=False) if value is None else patch.setenv(name, value)
        return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
