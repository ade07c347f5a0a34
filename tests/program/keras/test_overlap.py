"""Gradients of Keras models are announced bucket by bucket from the middle of backward, and stay the same bits."""

from __future__ import annotations

import threading

import keras
import numpy as np
import pytest
import torch

import fastdp
from fastdp.buffers import FlatBuffers
from fastdp.comm.host import communicator
from fastdp.comm.host.reduction import HostReduction
from fastdp.engine import step_scope

LIMIT = 20.0


@pytest.fixture(autouse=True)
def _three_devices(monkeypatch):
    monkeypatch.setattr(communicator, "CORES", 64)  # to spare
    fastdp.set_virtual_devices(3)
    yield
    fastdp.set_virtual_devices(0)
    Gate.waits = None


@pytest.fixture
def small_buckets(monkeypatch):
    monkeypatch.setattr(FlatBuffers.buckets, "__defaults__", (4, 200))


class Gate(torch.autograd.Function):
    """Nothing in forward; backward first calls `waits`."""

    waits = None

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        if Gate.waits is not None:
            Gate.waits()
        return gradient


@keras.saving.register_keras_serializable("test_overlap")
class Gated(keras.layers.Layer):
    """Holds up backward in its middle."""

    def call(self, x):
        return Gate.apply(x)


def model(kind="plain"):
    keras.utils.set_random_seed(7)
    inputs = keras.Input((6,))
    x = keras.layers.Dense(9, activation="tanh", kernel_regularizer="l2")(inputs)
    if kind == "batch_norm":
        x = keras.layers.BatchNormalization()(x)
    shared = keras.layers.Dense(9, activation="tanh")
    x = Gated()(shared(shared(x)))
    if kind == "batch_norm":
        x = keras.layers.BatchNormalization()(x)
    x = keras.layers.Dense(5, activation="tanh")(x)
    out = keras.layers.Dense(1)(x)
    return Aside(inputs, out) if kind == "unused" else keras.Model(inputs, out)


@keras.saving.register_keras_serializable("test_overlap")
class Aside(keras.Model):
    """Has weights in the middle and at the end that the loss does not depend on."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.extra = keras.layers.Dense(4)
        self.extra.build((None, 9))


def data(rows=11):
    rng = np.random.default_rng(0)
    return rng.normal(size=(rows, 6)).astype("f4"), rng.normal(size=(rows, 1)).astype("f4")


def batch_loss(y_true, y_pred):
    """No sum over samples: computed on the merged outputs."""
    return torch.sqrt(((y_true - y_pred) ** 2).mean() + 1e-3)


def trained(kind, steps=4, loss="mse", **options):
    parallel = fastdp.wrap(model(kind), gpus=3, **options)
    parallel.compile("adam", loss)
    x, y = data()
    for _ in range(steps):
        parallel.train_on_batch(x, y)
    return parallel


def weights(parallel):
    return [np.asarray(w).tobytes() for w in parallel.get_weights()]


KINDS = [
    ("plain", {}),
    ("unused", {}),
    ("batch_norm", {}),
    ("batch_norm", {"sync_batch_norm": True}),
    ("plain", {"loss": batch_loss}),
    ("plain", {"update": "each", "check_replicas": True}),
    ("plain", {"compile": "trace"}),
]


@pytest.mark.filterwarnings("ignore:Gradients do not exist")
@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_small_buckets_give_the_bits_of_one_bucket(monkeypatch, kind, options):
    want = trained(kind, **options)
    assert len(want.engine.group.buckets) == 1
    monkeypatch.setattr(FlatBuffers.buckets, "__defaults__", (4, 200))
    got = trained(kind, **options)
    assert len(got.engine.group.buckets) > 3
    if options.get("compile") is None:
        assert got.engine.times._watches[-1].early > 0
        report = got.report()
        assert (report.buckets, report.early_buckets) == (len(got.engine.group.buckets), got.engine.times.early)
        assert f"Of {report.buckets} buckets of gradients, {report.early_buckets} are reduced while" in str(report)
    assert weights(got) == weights(want)


@pytest.mark.usefixtures("small_buckets")
def test_the_last_layers_are_reduced_while_backward_is_held_up_before_the_first_ones(monkeypatch):
    spans, changed, kept = [], threading.Condition(), HostReduction._sum

    def summed(reduction, dtype, span, owner):
        kept(reduction, dtype, span, owner)
        with changed:
            spans.append((span.start, span.stop))
            changed.notify_all()

    monkeypatch.setattr(HostReduction, "_sum", summed)
    monkeypatch.setattr(step_scope, "CORES", 64)  # cores to spare: the calling thread sums, and does no worker's part
    parallel = trained("plain", steps=1)
    spans.clear()
    first, waited = parallel.engine.group.buckets[0], []

    def wait():
        waited.append(threading.current_thread().name)
        with changed:
            assert changed.wait_for(lambda: (first.start, first.stop) in spans, LIMIT), "not reduced meanwhile"

    Gate.waits = wait
    parallel.train_on_batch(*data())
    assert len(waited) == 3


@pytest.mark.usefixtures("small_buckets")
def test_a_failure_in_the_middle_of_backward_changes_no_weight():
    parallel = trained("plain", steps=2)
    before, steps = weights(parallel), []

    def fail():
        steps.append(threading.current_thread().name)
        if steps[-1] == "fastdp-virtual:1":
            raise FloatingPointError("planned")

    Gate.waits = fail
    with pytest.raises(fastdp.ReplicaError, match=r"virtual:1 .*planned"):
        parallel.train_on_batch(*data())
    assert weights(parallel) == before
    Gate.waits = None
    parallel.train_on_batch(*data())
    other = trained("plain", steps=3)
    assert weights(parallel) == weights(other)


@pytest.mark.usefixtures("small_buckets")
def test_accumulated_gradients_are_reduced_once_and_at_the_end():
    parallel = fastdp.wrap(model(), gpus=3)
    parallel.compile(keras.optimizers.SGD(0.1, gradient_accumulation_steps=2), "mse")
    plain = model()
    plain.compile(keras.optimizers.SGD(0.1, gradient_accumulation_steps=2), "mse")
    for _ in range(4):
        parallel.train_on_batch(*data())
        plain.train_on_batch(*data())
    for mine, theirs in zip(parallel.get_weights(), plain.get_weights(), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-6)
