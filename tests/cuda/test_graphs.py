"""CUDA graphs of captured steps, on the simulated CUDA: what they compute, and when they are recorded."""

from __future__ import annotations

import importlib
import warnings

import keras
import numpy as np
import pytest
import torch
from graph_models import batches, convolutional, dense, embedded, hows, normalized, train, unused, wrapped

import fastdp.buffers
from fastdp.capture import patience
from fastdp.capture import trace as capture_trace
from fastdp.capture.cuda_graphs import recording
from fastdp.engine.replicas import Replica

pytestmark = pytest.mark.usefixtures("shared_traces")
ORIGINALS = {name: getattr(Replica, name) for name in ("train", "launch", "predict", "update")}


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("layers", [dense, normalized, convolutional, embedded])
def test_recorded_steps_equal_traced_ones_bit_for_bit(gpus, small_buckets, layers, count):
    box = gpus(2)
    expected = train(wrapped(layers, box.devices(count), graph=None))
    parallel = wrapped(layers, box.devices(count))
    got = train(parallel)
    assert hows(parallel) == {"graph"}
    assert got[0] == expected[0]
    for ours, theirs in zip(got[1], expected[1], strict=True):
        np.testing.assert_array_equal(ours, theirs)
    replays = [graph.replays for graphs in box.graphs for graph in graphs.graphs]
    assert min(replays) > 0
    segments = {entry["segments"] for entry in parallel.report()}
    assert segments == {1} if count == 1 or not small_buckets else min(segments) > 1


def test_each_bucket_is_told_once_when_its_graph_has_been_launched(gpus, small_buckets, monkeypatch):
    box = gpus(2)
    told = []
    replay = capture_trace.Captured.replay

    def noted(self, replica, batch, context):
        mine, gradients = [], replica.gradients
        members = [bucket.arrays for bucket in replica.gradient_buffers.buckets()]
        context.ready = lambda bucket: mine.append((bucket, [gradients[i].clone() for i in members[bucket]]))
        for gradient in gradients:
            gradient.fill_(float("nan"))
        outcome = replay(self, replica, batch, context)
        assert sorted(bucket for bucket, _ in mine) == list(range(len(members)))
        for bucket, values in mine:
            assert all(torch.equal(a, gradients[i]) for a, i in zip(values, members[bucket], strict=True))
        told.append(context.rank in self.recordings)
        return outcome

    monkeypatch.setattr(capture_trace.Captured, "replay", noted)
    parallel = wrapped(normalized, box.devices(3))
    train(parallel, 5, sizes=(8,))
    assert told == [False] * 3 + [True] * 9
    assert len(parallel.engine.group.buckets) > 2 * small_buckets


@pytest.mark.parametrize("seed", [None, 0])
def test_recorded_steps_give_what_eager_ones_give(gpus, small_buckets, seed):
    box = gpus(2, seed=seed)
    expected = train(wrapped(dense, box.devices(3), compile=None))
    parallel = wrapped(dense, box.devices(3))
    got = train(parallel)
    assert hows(parallel) == {"graph"}
    np.testing.assert_allclose(got[0], expected[0], rtol=1e-5)
    for ours, theirs in zip(got[1], expected[1], strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_a_shape_runs_eagerly_then_traced_then_recorded(gpus):
    box = gpus(1)
    parallel = wrapped(dense, box.devices(2))
    seen = []
    for x, y in batches(4, sizes=(8,)):
        parallel.train_on_batch(x, y)
        seen.append(hows(parallel))
    assert seen == [{"eager"}, {"traced"}, {"graph"}, {"graph"}]
    first, second = parallel.report()  # the first replica counts the regularizers, so that each has a graph of its own
    for entry in (first, second):
        assert (entry["replicas"], entry["segments"], entry["steps"]) == (1, 1, 4)
        assert entry["record_seconds"] > 0
        assert entry["graph_nbytes"] > 0
    assert "recorded in s" in str(parallel.report())
    assert [graph.replays for graphs in box.graphs for graph in graphs.graphs] == [2, 2]


def test_only_so_many_shapes_of_a_replica_are_recorded_and_the_others_run_traced(gpus):
    box = gpus(1)
    parallel = wrapped(normalized, box.devices(1))
    train(parallel, 15, sizes=(4, 5, 6, 7, 8))
    entries = list(parallel.report())
    assert [entry["how"] for entry in entries] == ["graph"] * 4 + ["traced"]
    assert entries[-1]["why"].endswith("no CUDA graph: 4 other shapes are recorded")


def test_fewer_rows_than_devices_and_weights_that_no_step_uses(gpus, small_buckets):
    box = gpus(2)
    results = []
    for graph in (None, "auto"):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Gradients do not exist")
            parallel = wrapped(unused, box.devices(3), graph=graph)
            results.append(train(parallel, 8, sizes=(2, 7)))
    assert hows(parallel) == {"graph"}
    assert results[0][0] == results[1][0]
    for ours, theirs in zip(results[0][1], results[1][1], strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("update", ["first", "each"])
def test_gradient_accumulation(gpus, small_buckets, update):
    box = gpus(2)
    results = []
    for graph in (None, "bucket"):
        parallel = wrapped(
            dense,
            box.devices(2),
            graph=graph,
            update=update,
            optimizer=lambda: keras.optimizers.Adam(0.01, gradient_accumulation_steps=3),
        )
        results.append(train(parallel))
    assert hows(parallel) == {"graph"}
    assert results[0][0] == results[1][0]
    for ours, theirs in zip(results[0][1], results[1][1], strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_replays_see_weights_and_learning_rates_that_are_set_between_steps(gpus):
    box = gpus(2)
    results = []
    for graph in (None, "auto"):
        parallel = wrapped(normalized, box.devices(3), graph=graph)
        train(parallel, 6, sizes=(8,))
        parallel.set_weights([np.full_like(weight, 0.1) for weight in parallel.get_weights()])
        parallel.optimizer.learning_rate = 0.5
        x, y = next(batches(1))
        losses = [parallel.train_on_batch(x, y)[0] for _ in range(2)]
        parallel.template.layers[0].kernel.assign_add(np.ones((6, 8), "float32"))
        results.append([*losses, parallel.train_on_batch(x, y)[0]])
    assert hows(parallel) == {"graph"}
    assert results[0] == results[1]
    assert len(set(results[1])) == 3


def test_outputs_of_one_replay_are_not_those_of_the_next(gpus):
    """The graphs' outputs lie where the next replay writes: what a step gave the caller stays."""
    box = gpus(2)
    for cpu_merge in (True, False):
        devices = box.devices(2)
        parallel = wrapped(normalized, devices, cpu_merge=cpu_merge)
        train(parallel, 4, sizes=(8,))
        engine, program = parallel.engine, parallel.engine.program
        steps = parallel._steps
        kept, expected = [], []
        train_engine = engine.train

        def noted(*args, kept=kept, expected=expected, train_engine=train_engine, devices=devices, **options):
            result = train_engine(*args, **options)
            (output,) = result.outputs
            kept.append(output)
            expected.append(np.array(output) if isinstance(output, np.ndarray) else devices[0].to_host(output))
            return result

        engine.train = noted
        for x, y in batches(3, sizes=(8,)):
            parallel.train_on_batch(x, y)
        assert hows(parallel) == {"graph"}
        assert steps.engine is engine
        for output, values in zip(kept, expected, strict=True):
            np.testing.assert_array_equal(np.asarray(output), values)
        assert not np.array_equal(expected[0], expected[1])
        del engine, program, steps, train_engine, noted, kept, expected, parallel


def test_a_step_that_cannot_be_recorded_runs_traced_with_one_warning_and_loses_nothing(gpus):
    box = gpus(2)
    expected = train(wrapped(dense, box.devices(3), graph=None))
    box.not_recorded.add(torch.ops.aten.tanh.default)
    parallel = wrapped(dense, box.devices(3))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        got = train(parallel)
    said = [str(w.message) for w in caught if "CUDA graph" in str(w.message)]
    assert len(said) == 1
    assert "operation not permitted when stream is capturing" in said[0]
    assert hows(parallel) == {"traced"}
    assert all("no CUDA graph: RuntimeError" in entry["why"] for entry in parallel.report())
    assert got[0] == expected[0]
    for ours, theirs in zip(got[1], expected[1], strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_value_for_the_host_and_an_allocation_by_cuda_end_a_recording(gpus):
    box = gpus(1)
    (device,) = box.devices(1)
    graphs = box.graphs_of(device)
    x = torch.ones(3)
    with pytest.raises(RuntimeError, match="not permitted"):
        graphs.record(lambda: [x * float(x.sum())])
    with pytest.raises(RuntimeError, match="Capture"):
        graphs.record(lambda: [x, device.empty((3,), np.dtype("float32"))])
    assert len(box.sim.violations) == 1
    box.sim.violations.clear()
    graph, (y,) = graphs.record(lambda: [x + 1])
    assert torch.isnan(y).all()
    x.fill_(4)
    graph.replay()
    assert y.tolist() == [5, 5, 5]


@pytest.mark.parametrize("by_host", [False, True])
def test_a_failure_of_one_replica_while_the_others_replay_changes_no_weight(gpus, by_host):
    box = gpus(2)
    parallel = wrapped(normalized, box.devices(3))
    train(parallel, 6, sizes=(8,))
    parallel.engine.host_launch.enabled = by_host
    before = [np.array(weight) for weight in parallel.get_weights()]
    replays = [graph.replays for graphs in box.graphs for graph in graphs.graphs]
    graph = box.graphs[1].graphs[-1]
    replay, graph.replay = graph.replay, lambda: (_ for _ in ()).throw(FloatingPointError("no number"))
    x, y = next(batches(1))
    with pytest.raises(FloatingPointError, match="no number"):
        parallel.train_on_batch(x, y)
    graph.replay = replay
    after = [graph.replays for graphs in box.graphs for graph in graphs.graphs]
    # The host thread launches in rank order, and nothing behind the failure.
    assert sum(after) == sum(replays) + (1 if by_host else 2)
    for ours, theirs in zip(before, parallel.get_weights(), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    other = wrapped(normalized, box.devices(3))
    train(other, 6, sizes=(8,))
    assert parallel.train_on_batch(x, y) == other.train_on_batch(x, y)
    assert hows(parallel) == {"graph"}


def test_nothing_is_recorded_behind_what_a_failed_step_left(gpus):
    box = gpus(1)
    devices = box.devices(2)
    parallel = wrapped(normalized, devices)
    seen = []
    for number, (x, y) in enumerate(batches(4, sizes=(8,))):
        for device in devices:
            device.unsettled = number == 2  # the step itself cleans up
        parallel.train_on_batch(x, y)
        seen.append(hows(parallel))
    assert seen == [{"eager"}, {"traced"}, {"traced"}, {"graph"}]


def test_another_function_that_computes_the_step_is_recorded_anew(gpus):
    box = gpus(1)
    parallel = wrapped(normalized, box.devices(2))
    train(parallel, 4, sizes=(8,))
    captures = parallel._steps.captures
    (shape,) = captures._shapes.values()
    shape.captured.use(shape.captured.run)
    assert hows(parallel) == {"traced"}
    x, y = next(batches(1))
    parallel.train_on_batch(x, y)
    assert hows(parallel) == {"graph"}
    assert all(len(graphs.graphs) == 2 for graphs in box.graphs)


def test_replays_allocate_nothing_and_wait_for_no_whole_device(gpus, small_buckets):
    box = gpus(2)
    parallel = wrapped(dense, box.devices(2))
    train(parallel, 6, sizes=(8,))
    before = dict(box.sim.calls)
    assert hows(parallel) == {"graph"}
    train(parallel, 4, sizes=(8,))
    for name in ("malloc", "free", "hostAlloc", "freeHost", "deviceSynchronize"):
        assert box.sim.calls[name] == before.get(name, 0), name


def test_a_replay_that_nothing_orders_after_the_collectives_of_the_step_before_is_found(gpus, monkeypatch):
    box = gpus(2)
    one_thread = importlib.import_module("fastdp.comm.cuda.one_thread")
    parallel = wrapped(normalized, box.devices(2))
    train(parallel, 4, sizes=(8,))
    with monkeypatch.context() as patch:
        for name, work in ORIGINALS.items():  # of a replica's work the graphs alone are seen
            patch.setattr(Replica, name, work)
        patch.setattr(one_thread.OneThreadReduction, "join", lambda reduction: [])
        with pytest.raises(RuntimeError, match="nothing orders"):
            train(parallel, 2, sizes=(8,))
    assert any("a graph of torch's" in str(violation) for violation in box.sim.violations)
    box.sim.violations.clear()


def test_a_bucket_that_is_announced_before_its_graph_is_launched_is_found(gpus, monkeypatch):
    monkeypatch.setattr(
        fastdp.buffers, "plan_buckets", lambda sizes, first, cap: [(i, i + 1) for i in range(len(sizes))]
    )
    box = gpus(2)
    parallel = wrapped(normalized, box.devices(2))
    train(parallel, 4, sizes=(8,))

    def too_early(self, inputs, ready):
        for place, value in zip(self._inputs, inputs, strict=True):
            place.copy_(value)
        for graph, buckets in self._graphs:
            for bucket in buckets:
                ready(bucket)
            graph.replay()
        return self._results

    monkeypatch.setattr(recording.Recording, "replay", too_early)
    with pytest.raises(RuntimeError, match="nothing orders"):
        train(parallel, 2, sizes=(8,))
    assert any("a graph of torch's" in str(violation) for violation in box.sim.violations)
    box.sim.violations.clear()


def test_a_step_that_is_traced_late_is_recorded_before_it_runs(gpus, monkeypatch):
    monkeypatch.setattr(patience, "TRACE_SECONDS", -1.0)
    monkeypatch.setattr(patience, "TRACE_STEPS", 0)
    box = gpus(1)
    parallel = wrapped(normalized, box.devices(2), compile="auto")
    seen = []
    for x, y in batches(4, sizes=(8,)):
        parallel.train_on_batch(x, y)
        seen.append(hows(parallel))
    assert seen == [{"eager"}, {"eager"}, {"graph"}, {"graph"}]


def test_graphs_are_given_up_with_their_engine(gpus):
    box = gpus(1)
    parallel = wrapped(normalized, box.devices(1))
    train(parallel, 4, sizes=(8,))
    (shape,) = parallel._steps.captures._shapes.values()
    assert shape.captured.recordings
    parallel.compile("sgd", "mse")
    assert not shape.captured.recordings
    del shape


def test_an_explicit_graph_of_steps_that_are_not_captured_is_told(gpus):
    box = gpus(1)
    with pytest.warns(UserWarning, match='compile=None captures none.*Pass compile="trace"'):
        wrapped(dense, box.devices(1), graph="bucket", compile=None)
