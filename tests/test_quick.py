"""`make test-quick`: every package has tests in it, and all that it names are there."""

from __future__ import annotations

from pathlib import Path

from quick import QUICK, files

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
