"""Layers of which fastdp believes, without a trial, that rows do not meet in them: the trial must say the same."""

from __future__ import annotations

import keras
import layer_cases as cases
import numpy as np
import pytest

import fastdp
from fastdp.program.keras.batch import flatten_batch
from fastdp.program.keras.rows import policy as keras_row_policy
from fastdp.program.keras.rows import probe
from fastdp.program.keras.rows.known_layers import ROWS_APART, KnownLayers, keeps_rows_apart

layers = keras.layers


# Cases of layers that are known, but in a way in which they are not believed.
TRIED = {
    "BatchNormalization (renorm)",
    "Bidirectional (of GRU, masked, dropout)",
    "Dense (int8)",
    "Dropout (one mask for all rows)",
    "Embedding (masking zero)",
    "GRU (sequences, masked)",
    "GRU (stateful)",
    "GlobalAveragePooling1D (masked)",
    "LSTM (sequences, masked)",
    "LSTM (stateful)",
    "SimpleRNN (sequences, masked)",
    "SimpleRNN (stateful)",
}
LAYERS = {name: getattr(layers, cases.of_layer(name), None) for name in cases.CASES}
KNOWN = [
    name
    for name, case in cases.CASES.items()
    if LAYERS[name] in ROWS_APART and name not in TRIED and not (case.missing or case.refused)
]


def bare(name):
    """The case's layer in a model with nothing of the tests around it."""
    case = cases.CASES[name]
    keras.utils.set_random_seed(0)
    inputs = [keras.Input(shape, case.rows, dtype="int32" if case.below else "float32") for shape in case.shapes]
    return keras.Model(inputs if len(inputs) > 1 else inputs[0], case.apply(case.make(), list(inputs)))


def tried(model, x):
    """What three runs of the model on rows of x show."""
    shown = []
    call = lambda x, training: model(x, training=training)  # noqa: E731
    policy = keras_row_policy.Policy()  # rows that meet are an error
    trial = keras_row_policy.ModelEffects(model, model.variables, call, 1, training=True, policy=policy)
    run = trial._try_rows
    trial._try_rows = lambda *arguments, **options: shown.append(run(*arguments, **options)) or shown[-1]
    trial.inspect(*flatten_batch((x, None, None)))
    return shown


@pytest.mark.parametrize("name", KNOWN)
def test_the_trial_finds_nothing_in_a_layer_that_is_known(name, monkeypatch):
    model = bare(name)
    assert keeps_rows_apart(model)
    x = cases.CASES[name].batch(5)[0]
    assert tried(model, x) == []
    monkeypatch.setattr(keras_row_policy, "KnownLayers", lambda model: False)
    shown = tried(model, x)
    assert [len(trial.outputs) > 0 for trial in shown] == [True] * 3
    assert all(not trial.losses and not trial.moved for trial in shown)


@pytest.mark.parametrize("name", sorted(TRIED))
def test_a_known_layer_that_is_used_in_another_way_is_tried(name):
    assert not keeps_rows_apart(bare(name))


def test_every_layer_that_is_known_is_in_a_case():
    assert ROWS_APART - {LAYERS[name] for name in KNOWN} == set()


def dense(**options):
    return keras.Sequential([keras.Input((4,)), layers.Dense(4, **options)])


def numbers(layer):
    x = keras.Input(())
    return keras.Model(x, layer(x))


def functional(make):
    x = keras.Input((4, 4))
    return keras.Model(x, make(x))


class Doubled(layers.Layer):
    def call(self, inputs):
        return 2 * inputs


class Subclassed(keras.Model):
    def call(self, inputs):
        return inputs


def altered():
    model = dense()
    model.layers[0].call = lambda inputs: inputs - keras.ops.mean(inputs, axis=0)
    return model


def hooked():
    model = dense()
    model.layers[0].register_forward_hook(lambda module, inputs, output: output - output.mean(0))
    return model


ANYTHING = {
    "a layer of the user's": lambda: functional(Doubled()),
    "a subclass of Model": Subclassed,
    "a call of the layer's object": altered,
    "a hook": hooked,
    "a function as activation": lambda: dense(activation=lambda x: x - keras.ops.mean(x, axis=0)),
    "an activity regularizer": lambda: dense(activity_regularizer="l2"),
    "noise that rows share": lambda: functional(layers.Dropout(0.5, noise_shape=(1, 4, 4))),
    "softmax over the rows": lambda: functional(layers.Softmax(axis=0)),
    "rows put behind each other": lambda: functional(lambda x: layers.Concatenate(axis=0)([x, x])),
    "an einsum over the rows": lambda: functional(layers.EinsumDense("abc,cd->bad", (None, 4))),
    "a state": lambda: keras.Model(*[(x := keras.Input((4, 4), 2)), layers.LSTM(3, stateful=True)(x)]),
    "statistics beyond the usual": lambda: functional(layers.BatchNormalization(renorm=True)),
    "a mean over the rows": lambda: functional(lambda x: x - keras.ops.mean(x, axis=0, keepdims=True)),
    "unequal ranks": lambda: functional(lambda x: x + layers.Flatten()(x[:, :1])),
    "a softmax over one number for each row": lambda: numbers(layers.Softmax()),
    "an operation as activation": lambda: dense(activation=keras.ops.transpose),
    "a layer over the rows as activation": lambda: dense(activation=layers.Softmax(axis=0)),
    "a matrix of scales": lambda: functional(layers.Rescaling(np.ones((4, 1, 1)))),
    "attention over the rows": lambda: functional(lambda x: layers.MultiHeadAttention(1, 2, attention_axes=(0,))(x, x)),
    "a constant among the arguments": lambda: functional(
        lambda x: layers.MultiHeadAttention(1, 2)(x, x, attention_mask=np.ones((4, 4, 4)))
    ),
    "a lambda": lambda: functional(layers.Lambda(lambda x: x * 2)),
    "one of these in a model in a model": lambda: functional(keras.Sequential([keras.Sequential([Doubled()])])),
}


@pytest.mark.parametrize("what", ANYTHING)
def test_whatever_is_not_known_is_tried(what):
    assert not keeps_rows_apart(ANYTHING[what]())


def test_models_of_known_layers_are_known():
    assert keeps_rows_apart(dense(activation="relu"))
    assert keeps_rows_apart(
        functional(lambda x: layers.LayerNormalization()(x + layers.MultiHeadAttention(2, 2)(x, x)) * 2)
    )
    assert keeps_rows_apart(functional(keras.Sequential([layers.Flatten(), layers.Dense(2)])))
    assert keeps_rows_apart(functional(layers.Dropout(0.5, noise_shape=(None, 1, 4))))


def test_a_known_model_is_not_run_before_its_first_step(monkeypatch):
    fastdp.set_virtual_devices(2)
    monkeypatch.setattr(probe.Effects, "_try_rows", lambda *arguments: pytest.fail("tried"))
    parallel = fastdp.wrap(dense(), gpus=2)
    parallel.compile("sgd", "mse")
    parallel.train_on_batch(np.ones((4, 4), "float32"), np.ones((4, 4), "float32"))
    fastdp.set_virtual_devices(0)


def test_what_else_a_model_of_known_layers_holds_is_not_looked_at():
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.batches = iter([1, 2])
    known = KnownLayers(model)
    assert known
    assert known
    assert next(model.batches) == 1
