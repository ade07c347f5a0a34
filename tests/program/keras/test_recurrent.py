"""Recurrent layers on replicas: one operation for all time steps, equal to Keras's loop over them."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

import fastdp
from fastdp.comm.context import Context
from fastdp.program.keras.patches import replica_aware
from fastdp.program.keras.replica import ReplicaContext, replica_scope
from fastdp.runtime.host.job_threads import JobThreads
from fastdp.tensors import at_once, recurrent_ops, rnn_layer

L = keras.layers
ROWS, STEPS, FEATURES, UNITS = 5, 7, 3, 4
OPS = ("lstm_onednn", "lstm_scan", "gru_scan")

MASKS = {
    "none": None,
    "right": [[1, 1, 1, 1, 1, 0, 0]] * 2 + [[1, 0, 0, 0, 0, 0, 0]] * 2 + [[1] * 7],
    "left": [[0, 0, 1, 1, 1, 1, 1]] * 2 + [[0, 0, 0, 0, 0, 0, 1]] * 2 + [[1] * 7],
    "holes": [[1, 0, 1, 1, 0, 0, 1], [0, 1, 0, 1, 0, 1, 0], [0] * 7, [1] * 7, [1, 0, 0, 0, 0, 0, 1]],
}


@pytest.fixture
def counted(monkeypatch):
    """How often each operation ran."""
    calls = dict.fromkeys(OPS, 0)

    def counting(name, op):
        def call(*args):
            calls[name] += 1
            return op(*args)

        return call

    for name in OPS:
        target = f"fastdp.program.keras.recurrent.{name}"
        monkeypatch.setattr(target, counting(name, getattr(recurrent_ops, name)))
    return calls


def on_replica(function):
    """`function()` as the thread of a replica that has all rows runs it."""
    context = Context.alone([np.zeros((ROWS, 1))], None, 0, ROWS, ROWS)
    with replica_aware(), replica_scope(ReplicaContext(context)):
        return function()


def data(dtype="float32"):
    generator = np.random.default_rng(0)
    return torch.from_numpy(generator.normal(size=(ROWS, STEPS, FEATURES))).to(getattr(torch, dtype))


def randomized(layer):
    """The layer, built, with no weight that is zero or one."""
    if not layer.built:
        layer.build((None, STEPS, FEATURES))
    generator = np.random.default_rng(1)
    layer.set_weights([generator.normal(size=w.shape, scale=0.5) for w in layer.get_weights()])
    return layer


def results_and_gradients(layer, mask, states, training, dtype="float32"):
    """All results of a layer, and gradients by its weights, its input and its initial states."""
    x = data(dtype).requires_grad_()
    given = [torch.full((ROWS, UNITS), 0.3 + i, dtype=x.dtype).requires_grad_() for i in range(states)]
    mask = None if mask is None else torch.tensor(mask, dtype=torch.bool)
    found = keras.tree.flatten(layer(x, mask=mask, initial_state=given or None, training=training))
    seeds = [torch.linspace(-1, 2, r.numel(), dtype=r.dtype).reshape(r.shape) for r in found]
    inputs = [*(v.value for v in layer.trainable_variables), x, *given]
    gradients = torch.autograd.grad(found, inputs, seeds, allow_unused=True)
    return [t.detach() for t in found], [torch.zeros(()) if t is None else t for t in gradients]


def compare(layer, mask, states=0, training=True, tolerance=1e-5, dtype="float32"):
    """A layer on a replica gives what it gives in plain Keras."""
    reset_seeds(layer)
    expected, expected_gradients = results_and_gradients(layer, mask, states, training, dtype)
    reset_seeds(layer)
    found, gradients = on_replica(lambda: results_and_gradients(layer, mask, states, training, dtype))
    pairs = zip([*found, *gradients], [*expected, *expected_gradients], strict=True)
    for value, other in pairs:
        assert value.dtype == other.dtype
        torch.testing.assert_close(value, other.expand(value.shape), rtol=tolerance, atol=tolerance)


def reset_seeds(layer):
    for generator in [g for one in layer._flatten_layers() for g in one._seed_generators]:
        generator.state.assign(torch.tensor([generator._initial_seed or 0, 0]))


KINDS = {
    "lstm": lambda **options: L.LSTM(UNITS, **options),
    "gru": lambda **options: L.GRU(UNITS, **options),
    "gru-reset-before": lambda **options: L.GRU(UNITS, reset_after=False, **options),
    "rnn-lstm": lambda **options: L.RNN(L.LSTMCell(UNITS), **options),
    "rnn-gru": lambda **options: L.RNN(L.GRUCell(UNITS), **options),
}
OPTIONS = (
    {},
    {"return_sequences": True},
    {"return_state": True},
    {"return_sequences": True, "return_state": True, "go_backwards": True},
    {"return_sequences": True, "zero_output_for_mask": True},
    {"return_state": True, "zero_output_for_mask": True, "unroll": True},
)


@pytest.mark.parametrize("options", OPTIONS, ids=["-".join(options) or "plain" for options in OPTIONS])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_states_and_gradients_are_those_of_the_loop(kind, mask, options, counted):
    layer = randomized(KINDS[kind](**options))
    compare(layer, MASKS[mask])
    compare(layer, MASKS[mask], states=2 if "lstm" in kind else 1)
    assert sum(counted.values()) == 2


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("kind", ["lstm", "gru", "gru-reset-before"])
def test_without_biases(kind, mask, counted):
    compare(randomized(KINDS[kind](use_bias=False, return_sequences=True)), MASKS[mask])
    assert sum(counted.values()) == 1


@pytest.mark.parametrize("merge", ["concat", "sum", None])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_bidirectional_layers(kind, mask, merge, counted):
    layer = L.Bidirectional(KINDS[kind](return_sequences=True, return_state=True), merge_mode=merge)
    compare(randomized(layer), MASKS[mask])
    assert sum(counted.values()) == 2


@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_float64_is_computed_in_float64(kind, counted):
    layer = randomized(KINDS[kind](dtype="float64", return_sequences=True))
    # Without a mask: Keras's step-by-step loop casts to float32 on its way, and is near 1e-8 only.
    compare(layer, None, tolerance=1e-12, dtype="float64")
    assert counted["lstm_onednn"] == 0
    assert sum(counted.values()) == 1


@pytest.mark.parametrize("policy", ["float16", "bfloat16", "mixed_float16", "mixed_bfloat16"])
@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_half_precision_is_near_the_loop_and_nearer_to_the_truth(kind, policy, counted):
    layer = randomized(KINDS[kind](dtype=policy, recurrent_initializer="glorot_uniform", return_sequences=True))
    exact = KINDS[kind](dtype="float64", return_sequences=True)
    exact.build((None, STEPS, FEATURES))
    # The weights as they are after rounding to half precision.
    half = layer.compute_dtype
    exact.set_weights([keras.ops.convert_to_numpy(keras.ops.cast(w, half)).astype("float64") for w in layer.weights])
    x = data(half)
    truth = exact(x.double()).detach()
    loop = layer(x).detach()
    fused = on_replica(lambda: layer(x).detach())
    assert fused.dtype == loop.dtype == getattr(torch, half)
    epsilon = torch.finfo(fused.dtype).eps
    torch.testing.assert_close(fused, loop, rtol=8 * epsilon, atol=8 * epsilon)
    assert (fused.double() - truth).abs().max() <= (loop.double() - truth).abs().max() + epsilon / 8
    assert sum(counted.values()) == 1


@pytest.mark.parametrize("mask", ["none", "holes"])
@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_dropout_of_the_inputs_draws_keras_s_mask(kind, mask, counted):
    compare(randomized(KINDS[kind](dropout=0.4, seed=3)), MASKS[mask])
    assert sum(counted.values()) == 1


@pytest.mark.parametrize(
    "options",
    [
        {"recurrent_dropout": 0.3, "seed": 3},
        {"dropout": 1.0, "seed": 3},
        {"activation": "relu"},
        {"recurrent_activation": "hard_sigmoid"},
        {"activation": None},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_what_the_operations_do_not_know_runs_as_keras_s_loop(kind, options, counted):
    compare(randomized(KINDS[kind](**options)), MASKS["holes"])
    assert sum(counted.values()) == 0


class Doubling(L.SimpleRNNCell):
    """A cell of one's own."""

    def call(self, inputs, states, training=False):
        output, new = super().call(inputs, states, training)
        return 2.0 * output, new


class OwnLSTMCell(L.LSTMCell):
    """A cell that looks like Keras's."""

    def call(self, inputs, states, training=False):
        output, new = super().call(inputs, states, training)
        return output + 1.0, new


@pytest.mark.parametrize("cell", [Doubling, OwnLSTMCell])
def test_cells_of_one_s_own_run_in_the_loop(cell, counted):
    compare(randomized(L.RNN(cell(UNITS), return_sequences=True)), MASKS["holes"])
    assert sum(counted.values()) == 0


def test_stacked_cells_run_in_the_loop(counted):
    compare(randomized(L.RNN([L.LSTMCell(UNITS), L.LSTMCell(UNITS)])), None)
    assert sum(counted.values()) == 0


def test_one_row():
    layer = randomized(L.LSTM(UNITS, return_sequences=True))
    x = data()[:1]
    torch.testing.assert_close(on_replica(lambda: layer(x)), layer(x), rtol=1e-5, atol=1e-6)


def test_outside_of_replicas_nothing_is_changed(counted):
    layer = randomized(L.GRU(UNITS))
    with replica_aware():
        layer(data())
    assert sum(counted.values()) == 0


def test_without_onednn_the_scan_takes_its_place(counted, monkeypatch):
    monkeypatch.setattr("fastdp.program.keras.recurrent.has_onednn", lambda x: False)
    compare(randomized(L.LSTM(UNITS, return_sequences=True, return_state=True)), None, states=2)
    assert counted == {"lstm_onednn": 0, "lstm_scan": 1, "gru_scan": 0}


@pytest.fixture
def in_three_parts(monkeypatch):
    """Rows are cut into three parts, however few they are. Gives the number of parts of each computation."""
    counts, before = [], torch.get_num_threads()
    monkeypatch.setattr(at_once, "LEAST_ROWS", 1)
    monkeypatch.setattr(at_once, "LEAST_WORK", 1)

    def noting(function, count, **options):
        counts.append(count)
        return at_once.at_once(function, count, **options)

    monkeypatch.setattr(rnn_layer, "at_once", noting)
    torch.set_num_threads(3)
    yield counts
    torch.set_num_threads(before)


@pytest.mark.parametrize("options", OPTIONS[:4], ids=["-".join(options) or "plain" for options in OPTIONS[:4]])
@pytest.mark.parametrize("mask", ["none", "left"])
def test_rows_in_parts_give_what_all_rows_give(mask, options, in_three_parts, monkeypatch):
    monkeypatch.setattr(at_once, "_THREADS", JobThreads(2, "fastdp-rows"))  # fewer threads than parts
    layer = randomized(L.LSTM(UNITS, **options))
    compare(layer, MASKS[mask], states=2)
    compare(layer, MASKS[mask], training=False)
    scanned = mask != "none" and "return_state" in options  # the scan alone gives every c
    assert in_three_parts == ([] if scanned else [3] * 4)


# The operations themselves.


def inputs_of(name, dtype=torch.float64):
    """Arguments of an operation."""
    generator = torch.Generator().manual_seed(0)
    gates, states = (3, 1) if name == "gru_scan" else (4, 2)
    shapes = [(2, 3, FEATURES), *[(2, UNITS)] * states, (FEATURES, gates * UNITS), (UNITS, gates * UNITS)]
    shapes += [(gates * UNITS,)] * (2 if name == "gru_scan" else 1)
    return [torch.randn(s, generator=generator, dtype=dtype).requires_grad_() for s in shapes]


@pytest.mark.parametrize(("name", "options"), [("lstm_scan", ()), ("gru_scan", (True,)), ("gru_scan", (False,))])
def test_gradients_of_the_scans_are_those_of_finite_differences(name, options):
    op = getattr(recurrent_ops, name)
    assert torch.autograd.gradcheck(
        lambda *args: op(*args, *options)[: 2 if name == "lstm_scan" else 1], inputs_of(name)
    )


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *(("lstm_onednn", (train, parts)) for train in (True, False) for parts in (1, 2)),
        *(("lstm_scan", ()), ("gru_scan", (True,)), ("gru_scan", (False,))),
    ],
)
def test_the_operations_keep_torch_s_rules_for_operations(name, options):
    args = (*inputs_of(name, torch.float32), *options)
    # Not the values under a compiler that knows gradients: float32 inputs of a random size need wider tolerances.
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    assert set(torch.library.opcheck(getattr(recurrent_ops, name), args, test_utils=checks).values()) == {"SUCCESS"}


@pytest.mark.parametrize("mask", ["none", "holes"])
@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_a_trace_has_one_operation_forward_and_one_backward(kind, mask):
    layer = randomized(KINDS[kind](return_sequences=True))
    weights = [v.value for v in layer.trainable_variables]
    mask = None if MASKS[mask] is None else torch.tensor(MASKS[mask], dtype=torch.bool)

    def step(x):
        return torch.autograd.grad(layer(x, mask=mask).sum(), weights)

    graph = on_replica(lambda: make_fx(step)(data()))
    called = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    ours = [name for name in called if name.startswith("fastdp.")]
    name = {"lstm": "fastdp.lstm_onednn", "gru": "fastdp.gru_scan"}[kind]
    assert ours == [f"{name}.default", f"{name}_backward.default"]
    assert len(called) < 100


# In training.


def network(kind, embedding=True):
    keras.utils.set_random_seed(3)
    first = [keras.Input((STEPS,)), L.Embedding(9, FEATURES, mask_zero=True)]
    if not embedding:
        first = [keras.Input((STEPS, FEATURES)), L.Masking(0.0)]
    return keras.Sequential(
        [*first, L.Bidirectional(KINDS[kind](dropout=0.2, seed=1, return_sequences=True)), KINDS[kind](), L.Dense(2)]
    )


def train(kind, gpus, mode, steps=6):
    """Losses and weights after some steps, and what was captured."""
    generator = np.random.default_rng(0)
    model = network(kind)
    trainer = model if gpus is None else fastdp.wrap(model, gpus=gpus, compile=mode)
    trainer.compile(keras.optimizers.Adam(0.01), "mse")
    losses = []
    for _ in range(steps):
        x = generator.integers(0, 9, (8, STEPS))
        losses.append(trainer.train_on_batch(x, generator.normal(size=(8, 2)).astype("float32")))
    return losses, model.get_weights(), [] if gpus is None else trainer.report()


@pytest.fixture
def _devices():
    fastdp.set_virtual_devices(3)
    yield
    fastdp.set_virtual_devices(0)


@pytest.mark.usefixtures("_devices")
@pytest.mark.parametrize("mode", [None, "trace", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("gpus", [1, 3])
@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_training_equals_plain_keras(kind, gpus, mode):
    expected, expected_weights, _ = train(kind, None, None)
    losses, weights, _ = train(kind, gpus, mode)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    for weight, other in zip(weights, expected_weights, strict=True):
        np.testing.assert_allclose(weight, other, rtol=1e-4, atol=1e-5)
