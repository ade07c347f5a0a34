"""`fastdp.callbacks.TensorBoard`: Keras's tags and folders, read back by TensorBoard's own reader."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import keras
import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import HISTOGRAMS, IMAGES, EventAccumulator
from tensorboard.plugins.projector.projector_config_pb2 import ProjectorConfig

import fastdp
from fastdp.callbacks import TensorBoard
from fastdp.keras.callbacks.weight_images import pixels_of

X = np.random.default_rng(0).normal(size=(22, 3)).astype("float32")
Y = X.sum(axis=1, keepdims=True)
FIT = {"batch_size": 8, "shuffle": False, "verbose": 0}


@pytest.fixture(autouse=True)
def devices(tmp_path, monkeypatch):
    """Three devices, in a folder of the test's own; plain Keras afterwards."""
    monkeypatch.chdir(tmp_path)
    fastdp.set_virtual_devices(3)
    yield
    fastdp.uninstall()
    fastdp.set_virtual_devices(0)


def made(gpus, **options):
    keras.utils.clear_session()
    keras.utils.set_random_seed(3)
    layers = [keras.layers.Dense(4, activation="tanh", name="first"), keras.layers.Dense(1, name="last")]
    model = keras.Sequential([keras.Input((3,)), *layers])
    if gpus is not None:
        model = fastdp.wrap(model, gpus=gpus, compile=options.pop("compile", None))
    model.compile(keras.optimizers.SGD(0.25), "mse", metrics=["mae"])
    return model


def read(folder):
    return EventAccumulator(str(folder), size_guidance={HISTOGRAMS: 0, IMAGES: 0}).Reload()


def scalars(folder):
    found = read(folder)
    return {tag: [(event.step, event.value) for event in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


@pytest.fixture(params=["tensorboard", "tensorboardX"])
def library(request, monkeypatch):
    """Each of the libraries that write event files, where the other is missing."""
    find, other = importlib.util.find_spec, {"tensorboard": "tensorboardX"}.get(request.param, "tensorboard")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == other else find(name))
    return request.param


@pytest.mark.parametrize("gpus", [None, 3])
def test_losses_and_metrics_have_keras_s_tags_in_keras_s_folders(library, gpus):
    model, board = made(gpus), TensorBoard("logs", update_freq=2, write_steps_per_second=True)
    history = model.fit(X, Y, epochs=2, validation_data=(X, Y), callbacks=[board], **FIT).history
    train, validation = scalars("logs/train"), scalars("logs/validation")
    assert set(train) == {
        "epoch_loss", "epoch_mae", "epoch_learning_rate", "epoch_steps_per_second",
        "batch_loss", "batch_mae", "batch_steps_per_second",
    }  # fmt: skip
    assert set(validation) == {
        "epoch_loss", "epoch_mae", "evaluation_loss_vs_iterations", "evaluation_mae_vs_iterations",
    }  # fmt: skip
    for name in ("loss", "mae"):
        assert train[f"epoch_{name}"] == [(i, pytest.approx(v)) for i, v in enumerate(history[name])]
        assert validation[f"epoch_{name}"] == [(i, pytest.approx(v)) for i, v in enumerate(history[f"val_{name}"])]
        found = validation[f"evaluation_{name}_vs_iterations"]
        assert found == [(3 * (i + 1), pytest.approx(v)) for i, v in enumerate(history[f"val_{name}"])]
        assert [step for step, _ in train[f"batch_{name}"]] == [2, 4, 6]
    assert train["batch_loss"][-1][1] == pytest.approx(history["loss"][1])
    assert train["epoch_learning_rate"] == [(0, 0.25), (1, 0.25)]
    assert all(value > 0 for _, value in train["epoch_steps_per_second"] + train["batch_steps_per_second"])


def test_by_default_values_are_written_by_epoch_and_files_are_closed():
    board = TensorBoard()
    assert board.async_safe
    made(2).fit(X, Y, callbacks=[board], **FIT)
    assert set(scalars("logs/train")) == {"epoch_loss", "epoch_mae", "epoch_learning_rate"}
    assert board._train._writer is None
    assert not TensorBoard(update_freq="batch").async_safe


def test_evaluate_alone_writes_over_iterations():
    model, board = made(2), TensorBoard("logs")
    model.fit(X, Y, **FIT)
    model.evaluate(X, Y, callbacks=[board], verbose=0)
    assert {tag: step for tag, ((step, _),) in scalars("logs/validation").items()} == {
        "evaluation_loss_vs_iterations": 3, "evaluation_mae_vs_iterations": 3,
    }  # fmt: skip
    assert board._validation._writer is None


def test_the_graph_is_that_of_the_template(library):
    model = made(2)
    model.fit(X, Y, callbacks=[TensorBoard("logs")], **FIT)
    (event,) = read("logs/train").Tensors("keras")
    assert json.loads(event.tensor_proto.string_val[0]) == json.loads(model.template.to_json())
    content = read("logs/train").SummaryMetadata("keras").plugin_data
    assert (content.plugin_name, content.content) == ("graph_keras_model", b"1")
    made(2).fit(X, Y, callbacks=[TensorBoard("without", write_graph=False)], **FIT)
    assert "keras" not in read("without/train").Tags()["tensors"]


def test_weights_are_histograms_and_images_of_the_template_s_names(library):
    model = made(3)
    board = TensorBoard("logs", histogram_freq=2, write_images=True)
    model.fit(X, Y, epochs=3, callbacks=[board], **FIT)
    found = read("logs/train")
    names = [weight.path for weight in model.template.weights]
    assert sorted(found.Tags()["histograms"]) == sorted(f"{name}/histogram" for name in names)
    assert sorted(found.Tags()["images"]) == sorted(f"{name}/image" for name in names if name != "sequential/last/bias")
    kernel = model.template.get_layer("first").kernel
    histogram = found.Histograms(f"{kernel.path}/histogram")
    assert [event.step for event in histogram] == [0, 2]
    values = keras.ops.convert_to_numpy(kernel)
    last = histogram[-1].histogram_value
    assert (last.num, last.min, last.max) == (12, pytest.approx(values.min()), pytest.approx(values.max()))
    image = found.Images(f"{kernel.path}/image")[-1]
    shown = np.asarray(Image.open(io.BytesIO(image.encoded_image_string)).convert("L"))
    np.testing.assert_array_equal(shown, pixels_of(values)[:, :, 0])


def test_weights_as_pixels():
    np.testing.assert_array_equal(pixels_of(np.array([-1.0, 0.0, 1.0]))[:, :, 0], [[0, 128, 255]])
    assert pixels_of(np.zeros((5, 2))).shape == (2, 5, 1)
    assert pixels_of(np.zeros((2, 1, 5))).shape == (2, 5, 1)
    tiles = pixels_of(np.stack([np.full((2, 4), number) for number in range(5)], axis=2))[:, :, 0]
    assert tiles.shape == (2, 12)
    assert tiles[0, ::4].tolist() == [0, 128, 255]
    assert pixels_of(np.zeros((2, 2, 2, 2))) is None
    assert pixels_of(np.array([np.nan, np.inf])) is None
    np.testing.assert_array_equal(pixels_of(np.array([np.nan, 1.0, np.inf, 3.0]))[0, :, 0], [0, 0, 255, 255])


def test_weights_without_a_finite_number_are_told_of_once():
    model = made(2)
    model.template.get_layer("last").bias.assign([np.nan])
    board = TensorBoard("logs", histogram_freq=1, write_images=True)
    with pytest.warns(UserWarning, match="no histogram of .*, which has no finite number") as said:
        model.fit(X, Y, epochs=2, callbacks=[board], **FIT)
    messages = [str(one.message) for one in said if "no histogram" in str(one.message)]
    assert len(messages) == len(set(messages)) == 4  # NaN went from the bias into all weights


@pytest.mark.parametrize("gpus", [None, 1, 3])
def test_weights_are_the_same_bit_for_bit_and_steps_are_captured(gpus):
    def weights(callbacks):
        model = made(gpus, compile="trace")
        model.fit(X, Y, epochs=3, validation_data=(X, Y), callbacks=callbacks, **FIT)
        if gpus is not None:
            assert {entry["how"] for entry in model.report()} == {"traced"}
        return model.get_weights()

    without = weights([])
    watched = weights([TensorBoard("logs", histogram_freq=1, write_images=True, update_freq=1)])
    for one, other in zip(without, watched, strict=True):
        np.testing.assert_array_equal(one, other)


def test_under_install_the_model_of_the_script_is_written():
    fastdp.install(gpus=2, compile=None)
    model = made(None)
    model.fit(X, Y, callbacks=[TensorBoard("logs", histogram_freq=1)], **FIT)
    assert len(read("logs/train").Tags()["histograms"]) == len(model.weights)
    assert set(scalars("logs/train")) == {"epoch_loss", "epoch_mae", "epoch_learning_rate"}


class Fails(keras.callbacks.Callback):
    def on_epoch_end(self, epoch, logs=None):
        raise ArithmeticError("a callback's own")


def test_after_an_error_files_are_closed():
    model, board = made(2), TensorBoard("logs")
    with pytest.raises(ArithmeticError, match="a callback's own"):
        model.fit(X, Y, callbacks=[board, Fails()], **FIT)
    assert board._train._writer is None
    assert len(scalars("logs/train")["epoch_loss"]) == 1


def embedding_model():
    model = keras.Sequential(
        [
            keras.Input((4,), dtype="int32"),
            keras.layers.Embedding(5, 2, name="words"),
            keras.layers.Flatten(),
            keras.layers.Dense(1),
        ]
    )
    model = fastdp.wrap(model, gpus=2, compile=None)
    model.compile("sgd", "mse")
    return model


IDS = np.random.default_rng(1).integers(0, 5, size=(8, 4)).astype("int32")


@pytest.mark.parametrize("header", [False, True])
def test_embeddings_are_written_for_the_projector_with_their_labels(library, tmp_path, header):
    labels = [f"word {i}" for i in range(5)] if not header else ["word\tcount", *(f"word {i}\t{i}" for i in range(5))]
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "words.tsv").write_text("\n".join(labels))
    model = embedding_model()
    board = TensorBoard("logs", embeddings_freq=2, embeddings_metadata={"words": "words.tsv"}, write_graph=False)
    model.fit(IDS, Y[:8], epochs=3, callbacks=[board], **FIT)
    config = (tmp_path / "logs" / "train" / "projector_config.pbtxt").read_text()
    assert ProjectorConfig.DESCRIPTOR.name == "ProjectorConfig"
    assert config.count("embeddings {") == 2
    (tensors,) = (tmp_path / "logs" / "train" / "00002").rglob("tensors.tsv")
    written = np.loadtxt(tensors, delimiter="\t")
    np.testing.assert_allclose(written, model.template.get_layer("words").get_weights()[0], rtol=1e-5)
    assert (tensors.parent / "metadata.tsv").read_text().splitlines() == labels


def test_wrong_metadata_of_embeddings_is_named(tmp_path):
    (tmp_path / "short.tsv").write_text("a\nb")
    model = embedding_model()
    board = TensorBoard("logs", embeddings_freq=1, embeddings_metadata={"other": "f"})
    with pytest.raises(ValueError, match=r"must name Embedding layers of the model. Received: \['other'\].*'words'"):
        model.fit(IDS, Y[:8], callbacks=[board], **FIT)
    board = TensorBoard("logs", embeddings_freq=1, embeddings_metadata=str(tmp_path / "short.tsv"))
    with pytest.raises(ValueError, match=r"one line for each row of the layer 'words': 5\. Received: 2 lines"):
        model.fit(IDS, Y[:8], callbacks=[board], **FIT)


@pytest.mark.parametrize(("asked", "name", "steps"), [(2, "2", 1), ((2, 4), "2_4", 3), ("3,9", "3_9", 4)])
def test_a_profile_is_a_trace_of_the_steps_of_those_batches(asked, name, steps):
    board = TensorBoard("logs", profile_batch=asked)
    assert not board.async_safe
    made(2).fit(X, Y, epochs=2, callbacks=[board], **FIT)
    events = json.loads(Path(f"logs/train/trace_batch_{name}.json").read_text())["traceEvents"]
    # One run of forward and backward for each step and device.
    assert len({event["args"]["step"] for event in events if "step" in event.get("args", {})}) == steps
    assert {"scatter", "reduce", "update", "merge"} <= {event["name"] for event in events}


def test_a_profile_of_nothing_is_told_of():
    with pytest.warns(UserWarning, match=r"recorded nothing: it asks for batch 7, and this fit\(\) had 3"):
        made(2).fit(X, Y, callbacks=[TensorBoard("logs", profile_batch=7)], **FIT)
    with pytest.warns(UserWarning, match=r"trace_batch_1.json has no steps.*these were plain Keras's"):
        made(None).fit(X, Y, callbacks=[TensorBoard("logs", profile_batch=1)], **FIT)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"update_freq": "step"}, '`update_freq` must be "epoch", "batch" or a number of batches. Received: \'step\''),
        ({"update_freq": 0}, "`update_freq` must be"),
        ({"histogram_freq": -1}, "`histogram_freq` must be a number of epochs, or 0 for never. Received: -1"),
        ({"embeddings_freq": 0.5}, "`embeddings_freq` must be a number of epochs"),
        ({"profile_batch": (3, 2)}, r"`profile_batch` must be 0, the number of a batch .*Received: \(3, 2\)"),
        ({"profile_batch": "x"}, "`profile_batch` must be 0, the number"),
    ],
)
def test_wrong_arguments_are_named(arguments, said):
    with pytest.raises(ValueError, match=said):
        TensorBoard(**arguments)


def test_without_a_library_the_error_says_what_to_install(monkeypatch):
    find = importlib.util.find_spec
    missing = ("tensorboard", "tensorboardX")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in missing else find(name))
    with pytest.raises(ImportError, match=r"fastdp.callbacks.TensorBoard needs.*pip install 'fastdp\[tensorboard\]'"):
        TensorBoard()


def test_arguments_are_keras_s():
    from inspect import signature

    theirs = signature(keras.callbacks.TensorBoard.__init__).parameters
    mine = signature(TensorBoard.__init__).parameters
    assert list(mine) == list(theirs)
    assert {name: one.default for name, one in mine.items()} == {name: one.default for name, one in theirs.items()}


BESIDE_KERAS = """
    import glob
    import os
    import fastdp
    import keras
    import numpy as np
    import tensorflow as tf
    from fastdp.callbacks import TensorBoard

    fastdp.set_virtual_devices(3)
    x = np.random.default_rng(0).normal(size=(22, 6, 6, 1)).astype("float32")
    y = x.mean((1, 2))
    layers = keras.layers

    def written(board, gpus):
        keras.utils.clear_session()
        keras.utils.set_random_seed(2)
        model = keras.Sequential([keras.Input((6, 6, 1)), layers.Conv2D(2, 3), layers.Flatten(), layers.Dense(1)])
        model = model if gpus is None else fastdp.wrap(model, gpus=gpus)
        model.compile("sgd", "mse", metrics=["mae"])
        data = {"validation_data": (x, y), "batch_size": 8, "shuffle": False, "verbose": 0}
        model.fit(x, y, epochs=2, callbacks=[board], **data)
        found = {}
        for file in sorted(glob.glob(f"{board.log_dir}/**/events*", recursive=True)):
            for event in tf.compat.v1.train.summary_iterator(file):
                for value in event.summary.value:
                    place = os.path.relpath(os.path.dirname(file), board.log_dir), value.tag
                    found.setdefault(place, []).append(event.step)
        return found

    options = {"histogram_freq": 1, "write_images": True, "update_freq": 1, "write_steps_per_second": True}
    theirs = written(keras.callbacks.TensorBoard("keras", **options), None)
    assert len(theirs) == 19, theirs
    assert written(TensorBoard("plain", **options), None) == theirs
    assert written(TensorBoard("parallel", **options), 3) == theirs
    print("the same", len(theirs))
"""


@pytest.mark.slow
def test_folders_tags_and_steps_are_those_that_keras_writes_by_tensorflow(tmp_path):
    if importlib.util.find_spec("tensorflow") is None:
        pytest.skip("keras.callbacks.TensorBoard needs tensorflow, not installed here")
    (tmp_path / "beside.py").write_text(textwrap.dedent(BESIDE_KERAS), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "beside.py"],
        cwd=tmp_path,
        env={**os.environ, "KERAS_BACKEND": "torch", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "the same" in done.stdout
