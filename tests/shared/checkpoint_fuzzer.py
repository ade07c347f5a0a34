"""Mutates checkpoints and restarts from them: python tests/shared/checkpoint_fuzzer.py KIND TRIES [SEED], by hand.

Bytes are flipped, cut, filled and inserted; files are removed, renamed, linked and swapped; JSON, arrays, the manifest
and the HDF5 file in a Keras model's archive are changed deep inside. In half of the tries all checksums are made anew,
as somebody who means harm would do. The first checkpoint is never touched, so a restart must find values of one of
them; Keras may raise a documented error, where a signed state has another place in the epoch than its data. Everything
outside stays as it was. KIND is "functions", "torch" or "keras".
"""

from __future__ import annotations

import faulthandler
import hashlib
import json
import random
import shutil
import sys
import tempfile
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import file_mutations
import numpy as np
from trained_kinds import KINDS

import fastdp
from fastdp.checkpoint import folders

SECRET = 123456.75
SECONDS = 60


class Fuzzer:
    """Tries on copies of one folder with three checkpoints.

    Args:
        kind: "functions", "torch" or "keras".
        seed: of all mutations.
        place: an empty folder.
    """

    def __init__(self, kind: str, seed: int, place: Path) -> None:
        self._kind, self._random, self._place = kind, random.Random(seed), place
        self._outside = place / "outside"
        self._outside.mkdir()
        np.savez(self._outside / "state.npz", np.full(30, SECRET))
        (self._outside / "state.json").write_text('{"list": []}')
        file_mutations.write_secrets(self._outside)
        self._original = place / "original"
        self._states = {0: self._fresh()}
        self._write()
        self._outside_before = self._contents()
        self.outcomes: Counter[str] = Counter()

    def _fresh(self) -> list[np.ndarray]:
        return self._state(self._model())

    def _model(self) -> Any:
        if self._kind == "keras":
            return _keras_model()
        return KINDS[{"functions": "functions", "torch": "torch step"}[self._kind]](2)

    def _state(self, model: Any) -> list[np.ndarray]:
        if self._kind == "keras":
            return [np.array(weight) for weight in model.template.get_weights()]
        return [np.array(array) for array in model.state()]

    def _write(self) -> None:
        """Checkpoints of steps 1 to 3, and what the model is at each."""
        model = self._model()
        if self._kind == "keras":
            note = _Noting(self._states, self._state)
            _fit(model, self._original, [note], epochs=3)
            return
        with fastdp.Checkpoint(self._original, every_steps=1, keep=3, **model.parts()) as checkpoint:
            for number in (1, 2, 3):
                model.step(number)
                checkpoint.step()
                self._states[number] = self._state(model)

    def _contents(self) -> dict[str, str]:
        files = [path for path in self._place.rglob("*") if path.is_file() and "try" not in path.parts]
        return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}

    def attempt(self) -> None:
        """One try.

        Raises:
            AssertionError: a restart did what it must not do.
        """
        folder = self._place / "try"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self._original, folder, symlinks=True)
        told = []
        for _ in range(self._random.randint(1, 2)):
            step = self._random.choice([3, 3, 3, 2])
            told.append(self._mutate(folder / folders.name_of(step)))
        faulthandler.dump_traceback_later(SECONDS, exit=True)  # a library that hangs hears no signal
        outcome, state = self._restart(folder)
        faulthandler.cancel_dump_traceback_later()
        self.outcomes[outcome] += 1
        if state is not None:
            right = any(_equal(state, known) for known in self._states.values())
            changed = any("inside" in one for one in told)  # values that somebody has signed anew are what they are
            assert right or changed, f"{told}: wrong values"
            for secret in (SECRET, file_mutations.SECRET):
                assert not any((array == secret).any() for array in state), f"{told}: values of another file"
        assert self._contents() == self._outside_before, f"{told}: something outside has changed"

    def _restart(self, folder: Path) -> tuple[str, list[np.ndarray] | None]:
        model = self._model()
        with warnings.catch_warnings(record=True):
            warnings.simplefilter("always")
            try:
                if self._kind == "keras":
                    _fit(model, folder, [], epochs=0)
                    return "restored", self._state(model)
                with fastdp.Checkpoint(folder, every_steps=1, **model.parts()) as checkpoint:
                    position = checkpoint.restore()
            except (ValueError, TypeError, RuntimeError) as error:
                caught = error
            else:
                return f"restored step {position.step if position else None}", self._state(model)
        undocumented = isinstance(caught, (RecursionError, NotImplementedError, UnicodeError))
        assert not undocumented, f"{type(caught).__name__}: {caught}"
        assert self._kind == "keras", f"the first one could be used: {caught}"
        assert "`x` has" in str(caught), f"the first one could be used: {caught}"
        return f"error {type(caught).__name__}", None

    # Mutations.

    def _mutate(self, place: Path) -> str:
        """Change one thing in a checkpoint; says what."""
        if not place.is_dir() or not list(place.iterdir()):
            return "gone"
        file = self._random.choice(sorted(place.iterdir()))
        ways = [self._bytes, self._bytes, self._names, self._inside, self._inside, self._manifest]
        how = self._random.choice([*ways, *([self._weights] * 6 if self._kind == "keras" else [])])
        told = how(place, file)
        if self._random.random() < 0.5 and how != self._manifest:
            _sign(place)
            told += ", inside" if how == self._bytes else ", signed"
        return f"{place.name}/{file.name}: {told}"

    def _bytes(self, place: Path, file: Path) -> str:
        if not file.is_file() or file.is_symlink():
            return "gone"
        content = bytearray(file.read_bytes())
        at = self._random.randrange(len(content) + 1)
        length = self._random.choice([1, 4, 64, 1000])
        kind = self._random.choice(["flip", "cut", "fill", "insert", "empty"])
        if kind == "flip" and content:
            content[at % len(content)] ^= 1 << self._random.randrange(8)
        elif kind == "cut":
            del content[at : at + length]
        elif kind == "fill":
            content[at : at + length] = bytes(self._random.choice([0, 255]) for _ in range(length))
        elif kind == "insert":
            content[at:at] = self._random.randbytes(length)
        else:
            content.clear()
        file.write_bytes(content)
        return kind

    def _names(self, place: Path, file: Path) -> str:
        kind = self._random.choice(["remove", "link", "folder", "rename", "swap", "remove all"])
        if kind == "remove all":
            shutil.rmtree(place)
        elif file.exists() and not file.is_dir():
            file.unlink()
            if kind == "link":
                file.symlink_to(self._outside / "state.npz")
            elif kind == "folder":
                file.mkdir()
            elif kind == "rename":
                (place / f"{file.name}2").write_bytes(b"x")
            elif kind == "swap":
                shutil.copy(self._outside / "state.npz", file)
        return kind

    def _inside(self, place: Path, file: Path) -> str:
        """Change values within a structure or the arrays, and sign them."""
        path = place / self._random.choice(["state.json", "state.npz"])
        if not path.is_file() or path.is_symlink():
            return "gone"
        if path.suffix == ".json":
            try:
                value = json.loads(path.read_text("utf-8", "replace"))
            except ValueError:
                return "broken already"
            path.write_text(json.dumps(self._changed(value)), "utf-8")
        else:
            arrays = [np.zeros(self._random.choice([0, 1, 7])), np.array([{}], object), np.array("text")]
            np.savez(path, *self._random.choices(arrays, k=self._random.randrange(40)), allow_pickle=True)
        _sign(place)
        return "inside"

    def _weights(self, place: Path, file: Path) -> str:
        """Change the HDF5 file in a Keras model's archive, which is whole again, and signed."""
        path = place / "model.keras"
        if not path.is_file() or path.is_symlink() or not zipfile.is_zipfile(path):
            return "gone"
        try:
            with zipfile.ZipFile(path) as archive:
                parts = {name: archive.read(name) for name in archive.namelist()}
        except (zipfile.BadZipFile, OSError, EOFError, RuntimeError):  # RuntimeError: it declares to be encrypted
            return "broken already"
        inner = self._place / "weights.h5"
        inner.write_bytes(parts.get("model.weights.h5", b""))
        of_structure = [kind for kind in file_mutations.H5_MUTATIONS if kind != "configuration"]
        # The bytes last: the fuzzer itself opens no damaged file.
        kinds = self._random.choices(of_structure, k=self._random.randint(0, 2))
        kinds += self._random.choices(file_mutations.BYTE_MUTATIONS, k=self._random.randint(0 if kinds else 1, 1))
        for kind in kinds:
            file_mutations.mutate_h5(inner, kind, self._random.getrandbits(32), self._outside)
        parts["model.weights.h5"] = inner.read_bytes()
        inner.unlink()
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in parts.items():
                archive.writestr(name, content)
        _sign(place)
        return f"inside weights by {kinds}"

    def _changed(self, value: Any) -> Any:
        """A value with one part of it changed, somewhere deep."""
        odd: list[Any] = [
            None,
            -1,
            10**30,
            1e308,
            "x",
            [],
            {},
            {"array": 10**9},
            {"tensor": ["os", 0, 1]},
            True,
            "../x",
        ]
        odd += [{"tuple": 3}, {"dict": [[{"list": []}, 1]]}, {"array": -1}, [[[]]], {"array": "0"}]
        if isinstance(value, (dict, list)) and value and self._random.random() < 0.85:
            keys = list(value) if isinstance(value, dict) else list(range(len(value)))
            key = self._random.choice(keys)
            value[key] = self._changed(value[key])
            return value
        return self._random.choice(odd)

    def _manifest(self, place: Path, file: Path) -> str:
        path = place / folders.MANIFEST
        if not path.is_file() or path.is_symlink():
            return "gone"
        try:
            manifest = json.loads(path.read_text("utf-8", "replace"))
        except ValueError:
            return "broken already"
        manifest = self._changed(manifest)
        if isinstance(manifest, dict):
            files = manifest.get("files")
            if isinstance(files, dict) and self._random.random() < 0.3:
                files[self._random.choice(["../../outside/state.npz", "/etc/passwd", "a\0b", "", ".", "x" * 300])] = {}
            manifest.pop("sha256", None)
            manifest["sha256"] = folders._digest(folders._canonical(manifest))
        path.write_text(json.dumps(manifest), "utf-8")
        return "manifest"


def _sign(place: Path) -> None:
    """Make all checksums anew."""
    if not place.is_dir():
        return
    files = [file for file in sorted(place.iterdir()) if file.name != folders.MANIFEST and file.is_file()]
    manifest = folders._manifest(int(place.name.removeprefix("step-")), files)
    path = place / folders.MANIFEST
    if path.is_dir() and not path.is_symlink():
        path.rmdir()
    elif path.is_symlink():
        path.unlink()
    path.write_text(json.dumps(manifest), "utf-8")


def _equal(one: list[np.ndarray], other: list[np.ndarray]) -> bool:
    return all(np.array_equal(a, b, equal_nan=True) for a, b in zip(one, other, strict=False))


def _keras_model() -> Any:
    import keras

    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    parallel = fastdp.wrap(model, 2, compile=None)
    parallel.compile("adam", "mse")
    return parallel


def _fit(model: Any, folder: Path, callbacks: list[Any], epochs: int) -> None:
    from fastdp.callbacks import Checkpoint

    x = np.linspace(-1, 1, 12, dtype="f4").reshape(4, 3)
    saver = Checkpoint(folder, every_steps=1, keep=3)
    model.fit(x, x[:, :2], batch_size=4, epochs=max(epochs, 3), verbose=0, shuffle=False, callbacks=[*callbacks, saver])


def _Noting(states: dict[int, Any], state: Callable[[Any], Any]) -> Any:
    import keras

    class Noting(keras.callbacks.Callback):  # type: ignore[misc]
        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            states[epoch + 1] = state(self.model)

    return Noting()


def main(kind: str, tries: int, seed: int = 0) -> Counter[str]:
    """Run, and return how the tries ended."""
    fastdp.set_virtual_devices(2)
    with tempfile.TemporaryDirectory() as place:
        fuzzer = Fuzzer(kind, seed, Path(place))
        for number in range(tries):
            try:
                fuzzer.attempt()
            except BaseException as error:
                raise AssertionError(f"{kind}, seed {seed}, try {number}: {error!r}") from error
    return fuzzer.outcomes


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], *map(int, sys.argv[2:]))))  # noqa: T201
