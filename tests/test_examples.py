"""Every example runs as a script, in a small size."""

from __future__ import annotations

import re
from pathlib import Path

import keras
import numpy as np
import pytest
import sklearn  # noqa: F401  numpy_mlp's data; names the need, so that this file is left out without it
from scripts import loaded_python

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(name: str, *arguments: str, folder: Path, **environment: str) -> str:
    """What an example prints; warnings of fastdp are errors."""
    done = loaded_python(str(EXAMPLES / name), *arguments, folder=folder, **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_numpy_mlp_has_the_same_losses_on_one_device_and_on_four(tmp_path):
    lines = run("numpy_mlp.py", "--epochs", "3", "--batch-size", "99", folder=tmp_path).splitlines()
    losses = np.array([line.split() for line in lines[1:-1]], float)
    assert losses.shape == (3, 4)
    np.testing.assert_allclose(losses[:, 1], losses[:, 2], rtol=1e-10)
    assert losses[2, 1] < losses[0, 1] < 2.3
    accuracies = re.findall(r"0\.\d{4}", lines[-1])
    assert accuracies[0] == accuracies[1] > "0.85"


def test_numpy_function_gives_the_same_on_one_device_and_on_several(tmp_path):
    lines = run("numpy_function.py", "--devices", "3", "--epochs", "6", folder=tmp_path).splitlines()
    (first, last, right), several = ([float(n) for n in re.findall(r"\d\.\d+", line)] for line in lines)
    assert several == pytest.approx([first, last, right], rel=1e-9)
    assert last < first / 4
    assert right > 0.95


def test_keras_fallback_trains_without_devices_and_with_four(tmp_path):
    alone = run("keras_fallback.py", folder=tmp_path).splitlines()
    parallel = run("keras_fallback.py", folder=tmp_path, FASTDP_VIRTUAL_DEVICES="4").splitlines()
    assert "single GPU or CPU" in alone[0]
    assert "set_virtual_devices" in alone[0]
    assert parallel[0] == "Training using 4 devices.."
    assert alone[1] == parallel[1]


@pytest.mark.slow
def test_keras_xception_saves_a_file_that_plain_keras_loads(tmp_path):
    small = ["--devices", "2", "--samples", "4", "--batch-size", "4", "--epochs", "1", "--size", "71", "--classes", "3"]
    printed = run("keras_xception.py", *small, folder=tmp_path)
    loss = float(re.search(r"loss on 2 devices: (\S+)", printed).group(1))
    assert np.isfinite(loss)
    model = keras.models.load_model(tmp_path / "my_model.h5", compile=False)
    assert model.name == "xception"
    assert model.output_shape == (None, 3)


def test_every_example_is_run_here():
    tested = set(re.findall(r'run\("(\w+\.py)"', Path(__file__).read_text(encoding="utf-8")))
    tested |= {"torch_loop.py", "cupy_language_model.py"}  # by test_torch_examples.py and test_cupy_example.py
    assert tested == {path.name for path in EXAMPLES.glob("*.py")}
