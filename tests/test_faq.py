"""The scripts of examples/faq run, each in a folder of its own, and show what they say."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

import fastdp

FAQ = Path(__file__).parents[1] / "examples" / "faq"
Run = Callable[..., tuple[dict[str, Any], str]]


@pytest.fixture(autouse=True)
def eight_virtual_devices() -> Iterator[None]:
    fastdp.set_virtual_devices(8)
    yield
    fastdp.set_virtual_devices(0)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a script; its names, and what it printed."""

    def go(name: str, *arguments: str) -> tuple[dict[str, Any], str]:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        keras.utils.set_random_seed(0)
        return runpy.run_path(str(FAQ / name), run_name="__main__"), capsys.readouterr().out

    return go


def test_train_on_8_devices_gives_each_32_rows_of_256(run: Run) -> None:
    names, printed = run("train_on_8_devices.py")
    assert [replica.device.name for replica in names["parallel_model"].engine.replicas] == [
        f"virtual:{i}" for i in range(8)
    ]
    losses = names["history"].history["loss"]
    assert len(losses) == 20
    assert losses[-1] < losses[0]
    assert f"{losses[-1]:.3f}" in printed


def test_the_first_script_runs_alone_in_a_fresh_process(tmp_path: Path) -> None:
    """It chooses Keras's backend and makes its devices itself."""
    kept = {key: value for key, value in os.environ.items() if key not in ("KERAS_BACKEND", "FASTDP_VIRTUAL_DEVICES")}
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", str(FAQ / "train_on_8_devices.py")],
        cwd=tmp_path,
        env={**kept, "CUDA_VISIBLE_DEVICES": "", "KERAS_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"loss \d\.\d{3} -> \d\.\d{3}", done.stdout.strip())


def test_save_and_load_goes_on_with_the_optimizer(run: Run) -> None:
    names, printed = run("save_and_load.py")
    assert re.findall(r": (\w+)", printed) == ["20", "True", "24", "True"]
    assert not isinstance(names["model"], fastdp.ParallelModel)


def test_weights_by_name_load_the_shared_layer_alone(run: Run) -> None:
    names, printed = run("weights_by_name.py")
    assert printed.count("True") == 2
    dense, new = names["model"].layers
    np.testing.assert_array_equal(dense.get_weights()[0], names["first"].layers[0].get_weights()[0])
    assert new.get_weights()[0].shape == (2, 10)


def test_intermediate_outputs_differ_between_testing_and_training(run: Run) -> None:
    names, printed = run("intermediate_output.py")
    assert names["layer_output"].shape == (10, 6)
    assert not (names["in_test"] == 0).any()
    assert (names["in_training"] == 0).any()
    assert "the same values: True" in printed


def test_the_validation_split_is_the_end_of_the_data(run: Run) -> None:
    names, printed = run("validation_split.py")
    assert "validated on the last 20 rows: True" in printed
    assert set(names["hist"].history) == {"loss", "mae", "val_loss", "val_mae"}
    assert all(len(values) == 3 for values in names["hist"].history.values())


def test_rows_are_shuffled_anew_in_each_epoch_unless_told_otherwise(run: Run) -> None:
    orders = run("shuffle.py")[0]["orders"]
    rows = list(range(24))
    assert all(sorted(epoch) == rows for epochs in orders.values() for epoch in epochs)
    assert orders[False] == [rows, rows]
    for shuffled in (orders[True], orders["batch"]):
        assert shuffled[0] != shuffled[1]
        assert rows not in shuffled
    for epoch in orders["batch"]:
        assert all(epoch[i + 1] == epoch[i] + 1 for i in range(24) if i % 4 < 3)


def test_a_frozen_layer_stays_and_an_unfrozen_one_moves(run: Run) -> None:
    names, printed = run("freeze.py")
    first, frozen, trained = names["kernels"]
    np.testing.assert_array_equal(first, frozen)
    assert not np.array_equal(frozen, trained)
    assert re.findall(r": (\w+)", printed) == ["False", "True", "True"]


def test_pop_takes_the_last_layer_away(run: Run) -> None:
    assert run("pop.py")[1].split("\n")[:4] == ["2", "(4, 16)", "1", "(4, 32)"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["VGG16", "VGG19", "ResNet50", "InceptionV3", "Xception"])
def test_each_application_trains(run: Run, name: str) -> None:
    names, printed = run("applications.py", name)
    assert printed.startswith(f"{name}: ")
    assert printed.count("\n") == 1
    assert np.isfinite(names["loss"])


def test_sequential_and_functional_models_train(run: Run) -> None:
    names, _ = run("sequential_and_functional.py")
    assert set(names["sequential"]) == {"loss", "accuracy"}
    assert set(names["functional"]) == {"loss", "class_loss", "size_loss"}
    assert all(np.isfinite(value).all() for value in [*names["sequential"].values(), *names["functional"].values()])


def test_every_layer_of_the_faq_has_its_shape(run: Run) -> None:
    assert run("layers.py")[0]["shapes"] == {
        "Dense": (8, 8, 4),
        "Conv2D": (8, 8, 4),
        "Conv2DTranspose": (17, 17, 4),
        "Conv3D": (3, 7, 7, 4),
        "Cropping2D": (6, 4, 3),
        "ZeroPadding2D": (12, 12, 3),
        "MaxPooling2D": (4, 4, 3),
        "AveragePooling2D": (4, 4, 3),
        "GlobalMaxPooling2D": (3,),
    }


def test_hdf5_matrices_give_what_arrays_give(run: Run) -> None:
    names, printed = run("hdf5_matrix.py")
    assert names["predicted"].shape == (50, 1)
    assert "as from memory: True" in printed


def test_a_data_set_on_the_devices_gives_what_arrays_give(run: Run) -> None:
    names, printed = run("device_dataset.py")
    assert printed == "predicted (50, 2)\nlosses as from arrays: True\n"
    assert len(names["history"].history["val_loss"]) == 3


def test_layers_in_front_augment_as_one_device_would(run: Run) -> None:
    _, printed = run("augmentation.py")
    assert printed == "losses as on one device: True\npredicted (64, 2)\n"


def test_the_utilities_work_by_their_old_names(run: Run) -> None:
    names, printed = run("utilities.py")
    assert isinstance(names["layer"].kernel_regularizer, names["MyObject"])
    assert "[[0.6 0.8]]" in printed
    assert len(names["history"].history["loss"]) == 2
    assert any("Total params: 15" in line for line in names["lines"])


def test_every_script_of_the_faq_is_run_here() -> None:
    text = Path(__file__).read_text(encoding="utf-8")
    elsewhere = {"two_branches.py"}  # device parallelism, with the tests of fastdp.device
    assert {path.name for path in FAQ.glob("*.py")} - elsewhere == set(re.findall(r'run\("(\w+\.py)"', text))
