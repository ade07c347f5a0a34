"""Calls of layers in a step of a model's own: which arguments have rows is found out, whatever their lengths."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import keras
import numpy as np
import pytest
import torch

import fastdp

ROWS = 8
ops = keras.ops


@pytest.fixture(autouse=True)
def eight_devices() -> Iterator[None]:
    fastdp.set_virtual_devices(8)
    yield
    fastdp.set_virtual_devices(0)


def rows(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


class Own(keras.Model):
    """A layer, and a loss of its outputs: `step(layer, x)` gives them."""

    def __init__(self, layer, step):
        super().__init__()
        self.layer, self.step = layer, step
        self.temperature = self.add_weight(shape=(), initializer="ones", name="temperature")
        self.built = True

    def loss_of(self, outputs):
        tensors = [out for out in keras.tree.flatten(outputs) if isinstance(out, torch.Tensor)]
        return sum(ops.mean((i + 2.0) * ops.cast(out, "float32") ** 2) for i, out in enumerate(tensors))

    def train_step(self, data):
        x = data[0] if isinstance(data, tuple) else data
        outputs = self.step(self.layer, x) if self.step.__code__.co_argcount == 2 else self.step(self.layer, x, self)
        loss = self.loss_of(outputs) + sum(self.losses)
        self.zero_grad()
        loss.backward()
        weights = self.trainable_weights
        gradients = [v.value.grad for v in weights]
        with torch.no_grad():
            pairs = zip(gradients, weights, strict=True)
            self.optimizer.apply([v.value * 0 if g is None else g for g, v in pairs], weights)
        return {"loss": loss.detach()}


def trained(make, step, batches, gpus=None):
    """Losses and weights after training on these batches, and the report's counts."""
    keras.utils.set_random_seed(3)
    model = Own(make(), step)
    runner = model if gpus is None else fastdp.wrap(model, gpus=gpus)
    runner.compile(optimizer=keras.optimizers.SGD(0.05))
    losses = [float(runner.train_on_batch(x)) for x in batches]
    calls = [] if gpus is None else runner.report().calls
    return losses, [np.array(v) for v in model.variables], calls


def check(make, step, batches, *, split=True, gpus=(2, 3, 8)):
    """Plain Keras's numbers on several devices, with all calls split, or none."""
    expected, weights, _ = trained(make, step, batches)
    for count in gpus:
        losses, found, calls = trained(make, step, batches, count)
        np.testing.assert_allclose(losses, expected, rtol=2e-5, err_msg=str(count))
        for a, b in zip(found, weights, strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-6, err_msg=str(count))
        if split is not None:
            assert [(entry["split"] > 0, entry["one_device"] > 0) for entry in calls] == [(split, not split)]
    return calls


def built(layer, *shapes, **kwargs):
    layer(*(np.zeros(shape, "float32") for shape in shapes), **kwargs)
    return layer


class Attention(keras.layers.Layer):
    """Steps of a row look at those that a mask of T x T allows."""

    def __init__(self):
        super().__init__()
        self.query, self.value = keras.layers.Dense(4), keras.layers.Dense(4)

    def call(self, x, allowed=None):
        scores = ops.matmul(self.query(x), ops.transpose(x, (0, 2, 1)))
        if allowed is not None:
            scores = ops.where(ops.cast(allowed, "bool"), scores, -1e9)
        return ops.matmul(ops.softmax(scores), self.value(x))


class Tempered(keras.layers.Layer):
    """A weighted layer with whatever else a call may bring."""

    def __init__(self):
        super().__init__()
        self.dense = keras.layers.Dense(4)

    def call(self, x, scale=None, *, weights=None, flag=None, extra=None, functions=(), name=""):
        y = self.dense(x["a"] + x["b"] if isinstance(x, dict) else x)
        y = y if scale is None else y * scale
        y = y if weights is None else y * ops.mean(weights) + ops.sum(weights)
        y = y if flag is None or not bool(flag) else y + 1.0
        y = y if extra is None else y + ops.mean(ops.convert_to_tensor(extra[0]))
        for function in functions:
            y = function(y)
        return y


def attention():
    return built(Attention(), (2, 4, 4))


def tempered():
    return built(Tempered(), (2, 4))


@pytest.mark.parametrize("length", [ROWS, 5])
def test_a_mask_of_steps_by_steps_is_the_same_for_all_rows(length):
    mask = np.tril(np.ones((length, length), "float32"))
    check(attention, lambda layer, x: layer(x, allowed=mask), [rows(ROWS, length, 4), rows(ROWS, length, 4, seed=1)])


def test_keras_s_own_attention_takes_a_causal_mask_as_long_as_the_batch():
    mask = np.tril(np.ones((ROWS, ROWS), "bool"))

    def make():
        return built(keras.layers.MultiHeadAttention(2, 3), (2, 4, 4), (2, 4, 4))

    check(make, lambda layer, x: layer(x, x, attention_mask=mask), [rows(ROWS, ROWS, 4)])


def test_a_padding_mask_goes_with_its_rows():
    mask = np.random.default_rng(1).random((ROWS, 1, 5)) < 0.7
    mask[..., 0] = True
    check(attention, lambda layer, x: layer(x, allowed=mask[: len(x)]), [rows(ROWS, 5, 4), rows(3, 5, 4)])


@pytest.mark.parametrize("count", [ROWS, 6])
def test_weights_of_classes_as_many_as_rows_are_shared(count):
    weights = rows(count, seed=2)
    check(tempered, lambda layer, x: layer(x, weights=torch.tensor(weights)), [rows(ROWS, 4), rows(5, 4)])


def test_a_scale_for_each_row_is_dealt_out():
    check(
        tempered,
        lambda layer, x: layer(x, ops.reshape(ops.arange(len(x), dtype="float32"), (-1, 1))),
        [rows(ROWS, 4), rows(5, 4)],
    )


@pytest.mark.parametrize(
    "step",
    [
        lambda layer, x, model: layer(x, model.temperature),
        lambda layer, x, model: layer(x, ops.exp(model.temperature)),
        lambda layer, x, model: layer(x, scale=torch.ones(4) * model.temperature.value),
    ],
    ids=["variable", "number", "vector"],
)
def test_what_all_rows_share_gets_its_gradient(step):
    check(tempered, step, [rows(ROWS, 4), rows(5, 4)])


def test_flags_numbers_strings_and_empty_tensors_are_the_same_for_all_rows():
    def step(layer, x):
        flag = torch.tensor(len(x) > 5)
        first = layer(x, None, weights=None, flag=flag, name="some", functions=[])
        return first, layer(x, extra=[np.float32(2.0), None])

    check(tempered, step, [rows(ROWS, 4), rows(5, 4)])


def test_inputs_may_be_nested():
    check(
        tempered,
        lambda layer, x: layer({"b": x, "a": 2.0 * x}, weights=torch.ones(3)),
        [rows(ROWS, 4), rows(5, 4)],
    )


class Large:
    """An object that looks like any other of its class."""

    def __init__(self, values):
        self.values = values

    def __repr__(self):
        return "Large"

    def __call__(self, y):
        return y - ops.mean(y, axis=0) if self.values else y


def test_objects_that_look_alike_are_not_taken_for_each_other():
    apart, mixing = Large(False), Large(True)
    step = lambda layer, x: (layer(x, functions=(apart,)), layer(x, functions=(mixing,)))  # noqa: E731
    with pytest.warns(UserWarning, match="on one device: its outputs for a row depend on the other rows"):
        calls = check(tempered, step, [rows(ROWS, 4), rows(5, 4)], split=None)
    assert (calls[0]["split"], calls[0]["one_device"]) == (2, 2)


def test_arguments_that_are_new_each_time_are_tried_each_time():
    batches = [rows(ROWS, 4, seed=i) for i in range(3)]
    check(tempered, lambda layer, x: layer(x, functions=(lambda y: y * 2.0,)), batches)


def test_large_arrays_in_a_list_count_by_their_values():
    first, second = np.zeros(2000, "float32"), np.zeros(2000, "float32")
    second[1000] = 500.0
    arrays = iter([first, second] * 20)
    check(tempered, lambda layer, x: layer(x, extra=[next(arrays)]), [rows(ROWS, 4), rows(ROWS, 4, seed=1)])


class Outputs(keras.layers.Layer):
    """Gives what it is told to."""

    def __init__(self, form):
        super().__init__()
        self.dense, self.form = keras.layers.Dense(3), form

    def call(self, x):
        return self.form(self.dense(x))


FORMS = {
    "dict": lambda y: {"z": y, "a": [2.0 * y, y + 1.0]},
    "none": lambda y: (y, None, {"n": None, "k": 3, "s": "name"}),
    "mean": lambda y: (y, ops.mean(y**2)),
    "sum": lambda y: {"loss": ops.sum(y**2), "y": y},
    "more_per_row": lambda y: ops.reshape(y, (-1, 1)),
    "whole_numbers": lambda y: (y, ops.cast(y > 0, "int32"), y > 0),
}


@pytest.mark.parametrize("form", FORMS)
def test_outputs_of_a_layer_may_be_nested_and_no_tensors(form):
    check(lambda: built(Outputs(FORMS[form]), (2, 4)), lambda layer, x: layer(x), [rows(ROWS, 4), rows(5, 4)])


def test_a_layer_that_gives_nothing_but_losses():
    class Silent(Outputs):
        def call(self, x):
            self.add_loss(ops.mean(self.dense(x) ** 2))

    check(lambda: built(Silent(None), (2, 4)), lambda layer, x: layer(x), [rows(ROWS, 4), rows(5, 4)])


UNFIT = {
    "rows_by_rows": (lambda y: ops.matmul(y, ops.transpose(y)), "shape"),
    "deviation": (lambda y: (y, ops.std(y)), "neither a mean nor a sum"),
    "count": (lambda y: (y, len(y)), "not a tensor"),
    "mixed": (lambda y: y - ops.mean(y, axis=0), "depend on the other rows"),
    "mixed_whole_numbers": (lambda y: ops.argsort(ops.cast(y * 100, "int32"), axis=0), "depend on the other rows"),
    "squeezed": (lambda y: ops.squeeze(y[:, :1]), "shape|rows"),
}


@pytest.mark.parametrize("form", UNFIT)
def test_outputs_that_are_not_by_rows_are_one_device_s_and_say_so(form):
    function, reason = UNFIT[form]

    with pytest.warns(UserWarning, match=rf"calls of 'outputs\S*' .* one device: .*({reason})"):
        check_with_another(function)


def check_with_another(function):
    """Beside a layer that can be split, since a step without any is an error."""

    def both(layer, x):
        return layer.first(x), layer.second(x)

    class Pair(keras.layers.Layer):
        def __init__(self):
            super().__init__()
            self.first, self.second = built(Outputs(function), (4, 4)), built(keras.layers.Dense(2), (2, 4))

        def call(self, x):
            return x

    check(lambda: built(Pair(), (2, 4)), both, [rows(ROWS, 4), rows(5, 4)], split=None)


def test_a_failure_in_a_trial_is_no_failure_of_the_step():
    class Odd(Exception):
        pass

    def at_least_four(y):
        if len(y) < 4:
            raise Odd("too few")
        return y

    with pytest.warns(UserWarning, match="on one device: it fails on a part of the rows: Odd: .*too few"):
        check_with_another(at_least_four)


def test_what_a_call_itself_fails_with_is_told_alone():
    def step(layer, x):
        return layer(ops.reshape(x, (-1, 2)))

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match="expected axis"):
            trained(lambda: built(keras.layers.Dense(3), (2, 4)), step, [rows(ROWS, 4)], 3)


class Unused(keras.layers.Layer):
    """Takes an argument that it does not look at."""

    def __init__(self):
        super().__init__()
        self.dense = keras.layers.Dense(3)

    def call(self, x, context):
        return self.dense(x)


def test_roles_that_values_leave_open_run_on_one_device_and_say_so():
    class Pair(keras.layers.Layer):
        def __init__(self):
            super().__init__()
            self.first, self.second = built(Unused(), (2, 4), (2, 4)), built(keras.layers.Dense(2), (2, 4))

        def call(self, x):
            return x

    with pytest.warns(UserWarning, match="do not show which of them have rows"):
        check(
            lambda: built(Pair(), (2, 4)),
            lambda layer, x: (layer.first(x, 2.0 * x), layer.second(x)),
            [rows(ROWS, 4, seed=i) for i in range(4)],
            split=None,
        )


def test_roles_that_values_leave_open_are_known_from_another_number_of_rows():
    table = rows(6, 4, seed=5)
    calls = check(
        lambda: built(Unused(), (2, 4), (2, 4)),
        lambda layer, x: layer(x, table),
        [rows(ROWS, 4), rows(6, 4), rows(6, 4, seed=1)],
        gpus=(3,),
    )
    assert calls == [{"layer": calls[0]["layer"], "split": 3, "one_device": 0, "why": ""}]


def test_every_size_of_a_batch_is_split():
    sizes = [8, 3, 2, 16, 5]
    calls = check(
        lambda: built(keras.layers.Dense(3), (2, 4)), lambda layer, x: layer(x), [rows(n, 4, seed=n) for n in sizes]
    )
    assert calls[0]["split"] == len(sizes)


def test_a_single_row_is_no_loss_and_no_word():
    calls = check(
        lambda: built(keras.layers.Dense(3), (2, 4)), lambda layer, x: layer(x), [rows(8, 4), rows(1, 4)], gpus=(3,)
    )
    assert (calls[0]["split"], calls[0]["one_device"]) == (1, 0)


def test_a_layer_that_is_none_of_the_model_s_says_so():
    outside = built(keras.layers.Dense(4), (2, 4))
    outside.trainable = False
    with pytest.warns(UserWarning, match=f"calls of '{outside.name}'.* it is not a layer of the model"):
        check(
            lambda: built(keras.layers.Dense(3), (2, 4)),
            lambda layer, x: layer(outside(x)),
            [rows(ROWS, 4)],
            split=None,
            gpus=(3,),
        )


def test_the_report_counts_calls_by_layer():
    keras.utils.set_random_seed(3)
    model = Own(built(keras.layers.Dense(3, name="head"), (2, 4)), lambda layer, x: layer(x))
    parallel = fastdp.wrap(model, gpus=3)
    parallel.compile(optimizer="sgd")
    for n in (8, 4):
        parallel.train_on_batch(rows(n, 4))
    report = parallel.report()
    assert report.calls == [{"layer": "head", "split": 2, "one_device": 0, "why": ""}]
    assert "head" in str(report)
    assert report.to_dict()["calls"] == report.calls
