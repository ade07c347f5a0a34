"""Builds the wheel and the sdist into a folder, by the setuptools that is installed, without a network.

python tests/shared/build_package.py dist
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
from pathlib import Path

from setuptools import build_meta

ROOT = Path(__file__).parents[2]


def build(target: Path, *, wheel: bool = True, sdist: bool = True, root: Path = ROOT) -> list[Path]:
    """Build into `target` from the checkout at `root`; the paths of what was built."""
    target.mkdir(parents=True, exist_ok=True)
    folder, target, made = Path.cwd(), target.resolve(), []
    # One mask for all: a wheel keeps the modes of its files.
    mask = os.umask(0o022)
    try:
        os.chdir(root)
        with contextlib.redirect_stdout(io.StringIO()):
            if wheel:
                made.append(target / build_meta.build_wheel(str(target)))
            if sdist:
                made.append(target / build_meta.build_sdist(str(target)))
    finally:
        os.umask(mask)
        os.chdir(folder)
    return made


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", type=Path)
    for path in build(parser.parse_args().target):
        print(path)  # noqa: T201  a program
