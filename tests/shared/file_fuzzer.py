"""Reads mutated files in this process: each try ends with right values, or with a documented error that names the file.

python file_fuzzer.py TARGET,TARGET TRIES [SEED]

Memory is bounded by the system (RLIMIT_AS). A try that takes too long ends the process, and leaves its file. Prints a
line of JSON: how many tries ended in which way.
"""

from __future__ import annotations

import collections
import faulthandler
import json
import logging
import os
import resource
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ["KERAS_BACKEND"] = "torch"

import h5py
import hypothesis
import keras
import numpy as np
from file_mutations import (
    BYTE_MUTATIONS,
    H5_MUTATIONS,
    SECRET,
    SECRET_TEXT,
    mutate_h5,
    mutated_bytes,
    write_archive,
    write_secrets,
)
from hypothesis import strategies as st

from fastdp.keras.h5_files.convert import convert
from fastdp.utils import HDF5Matrix, get_file, load_model, load_weights, save_weights

ROOM_NBYTES = 1 << 30  # what a try may take besides what the process has: files have some 20 KiB
SECONDS = 30


class FaultError(AssertionError):
    """A try ended in another way than it may."""


def build() -> keras.Model:
    """A model with two layers of weights."""
    x = keras.Input((3,))
    y = keras.layers.BatchNormalization(name="norm")(keras.layers.Dense(4, name="first")(x))
    return keras.Model(x, keras.layers.Dense(1, name="last")(y))


class Files:
    """The whole files that are mutated, and a folder for each try."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        write_secrets(folder)
        (folder / "whole").mkdir()
        model = build()
        model.compile(keras.optimizers.SGD(0.1, momentum=0.9), "mse", metrics=["mae"])
        model.train_on_batch(np.ones((2, 3), np.float32), np.ones((2, 1), np.float32))
        model.save(self.whole("load_model"))
        save_weights(model, self.whole("load_weights"))
        shutil.copy(self.whole("load_weights"), self.whole("by_name"))
        with h5py.File(self.whole("HDF5Matrix"), "w") as file:
            file["x"] = np.arange(60, dtype=np.float32).reshape(20, 3)
            file.create_dataset("group/y", data=np.arange(400).reshape(100, 4), chunks=(7, 4), compression="gzip")
        self._write_wrapper(self.whole("convert"))

    def whole(self, target: str) -> Path:
        """The whole file of a target."""
        return self.folder / "whole" / f"{target}.h5"

    def _write_wrapper(self, path: Path) -> None:
        """A file of a Keras 2 parallel model, as `convert` wants it."""
        layers = [{"class_name": "Dense", "config": {"name": name, "units": 4}} for name in ("dense_1", "dense_2")]
        nested = {"class_name": "Sequential", "name": "chain", "config": {"name": "chain", "layers": layers}}
        plain = [{"class_name": kind, "config": {"name": kind}} for kind in ("InputLayer", "Lambda", "Concatenate")]
        with h5py.File(path, "w") as file:
            config = {"class_name": "Model", "config": {"name": "m", "layers": [*plain[:2], nested, plain[2]]}}
            file.attrs["model_config"] = json.dumps(config)
            group = file.create_group("model_weights")
            group.attrs["layer_names"] = [b"InputLayer", b"Lambda", b"chain", b"Concatenate"]
            names = [f"{layer}/{weight}:0" for layer in ("dense_1", "dense_2") for weight in ("kernel", "bias")]
            for name in ("InputLayer", "Lambda", "chain", "Concatenate"):
                inner = group.create_group(name)
                inner.attrs["weight_names"] = np.array(names if name == "chain" else [], "S20")
            for name in names:
                group["chain"][name] = np.ones((4, 4) if "kernel" in name else (4,), np.float32)


def check_values(values: Sequence[Any]) -> None:
    """None of the values is one of a file outside."""
    for value in values:
        array = np.asarray(value)
        if array.dtype.kind in "fiu" and np.any(array == SECRET):
            raise FaultError("a value of a file outside was read")


def stored(path: Path, where: str) -> list[Any]:
    """The weights in a file, as h5py reads them."""
    with h5py.File(path) as file:
        top = file.get(where, file)
        layers = [top[name] for name in names(top, "layer_names")]
        return [layer[name][()] for layer in layers for name in names(layer, "weight_names")]


def names(group: h5py.Group, name: str) -> list[str]:
    """A list of names in an attribute."""
    return [one.decode() if isinstance(one, bytes) else one for one in group.attrs.get(name, [])]


def check_weights(model: keras.Model, path: Path, where: str) -> None:
    """The model has the weights of the file."""
    layers = [[*layer.trainable_weights, *layer.non_trainable_weights] for layer in model.layers]
    found = [np.asarray(variable.value.detach().cpu()) for layer in layers for variable in layer]
    check_values(found)
    for value, wanted in zip(found, stored(path, where), strict=True):
        if not np.array_equal(value, np.asarray(wanted).astype(value.dtype), equal_nan=True):
            raise FaultError("the model has other weights than the file")


def try_load_model(path: Path) -> None:
    """Load a whole model, with the state of its optimizer."""
    model = load_model(path)
    check_weights(model, path, "model_weights")
    if model.compiled:
        check_values([variable.value.detach().cpu() for variable in model.optimizer.variables])


def try_load_weights(path: Path) -> None:
    """Load weights in the order of layers."""
    model = build()
    load_weights(model, path)
    check_weights(model, path, "model_weights")


def try_by_name(path: Path) -> None:
    """Load weights by the names of layers: all that fit, or nothing."""
    model = build()
    before = [np.array(weight) for weight in model.get_weights()]
    try:
        load_weights(model, path, by_name=True)
    except (OSError, ValueError):
        if not all(map(np.array_equal, before, model.get_weights())):
            raise FaultError("loading failed and changed the model") from None
        raise
    check_values(model.get_weights())


def try_matrix(path: Path) -> None:
    """Read rows in several ways."""
    for name in ("x", "group/y"):
        with HDF5Matrix(path, name) as matrix:
            rows = [matrix[0], matrix[-1], matrix[:5], matrix[[3, 1, 1]]] if len(matrix) > 3 else [matrix[:]]
            if matrix.size < 1 << 16:
                rows.append(np.asarray(matrix))
                with h5py.File(path) as file:
                    if not np.array_equal(rows[-1], file[name][()], equal_nan=rows[-1].dtype.kind == "f"):
                        raise FaultError("the matrix has other values than the file")
            check_values(rows)


def try_convert(path: Path) -> None:
    """Convert an old file. The new one is whole, or not there."""
    new = path.parent / "new.h5"
    try:
        convert(path, new)
    finally:
        left = sorted(one.name for one in path.parent.iterdir())
        if left not in ([path.name, "new.h5"], [path.name]):
            raise FaultError(f"left behind: {left}")
    with h5py.File(new) as file:
        file.visititems(lambda _, item: check_values([item[()]]) if isinstance(item, h5py.Dataset) else None)


def try_archive(path: Path) -> None:
    """Fetch and unpack an archive. Nothing lies outside of the folder, nothing of outside lies in it."""
    cache = path.parent / "cache"
    for name, options in (("archive", {"extract": True}), ("folder", {"untar": True})):
        try:
            get_file(name, path.as_uri(), cache_dir=cache, **options)
        finally:
            outside = sorted(one.name for one in path.parent.iterdir())
            if outside != [path.name, "cache"] or os.path.lexists("/tmp/fastdp-fuzz-up"):
                raise FaultError(f"written outside: {outside}")
            for one in (cache / "datasets").rglob("*"):
                if not Path(os.path.realpath(one)).is_relative_to(cache / "datasets"):
                    raise FaultError(f"{one} leads outside")
                if one.is_file() and not one.name.startswith(("archive", "folder")) and SECRET_TEXT in one.read_bytes():
                    raise FaultError(f"{one} is a file of outside")


TARGETS: dict[str, Callable[[Path], None]] = {
    "load_model": try_load_model,
    "load_weights": try_load_weights,
    "by_name": try_by_name,
    "HDF5Matrix": try_matrix,
    "convert": try_convert,
    "get_file": try_archive,
}
ALLOWED: dict[str, tuple[type[Exception], ...]] = {
    "load_model": (OSError, TypeError, ValueError),
    "HDF5Matrix": (OSError, KeyError, ValueError),
}


def attempt(files: Files, target: str, mutations: Sequence[tuple[str, int]]) -> str:
    """Mutate a file, read it, and say how that ended."""
    folder = Path(tempfile.mkdtemp(dir=files.folder / "tries"))
    path = folder / ("archive.bin" if target == "get_file" else "file.h5")
    try:
        if target == "get_file":
            write_archive(path, mutations[0][1])
            for kind, seed in mutations[1:]:
                path.write_bytes(mutated_bytes(path.read_bytes(), kind, seed))
        else:
            shutil.copy(files.whole(target), path)
            # The bytes last: HDF5 may stand for ever where the fuzzer itself opens a damaged file.
            for kind, seed in sorted(mutations, key=lambda one: one[0] in BYTE_MUTATIONS):
                mutate_h5(path, kind, seed, files.folder)
        return read(target, path)
    finally:
        shutil.rmtree(folder)


def read(target: str, path: Path) -> str:
    """Read a file within a limit of time; the name of the error it ended with, or "right"."""
    faulthandler.dump_traceback_later(SECONDS, exit=True)  # an alarm would wait for the library that hangs
    try:
        TARGETS[target](path)
    except FaultError:
        raise
    except ALLOWED.get(target, (OSError, ValueError)) as error:
        if str(path.parent) not in str(error):
            raise FaultError(f"{type(error).__name__} names no file: {error}") from error
        check_memory(error)
        return type(error).__name__
    except Exception as error:
        raise FaultError(f"{type(error).__name__} is not documented: {error}") from error
    finally:
        faulthandler.cancel_dump_traceback_later()
    return "right"


def check_memory(error: BaseException | None) -> None:
    """No error on the way came from an allocation that the system refused."""
    while error is not None:
        if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
            raise FaultError("it asked for more memory than it may")
        error = error.__cause__ or error.__context__


def bound_memory() -> None:
    """Let this process have little more memory than it has now."""
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + ROOM_NBYTES, now + ROOM_NBYTES))


def fuzz(files: Files, target: str, tries: int, seed: str) -> collections.Counter[str]:
    """Try so many files of a target, and count how they ended. The smallest one that is a fault is raised."""
    count: collections.Counter[str] = collections.Counter()
    kinds = BYTE_MUTATIONS if target == "get_file" else (*H5_MUTATIONS, *BYTE_MUTATIONS)

    @hypothesis.settings(
        max_examples=tries,
        deadline=None,
        database=None,
        derandomize=not seed,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(
        st.lists(st.tuples(st.sampled_from(kinds), st.integers(0, (1 << 32) - 1)), min_size=1, max_size=3)
    )
    def run(mutations: list[tuple[str, int]]) -> None:
        count[attempt(files, target, mutations)] += 1

    (hypothesis.seed(int(seed))(run) if seed else run)()
    return count


def main(targets: str, tries: str, seed: str = "") -> None:
    """Try so many files of each target; print what they ended with."""
    warnings.simplefilter("ignore")
    counts: dict[str, dict[str, int]] = {}
    logging.disable()
    with tempfile.TemporaryDirectory(prefix="fastdp-fuzz-") as folder:
        files = Files(Path(folder).resolve())
        (files.folder / "tries").mkdir()
        for target in targets.split(","):
            if target != "get_file":  # warm up: what libraries load at their first use is not a file's doing
                read(target, files.whole(target)) if target != "convert" else None
        bound_memory()
        for target in targets.split(","):
            counts[target] = fuzz(files, target, int(tries), seed)
    sys.stdout.write(json.dumps({target: dict(count) for target, count in counts.items()}) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
