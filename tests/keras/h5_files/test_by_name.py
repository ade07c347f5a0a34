"""Keras 2's weight files: written, loaded in order and by name, by plain Keras too."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import keras
import numpy as np
import pytest

import fastdp
from fastdp.utils import load_weights, save_weights

layers = keras.layers
X = np.random.default_rng(0).normal(size=(9, 3)).astype("float32")
WEIGHTS = np.random.default_rng(1)
FIRST = WEIGHTS.bit_generator.state


@pytest.fixture(autouse=True)
def weights_repeat() -> None:
    """The same weights in each run: an output near zero has few digits left, by which splitting may be judged."""
    WEIGHTS.bit_generator.state = FIRST


@pytest.fixture(scope="module", autouse=True)
def virtual_devices() -> Iterator[None]:
    fastdp.set_virtual_devices(3)
    yield
    fastdp.set_virtual_devices(0)


def chain(last: str = "last", hidden: int = 4) -> keras.Model:
    """Random weights, moving statistics too."""
    stack = [layers.Dense(hidden, name="hidden"), layers.BatchNormalization(name="norm"), layers.Dense(1, name=last)]
    model = keras.Sequential([keras.Input((3,)), *stack], name="chain")
    model.set_weights([WEIGHTS.uniform(0.1, 1, w.shape) for w in model.get_weights()])
    return model


def weights_of(model: keras.Model, layer: str) -> list[np.ndarray]:
    return model.get_layer(layer).get_weights()


def same(one: list[np.ndarray], other: list[np.ndarray]) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def parallel_of(model: keras.Model) -> keras.Model:
    return fastdp.multi_gpu_model(model, gpus=3)


def itself(model: keras.Model) -> keras.Model:
    return model


@pytest.mark.parametrize("kind", [itself, parallel_of], ids=["plain", "parallel"])
@pytest.mark.parametrize("by_name", [False, True])
def test_a_weight_file_goes_round_between_plain_and_parallel_models(kind: Any, by_name: bool, tmp_path: Path) -> None:
    source, target = chain(), chain()
    save_weights(kind(source), tmp_path / "w.h5")
    load_weights(kind(target), tmp_path / "w.h5", by_name=by_name)
    assert same(source.get_weights(), target.get_weights())


def test_a_weight_file_loads_in_plain_keras_by_order_and_by_name(tmp_path: Path) -> None:
    source = chain()
    parallel_of(source).save_weights(tmp_path / "w.h5")
    for options in ({}, {"by_name": True}):
        target = chain()
        target.load_weights(tmp_path / "w.h5", **options)
        assert same(source.get_weights(), target.get_weights())
    assert [path.name for path in tmp_path.iterdir()] == ["w.h5"]


@pytest.mark.parametrize("whole", [False, True], ids=["weights", "whole model"])
def test_same_names_load_and_the_others_stay(whole: bool, tmp_path: Path) -> None:
    source, target = chain("last"), chain("new", hidden=4)
    (source.save if whole else parallel_of(source).save_weights)(tmp_path / "w.h5")
    parallel, before = parallel_of(target), weights_of(target, "new")
    parallel.predict(X, verbose=0)
    parallel.load_weights(tmp_path / "w.h5", by_name=True)
    for layer in ("hidden", "norm"):
        assert same(weights_of(target, layer), weights_of(source, layer))
    assert same(weights_of(target, "new"), before)
    # All replicas follow.
    np.testing.assert_allclose(parallel.predict(X, verbose=0), target.predict(X, verbose=0), rtol=1e-6)


def test_mismatches_are_all_named_and_nothing_is_loaded(tmp_path: Path) -> None:
    source, target = chain(hidden=4), chain(hidden=5)
    parallel_of(source).save_weights(tmp_path / "w.h5")
    before = target.get_weights()
    said = r"'hidden' has kernel of shape \(3, 5\).*\(3, 4\); 'norm' .*; 'last' .*Nothing was loaded.*skip_mismatch"
    for load in (lambda *a, **k: load_weights(target, *a, **k), parallel_of(target).load_weights):
        with pytest.raises(ValueError, match=said):
            load(tmp_path / "w.h5", by_name=True)
    assert same(before, target.get_weights())


def test_a_layer_with_another_number_of_weights_is_a_mismatch(tmp_path: Path) -> None:
    save_weights(chain(), tmp_path / "w.h5")
    target = keras.Sequential([keras.Input((3,)), layers.Dense(4, use_bias=False, name="hidden")])
    with pytest.raises(ValueError, match="'hidden' has 1 weights, the file has 2"):
        load_weights(target, tmp_path / "w.h5", by_name=True)


def test_skipped_mismatches_are_warned_of_and_the_rest_loads(tmp_path: Path) -> None:
    source, target = chain(), chain()
    grown = keras.Sequential([keras.Input((3,)), *target.layers[:2], layers.Dense(2, name="last")])
    parallel_of(source).save_weights(tmp_path / "w.h5")
    before = weights_of(grown, "last")
    with pytest.warns(UserWarning, match=r"A layer was not loaded.*'last' has kernel of shape \(4, 2\)"):
        parallel_of(grown).load_weights(tmp_path / "w.h5", by_name=True, skip_mismatch=True)
    assert same(weights_of(grown, "hidden"), weights_of(source, "hidden"))
    assert same(weights_of(grown, "last"), before)


def test_no_common_name_is_a_warning_with_both_lists(tmp_path: Path) -> None:
    save_weights(chain(), tmp_path / "w.h5")
    other = keras.Sequential([keras.Input((3,)), layers.Dense(4, name="else")])
    with pytest.warns(UserWarning, match=r"No layer was loaded.*'hidden', 'norm', 'last'.*'else'"):
        load_weights(other, tmp_path / "w.h5", by_name=True)


def test_models_inside_load_by_their_name_and_frozen_layers_too(tmp_path: Path) -> None:
    def nested() -> keras.Model:
        inner, x = chain(), keras.Input((3,))
        inner.get_layer("hidden").trainable = False
        return keras.Model(x, layers.Dense(2, name="top")(inner(x)))

    source, target = nested(), nested()
    save_weights(source, tmp_path / "w.h5")
    load_weights(target, tmp_path / "w.h5", by_name=True)
    assert same(source.get_layer("chain").get_weights(), target.get_layer("chain").get_weights())


def test_weights_of_a_subclassed_model_itself_load_by_name(tmp_path: Path) -> None:
    class Scaled(keras.Model):
        def __init__(self) -> None:
            super().__init__()
            self.dense = layers.Dense(2, name="dense")

        def build(self, shape: Any) -> None:
            self.scale = self.add_weight(shape=(2,), initializer="random_normal", name="scale")
            self.dense.build(shape)

        def call(self, x: Any) -> Any:
            return self.dense(x) * self.scale

    source, target = Scaled(), Scaled()
    for model in (source, target):
        model(X)
    save_weights(parallel_of(source), tmp_path / "w.h5")
    load_weights(parallel_of(target), tmp_path / "w.h5", by_name=True)
    np.testing.assert_allclose(target.predict(X, verbose=0), source.predict(X, verbose=0), rtol=1e-6)


def test_a_file_saved_from_a_keras_2_parallel_model_says_how_to_unwrap_it(tmp_path: Path) -> None:
    """keras-team/keras #11253 #8212 #13766: all weights under one nested model."""
    source = chain()
    with h5py.File(tmp_path / "old.h5", "w") as file:
        file.attrs["layer_names"] = [b"input_1", b"lambda_1", b"chain", b"last"]
        for name in ("input_1", "lambda_1", "last"):
            file.create_group(name).attrs["weight_names"] = np.array([], "S1")
        inner = file.create_group("chain")
        order = [*source.trainable_weights, *source.non_trainable_weights]
        owners = {id(v): layer.name for layer in source.layers for v in layer.weights}
        inner.attrs["weight_names"] = [f"{owners[id(v)]}/{v.name}:0".encode() for v in order]
        for v in order:
            inner[f"{owners[id(v)]}/{v.name}:0"] = v.numpy()
    for target in (chain(), parallel_of(chain())):
        for by_name in (False, True):
            with pytest.raises(ValueError, match=r"inside one model 'chain'.*fastdp convert old\.h5 plain\.h5"):
                load_weights(target, tmp_path / "old.h5", by_name=by_name)
    with pytest.raises(ValueError, match=r"fastdp convert old\.h5"):
        parallel_of(chain()).load_weights(tmp_path / "old.h5")
    subprocess.run(
        [sys.executable, "-m", "fastdp", "convert", "old.h5", "plain.h5"], cwd=tmp_path, check=True, timeout=120
    )
    target = chain()
    load_weights(target, tmp_path / "plain.h5", by_name=True)
    assert same(source.get_weights(), target.get_weights())


def test_wrong_paths_and_files_are_named(tmp_path: Path) -> None:
    model = chain()
    parallel = parallel_of(model)
    parallel.save_weights(tmp_path / "w.weights.h5")
    with pytest.raises(ValueError, match=r"not in \.weights\.h5.*fastdp\.utils\.save_weights"):
        parallel.load_weights(tmp_path / "w.weights.h5", by_name=True)
    for path in ("w.weights.h5", "w.keras"):
        with pytest.raises(ValueError, match=r"`filepath` must end in \.h5 or \.hdf5"):
            save_weights(model, tmp_path / path)
    with pytest.raises(FileNotFoundError, match=r"existing file.*nowhere\.h5"):
        load_weights(model, tmp_path / "nowhere.h5")
    (tmp_path / "w.weights.h5").rename(tmp_path / "renamed.h5")
    with pytest.raises(ValueError, match=r"must be a Keras 2 weight file.*must be named `\.weights\.h5`"):
        load_weights(model, tmp_path / "renamed.h5")
    save_weights(model, tmp_path / "w.h5")
    with pytest.raises(FileExistsError, match=r"w\.h5"):
        parallel.save_weights(tmp_path / "w.h5", overwrite=False)
    with pytest.raises(ValueError, match="is not built"):
        save_weights(keras.Sequential([layers.Dense(1)]), tmp_path / "unbuilt.h5")


def test_a_user_model_with_an_attribute_template_is_no_parallel_model(tmp_path: Path) -> None:
    model = chain()
    model.template = "mine"
    save_weights(model, tmp_path / "w.h5")
    load_weights(model, tmp_path / "w.h5", by_name=True)
