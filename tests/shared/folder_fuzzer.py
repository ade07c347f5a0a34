"""Leaves things in a run's folder between its restarts: python tests/shared/folder_fuzzer.py TRIES [SEED], by hand.

Files, folders, links and pipes lie where checkpoints do, and checkpoints are cut, renamed and removed. Each restart
must load the newest one that is whole, with the values of its step, and save; nothing that a link leads to may change.
"""

from __future__ import annotations

import os
import random
import shutil
import sys
import tempfile
import warnings
from pathlib import Path

import torch

import fastdp
from fastdp.checkpoint import folders

NAMES = [folders.name_of(step) + end for step in range(1, 9) for end in ("", ".tmp", ".old.tmp")]
NAMES += ["step-x", "step-1", ".lock2", "x", f"step-{3:027}"]
KINDS = ("file", "folder", "nest", "link", "broken link", "pipe", "remove", "rename", "inside", "cut")
RESTARTS = 4


class Fuzzer:
    """Tries in one place.

    Args:
        seed: of all that is left.
        place: an empty folder.
    """

    def __init__(self, seed: int, place: Path) -> None:
        self._random, self._run, self._outside = random.Random(seed), place / "run", place / "outside"
        self._outside.mkdir()
        (self._outside / "kept").write_text("kept")

    def attempt(self) -> None:
        """One run with restarts.

        Raises:
            AssertionError: a restart did something else; the message has what was left.
        """
        shutil.rmtree(self._run, ignore_errors=True)
        self._run.mkdir()
        left: list[tuple[str, str]] = []
        for _ in range(RESTARTS):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self._restart(left)
            assert [path.name for path in self._outside.iterdir()] == ["kept"], left
            assert (self._outside / "kept").read_text() == "kept", left
            for _ in range(self._random.randint(0, 4)):
                self._leave(left)

    def _restart(self, left: list[tuple[str, str]]) -> None:
        """Restore, and make some steps, whose number is the weights' value."""
        steps = folders.steps_in(self._run)
        whole = [step for step in steps if folders.what_is_wrong(self._run / folders.name_of(step)) is None]
        module = torch.nn.Linear(3, 2)
        torch.nn.init.zeros_(module.weight)
        options = {"every_steps": 1, "keep": self._random.choice([1, 2, 3])}
        with fastdp.Checkpoint(self._run, model=module, **options) as checkpoint:
            found = checkpoint.restore()
            assert (found and found.step) == (whole[0] if whole else None), left
            assert found is None or set(module.weight.detach().flatten().tolist()) == {float(found.step)}, left
            for _ in range(self._random.randint(0, 3)):
                torch.nn.init.constant_(module.weight, checkpoint.position.step + 1)
                checkpoint.step()
                if self._random.random() < 0.3:
                    checkpoint._store.settle()
                    self._leave(left)

    def _leave(self, left: list[tuple[str, str]]) -> None:
        """Leave something, if it can be left there."""
        path, kind = self._run / self._random.choice(NAMES), self._random.choice(KINDS)
        other = self._run / self._random.choice(NAMES)
        left.append((kind, path.name))
        try:
            if kind == "remove":
                folders.remove_rest(path)
            elif kind == "rename":
                path.rename(other)
            elif kind == "inside" and not path.is_symlink():
                (path / self._random.choice(["manifest.json", "model.pt", "more"])).write_bytes(b"{}")
            elif kind == "cut" and not path.is_symlink():
                file = path / "model.pt"
                file.write_bytes(file.read_bytes()[:-3])
            elif not os.path.lexists(path):
                self._make(path, kind)
        except OSError:
            left.pop()

    def _make(self, path: Path, kind: str) -> None:
        if kind == "file":
            path.write_bytes(bytes(self._random.choice([0, 5000])))
        elif kind == "pipe":
            os.mkfifo(path)
        elif kind in ("folder", "nest"):
            (path if kind == "folder" else path / "a" / "b").mkdir(parents=True)
        else:
            path.symlink_to(self._outside if kind == "link" else self._outside / "none")


def main(tries: int, seed: int = 0) -> int:
    """Run; returns the number of restarts."""
    with tempfile.TemporaryDirectory() as place:
        fuzzer = Fuzzer(seed, Path(place))
        for number in range(tries):
            try:
                fuzzer.attempt()
            except BaseException as error:
                raise AssertionError(f"seed {seed}, try {number}: {error!r}") from error
    return tries * RESTARTS


if __name__ == "__main__":
    print(main(*map(int, sys.argv[1:])))  # noqa: T201
