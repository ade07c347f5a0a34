"""`fastdp run`: an unmodified script on several devices, with everything around it as with plain Python."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path

import pytest
from scripts import fastdp_run, loaded_python, loaded_run, python

pytestmark = pytest.mark.skipif(importlib.util.find_spec("keras") is None, reason="Keras is not installed")

TRAINING = """
import keras, numpy as np, sys
keras.utils.set_random_seed(1)
layers = [keras.layers.Dense(4, activation="tanh"), keras.layers.BatchNormalization(), keras.layers.Dense(1)]
model = keras.Sequential(layers)
model.compile("adam", "mse")
x = np.random.default_rng(0).normal(size=(21, 3)).astype("float32")
history = model.fit(x, x.sum(1, keepdims=True), batch_size=8, epochs=2, verbose=0)
print([round(loss, 4) for loss in history.history["loss"]])
print(type(model.train_function).__name__, file=sys.stderr)
"""


def test_a_script_trains_as_plain_python_and_on_the_devices(tmp_path):
    (tmp_path / "train.py").write_text(TRAINING)
    plain = loaded_python("train.py", folder=tmp_path)
    parallel = loaded_run("--virtual", "2", "train.py", folder=tmp_path)
    assert plain.stdout == parallel.stdout
    assert parallel.stderr.strip() == "_ParallelFunction"
    assert plain.stderr.strip() == "function"


def test_keras_runs_on_torch_whatever_the_environment_names(tmp_path):
    (tmp_path / "show.py").write_text("import keras; print(keras.backend.backend())")
    for environment in ({"KERAS_BACKEND": "jax"}, {"KERAS_BACKEND": "torch"}):
        ran = loaded_run("--virtual", "2", "show.py", folder=tmp_path, **environment)
        assert ran.stdout == "torch\n"
        assert ("not on KERAS_BACKEND=jax" in ran.stderr) == (environment["KERAS_BACKEND"] == "jax")


def test_graphs_are_asked_for_as_of_install(tmp_path):
    (tmp_path / "train.py").write_text(TRAINING)
    done = loaded_run("--virtual", "2", "--graph", "step", "train.py", folder=tmp_path)
    assert 'graph="step" has nothing to record on virtual devices in host memory' in done.stderr
    assert "_ParallelFunction" in done.stderr
    assert "invalid choice: 'fast'" in loaded_run("--graph", "fast", "train.py", folder=tmp_path).stderr


SHOW = "import sys; print(__name__, sys.argv, sys.path[0], __import__('neighbour').word)"


@pytest.mark.parametrize("devices", [["--virtual", "2", "--gpus", "0,1"], []])
def test_arguments_paths_and_main_are_those_of_plain_python(tmp_path, devices):
    folder = tmp_path / "scripts"
    folder.mkdir()
    (folder / "show.py").write_text(SHOW)
    (folder / "neighbour.py").write_text("word = 'found'")
    environment = {} if devices else {"FASTDP_VIRTUAL_DEVICES": "2"}
    plain = python("scripts/show.py", "--gpus", "7", "-m", folder=tmp_path)
    parallel = fastdp_run(*devices, "scripts/show.py", "--gpus", "7", "-m", folder=tmp_path, **environment)
    assert plain.stdout == parallel.stdout
    assert "found" in plain.stdout


def test_a_module_by_name(tmp_path):
    (tmp_path / "tool.py").write_text("import sys; print(__name__, sys.argv[1:], sys.path[0])")
    plain = python("-m", "tool", "--virtual", "x", folder=tmp_path)
    assert fastdp_run("--virtual", "2", "-m", "tool", "--virtual", "x", folder=tmp_path).stdout == plain.stdout


@pytest.mark.parametrize("code", ["sys.exit(3)", "sys.exit('bad')", "sys.exit()", "pass", "1 / 0"])
def test_exit_status_and_traceback_are_those_of_plain_python(tmp_path, code):
    (tmp_path / "end.py").write_text(f"import sys\ndef f():\n    {code}\nf()\n")
    plain = python(str(tmp_path / "end.py"), folder=tmp_path)
    parallel = fastdp_run("--virtual", "2", str(tmp_path / "end.py"), folder=tmp_path)
    assert (parallel.returncode, parallel.stderr) == (plain.returncode, plain.stderr)


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["missing.py"], 2, "can't open file"),
        (["--virtual", "2", "-m", "no_such_module"], 2, "no module named no_such_module"),
        (["--virtual", "2", "-m", "no_such.module"], 2, "no module named no_such.module"),
        ([], 2, "name a script, or a module after -m"),
        (["--virtual", "2", "--gpus", "3", "a.py"], 2, "wants the devices [0, 1, 2]"),
        (["--gpus", "many", "a.py"], 2, "must be a number"),
        (["--virtual", "2", "-m", ".x"], 2, "no module named .x"),
        (["."], 2, "a folder needs a __main__.py"),
        (["a" * 5000], 2, "can't open file"),
    ],
)
def test_what_cannot_be_run_says_why(tmp_path, arguments, status, message):
    (tmp_path / "a.py").write_text("")
    done = fastdp_run(*arguments, folder=tmp_path)
    assert done.returncode == status
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_auto_runs_anywhere_and_one_line_says_on_what(tmp_path):
    (tmp_path / "a.py").write_text("import fastdp, torch; print(len(fastdp.wrap(torch.nn.Linear(2, 1)).devices))")
    done = loaded_run("--gpus", "auto", "a.py", folder=tmp_path)
    assert (done.returncode, done.stdout) == (0, "1\n")
    assert [line[:29] for line in done.stderr.splitlines()] == ["fastdp: no GPU is visible, so"]
    many = loaded_run("--gpus", "auto", "--virtual", "3", "a.py", folder=tmp_path)
    assert (many.returncode, many.stdout, many.stderr) == (0, "3\n", "")


def test_json_ends_with_one_line_for_programs(tmp_path):
    (tmp_path / "train.py").write_text(TRAINING)
    done = loaded_run("--virtual", "2", "--json", "train.py", folder=tmp_path)
    assert json.loads(done.stderr.splitlines()[-1]) == {
        "script": "train.py",
        "devices": ["virtual:0", "virtual:1"],
        "keras": True,
        "torch": [],
    }


@pytest.mark.slow
def test_keras_own_test_of_a_callback_passes_on_the_devices(tmp_path):
    """A part of `make conformance`, whose other tests import more libraries than .venv has."""
    spec = importlib.util.find_spec("keras")
    file = Path(spec.origin).parent / "src" / "callbacks" / "monitor_callback_test.py"
    settings = ["-q", "-p", "no:cacheprovider", "-c", os.devnull, f"--rootdir={tmp_path}"]
    done = loaded_run("--virtual", "2", "-m", "pytest", *settings, str(file), folder=tmp_path)
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout
