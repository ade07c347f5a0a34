"""Captured steps that the host thread launches on all simulated GPUs: their bits, their order, and who is woken."""

from __future__ import annotations

import importlib

import keras
import numpy as np
import pytest
from graph_models import batches, dense, hows, normalized, train, wrapped
from simulated_memory import RaceError
from small_buckets import make_buckets_small

import fastdp.comm.algorithm
from fastdp.comm.batch import Batch
from fastdp.errors import DeviceTimeoutError, ReplicaError
from fastdp.runtime.queue import QueueDevice

pytestmark = pytest.mark.usefixtures("few_arrays_in_a_bucket", "shared_traces")


@pytest.fixture
def few_arrays_in_a_bucket(monkeypatch):
    """Each model has several buckets."""
    make_buckets_small(monkeypatch)


@pytest.fixture
def woken(monkeypatch):
    """The devices whose worker was woken."""
    names: list[str] = []
    rouse = QueueDevice._rouse

    def noted(device):
        names.extend([device.name] if device._asleep else [])
        rouse(device)

    monkeypatch.setattr(QueueDevice, "_rouse", noted)
    return names


def by_workers(parallel):
    """A model whose steps are left to the workers."""
    x, y = next(batches(1))
    parallel.train_on_batch(x, y)
    parallel.engine.host_launch.enabled = False
    return parallel


def by_host(parallel):
    x, y = next(batches(1))
    parallel.train_on_batch(x, y)
    assert parallel.engine.host_launch.enabled
    return parallel


def assert_same(got, expected):
    assert got[0] == expected[0]
    for ours, theirs in zip(got[1], expected[1], strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(
    ("graph", "layers", "count", "seed", "nccl"),
    [("auto", dense, 2, 0, False), ("auto", normalized, 3, 1, True), ("step", dense, 3, 2, True)],
)
def test_the_host_thread_gives_the_bits_of_the_workers(gpus, monkeypatch, graph, layers, count, seed, nccl):
    """With draws, regularizers and moments, at any moment that CUDA allows. The last sizes fall back to workers."""
    if nccl:
        monkeypatch.setattr(fastdp.comm.algorithm, "ONE_SHOT_NBYTES", -1)
        monkeypatch.setattr(fastdp.comm.algorithm, "TWO_SHOT_NBYTES", -1)
    box = gpus(count, seed=seed)
    sizes = (8, 8, 8, 7, 8, 1)
    expected = train(by_workers(wrapped(layers, box.devices(count), graph=graph)), 10, sizes)
    parallel = by_host(wrapped(layers, box.devices(count), graph=graph))
    assert_same(train(parallel, 10, sizes), expected)
    assert "graph" in {how.split()[-1] for how in hows(parallel)}


@pytest.mark.parametrize("graph", ["auto", "step"])
def test_no_worker_is_woken_by_a_captured_step_of_a_fit(gpus, woken, graph):
    box = gpus(2)
    parallel = by_host(wrapped(normalized, box.devices(2), graph=graph))
    x, y = next(batches(1))
    for _ in range(4):
        parallel.train_on_batch(x, y)
    woken.clear()
    parallel.fit(np.tile(x, (6, 1)), np.tile(y, (6, 1)), batch_size=8, epochs=2, verbose=0, shuffle=False)
    assert woken == []
    by_workers(parallel)
    woken.clear()
    parallel.train_on_batch(x, y)
    assert set(woken) == {"gpu:0", "gpu:1"}


@pytest.mark.parametrize("update", ["each", "first"])
def test_learning_rates_weights_and_accumulation_are_seen(gpus, update):
    box = gpus(2)
    results = []
    for prepared in (by_workers, by_host):
        optimizer = lambda: keras.optimizers.Adam(0.01, gradient_accumulation_steps=2)  # noqa: E731
        parallel = prepared(wrapped(dense, box.devices(2), graph="step", optimizer=optimizer, update=update))
        train(parallel, 4, sizes=(8,))
        parallel.set_weights([np.full_like(weight, 0.1) for weight in parallel.get_weights()])
        parallel.optimizer.learning_rate = 0.5
        results.append(train(parallel, 5, sizes=(8,)))
    assert_same(results[1], results[0])


@pytest.mark.parametrize("early", [False, True])
def test_collectives_that_do_not_wait_for_the_gradients_are_found(gpus, monkeypatch, early):
    box = gpus(2)
    devices = box.devices(2)
    parallel = by_host(wrapped(normalized, devices, graph="auto"))
    train(parallel, 5, sizes=(8,))
    if not early:  # no bucket begins before the end
        parallel.engine._reductions._trained.clear()
    x, y = next(batches(1))
    with monkeypatch.context() as patch:
        for name in ("communicator", "one_thread"):
            module = importlib.import_module(f"fastdp.comm.cuda.{name}")
            patch.setattr(module, "begin_together", lambda streams, events, gate=None: None)
        with pytest.raises((ReplicaError, RaceError), match="nothing orders"):
            parallel.train_on_batch(x, y)
    box.drain(devices)


@pytest.mark.parametrize("graph", ["auto", "step"])
def test_a_step_that_takes_too_long_is_given_up_and_the_next_one_works(gpus, monkeypatch, graph):
    box = gpus(2)
    parallel = by_host(wrapped(normalized, box.devices(2), graph=graph))
    other = by_workers(wrapped(normalized, box.devices(2), graph=graph))
    train(parallel, 5, sizes=(8,))
    train(other, 5, sizes=(8,))
    x, y = next(batches(1))
    wait, parallel.engine.timeout = parallel.engine.host_launch._wait, 0.3

    def stuck(step, computed):
        with monkeypatch.context() as patch:
            patch.setattr(box.runtime, "event_done", lambda event: False)
            wait(step, computed)

    parallel.engine.host_launch._wait = stuck
    with pytest.raises(DeviceTimeoutError, match=r"gpu:0.*took longer than timeout=0.3"):
        parallel.train_on_batch(x, y)
    parallel.engine.host_launch._wait, parallel.engine.timeout = wait, 20.0
    for _ in range(2):
        assert parallel.train_on_batch(x, y) == other.train_on_batch(x, y)


@pytest.mark.parametrize("forgotten", [False, True])
def test_rows_of_an_idle_gpu_do_not_race_with_rows_that_were_staged_for_nothing(gpus, forgotten):
    """The copies that staging has enqueued on another stream may still run, to the same buffer."""
    box = gpus(2, seed=3)
    parallel, other = (prepared(wrapped(normalized, box.devices(2))) for prepared in (by_host, by_workers))
    for one in (parallel, other):
        train(one, 5, sizes=(8,))
    for step, (x, y) in enumerate(batches(6, sizes=(8,))):
        if step % 2:
            parallel.engine.stage(Batch.of([x.copy(), y.copy()]))
            if forgotten:
                parallel.engine.forget_staged()
        assert parallel.train_on_batch(x, y) == other.train_on_batch(x, y)
