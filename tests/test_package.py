"""Wheel and sdist: the same bytes from the same sources, kernels inside, tests and pages whole; a quick import."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import build_package
import pytest

ROOT = build_package.ROOT
LEFT_OUT = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__", "results")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> list[list[Path]]:
    """What was built from two copies of the checkout, whose files have other times and modes."""
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SOURCE_DATE_EPOCH", "1700000000")
        for number, mode in enumerate((0o644, 0o664)):
            copy = tmp_path_factory.mktemp("checkout") / "fastdp"
            shutil.copytree(ROOT, copy, ignore=LEFT_OUT)
            for path in (*copy.rglob("*.py"), *copy.rglob("*.cu")):
                os.utime(path, (number * 10**6 + 10**9,) * 2)
                path.chmod(mode)
            # In a process of its own: setuptools keeps what it has found in a folder.
            script = str(copy / "tests" / "shared" / "build_package.py")
            done = subprocess.run(
                [sys.executable, script, str(copy / "dist")], capture_output=True, text=True, timeout=200, check=True
            )
            found.append([Path(line) for line in done.stdout.splitlines()])
    return found


def test_two_builds_make_the_same_wheel(built: list[list[Path]]) -> None:
    (first, _), (second, _) = built
    assert first.name == second.name
    assert first.read_bytes() == second.read_bytes()


def test_the_wheel_holds_the_package_its_kernels_and_the_license_alone(built: list[list[Path]]) -> None:
    names = zipfile.ZipFile(built[0][0]).namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"fastdp"}
    kernels = {path.name for path in (ROOT / "kernels").glob("*.cu*")}
    assert {name.split("/")[-1] for name in names if name.startswith("fastdp/kernels/")} - {"__init__.py"} == kernels
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "fastdp").rglob("*.py")}
    assert modules <= set(names)
    assert [name for name in names if name.endswith("licenses/LICENSE")]


def test_the_sdist_is_a_whole_checkout(built: list[list[Path]]) -> None:
    with tarfile.open(built[0][1]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for folder in ("tests", "docs", "examples", "kernels"):
        whole = {path.relative_to(ROOT).as_posix() for path in (ROOT / folder).rglob("*") if path.is_file()}
        whole = {name for name in whole if "__pycache__" not in name and not name.endswith((".pyc", ".DS_Store"))}
        assert whole - names == set()
    assert names >= {"Makefile", "LICENSE", "README.md", "CHANGELOG.md", "constraints.txt", "mkdocs.yml", "setup.py"}


def test_an_import_brings_in_nothing_heavy_and_says_nothing(tmp_path: Path) -> None:
    """Names load what they need when they are asked for: the import itself takes a few hundredths of a second."""
    code = (
        "import sys, fastdp; print(sorted({name.split('.')[0] for name in sys.modules} & "
        "{'numpy', 'torch', 'keras', 'rich', 'h5py', 'matplotlib', 'cupy', 'sklearn', 'tensorboard'}), "
        "sum(name.startswith('fastdp') for name in sys.modules) < 10); "
        "fastdp.wrap; print(sorted({name.split('.')[0] for name in sys.modules} & "
        "{'torch', 'keras', 'rich', 'h5py', 'matplotlib', 'cupy', 'sklearn', 'tensorboard'}))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
    )
    assert (done.stdout, done.stderr) == ("[] True\n[]\n", "")
