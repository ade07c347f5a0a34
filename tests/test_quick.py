"""`make test-quick`: every package has tests in it, and all that it names are there."""

from __future__ import annotations

from pathlib import Path

from quick import QUICK, files, installed

ROOT = Path(__file__).parents[1]


def test_every_package_has_quick_tests() -> None:
    packages = {path.parent.name for path in (ROOT / "fastdp").glob("*/__init__.py")}
    modules = {path.stem for path in (ROOT / "fastdp").glob("[!_]*.py")}
    assert (packages | modules) - set(QUICK) == set()


def test_all_that_is_named_is_there() -> None:
    for name in files():
        file, _, test = name.partition("::")
        found = [ROOT / file] if file.endswith(".py") else sorted((ROOT / file).glob("test_*.py"))
        assert found, name
        assert all(f"def {test or 'test_'}" in path.read_text(encoding="utf-8") for path in found), name


def test_files_that_need_what_is_not_installed_are_left_out_and_no_others() -> None:
    assert installed(lambda source: []) == files()
    without_keras = installed(lambda source: ["keras"] if "import keras" in source else [])
    assert "tests/test_options.py" in without_keras
    # By the file itself, by the conftest.py beside it, and by a file of a folder.
    gone = {name.partition("::")[0] for name in set(files()) - set(without_keras)}
    assert gone >= {"tests/keras/test_placement.py", "tests/exactness/test_metrics.py", "tests/keras/keras2"}
