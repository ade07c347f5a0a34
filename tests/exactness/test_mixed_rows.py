"""Models in which the rows of a batch meet: merged inputs give what one device gives; nothing goes on wrong."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest

import fastdp

layers, ops = keras.layers, keras.ops
GPUS = [1, 2, 3, 8]


def batches(sizes: Any = (9, 8, 3), outputs: int = 2) -> list[dict[str, Any]]:
    rng = np.random.default_rng(4)
    return [
        {"x": rng.normal(size=(n, 4)).astype("float32"), "y": rng.normal(size=(n, outputs)).astype("float32")}
        for n in sizes
    ]


def settings(loss: Any = "mse") -> dict[str, Any]:
    return {"optimizer": keras.optimizers.SGD(0.05), "loss": loss, "metrics": ["mae"]}


class Applied(layers.Layer):
    """A function of the batch, after a layer of weights."""

    def __init__(self, function: Callable[[Any], Any], **options: Any) -> None:
        super().__init__(**options)
        self.function = function
        self.dense = layers.Dense(4)

    def call(self, x: Any) -> Any:
        return self.function(self.dense(x))

    def compute_output_shape(self, shape: Any) -> Any:
        return shape


class Discriminating(layers.Layer):
    """Minibatch discrimination: how far each row is from all others."""

    def build(self, shape: Any) -> None:
        self.kernel = self.add_weight(shape=(shape[-1], 6))

    def call(self, x: Any) -> Any:
        y = ops.reshape(ops.matmul(x, self.kernel), (-1, 3, 2))
        apart = ops.sum(ops.abs(y[:, None] - y[None]), axis=3)
        return ops.concatenate([x, ops.sum(ops.exp(-apart), axis=1)], axis=1)


class Composite(layers.Layer):
    """Whose parts keep rows apart, and draw, and normalize; its own code does not."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = [layers.Dense(4), layers.BatchNormalization(), layers.Dropout(0.3, seed=2), layers.Dense(4)]

    def build(self, shape: Any) -> None:
        for part in self.parts:
            part.build(shape)

    def call(self, x: Any, training: bool = False) -> Any:
        y = self.parts[0](x) - ops.max(x, axis=0)
        y = self.parts[2](self.parts[1](y, training=training), training=training)
        return self.parts[3](ops.softmax(y, axis=0))


def attention(x: Any) -> Any:
    return ops.matmul(ops.softmax(ops.matmul(x, ops.transpose(x))), x)


FUNCTIONS: dict[str, Callable[[Any], Any]] = {
    "less its mean": lambda x: x - ops.mean(x, axis=0, keepdims=True),
    "softmax over the batch": lambda x: ops.softmax(x, axis=0),
    "rolled": lambda x: ops.roll(x, 1, axis=0),
    "cumulated": lambda x: ops.cumsum(x, axis=0),
    "sorted": lambda x: ops.sort(x, axis=0),
    "ordered": lambda x: ops.take_along_axis(x, ops.argsort(x, axis=0), axis=0),
    "turned round": lambda x: ops.flip(x, axis=0),
    "over their deviation": lambda x: x / (1 + ops.std(x, axis=0)),
    "attention over the batch": attention,
    "a small part": lambda x: 0.01 * x + 0.0003 * ops.mean(x, axis=0),
    "counted": lambda x: x * ops.cast(ops.shape(ops.unique(ops.round(x)))[0], "float32"),
}


def between(layer: Callable[[], Any]) -> Callable[[], keras.Model]:
    def build() -> keras.Model:
        inputs = keras.Input((4,))
        return keras.Model(inputs, layers.Dense(2)(layer()(layers.Dense(4)(inputs))))

    return build


def operations(function: Callable[[Any], Any]) -> Callable[[], keras.Model]:
    """The function is a part of the graph: each of its operations is a node."""

    def build() -> keras.Model:
        inputs = keras.Input((4,))
        return keras.Model(inputs, layers.Dense(2)(function(layers.Dense(4)(inputs))))

    return build


MIXING: dict[str, Callable[[], keras.Model]] = {
    **{name: between(lambda f=f: Applied(f)) for name, f in FUNCTIONS.items()},
    "minibatch discrimination": between(Discriminating),
    "operations: less their mean": operations(FUNCTIONS["less its mean"]),
    "operations: attention": operations(attention),
    "operations: twice": operations(lambda x: FUNCTIONS["sorted"](FUNCTIONS["less its mean"](x))),
    "a layer applied twice": lambda: (
        (shared := Applied(FUNCTIONS["less its mean"])),
        operations(lambda x: shared(ops.tanh(shared(x))))(),
    )[1],
}


@pytest.mark.parametrize("gpus", [2, 3, 8])
@pytest.mark.parametrize("name", MIXING)
def test_layers_that_mix_rows_equal_one_device_on_merged_inputs(name: str, gpus: int, equals_one_device: Any) -> None:
    equals_one_device(MIXING[name], settings, batches(), gpus=gpus, wrap={"rows": "merge"}, tolerance=2e-5)


@pytest.mark.parametrize("gpus", GPUS)
def test_layers_within_a_merged_one_normalize_and_draw_as_on_one_device(gpus: int, equals_one_device: Any) -> None:
    equals_one_device(between(Composite), settings, batches(), gpus=gpus, wrap={"rows": "merge"})


@pytest.mark.parametrize("name", ["less its mean", "rolled", "a small part"])
def test_without_a_policy_a_layer_that_mixes_rows_is_an_error_that_names_it(name: str) -> None:
    model = between(lambda: Applied(FUNCTIONS[name], name="mixer"))()
    parallel = fastdp.wrap(model, gpus=2)
    parallel.compile(**settings())
    before = model.get_weights()
    batch = batches()[0]
    named = r"layer 'mixer' \(Applied\) mixes the rows.*rows=\"merge\".*rows=\"replica\".*gpus=\[0\]"
    for call in (lambda: parallel.train_on_batch(**batch), lambda: parallel.predict_on_batch(batch["x"])):
        for _ in range(2):  # the second time too
            with pytest.raises(ValueError, match=named):
                call()
    assert all(np.array_equal(a, b) for a, b in zip(before, model.get_weights(), strict=True))


def test_an_operation_of_the_graph_that_mixes_rows_is_named() -> None:
    parallel = fastdp.multi_gpu_model(operations(FUNCTIONS["less its mean"])(), gpus=2)
    with pytest.raises(ValueError, match=r"The operation 'mean.*' \(Mean\).* mixes the rows"):
        parallel.predict(batches()[0]["x"], verbose=0)


def test_by_replica_each_device_goes_by_its_own_rows_and_one_warning_says_so() -> None:
    model = keras.Sequential([keras.Input((4,)), Applied(FUNCTIONS["less its mean"], name="mixer")])
    parallel = fastdp.wrap(model, gpus=2, rows="replica")
    parallel.compile(**settings())
    x = batches((7,))[0]["x"]
    with pytest.warns(UserWarning, match=r"'mixer' \(Applied\) mixes the rows.*rows=\"replica\"") as said:
        found = [parallel.predict(x, verbose=0), parallel.train_on_batch(x, x), parallel.predict(x, verbose=0)][0]
    assert sum("fastdp" in str(one.message) for one in said) == 1
    assert found.shape == (7, 4)
    np.testing.assert_allclose(found[:4].mean(0), 0, atol=1e-6)
    np.testing.assert_allclose(found[4:].mean(0), 0, atol=1e-6)


def test_an_unknown_policy_is_a_value_error() -> None:
    with pytest.raises(ValueError, match=r"`rows` must be one of .*'merge'.*rows='merged'"):
        fastdp.wrap(between(Discriminating)(), gpus=2, rows="merged")


# Outputs whose other axes grow with the rows.


def clip(dimensions: int = 3) -> keras.Model:
    """Logits of each image and each text of the batch."""
    inputs = keras.Input((4,))
    image, text = layers.Dense(dimensions)(inputs[:, :2]), layers.Dense(dimensions)(inputs[:, 2:])
    return keras.Model(inputs, ops.matmul(image, ops.transpose(text)))


class Similar(layers.Layer):
    def call(self, x: Any) -> Any:
        return ops.sum((x[:, None] - x[None]) ** 2, axis=-1)


def contrastive(y: Any, logits: Any) -> Any:
    labels = ops.arange(ops.shape(logits)[0])
    rows = keras.losses.sparse_categorical_crossentropy(labels, logits, from_logits=True)
    columns = keras.losses.sparse_categorical_crossentropy(labels, ops.transpose(logits), from_logits=True)
    return ops.mean(rows + columns) / 2


GROWN: dict[str, Callable[[], keras.Model]] = {
    "logits": clip,
    "distances": lambda: keras.Sequential([keras.Input((4,)), layers.Dense(3), Similar()]),
    "with a layer behind": lambda: (
        (x := keras.Input((4,))),
        keras.Model(x, layers.Dense(2)(ops.reshape(Similar()(layers.Dense(3)(x)), (-1, 1)))),
    )[1],
    "squeezed": lambda: keras.Sequential(
        [keras.Input((4,)), layers.Dense(1), layers.Lambda(ops.squeeze, output_shape=())]
    ),
    "products of columns": lambda: (
        (x := keras.Input((4,))),
        keras.Model(x, ops.matmul(ops.transpose(layers.Dense(3)(x)), layers.Dense(2)(x))),
    )[1],
}


def trained(build: Callable[[], keras.Model], loss: Any, gpus: Any, sizes: Any = (7, 6, 2, 1), **options: Any) -> Any:
    """Losses, predictions and weights, of steps on whole batches."""
    keras.utils.clear_session(free_memory=False)
    keras.utils.set_random_seed(3)
    model = build()
    run = model if gpus is None else fastdp.wrap(model, gpus=gpus, check_replicas=True, **options)
    run.compile(keras.optimizers.SGD(0.002), None if isinstance(model, OwnLoss) else loss)
    found = []
    for batch in batches(sizes):
        x, y = batch["x"], batch["y"]
        found += [run.train_on_batch(x, y), run.test_on_batch(x, y), *keras.tree.flatten(run.predict_on_batch(x))]
    values = [*map(keras.ops.stop_gradient, map(keras.ops.convert_to_tensor, found)), *model.get_weights()]
    return [np.asarray(keras.ops.convert_to_numpy(one), "float64") for one in values]


def assert_alike(found: Any, expected: Any) -> None:
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-5, atol=2e-5 * float(np.abs(other).max()) + 1e-6)


LOSSES = {
    "logits": contrastive,
    "distances": lambda y, d: ops.mean(d * ops.cast(ops.expand_dims(y[:, 0] > 0, 1), "float32")),
}


def squared(y: Any, y_pred: Any) -> Any:
    return ops.mean(y_pred**2) + ops.std(y_pred)


@pytest.mark.parametrize("gpus", GPUS)
@pytest.mark.parametrize("name", GROWN)
@pytest.mark.parametrize("rows", [None, "merge"])
def test_outputs_that_are_not_by_rows_equal_one_device(name: str, gpus: int, rows: Any) -> None:
    expected = trained(GROWN[name], LOSSES.get(name, squared), None)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = trained(GROWN[name], LOSSES.get(name, squared), gpus, rows=rows)
    assert_alike(found, expected)
    about = [str(one.message) for one in said if "fastdp" in str(one.message)]
    assert len(about) == (1 if rows is None and gpus > 1 else 0), about
    assert all("runs on the whole batch on each device" in one for one in about)


def behind() -> keras.Model:
    x = keras.Input((4,))
    return keras.Model(x, layers.Concatenate(axis=0, name="behind")([layers.Dense(2)(x), layers.Dense(2)(x)]))


class Wide(layers.Layer):
    """Two rows of each, beside each other in the batch."""

    def call(self, x: Any) -> Any:
        return ops.reshape(ops.stack([x, -x], axis=1), (-1, x.shape[-1]))


def time_major() -> keras.Model:
    x = keras.Input((4,))
    steps = ops.transpose(ops.reshape(layers.Dense(6)(x), (-1, 3, 2)), (1, 0, 2))
    return keras.Model(x, layers.Dense(2)(steps))


def back_and_forth() -> keras.Model:
    x = keras.Input((4,))
    columns = ops.transpose(layers.Dense(3)(x))
    return keras.Model(x, layers.Dense(2)(ops.transpose(ops.tanh(columns))))


class OwnLoss(keras.Model):
    """Of two outputs, of which the second is a number."""

    def compute_loss(self, x: Any, y: Any, y_pred: Any, sample_weight: Any = None, training: bool = True) -> Any:
        return ops.mean(ops.subtract(y_pred[0], y) ** 2) + 0.1 * y_pred[1]


class Norm(layers.Layer):
    """The same for all rows."""

    def build(self, shape: Any) -> None:
        self.kernel = self.add_weight(shape=(3,))

    def call(self, x: Any) -> Any:
        return ops.sum(self.kernel**2)


def scalar(function: Callable[[Any], Any]) -> Callable[[], keras.Model]:
    def build() -> keras.Model:
        x = keras.Input((4,))
        h = layers.Dense(3)(x)
        return OwnLoss(x, [layers.Dense(2)(h), Applied(function, name="scalar")(layers.Dense(4)(h))])

    return build


def first_and_second(y: Any, y_pred: Any) -> Any:
    return ops.mean(y_pred**2)


OUTPUTS: dict[str, Callable[[], keras.Model]] = {
    "two for each row": lambda: keras.Sequential([keras.Input((4,)), layers.Dense(3), Wide()]),
    "time first": time_major,
    "columns and back": back_and_forth,
    "a mean": scalar(lambda x: ops.mean(x**2)),
    "a sum": scalar(lambda x: ops.sum(x**2)),
    "a norm of the weights": lambda: (
        (x := keras.Input((4,))),
        OwnLoss(x, [layers.Dense(2)(x), Norm()(x)]),
    )[1],
    "whole numbers": lambda: keras.Sequential(
        [keras.Input((4,)), layers.Dense(3), Applied(lambda x: x + ops.cast(ops.cast(x * 10, "int32"), "float32"))]
    ),
}


@pytest.mark.parametrize("gpus", GPUS)
@pytest.mark.parametrize("name", OUTPUTS)
def test_outputs_that_can_be_put_together_are_without_a_word(name: str, gpus: int) -> None:
    assert_alike(trained(OUTPUTS[name], first_and_second, gpus), trained(OUTPUTS[name], first_and_second, None))


BY_MERGING: dict[str, Callable[[], keras.Model]] = {
    "rows behind each other": behind,
    "a root of a mean": scalar(lambda x: ops.sqrt(ops.mean(x**2))),
    "the largest": scalar(ops.max),
    "whole numbers": lambda: keras.Sequential(
        [keras.Input((4,)), layers.Dense(3), Applied(lambda x: ops.argsort(x[:, 0]), name="ordering")]
    ),
    "truths": lambda: keras.Sequential(
        [keras.Input((4,)), layers.Dense(3), Applied(lambda x: x > ops.mean(x, axis=0), name="ordering")]
    ),
}


@pytest.mark.parametrize("gpus", GPUS)
@pytest.mark.parametrize("name", BY_MERGING)
def test_outputs_that_are_by_rows_only_in_shape_equal_one_device_when_merged(name: str, gpus: int) -> None:
    loss = lambda y, y_pred: ops.mean(ops.cast(y_pred, "float32") ** 2)  # noqa: E731
    build = BY_MERGING[name]
    if name in ("whole numbers", "truths"):
        x = batches((7,))[0]["x"]
        keras.utils.set_random_seed(3)
        model = build()
        parallel = fastdp.wrap(model, gpus=gpus, rows="merge")
        np.testing.assert_array_equal(parallel.predict_on_batch(x), model.predict_on_batch(x))
        return
    assert_alike(trained(build, loss, gpus, rows="merge"), trained(build, loss, None))


@pytest.mark.parametrize("name", BY_MERGING)
def test_outputs_that_are_by_rows_only_in_shape_are_an_error_otherwise(name: str) -> None:
    parallel = fastdp.wrap(BY_MERGING[name](), gpus=2)
    with pytest.raises(ValueError, match=r"layer '(behind|scalar|ordering)' .* mixes the rows"):
        parallel.predict_on_batch(batches()[0]["x"])


def test_by_replica_outputs_that_cannot_be_put_together_are_an_error() -> None:
    parallel = fastdp.wrap(clip(), gpus=2, rows="replica")
    with pytest.raises(ValueError, match=r"shape \(1, 1\) for one row of the batch and \(3, 3\) for 3 rows"):
        parallel.predict(batches()[0]["x"], verbose=0)


# Where there is no unit to merge.


class OwnCall(keras.Model):
    """Mixes rows in its own call."""

    def __init__(self) -> None:
        super().__init__()
        self.dense, self.last = layers.Dense(3), layers.Dense(2)

    def build(self, shape: Any) -> None:
        self.dense.build(shape)
        self.last.build((None, 3))
        self.built = True

    def call(self, x: Any) -> Any:
        h = self.dense(x)
        return self.last(h - ops.mean(h, axis=0))


def own_call() -> keras.Model:
    model = OwnCall()
    model.build((None, 4))
    return model


@pytest.mark.parametrize("gpus", GPUS)
def test_a_model_whose_own_call_mixes_rows_runs_on_one_device_and_says_so(gpus: int, equals_one_device: Any) -> None:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        run = equals_one_device(own_call, settings, batches(), gpus=gpus, wrap={"rows": "merge"})
    about = [str(one.message) for one in said if "fastdp" in str(one.message)]
    assert len(about) == (gpus > 1), about
    assert all("runs on one device, with all rows. The model 'own_call' (OwnCall) mixes the rows" in a for a in about)
    assert run.trained.engine.program.most_replicas == 1


def test_a_model_whose_own_call_mixes_rows_is_an_error_without_a_policy() -> None:
    model = own_call()
    with pytest.raises(ValueError, match=r"The model 'own_call.*' \(OwnCall\) mixes the rows"):
        fastdp.wrap(model, gpus=2).predict_on_batch(batches()[0]["x"])


class OwnNoise(layers.Layer):
    def call(self, x: Any) -> Any:
        noise = np.random.default_rng().random(tuple(x.shape))  # from a generator that nobody can follow
        return x + ops.convert_to_tensor(noise.astype("float32"))


def test_draws_that_nobody_can_follow_are_no_rows_that_meet() -> None:
    build = between(OwnNoise)
    x = batches()[0]["x"]
    with pytest.raises(ValueError, match=r"draws at random outside of keras\.random"):
        fastdp.wrap(build(), gpus=2).predict_on_batch(x)
    with pytest.warns(UserWarning, match=r"outside of keras\.random.*rows=\"replica\""):
        assert fastdp.wrap(build(), gpus=2, rows="replica").predict_on_batch(x).shape == (9, 2)
    with pytest.warns(UserWarning, match=r"one device.*outside of keras\.random"):
        assert fastdp.wrap(build(), gpus=2, rows="merge").predict_on_batch(x).shape == (9, 2)


@pytest.mark.parametrize("gpus", [2, 3])
def test_a_model_that_cannot_run_on_some_rows_runs_on_one_device(gpus: int) -> None:
    def build() -> keras.Model:
        def fours(x: Any) -> Any:
            if x.shape[0] != 8:
                raise AssertionError("eight rows, please")
            return x

        return keras.Sequential([keras.Input((4,)), layers.Lambda(fours, output_shape=(4,)), layers.Dense(2)])

    parallel = fastdp.wrap(build(), gpus=gpus)
    x = batches((8,))[0]["x"]
    with pytest.raises(ValueError, match=r"fails on a part of it.*AssertionError.*rows=\"merge\""):
        parallel.predict_on_batch(x)
    with pytest.warns(UserWarning, match="runs on one device, with all rows.*fails on a part of it"):
        found = trained(build, "mse", gpus, (8, 8), rows="merge")
    assert_alike(found, trained(build, "mse", None, (8, 8)))


def test_a_model_that_plain_keras_cannot_run_either_fails_with_its_own_error() -> None:
    model = keras.Sequential([keras.Input((4,)), layers.Lambda(lambda x: ops.reshape(x, (-1, 7)), output_shape=(7,))])
    with pytest.raises(Exception, match="shape") as failed:
        fastdp.wrap(model, gpus=2, rows="merge").predict_on_batch(batches()[0]["x"])
    assert "fastdp ran the model on 9 of the batch's rows, before the step itself" in failed.value.__notes__[0]


def test_a_model_that_runs_on_halves_only_is_run_by_rows() -> None:
    fours = lambda x: ops.reshape(ops.reshape(x, (-1, 4, 4)), (-1, 4))  # noqa: E731
    build = lambda: keras.Sequential(  # noqa: E731
        [keras.Input((4,)), layers.Lambda(fours, output_shape=(4,)), layers.Dense(2)]
    )
    assert_alike(trained(build, "mse", 2, (8, 8)), trained(build, "mse", None, (8, 8)))


# In company.


def test_a_step_with_merged_inputs_runs_eagerly_and_says_why() -> None:
    model = between(lambda: Applied(FUNCTIONS["less its mean"], name="mixer"))()
    parallel = fastdp.wrap(model, gpus=2, rows="merge", compile="trace")
    parallel.compile(**settings())
    with pytest.warns(UserWarning, match="eagerly"):
        assert [parallel.train_on_batch(**batch)[0] > 0 for batch in batches((8, 8, 8))] == [True] * 3
    (entry,) = list(parallel.report())
    assert entry["how"] == "eager"
    assert "the layer 'mixer' (Applied), which runs on the merged inputs of all replicas" in entry["why"]


def test_masks_go_with_merged_inputs(equals_one_device: Any) -> None:
    class Behind(layers.Layer):
        def __init__(self) -> None:
            super().__init__()
            self.supports_masking = True

        def call(self, x: Any, mask: Any = None) -> Any:
            seen = ops.cast(ops.expand_dims(mask, -1), x.dtype)
            return x - ops.sum(x * seen, axis=(0, 1)) / ops.sum(seen)

    def build() -> keras.Model:
        numbers = keras.Input((4,))
        h = layers.Embedding(9, 3, mask_zero=True)(ops.cast(ops.abs(numbers * 4), "int32"))
        masked = layers.Masking()(keras.layers.Reshape((4, 1))(numbers))
        return keras.Model(numbers, layers.LSTM(2)(Behind()(layers.Add()([h, masked]))))

    rounded = [{**batch, "x": np.round(batch["x"])} for batch in batches()]
    equals_one_device(build, settings, rounded, gpus=3, wrap={"rows": "merge"})


def test_gradients_are_accumulated_as_on_one_device(equals_one_device: Any) -> None:
    made = lambda: {"optimizer": keras.optimizers.Adam(0.01, gradient_accumulation_steps=2), "loss": "mse"}  # noqa: E731
    equals_one_device(between(Discriminating), made, batches((9, 8, 3, 5)), gpus=3, wrap={"rows": "merge"})


def test_embeddings_multiplied_over_the_whole_batch_equal_one_device(equals_one_device: Any) -> None:
    class Recommender(keras.Model):
        """As in keras.io's collaborative filtering: the product goes over the batch too."""

        def __init__(self) -> None:
            super().__init__()
            self.users, self.films, self.bias = (layers.Embedding(5, size) for size in (3, 3, 1))
            for part in (self.users, self.films, self.bias):
                part.build((None,))
            self.built = True

        def call(self, x: Any) -> Any:
            numbers = ops.cast(ops.abs(x), "int32")
            users, films = self.users(numbers[:, 0]), self.films(numbers[:, 1])
            return ops.sigmoid(ops.tensordot(users, films, 2) + self.bias(numbers[:, 0]))

    narrow = batches(outputs=1)
    with pytest.warns(UserWarning, match=r"one device, with all rows. The model '.*' \(Recommender\) mixes the rows"):
        equals_one_device(Recommender, settings, narrow, gpus=3, wrap={"rows": "merge"})


def test_fewer_rows_than_devices_and_one_row_at_first(equals_one_device: Any) -> None:
    equals_one_device(MIXING["less its mean"], settings, batches((1, 2, 3, 9)), gpus=8, wrap={"rows": "merge"})
    equals_one_device(MIXING["operations: twice"], settings, batches((2, 2, 9)), gpus=8, wrap={"rows": "merge"})


def test_what_trials_draw_is_given_back() -> None:
    import torch

    parallel = fastdp.wrap(between(lambda: Applied(FUNCTIONS["rolled"]))(), gpus=2, rows="merge")
    before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    parallel.predict_on_batch(batches()[0]["x"])
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])  # noqa: NPY002
