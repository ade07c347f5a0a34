"""Keras models that are measured: their inputs, labels, losses and optimizers, from files and functions."""

from __future__ import annotations

import keras
import numpy as np
import pytest

from fastdp.benchmark.data import batches_of
from fastdp.benchmark.request import Request
from fastdp.benchmark.target import load

layers = keras.layers


@pytest.fixture(autouse=True)
def _policy():
    yield
    keras.config.set_dtype_policy("float32")


@pytest.fixture
def written(tmp_path):
    """Write a file of the user's and load its target; further fields are those of the request."""

    def of(text: str, function: str = "make_model", **fields):
        path = tmp_path / "my_file.py"
        path.write_text("import keras, numpy as np\nfrom keras import layers\n" + text)
        request = Request(target=f"{path}:{function}", framework="keras", **{"batch": 4, **fields})
        return load(request), request

    return of


def saved(model, path):
    model.save(path)
    return Request(target=str(path), framework="keras", batch=4)


def arrays(target, request):
    return [(one.name, one.shape, one.dtype, one.below) for one in (*target.inputs, *target.targets)]


def test_a_classifier_of_a_file_gets_labels_and_a_loss_by_its_softmax(tmp_path):
    request = saved(
        keras.Sequential([keras.Input((6,), name="image"), layers.Dense(3, "softmax")]), tmp_path / "a.keras"
    )
    target = load(request)
    assert arrays(target, request) == [("image", (6,), "float32", 2), ("y", (), "int64", 3)]
    assert (target.loss_title, target.optimizer_title) == ("sparse_categorical_crossentropy", "adam")
    assert target.title == "a.keras"
    x, y = batches_of(target, request)(0)
    target.model.compile(target.optimizer, target.loss)
    assert np.isfinite(target.model.train_on_batch(x, y))


def test_a_compiled_model_keeps_its_own_loss_optimizer_and_weights(tmp_path):
    x = keras.Input((6,))
    model = keras.Model(x, [layers.Dense(2, name="a")(x), layers.Dense(3, "softmax", name="b")(x)])
    loss = ["mse", "categorical_crossentropy"]
    model.compile(keras.optimizers.SGD(0.5), loss, loss_weights=[1.0, 0.2])
    target = load(saved(model, tmp_path / "a.keras"))
    assert target.loss_weights == [1.0, 0.2]
    assert float(target.optimizer.learning_rate.numpy()) == 0.5
    assert [(one.shape, one.dtype) for one in target.targets] == [((2,), "float32"), ((3,), "bool")]
    _, y = batches_of(target, Request(target="mlp", framework="keras", batch=4))(0)
    target.model.compile(target.optimizer, target.loss, loss_weights=target.loss_weights)
    assert np.isfinite(target.model.train_on_batch(np.zeros((4, 6)), y)[0])


def test_a_file_with_classes_of_its_own_names_the_way_out(tmp_path, monkeypatch):
    class Own(layers.Layer):
        pass

    request = saved(keras.Sequential([keras.Input((2,)), Own()]), tmp_path / "a.keras")
    with pytest.raises(ValueError, match=r"classes of its own.*fastdp bench file\.py:make_model"):
        load(request)


def test_mixed_precision_of_a_file_is_refused_and_of_a_function_given(tmp_path, written):
    request = saved(keras.Sequential([keras.Input((2,)), layers.Dense(1)]), tmp_path / "a.keras")
    with pytest.raises(ValueError, match="keep the dtype policy"):
        load(Request(target=request.target, framework="keras", precision="bf16"))
    text = "make_model = lambda: keras.Sequential([keras.Input((2,)), layers.Dense(1)])"
    target, _ = written(text, precision="bf16")
    assert target.model.layers[-1].compute_dtype == "bfloat16"
    assert target.loss_title == "mean_squared_error"


def test_a_pair_of_model_and_loss_and_several_inputs_by_name(written):
    target, request = written(
        """
def make_model():
    a, b = keras.Input((4,), name="a"), keras.Input((3,), dtype="int32", name="b")
    joined = layers.Concatenate()([a, layers.Flatten()(layers.Embedding(7, 2)(b))])
    return keras.Model({"a": a, "b": b}, layers.Dense(2)(joined)), keras.losses.MeanAbsoluteError()
"""
    )
    assert arrays(target, request)[:2] == [("a", (4,), "float32", 7), ("b", (3,), "int32", 7)]
    assert target.loss_title == "mean_absolute_error"
    x, _ = batches_of(target, request)(0)
    assert set(x) == {"a", "b"}
    assert x["b"].max() < 7


def test_make_batch_beside_the_function_gives_the_batches(written):
    target, request = written(
        """
class Own(keras.Model):
    def __init__(self):
        super().__init__()
        self.dense = layers.Dense(1)
    def call(self, x):
        return self.dense(x)
def make_model():
    model = Own()
    model(np.zeros((1, 5)))
    return model
def make_batch(rows):
    return np.full((rows, 5), 2.0), np.zeros((rows, 1))
"""
    )
    batches = batches_of(target, request)
    assert batches(0)[0].shape == (4, 5)
    assert batches(7)[0][0, 0] == 2.0


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("def other(): pass", r"has no function 'make_model'. It has: other"),
        ("make_model = lambda: 3", "must return a keras.Model or a torch.nn.Module, got int"),
        ("make_model = lambda: keras.Sequential([layers.Dense(1)])", r"inputs.*unknown.*make_batch\(rows\)"),
        ("make_model = lambda: keras.Sequential([keras.Input((None, 3)), layers.Dense(1)])", "open sizes.*make_batch"),
    ],
)
def test_what_cannot_be_measured_is_said_with_the_remedy(written, text, said):
    with pytest.raises(ValueError, match=said):
        written(text)


def test_a_make_batch_that_returns_no_pair_is_refused(written):
    text = "make_batch = lambda rows: [1]\nmake_model = lambda: keras.Sequential([keras.Input((1,)), layers.Dense(1)])"
    with pytest.raises(ValueError, match=r"make_batch\(2\) must return a pair"):
        written(text)


def test_loss_and_optimizer_may_be_named(written):
    text = "make_model = lambda: keras.Sequential([keras.Input((2,)), layers.Dense(1)])"
    target, _ = written(text, loss="mae", optimizer="rmsprop")
    assert isinstance(target.optimizer, keras.optimizers.RMSprop)
    assert (target.loss, target.loss_title, target.optimizer_title) == ("mae", "mae", "rmsprop")
