"""The Keras examples run as scripts in a small size: losses fall, devices do not change them, files load elsewhere."""

from __future__ import annotations

import re
import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import h5py
import keras
import numpy as np
import pytest
from scripts import loaded_run
from sklearn.datasets import load_digits

import fastdp

EXAMPLES = Path(__file__).parents[1] / "examples"
Run = Callable[..., str]


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    yield
    fastdp.set_virtual_devices(0)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run an example; what it printed."""

    def go(name: str, *arguments: str) -> str:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        runpy.run_path(str(EXAMPLES / "keras" / name), run_name="__main__")
        return capsys.readouterr().out

    return go


def losses(printed: str) -> list[float]:
    """The first and the last loss that an example tells."""
    return [float(loss) for loss in re.search(r"^loss (\S+) -> ([\d.]+)", printed, re.MULTILINE).groups()]


def test_images_from_hdf5_are_learned_and_a_finished_run_trains_no_more(run: Run, tmp_path: Path) -> None:
    digits = load_digits(n_class=4)
    with h5py.File(tmp_path / "own.h5", "w") as file:
        file["images"] = (digits.images[:400, ..., None] * 15).astype(np.uint8)
        file["labels"] = digits.target[:400]
    small = ("--file", "own.h5", "--devices", "2", "--epochs", "2", "--batch-size", "32")
    accuracy = float(re.search(r"not trained on: (\S+)", run("images_hdf5.py", *small)).group(1))
    assert accuracy > 0.5
    weights = keras.models.load_model(tmp_path / "images.keras").get_weights()
    assert list((tmp_path / "run").glob("step-*"))
    with pytest.warns(UserWarning, match="this `fit` trains no more"):
        run("images_hdf5.py", *small)
    for found, wanted in zip(keras.models.load_model(tmp_path / "images.keras").get_weights(), weights, strict=True):
        np.testing.assert_array_equal(found, wanted)


def test_an_lstm_learns_padded_text(run: Run) -> None:
    first, last = losses(run("text_lstm.py", "--devices", "3", "--rows", "700", "--epochs", "3"))
    assert last < first < 1.2


def test_a_transformer_learns_text_and_its_file_continues_a_line(run: Run, tmp_path: Path) -> None:
    printed = run("text_transformer.py", "--devices", "2", "--rows", "500", "--epochs", "2")
    first, last = losses(printed)
    assert last < first
    assert "    def _" in printed
    assert keras.models.load_model(tmp_path / "text.keras").output_shape[:2] == (None, 32)


@pytest.mark.parametrize("name", ["vae.py", "contrastive.py"])
def test_a_loss_of_the_whole_batch_is_the_same_on_one_device_and_on_three(run: Run, name: str) -> None:
    one, three = (losses(run(name, "--devices", devices, "--epochs", "2")) for devices in ("1", "3"))
    assert one[1] < one[0]
    assert three == pytest.approx(one, rel=1e-3)


def test_a_plain_script_gives_the_same_under_fastdp_run(run: Run, tmp_path: Path) -> None:
    alone = run("plain_script.py")
    script = str(EXAMPLES / "keras" / "plain_script.py")
    done = loaded_run("--virtual", "2", script, folder=tmp_path)
    plain, parallel = ([float(number) for number in re.findall(r"\d\.\d+", text)] for text in (alone, done.stdout))
    assert len(plain) == 5
    assert parallel == pytest.approx(plain, abs=2e-3)
    assert plain[3] < plain[0]


def test_every_example_is_run_here() -> None:
    tested = set(re.findall(r'"(\w+\.py)"', Path(__file__).read_text(encoding="utf-8")))
    assert tested == {path.name for path in (EXAMPLES / "keras").glob("*.py")}
