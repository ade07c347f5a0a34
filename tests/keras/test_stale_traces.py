"""What changes between two steps counts in the next one, captured or not: as in plain Keras with the same change."""

from __future__ import annotations

import functools

import keras
import numpy as np
import pytest
import torch

import fastdp
from fastdp.capture import patience
from fastdp.capture import steps as capture_steps

L = keras.layers
ops = keras.ops
BEFORE, AFTER = 3, 3


@pytest.fixture(autouse=True)
def _devices():
    fastdp.set_virtual_devices(2)
    yield
    fastdp.set_virtual_devices(0)


def batches():
    generator = np.random.default_rng(0)
    for _ in range(BEFORE + AFTER):
        x = generator.normal(size=(8, 6)).astype("float32")
        yield x, np.eye(3, dtype="float32")[generator.integers(0, 3, 8)]


def sequential(*layers):
    return keras.Sequential([keras.Input((6,)), *layers, L.Dense(3)])


def losses(build, change, gpus=None, mode="trace", how="traced", loss="mse", optimizer=None, before_change=None):
    """The loss of each step, with a change in the middle; the model with the layers is handed to `change`."""
    keras.utils.set_random_seed(7)
    model = build()
    trained = model if gpus is None else fastdp.wrap(model, gpus=gpus, compile=mode)
    trained.compile(optimizer() if optimizer else keras.optimizers.SGD(0.05), loss() if callable(loss) else loss)
    found = []
    for number, (x, y) in enumerate(batches()):
        if number == BEFORE:
            if gpus is not None and how is not None:
                if before_change is not None:
                    before_change(trained)
                assert {entry["how"] for entry in trained.report()} == {how}
            change(model, trained)
        found.append(float(trained.train_on_batch(x, y)))
    if gpus is not None and how is not None:
        assert {entry["how"] for entry in trained.report()} == {"traced"}
    return found, [keras.ops.convert_to_numpy(w) for w in model.trainable_weights]


def check(build, change, undo=None, **options):
    """Plain Keras and captured steps agree, and the change matters."""
    results = []
    expectations = {key: options[key] for key in ("loss", "optimizer") if key in options}
    for arguments in ((None, expectations), (2, options)):
        try:
            results.append(losses(build, change, arguments[0], **arguments[1]))
        finally:
            if undo is not None:
                undo()
    unchanged, _ = losses(build, lambda *_: None, **expectations)
    (plain, plain_weights), (found, weights) = results
    assert not np.allclose(plain[BEFORE:], unchanged[BEFORE:], rtol=1e-4), "this change changes nothing"
    np.testing.assert_allclose(found, plain, rtol=2e-5)
    for weight, other in zip(weights, plain_weights, strict=True):
        np.testing.assert_allclose(weight, other, rtol=1e-4, atol=1e-6)


# Layers of Keras's.


def normalized():
    layer = L.Normalization()
    layer.adapt(np.random.default_rng(1).normal(2.0, 3.0, (50, 6)))
    return sequential(layer, L.Dense(4, "tanh"))


def adapt_again(model, _):
    model.layers[0].adapt(np.random.default_rng(2).normal(-1.0, 0.5, (50, 6)))


def in_place(model, _):
    model.layers[0].mean.add_(1.5)


def by_data(model, _):
    model.layers[0].mean.data.add_(1.5)


def by_numpy(model, _):
    model.layers[0].variance.numpy()[...] *= 4.0


@pytest.mark.parametrize("change", [adapt_again, in_place, by_data, by_numpy])
def test_statistics_of_a_normalization_layer(change):
    check(normalized, change)


def dense():
    return sequential(L.Dense(4, "tanh", kernel_regularizer=keras.regularizers.L2(0.01)))


def setting(path, value):
    """A change that sets one attribute, by its path from the model."""

    def change(model, _):
        *owners, name = path.split(".")
        owner = model.layers[0]
        for one in owners:
            owner = getattr(owner, one)
        setattr(owner, name, value() if value.__class__ is functools.partial else value)

    change.__name__ = path
    return change


class Scaled:
    """An activation that is an object."""

    def __init__(self, factor):
        self.factor = factor

    def __call__(self, x):
        return ops.tanh(x) * self.factor


CHANGES = [
    (dense, setting("activation", keras.activations.sigmoid)),
    (dense, setting("kernel_regularizer.l2", 0.5)),
    (dense, setting("kernel.regularizer", functools.partial(keras.regularizers.L1, 0.3))),
    (dense, setting("bias.regularizer", functools.partial(keras.regularizers.L1, 0.3))),
    (dense, setting("activity_regularizer", functools.partial(keras.regularizers.L2, 0.3))),
    (dense, setting("dtype_policy", "bfloat16")),
    (lambda: sequential(L.Dropout(0.0)), setting("call", lambda inputs, training=None: inputs * 0.1)),
    (lambda: sequential(L.Dense(4, Scaled(1.0))), setting("activation.factor", 3.0)),
    (
        lambda: sequential(L.Dense(4, activity_regularizer=keras.regularizers.L2(0.1))),
        setting("activity_regularizer.l2", 2.0),
    ),
    (lambda: sequential(L.Rescaling(0.5)), setting("scale", 2.0)),
    (lambda: sequential(L.Rescaling([1.0, 1, 1, 1, 1, 2])), setting("scale", [0.5] * 6)),
    (lambda: sequential(L.Rescaling([1.0, 1, 1, 1, 1, 2])), lambda model, _: model.layers[0].scale.__setitem__(0, 5.0)),
    (lambda: sequential(L.Rescaling(np.ones(6))), lambda model, _: model.layers[0].scale.__imul__(2.0)),
    (lambda: sequential(L.LeakyReLU(0.1)), setting("negative_slope", 0.9)),
    (lambda: sequential(L.Dense(4), L.Activation("relu")), lambda m, _: setattr(m.layers[1], "activation", ops.tanh)),
    (lambda: sequential(L.LayerNormalization()), setting("epsilon", 10.0)),
    (lambda: sequential(L.Dropout(0.1, seed=1)), setting("rate", 0.7)),
]


@pytest.mark.parametrize(
    ("build", "change"), CHANGES, ids=[change.__name__ + str(i) for i, (_, change) in enumerate(CHANGES)]
)
def test_attributes_of_keras_layers(build, change):
    check(build, change)


# Losses, optimizers, settings.


class Weighted(keras.losses.Loss):
    """A loss with an attribute."""

    factor = 1.0

    def call(self, y_true, y_pred):
        return self.factor * ops.mean(ops.square(y_true - y_pred), axis=-1)


def of_loss(name, value):
    def change(_, trained):
        setattr(trained._compile_loss._flat_losses[0].loss, name, value)

    return change


def of_keyword(name, value):
    def change(_, trained):
        trained._compile_loss._flat_losses[0].loss._fn_kwargs[name] = value

    return change


LOSSES = [
    (lambda: keras.losses.Huber(delta=0.1), of_keyword("delta", 2.0)),
    (lambda: keras.losses.CategoricalCrossentropy(from_logits=True), of_keyword("label_smoothing", 0.4)),
    (keras.losses.MeanSquaredError, of_loss("reduction", "sum")),
    (keras.losses.MeanSquaredError, of_loss("fn", keras.losses.mean_absolute_error)),
]


@pytest.mark.parametrize(("loss", "change"), LOSSES)
def test_attributes_of_losses(loss, change):
    check(dense, change, loss=loss)


def test_a_loss_that_becomes_one_of_the_whole_batch_is_computed_on_merged_outputs():
    change = of_keyword("axis", 0)
    plain, _ = losses(lambda: sequential(L.Dense(4)), change, loss=keras.losses.CosineSimilarity)
    with pytest.warns(UserWarning, match="exchange"):
        found, _ = losses(lambda: sequential(L.Dense(4)), change, 2, loss=keras.losses.CosineSimilarity, how=None)
    np.testing.assert_allclose(found, plain, rtol=2e-5)


def test_the_scale_of_the_loss():
    def change(_, trained):
        trained.optimizer.loss_scale_factor = 16.0

    def sgd():
        return keras.optimizers.SGD(0.05, loss_scale_factor=2.0)

    plain, _ = losses(dense, change, optimizer=sgd)
    found, _ = losses(dense, change, 2, optimizer=sgd)
    np.testing.assert_allclose(found, plain, rtol=2e-5)


def test_settings_of_keras():
    epsilon = keras.config.epsilon()
    build = lambda: sequential(L.Dense(4, "softmax"))  # noqa: E731
    check(
        build,
        lambda *_: keras.config.set_epsilon(0.2),
        undo=lambda: keras.config.set_epsilon(epsilon),
        loss=keras.losses.KLDivergence,
    )


def test_autocast():
    """On the devices too, whose threads have autocast settings of their own."""

    def run(gpus):
        keras.utils.set_random_seed(7)
        model = dense()
        trained = model if gpus is None else fastdp.wrap(model, gpus=gpus, compile="trace")
        trained.compile(keras.optimizers.SGD(0.05), "mse")
        found = []
        for number, (x, y) in enumerate(batches()):
            with torch.autocast("cpu", torch.bfloat16, enabled=number >= BEFORE):
                found.append(float(trained.train_on_batch(x, y)))
        return found

    plain = run(None)
    np.testing.assert_allclose(run(1), plain, rtol=1e-4)
    np.testing.assert_allclose(run(2), plain, rtol=1e-3)
    np.testing.assert_allclose(run(2)[BEFORE], plain[BEFORE], rtol=1e-5)  # the rows' outputs are the same
    assert not np.allclose(plain, losses(dense, lambda *_: None)[0], rtol=1e-5)


# Code of the user's.

FACTOR = 1.0
TABLE = torch.ones(6)
NUMBERS = np.ones(6, "float32")
HOLDER = {"factor": 1.0, "list": [1.0, 2.0]}


def scaled(x):
    return x * FACTOR


class Own(L.Layer):
    """A layer that reads this and that."""

    factor = 1.0
    weights_of = (1.0, 1.0)

    def __init__(self):
        super().__init__()
        self.own = {"a": [1.0, 1.0]}
        self.array = np.ones(6, "float32")
        self.tensor = torch.ones(6)
        self.object = Scaled(1.0)

    def call(self, x):
        x = scaled(x) * self.factor * self.weights_of[0] * self.own["a"][0]
        x = x * TABLE * ops.convert_to_tensor(NUMBERS * 2) * HOLDER["factor"] * HOLDER["list"][0]
        return self.object(x * ops.convert_to_tensor(self.array + 0.0) * self.tensor)


def own():
    return sequential(Own(), L.Dense(4, "tanh"))


def class_attribute(model, _):
    Own.factor = 2.0


def class_method(model, _):
    Own.call = lambda self, x: x * 0.5


def global_number(model, _):
    globals()["FACTOR"] = 2.0


def global_function(model, _):
    globals()["scaled"] = lambda x: x * 3.0


def global_tensor(model, _):
    TABLE.mul_(2.0)


def global_tensor_exchanged(model, _):
    globals()["TABLE"] = torch.full((6,), 2.0)


def global_array(model, _):
    NUMBERS[2] = 3.0


def global_dict(model, _):
    HOLDER["factor"] = 2.0


def inside_a_global_dict(model, _):
    HOLDER["list"][0] = 2.0


def inside_an_attribute(model, _):
    model.layers[0].own["a"][0] = 2.0


def array_attribute(model, _):
    model.layers[0].array *= 2.0


def tensor_attribute(model, _):
    model.layers[0].tensor.data.mul_(2.0)


def tensor_exchanged(model, _):
    model.layers[0].tensor = torch.full((6,), 2.0)


def object_attribute(model, _):
    model.layers[0].object.factor = 2.0


def object_exchanged(model, _):
    model.layers[0].object = Scaled(2.0)


@pytest.fixture
def undone():
    """Puts back what the changes above change."""
    kept = {name: globals()[name] for name in ("FACTOR", "TABLE", "NUMBERS", "scaled")}
    call = Own.call

    def undo():
        globals().update(kept)
        TABLE.fill_(1.0)
        NUMBERS.fill(1.0)
        HOLDER.update(factor=1.0, list=[1.0, 2.0])
        Own.factor, Own.call = 1.0, call

    yield undo
    undo()


@pytest.mark.parametrize(
    "change",
    [
        class_attribute,
        class_method,
        global_number,
        global_function,
        global_tensor,
        global_tensor_exchanged,
        global_array,
        global_dict,
        inside_a_global_dict,
        inside_an_attribute,
        array_attribute,
        tensor_attribute,
        tensor_exchanged,
        object_attribute,
        object_exchanged,
    ],
)
def test_what_a_layer_of_ones_own_reads(change, undone):
    check(own, change, undo=undone)


def test_what_a_function_closes_over():
    state = {"box": [1.0]}
    factor = 1.0

    def build():
        return sequential(L.Lambda(lambda x: x * factor * state["box"][0]), L.Dense(4))

    def change(*_):
        nonlocal factor
        factor = 2.0

    def change_box(*_):
        state["box"][0] = 3.0

    def undo():
        nonlocal factor
        factor, state["box"][0] = 1.0, 1.0

    check(build, change, undo=undo)
    check(build, change_box, undo=undo)


def test_a_method_of_keras_that_is_replaced(monkeypatch):
    original = L.Dense.call
    check(
        dense,
        lambda *_: setattr(L.Dense, "call", lambda self, x, training=None: original(self, x) * 2.0),
        undo=lambda: setattr(L.Dense, "call", original),
    )


def test_an_attribute_of_a_loss_of_ones_own():
    def change(_, trained):
        trained._compile_loss._flat_losses[0].loss.factor = 2.0

    plain, _ = losses(dense, change, loss=Weighted)
    found, _ = losses(dense, change, 2, loss=Weighted, how=None, mode=None)
    np.testing.assert_allclose(found, plain, rtol=2e-5)


class Module(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(6, 4)
        self.factor = 1.0

    def forward(self, x):
        return self.linear(x) * self.factor


def with_module():
    torch.manual_seed(0)
    return sequential(L.TorchModuleWrapper(Module(), output_shape=(None, 4)))


def module_factor(model, _):
    model.layers[0].module.factor = 2.0


def module_hook(model, _):
    model.layers[0].module.linear.register_forward_hook(lambda module, args, output: output * 2.0)


def module_forward(model, _):
    module = model.layers[0].module
    module.forward = lambda x: module.linear(x) * 3.0


@pytest.mark.parametrize("mode", ["trace", None])
@pytest.mark.parametrize("change", [module_factor, module_hook])
def test_a_torch_module_inside(change, mode):
    check(with_module, change, mode=mode, how="traced" if mode else None)


def layer_hook(model, _):
    model.layers[0].register_forward_hook(lambda layer, args, output: output * 2.0)


def test_a_hook_of_a_layer():
    check(dense, layer_hook)


def test_a_hook_that_goes_away():
    handles = []

    def build():
        model = dense()
        handles.append(model.layers[0].register_forward_hook(lambda layer, args, output: output * 2.0))
        return model

    check(build, lambda *_: handles[-1].remove())


def test_a_hook_of_all_modules():
    handles = []

    def hook(module, args, output):
        return output * 2.0 if isinstance(module, L.Dense) else None

    def add(*_):
        handles.append(torch.nn.modules.module.register_module_forward_hook(hook))

    check(dense, add, undo=lambda: handles.pop().remove())
    add()  # another, which goes away
    try:
        keras.utils.set_random_seed(7)
        parallel = fastdp.wrap(dense(), gpus=2, compile="trace")
        parallel.compile(keras.optimizers.SGD(0.05), "mse")
        for x, y in batches():
            parallel.train_on_batch(x, y)
        assert {entry["how"] for entry in parallel.report()} == {"traced"}
    finally:
        handles.pop().remove()
    parallel.train_on_batch(x, y)
    assert {entry["how"] for entry in parallel.report()} == {"eager"}


def test_a_constant_among_the_operands_of_a_functional_model():
    constants = []

    def build():
        constants.append(np.full(4, 0.5, "float32"))
        inputs = keras.Input((6,))
        return keras.Model(inputs, L.Dense(3)(ops.multiply(L.Dense(4)(inputs), constants[-1])))

    check(build, lambda *_: constants[-1].__imul__(3.0))


# What cannot be compared, or changes by itself, is not captured.


class Counting(L.Layer):
    calls = 0

    def __init__(self):
        super().__init__()
        self.seen = 0
        self.kept = []

    def call(self, x):
        self.seen += 1
        self.kept.append(1)
        return x * self.seen * len(self.kept)


class Drawing(L.Layer):
    def __init__(self, of=None):
        super().__init__()
        self.of = of

    def call(self, x):
        return x * float((self.of or np.random).uniform())


class Large(L.Layer):
    def __init__(self):
        super().__init__()
        self.array = np.ones((200, 200, 6), "float32")

    def call(self, x):
        return x * ops.convert_to_tensor(self.array.mean(axis=(0, 1)))


def trained_eagerly(build, mode):
    """The model, and the losses, of steps on one device."""
    np.random.seed(3)  # noqa: NPY002 - the layer draws from it
    keras.utils.set_random_seed(7)
    model = build()
    parallel = fastdp.wrap(model, gpus=1, compile=mode)
    parallel.compile(keras.optimizers.SGD(), "mse")
    found = [float(parallel.train_on_batch(x, y)) for x, y in batches()]
    assert {entry["how"] for entry in parallel.report()} == {"eager"}
    return model.layers[0], found


@pytest.mark.filterwarnings("ignore:The outputs of")
def test_a_layer_that_counts_its_calls_runs_eagerly_and_a_trace_does_not_count():
    layer, expected = trained_eagerly(lambda: sequential(Counting()), None)
    with pytest.warns(UserWarning, match="which changes while the model trains"):
        other, found = trained_eagerly(lambda: sequential(Counting()), "trace")
    assert (other.seen, other.kept) == (layer.seen, layer.kept)
    assert found == expected


@pytest.mark.filterwarnings("ignore:The outputs of")
@pytest.mark.parametrize("make", [lambda: None, lambda: np.random.default_rng(0), lambda: np.random.RandomState(0)])
def test_a_layer_that_draws_from_numpy_runs_eagerly_and_a_trace_draws_nothing(make):
    _, expected = trained_eagerly(lambda: sequential(Drawing(make())), None)
    with pytest.warns(
        UserWarning, match="draws random numbers from|a draw by NumPy's random generator, in the layer 'drawing"
    ):
        _, found = trained_eagerly(lambda: sequential(Drawing(make())), "trace")
    assert found == expected


def test_a_large_array_that_anybody_may_write_to_is_not_captured():
    with pytest.warns(UserWarning, match="an array too large"):
        _, found = trained_eagerly(lambda: sequential(Large()), "trace")
    np.testing.assert_allclose(
        found, losses(lambda: sequential(Large()), lambda *_: None, optimizer=keras.optimizers.SGD)[0], rtol=2e-5
    )


def test_a_large_array_that_nobody_may_write_to_is_captured():
    def build():
        layer = Large()
        layer.array.setflags(write=False)
        return sequential(layer)

    plain, _ = losses(build, lambda *_: None)
    found, _ = losses(build, lambda *_: None, 2)
    np.testing.assert_allclose(found, plain, rtol=2e-5)


def test_anomaly_detection_runs_steps_eagerly_while_it_is_on():
    model = sequential(L.Dense(4), L.Activation(lambda x: ops.sqrt(x - 1e6)))
    parallel = fastdp.wrap(model, gpus=2, compile="trace")
    parallel.compile("sgd", "mse")
    for x, y in list(batches())[:3]:
        parallel.train_on_batch(x, y)
    assert {entry["how"] for entry in parallel.report()} == {"traced"}
    with (
        pytest.warns(UserWarning, match="Anomaly|Error detected"),
        pytest.raises(RuntimeError, match="nan"),
        torch.autograd.detect_anomaly(),
    ):
        parallel.train_on_batch(x, y)


# How captured steps go on.


def test_changes_far_apart_are_captured_anew_each_time(monkeypatch):
    monkeypatch.setattr(capture_steps, "STEPS_BETWEEN_CHANGES", 2)
    model = dense()
    parallel = fastdp.wrap(model, gpus=1, compile="trace")
    parallel.compile("sgd", "mse")
    for number in range(2 * capture_steps.MOST_CHANGES):
        model.layers[0].kernel_regularizer.l2 = 0.01 * number
        for x, y in list(batches())[:4]:
            parallel.train_on_batch(x, y)
    assert {entry["how"] for entry in parallel.report()} == {"traced"}


@pytest.mark.parametrize("change", [adapt_again])
def test_in_auto_mode(change, monkeypatch):
    monkeypatch.setattr(patience, "TRACE_SECONDS", 0.0)
    monkeypatch.setattr(patience, "TRACE_STEPS", 0)
    plain, _ = losses(normalized, change)
    found, _ = losses(normalized, change, 2, mode="auto")
    np.testing.assert_allclose(found, plain, rtol=2e-5)


def test_code_of_ones_own_that_comes_later_is_not_captured_in_auto_mode(monkeypatch):
    monkeypatch.setattr(patience, "TRACE_SECONDS", 0.0)
    monkeypatch.setattr(patience, "TRACE_STEPS", 0)
    change = setting("activation", Scaled(2.0))
    plain, _ = losses(dense, change)
    keras.utils.set_random_seed(7)
    model = dense()
    parallel = fastdp.wrap(model, gpus=2)
    parallel.compile(keras.optimizers.SGD(0.05), "mse")
    found = []
    for number, (x, y) in enumerate(batches()):
        if number == BEFORE:
            assert {entry["how"] for entry in parallel.report()} == {"traced"}
            change(model, parallel)
        found.append(float(parallel.train_on_batch(x, y)))
    np.testing.assert_allclose(found, plain, rtol=2e-5)
    assert [entry["how"] for entry in parallel.report()] == ["eager"]
    assert "your own code" in parallel.report()[0]["why"]
