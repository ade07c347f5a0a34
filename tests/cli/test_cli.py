"""The command line: what each command says, and that the light ones work without Keras."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys

import h5py
import pytest

from fastdp import __version__
from fastdp.cli import COMMANDS, demo, main
from fastdp.cli.optional import MissingLibraryError, load

needs_keras = pytest.mark.skipif(importlib.util.find_spec("keras") is None, reason="Keras is not installed")
needs_sklearn = pytest.mark.skipif(importlib.util.find_spec("sklearn") is None, reason="scikit-learn is not installed")
WITHOUT_KERAS = "import sys; sys.modules['keras'] = sys.modules['torch'] = None; "


def run(*arguments: str, code: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    """`python -m fastdp` in a process of its own, without GPUs, and with virtual devices only where asked for."""
    kept = {name: value for name, value in os.environ.items() if name != "FASTDP_VIRTUAL_DEVICES"}
    start = ["-c", code + "from fastdp.cli import main; sys.exit(main(sys.argv[1:]))"] if code else ["-m", "fastdp"]
    return subprocess.run(
        [sys.executable, "-W", "error", *start, *arguments],
        env={**kept, "CUDA_VISIBLE_DEVICES": "", **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def installed_problems() -> list[str]:
    """What `fastdp devices` has to say of the libraries that the tests run without."""
    missing = [name for name in ("torch", "keras") if importlib.util.find_spec(name) is None]
    told = json.loads(run("devices", "--json", FASTDP_VIRTUAL_DEVICES="1").stdout)["problems"]
    assert [line.split()[0] for line in told] == missing
    return told


def test_help_names_every_command():
    done = run("--help")
    assert done.returncode == 0
    for command, what in COMMANDS.items():
        assert command in done.stdout
        assert what.split()[0] in done.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_has_help_without_keras(command):
    done = run(command, "--help", code=WITHOUT_KERAS)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"usage: fastdp {command}")


def test_version_is_that_of_the_package(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"fastdp {__version__}\n"


def test_devices_without_any_says_what_is_missing_and_how_to_get_virtual_ones():
    done = run("devices")
    assert (done.returncode, done.stderr) == (0, "")
    assert "FASTDP_VIRTUAL_DEVICES=4 fastdp devices" in done.stdout
    assert 'gpus="auto"' in done.stdout


def test_devices_names_missing_libraries_with_the_line_that_installs_them():
    done = run("devices", "--json", code=WITHOUT_KERAS)
    problems = json.loads(done.stdout)["problems"]
    assert "torch is not installed, which Keras models and torch modules need. Install it with: pip install torch" in (
        problems
    )
    assert any("pip install 'fastdp[keras]'" in problem for problem in problems)


def test_devices_as_json_is_one_line_with_all_that_is_known():
    done = run("devices", "--json", "--measure", FASTDP_VIRTUAL_DEVICES="2", FASTDP_VIRTUAL_KIND="host")
    assert (done.returncode, done.stderr, done.stdout.count("\n")) == (0, "", 1)
    found = json.loads(done.stdout)
    assert [device["name"] for device in found["devices"]] == ["virtual:0", "virtual:1"]
    assert found["problems"] == installed_problems()
    assert found["paths"] == []
    assert found["measured"]["decides"] == "nothing to choose between"
    size = found["measured"]["sizes"][0]
    assert size["nbytes"] == 4096
    assert size["used"] == "host"
    assert 0 < size["seconds"]["host"] < 1


def test_devices_measures_how_virtual_ones_add_up():
    done = run("devices", "--measure", FASTDP_VIRTUAL_DEVICES="3", FASTDP_VIRTUAL_KIND="host")
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()[4 + len(installed_problems()) :]
    assert lines[0].startswith("all-reduce of float32 over 3 devices")
    assert lines[1].split() == ["size", "host"]
    assert [line.split()[:3] for line in lines[2:4]] == [["4", "KiB", "*"], ["32", "KiB", "*"]]
    assert lines[-1] == "There is nothing to choose between on these devices."
    assert "one device adds nothing up" in run("devices", "--measure", FASTDP_VIRTUAL_DEVICES="1").stdout


def test_devices_lists_the_virtual_ones_without_keras():
    done = run("devices", code=WITHOUT_KERAS, FASTDP_VIRTUAL_DEVICES="2")
    assert done.stdout.splitlines()[:2] == [
        "0: virtual:0 (virtual, host memory)",
        "1: virtual:1 (virtual, host memory)",
    ]


@needs_sklearn
def test_demo_without_keras_says_what_to_install(tmp_path):
    done = run("demo", "--out", str(tmp_path), code="import sys; sys.modules['keras'] = None; ")
    assert done.returncode == 2
    assert "needs keras" in done.stderr
    assert "pip install 'fastdp[keras,demo]'" in done.stderr
    assert "Traceback" not in done.stderr


@needs_keras
@pytest.mark.parametrize("line", [["convert", "a.h5", "b.h5"], ["demo", "--epochs", "1"]])
@pytest.mark.parametrize("library", ["torch", "keras"])
def test_a_library_that_another_one_needs_is_named_too(line, library, tmp_path):
    h5py.File(tmp_path / "a.h5", "w").close()
    done = run(*line, code=f"import os, sys; sys.modules['{library}'] = None; os.chdir({str(tmp_path)!r}); ")
    assert done.returncode == 2
    assert f"needs {library}, which is not installed" in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == [tmp_path / "a.h5"]


@needs_keras
def test_convert_runs_on_torch_whatever_the_environment_names():
    done = run("convert", "none.h5", "new.h5", KERAS_BACKEND="nonsense")
    assert done.returncode == 1
    assert done.stderr.splitlines()[0] == (
        "fastdp convert: Keras runs on torch here, and not on KERAS_BACKEND=nonsense."
    )
    assert "none.h5" in done.stderr.splitlines()[1]
    assert done.stderr.count("\n") == 2


@pytest.mark.parametrize("line", ["devices", "--help", ""])
def test_a_closed_output_is_no_traceback(line):
    closed = f"exec {sys.executable} -m fastdp {line} >&-"
    done = subprocess.run(["bash", "-c", closed], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_demo_refuses_a_file_as_its_folder_before_it_loads_libraries(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo, "load", lambda *_: pytest.fail("a library was loaded"))
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "inside"):
        assert main(["demo", "--out", str(out)]) == 2
        said = capsys.readouterr().err
        assert said.startswith("fastdp demo: argument --out: must be a folder")
        assert str(out) in said


def test_convert_looks_at_its_paths_before_it_loads_keras(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "fastdp.keras.h5_files.convert", None)  # an import of it is an error
    (tmp_path / "text.h5").write_text("no HDF5")
    for source, said in (("none.h5", "must be an existing .h5 file"), ("text.h5", "must be an HDF5 file")):
        assert main(["convert", str(tmp_path / source), str(tmp_path / "new.h5")]) == 1
        assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "value"), [("--devices", "1"), ("--epochs", "0"), ("--batch-size", "1501"), ("--epochs", "many")]
)
def test_demo_refuses_values_out_of_range(option, value, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["demo", option, value])
    assert option in capsys.readouterr().err


def test_demo_options_have_the_documented_defaults():
    parser = demo.argparse.ArgumentParser()
    demo.add_arguments(parser)
    options = parser.parse_args([])
    assert (options.devices, options.epochs, options.batch_size, options.out.as_posix()) == (4, 10, 64, "out/demo")


@needs_keras
def test_convert_of_a_missing_file_names_it(tmp_path, capsys):
    assert main(["convert", str(tmp_path / "none.h5"), str(tmp_path / "new.h5")]) == 1
    assert str(tmp_path / "none.h5") in capsys.readouterr().err


@needs_keras
def test_convert_never_overwrites_a_file(tmp_path, capsys):
    source, destination = tmp_path / "old.h5", tmp_path / "new.h5"
    h5py.File(source, "w").close()
    destination.write_bytes(b"precious")
    assert main(["convert", str(source), str(destination)]) == 1
    assert destination.read_bytes() == b"precious"
    assert str(destination) in capsys.readouterr().err


@needs_keras
def test_convert_as_json_has_the_notes_and_alone_prints_them(tmp_path, capsys, monkeypatch):
    module = load("fastdp.keras.h5_files.convert", "keras")
    monkeypatch.setattr(module, "convert", lambda source, destination: module.warn_user("a note"))
    monkeypatch.setattr("fastdp.data.h5_checks.check_conversion", lambda *_: None)
    assert main(["convert", "a.h5", "b.h5", "--json"]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out) == {"source": "a.h5", "destination": "b.h5", "notes": ["a note"]}
    assert said.err == ""
    assert main(["convert", "a.h5", "b.h5"]) == 0
    assert capsys.readouterr() == ("Wrote b.h5\n", "fastdp convert: a note\n")


def test_bench_alone_prints_help_with_examples(capsys):
    assert main(["bench"]) == 0
    said = capsys.readouterr().out
    assert "fastdp bench my_model.keras" in said
    assert "--virtual" in said


def test_a_missing_library_names_the_extra_that_brings_it():
    with pytest.raises(MissingLibraryError, match=r"needs no_such_library.*fastdp\[demo\]"):
        load("no_such_library.part", "demo")
