"""What `import fastdp` gives, what it leaves alone, and what works without torch and Keras."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import fastdp

ROOT = Path(__file__).parents[1]
NEEDS_NO_KERAS = {
    "Checkpoint",
    "DataParallel",
    "DeviceInfo",
    "DeviceTimeoutError",
    "FunctionProgram",
    "HDF5Matrix",
    "ReplicaError",
}
NEEDS_NO_KERAS |= {"StepResult", "data", "device", "devices", "set_virtual_devices", "trace", "wrap"}

BLOCKER = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"torch", "keras", "tensorflow", "jax"}:
            raise ModuleNotFoundError(f"No module named {name!r} (blocked)", name=name)

sys.meta_path.insert(0, Blocker())
"""


def python(code, home, **environment):
    """What a fresh interpreter prints. `home` holds no keras.json unless the test wrote one."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("KERAS_", "FASTDP_", "COV", "PYTEST"))}
    kept |= {"PYTHONPATH": str(ROOT), "KERAS_HOME": str(home), **environment}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], env=kept, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_public_names_of_fastdp():
    assert fastdp.__all__ == [
        "Checkpoint",
        "DataParallel",
        "DeviceInfo",
        "DeviceTimeoutError",
        "FunctionProgram",
        "HDF5Matrix",
        "ParallelModel",
        "ReplicaError",
        "StepResult",
        "__version__",
        "callbacks",
        "data",
        "device",
        "devices",
        "install",
        "mean_over",
        "multi_gpu_model",
        "progress",
        "replica",
        "rows",
        "same",
        "set_virtual_devices",
        "trace",
        "uninstall",
        "utils",
        "wrap",
    ]


def needs_keras():
    for library in ("keras", "torch"):
        if importlib.util.find_spec(library) is None:
            pytest.skip(f"{library} is not installed")


@pytest.mark.parametrize("name", [name for name in fastdp.__all__ if name != "__version__"])
def test_every_name_is_there_once_asked_for(name):
    assert name in dir(fastdp)
    if name not in NEEDS_NO_KERAS:
        needs_keras()
    assert getattr(fastdp, name).__name__.rsplit(".", maxsplit=1)[-1] == name


def test_the_names_of_keras_2_utils():
    needs_keras()
    utils = importlib.import_module("fastdp.utils")
    assert utils.__all__ == [
        "CustomObjectScope",
        "HDF5Matrix",
        "Sequence",
        "get_file",
        "get_layer_output",
        "load_model",
        "load_weights",
        "multi_gpu_model",
        "normalize",
        "plot_model",
        "print_summary",
        "save_weights",
        "to_categorical",
    ]
    assert all(callable(getattr(utils, name)) for name in utils.__all__)
    assert utils.multi_gpu_model is fastdp.multi_gpu_model


PACKAGES = sorted(path.parent for path in (ROOT / "fastdp").rglob("__init__.py"))


@pytest.mark.parametrize("package", [".".join(path.relative_to(ROOT).parts) for path in PACKAGES])
def test_no_name_of_a_package_stands_for_another_thing_than_its_module_of_that_name(package):
    """`import fastdp.device` gave a function once, since a name of the package hid the module."""
    needs_keras()
    folder = ROOT.joinpath(*package.split("."))
    modules = {path.stem for path in folder.glob("*.py")} | {path.parent.name for path in folder.glob("*/__init__.py")}
    found = importlib.import_module(package)
    names = {*vars(found), *getattr(found, "_LATE", ()), *getattr(found, "__all__", ())}
    for name in sorted(names & modules - {"__init__"}):
        assert getattr(found, name) is importlib.import_module(f"{package}.{name}")


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'fastdp' has no attribute 'multi_gpu'"):
        fastdp.multi_gpu  # noqa: B018


def test_keras_2_backend_names_load_where_they_are_asked_for(tmp_path):
    needs_keras()
    code = (
        "import sys; from fastdp import backend as K; print('keras' in sys.modules, K.__all__); "
        "print(K.function.__name__, 'keras' in sys.modules)"
    )
    assert python(code, tmp_path) == "False ['function', 'get_layer_output', 'learning_phase']\nfunction True"


def test_a_backend_name_that_keras_2_had_elsewhere_says_where_it_went():
    with pytest.raises(AttributeError, match=r"no attribute 'mean'.*keras\.ops"):
        fastdp.backend.mean  # noqa: B018


def test_import_fastdp_imports_neither_torch_nor_keras(tmp_path):
    code = "import sys, fastdp; print(sorted({'torch', 'keras', 'tensorflow', 'jax', 'cupy'} & set(sys.modules)))"
    assert python(code, tmp_path) == "[]"


def test_import_fastdp_starts_no_thread_and_makes_no_device(tmp_path):
    devices = "sys.modules['fastdp.runtime.select']._virtual._devices"
    code = f"import threading, sys, fastdp; fastdp.devices, fastdp.wrap; print(threading.active_count(), {devices})"
    assert python(code, tmp_path, FASTDP_VIRTUAL_DEVICES="4") == "1 []"


SHOW = "import os, fastdp; print(os.environ.get('KERAS_BACKEND'))"


def test_torch_becomes_the_backend_where_nobody_chose_one(tmp_path):
    assert python(SHOW, tmp_path) == "torch"
    assert python(SHOW, tmp_path / "no such folder") == "torch"


@pytest.mark.parametrize("backend", ["jax", "tensorflow", "torch"])
def test_a_backend_chosen_by_the_environment_is_kept(tmp_path, backend):
    assert python(SHOW, tmp_path, KERAS_BACKEND=backend) == backend


def test_the_backend_is_left_alone_once_keras_is_imported(tmp_path):
    code = f"import sys, types; sys.modules['keras'] = types.ModuleType('keras')\n{SHOW}"
    assert python(code, tmp_path) == "None"


def test_an_installed_backend_named_in_keras_json_is_kept(tmp_path):
    (tmp_path / "keras.json").write_text(json.dumps({"backend": "numpy"}))  # the one that is always installed
    assert python(SHOW, tmp_path) == "None"


@pytest.mark.parametrize("text", ['{"backend": "no_such_backend"}', "{}", "", "not json"])
def test_a_keras_json_that_names_no_installed_backend_is_no_choice(tmp_path, text):
    (tmp_path / "keras.json").write_text(text)
    assert python(SHOW, tmp_path) == "torch"


ENGINE = """
import numpy as np
import fastdp
from fastdp.runtime.select import resolve

fastdp.set_virtual_devices(3)

def train(parameters, batch):
    x, y = batch
    error = x @ parameters["w"] - y
    return (error**2).mean(), {"w": 2 * x.T @ error / len(x)}, [error]

program = fastdp.FunctionProgram(
    {"w": np.zeros(2)},
    train,
    lambda parameters, slots, gradients: ({"w": parameters["w"] - 0.1 * gradients["w"]}, {}),
    lambda parameters, batch: [batch[0] @ parameters["w"]],
)
engine = fastdp.DataParallel(program, resolve(3))
x = np.random.default_rng(0).normal(size=(50, 2))
for _ in range(100):
    engine.train([x, x @ [3.0, -2.0]])
print(program.parameters["w"].round(3).tolist())
"""


def test_a_function_program_runs_without_torch_and_keras_and_the_process_ends(tmp_path):
    assert python(BLOCKER + ENGINE, tmp_path) == "[3.0, -2.0]"


@pytest.mark.parametrize("name", ["multi_gpu_model", "ParallelModel", "callbacks", "utils", "backend.function"])
def test_a_keras_name_without_keras_is_an_import_error_with_the_remedy(tmp_path, name):
    code = f"{BLOCKER}\nimport fastdp\ntry:\n    fastdp.{name}\nexcept ImportError as error:\n    print(error)"
    message = python(code, tmp_path)
    assert message == f"fastdp.{name} needs Keras and torch. Install them with: pip install 'fastdp[keras]'"


def test_hdf5_matrix_works_without_torch_and_keras(tmp_path):
    assert python(f"{BLOCKER}\nimport fastdp\nprint(fastdp.HDF5Matrix.__name__)", tmp_path) == "HDF5Matrix"
