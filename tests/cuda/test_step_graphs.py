"""`graph="step"` on the simulated CUDA: one graph per GPU, of a replica's step and its gradients' all-reduces."""

from __future__ import annotations

import gc
import importlib
import itertools
import random
import threading
import time
import warnings

import keras
import numpy as np
import pytest
import torch
from graph_models import batches, dense, hows, normalized, train, wrapped
from simulated_memory import RaceError
from small_buckets import make_buckets_small

import fastdp.comm.algorithm
from fastdp.capture.cuda_graphs import recorder, recording
from fastdp.capture.cuda_graphs.step_graphs import StepGraphJoiner
from fastdp.engine.data_parallel import DataParallel
from fastdp.errors import DeviceTimeoutError, ReplicaError

pytestmark = pytest.mark.usefixtures("few_arrays_in_a_bucket", "shared_traces")


@pytest.fixture
def few_arrays_in_a_bucket(monkeypatch):
    """Each model has several buckets."""
    make_buckets_small(monkeypatch)


@pytest.fixture
def by_nccl(monkeypatch):
    """NCCL reduces small buckets too."""
    monkeypatch.setattr(fastdp.comm.algorithm, "ONE_SHOT_NBYTES", -1)
    monkeypatch.setattr(fastdp.comm.algorithm, "TWO_SHOT_NBYTES", -1)


def delayed(devices, seed=0):
    """Let the workers be late, by as much as chance wants."""
    for device in devices:
        chance = random.Random(seed + device.index)
        device.delay = lambda chance=chance: time.sleep(chance.random() * 1e-3)
    return devices


def assert_same(got, expected):
    assert got[0] == expected[0]
    for ours, theirs in zip(got[1], expected[1], strict=True):
        np.testing.assert_array_equal(ours, theirs)


def launched(box, devices):
    """How often each device has launched a graph."""
    handles = [device.compute.handle for device in devices]
    assert {stream for _, stream in box.launches} <= set(handles)
    return [sum(stream == handle for _, stream in box.launches) for handle in handles]


def why(parallel):
    return " | ".join(entry.get("why", "") for entry in parallel.report())


# What they compute.


@pytest.mark.parametrize(
    ("layers", "count", "cards", "seed"),
    [(dense, 2, 2, None), (dense, 3, 3, 0), (normalized, 4, 4, 1), (dense, 2, 1, 2), (normalized, 3, 2, None)],
)
def test_whole_steps_equal_those_in_buckets_bit_for_bit(gpus, layers, count, cards, seed):
    box = gpus(cards, seed=seed)
    expected = train(wrapped(layers, box.devices(count), graph="bucket"))
    parallel = wrapped(layers, delayed(box.devices(count)), graph="step")
    got = train(parallel)
    assert hows(parallel) == {"step graph"}
    assert_same(got, expected)
    assert {entry["whole_steps"] for entry in parallel.report() if entry["of"] == 8} == {7}


@pytest.mark.usefixtures("by_nccl")
@pytest.mark.parametrize(("layers", "count", "seed"), [(dense, 2, 0), (normalized, 3, None)])
def test_collectives_of_nccl_in_graphs_give_the_same_bits(gpus, layers, count, seed):
    box = gpus(count, seed=seed)
    expected = train(wrapped(layers, box.devices(count), graph="bucket"))
    parallel = wrapped(layers, delayed(box.devices(count)), graph="step")
    before = box.sim.calls["initAll"]
    got = train(parallel)
    assert hows(parallel) == {"step graph"}
    assert_same(got, expected)
    # The engine's communicators, and those of the graphs, which both batch shapes share.
    assert box.sim.calls["initAll"] == before + 2


@pytest.mark.parametrize("update", ["each", "first"])
def test_whole_steps_give_what_eager_ones_and_one_device_give(gpus, update):
    box = gpus(3)
    eager = train(wrapped(dense, box.devices(3), compile=None, update=update))
    alone = train(wrapped(dense, box.devices(1), compile=None))
    parallel = wrapped(dense, delayed(box.devices(3)), graph="step", update=update)
    got = train(parallel)
    assert hows(parallel) == {"step graph"}
    for expected in (eager, alone):
        np.testing.assert_allclose(got[0], expected[0], rtol=1e-5)
        for ours, theirs in zip(got[1], expected[1], strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_weights_and_learning_rates_set_between_steps_are_seen(gpus):
    box = gpus(2)
    results = []
    for graph in ("bucket", "step"):
        parallel = wrapped(normalized, box.devices(2), graph=graph)
        train(parallel, 6, sizes=(8,))
        parallel.set_weights([np.full_like(weight, 0.1) for weight in parallel.get_weights()])
        parallel.optimizer.learning_rate = 0.5
        x, y = next(batches(1))
        results.append([parallel.train_on_batch(x, y)[0] for _ in range(3)])
    assert hows(parallel) == {"step graph"}
    assert results[0] == results[1]
    assert len(set(results[1])) == 3


# What a step costs.


@pytest.mark.usefixtures("by_nccl")
def test_a_step_is_one_launch_per_device_and_nothing_is_reduced_or_allocated_beside_it(gpus):
    box = gpus(3)
    devices = box.devices(3)
    parallel = wrapped(dense, devices, graph="step")
    train(parallel, 4, sizes=(8,))
    assert hows(parallel) == {"step graph"}
    before, calls = launched(box, devices), dict(box.sim.calls)
    replays = [graph.replays for graphs in box.graphs for graph in graphs.graphs]
    train(parallel, 5, sizes=(8,))
    assert [after - earlier for after, earlier in zip(launched(box, devices), before, strict=True)] == [5, 5, 5]
    assert box.sim.calls["graphLaunch"] == calls["graphLaunch"] + 15
    assert [graph.replays for graphs in box.graphs for graph in graphs.graphs] == replays == [0] * len(replays)
    for name in ("allReduce", "groupStart", "graphInstantiate", "malloc", "free", "hostAlloc", "freeHost"):
        assert box.sim.calls[name] == calls.get(name, 0), name


def test_every_graph_is_uploaded_before_it_is_launched_and_first_launched_between_steps(gpus, monkeypatch):
    box = gpus(2)
    seen, inside = [], []
    whole = importlib.import_module("fastdp.comm.cuda.step_graph.graph").StepGraph
    run = DataParallel.train

    def noting(launch):
        def noted(self, rank):
            seen.append((self._launchable[rank], self._launchable[rank] in box.sim.uploaded, bool(inside)))
            launch(self, rank)

        return noted

    def training(engine, *args, **more):
        inside.append(engine)
        try:
            return run(engine, *args, **more)
        finally:
            inside.remove(engine)

    for name in ("launch", "launch_here"):
        monkeypatch.setattr(whole, name, noting(getattr(whole, name)))
    monkeypatch.setattr(DataParallel, "train", training)
    train(wrapped(normalized, box.devices(2), graph="step"), 5, sizes=(8,))
    assert all(uploaded for _, uploaded, _ in seen)
    assert [in_step for *_, in_step in seen] == [False] * 2 + [True] * 6


# Steps that are not for the graph of the whole step.


def test_gradient_accumulation_reduces_beside_the_graphs(gpus):
    box = gpus(2)
    results = []
    for graph in ("bucket", "step"):
        devices = box.devices(2)
        optimizer = lambda: keras.optimizers.Adam(0.01, gradient_accumulation_steps=3)  # noqa: E731
        parallel = wrapped(dense, devices, graph=graph, optimizer=optimizer)
        results.append(train(parallel))
    assert_same(results[1], results[0])
    assert hows(parallel) == {"graph"}
    assert "no graph of the whole step: gradients " in why(parallel)
    assert launched(box, devices) == [2, 2]  # one of each batch shape, when they were made


def test_fewer_rows_than_devices(gpus):
    box = gpus(3)
    expected = train(wrapped(dense, box.devices(3), graph="bucket"), 8, sizes=(8, 2))
    devices = box.devices(3)
    parallel = wrapped(dense, devices, graph="step")
    assert_same(train(parallel, 8, sizes=(8, 2)), expected)
    by_batch = {entry["of"]: entry["how"] for entry in parallel.report()}
    assert by_batch == {8: "step graph", 2: "graph"}
    assert "fewer rows than devices" in why(parallel)
    assert launched(box, devices) == [3, 3, 3]


def test_shapes_beyond_those_that_are_recorded(gpus):
    box = gpus(2)
    sizes = (4, 6, 8, 10, 12)
    expected = train(wrapped(normalized, box.devices(2), graph="bucket"), 15, sizes)
    parallel = wrapped(normalized, box.devices(2), graph="step")
    assert_same(train(parallel, 15, sizes), expected)
    assert [entry["how"] for entry in parallel.report()] == ["step graph"] * 4 + ["traced"]


def test_a_loss_of_the_merged_outputs_runs_eagerly(gpus):
    def contrast(y, y_pred):
        return keras.ops.std(y_pred) + keras.ops.mean(keras.ops.square(y - y_pred))

    box = gpus(2)
    results = []
    for graph in ("bucket", "step"):
        parallel = wrapped(normalized, box.devices(2), graph=graph)
        parallel.compile("sgd", contrast)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*eagerly")
            results.append([parallel.train_on_batch(x, y) for x, y in batches(5, sizes=(8,))])
    assert hows(parallel) == {"eager"}
    assert results[0] == results[1]
    assert not box.launches


def test_virtual_gpus_of_one_card_want_queues_of_their_own(gpus, monkeypatch):
    box = gpus(1)
    expected = train(wrapped(normalized, box.devices(3), graph="bucket"), 6, sizes=(8,))
    parallel = wrapped(normalized, box.devices(3), graph="step")
    with pytest.warns(UserWarning, match=r"3 virtual GPUs share a card.*CUDA_DEVICE_MAX_CONNECTIONS=12"):
        got = train(parallel, 6, sizes=(8,))
    assert_same(got, expected)
    assert hows(parallel) == {"graph"}
    assert "3 virtual GPUs share a card" in why(parallel)
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "32")
    parallel = wrapped(normalized, box.devices(3), graph="step")
    assert_same(train(parallel, 6, sizes=(8,)), expected)
    assert hows(parallel) == {"step graph"}


def test_gradients_that_are_added_up_in_host_memory_and_replicas_that_span_devices_are_refused(gpus):
    box = gpus(2)
    whole = importlib.import_module("fastdp.comm.cuda.step_graph.build").StepGraphs(box.devices(2), None)
    assert whole.why_not(["nccl", "one-shot"]) == ""
    assert whole.why_not(["nccl", "host"]) == "gradients are added up in host memory"
    one = recorder.Recorder("model", threading.Lock, parts=True)
    assert StepGraphJoiner(one, spans=True).consider([], {}) == "a replica spans several devices"


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("no driver", "cuGraphAddChildGraphNode of libcuda.so.1 is needed"),
        ("child", "cuGraphAddChildGraphNode: CUDA_ERROR_INVALID_HANDLE"),
        ("allReduce", "cudaErrorInvalidValue|NCCL"),
        ("graphInstantiate", "cudaErrorMemoryAllocation"),
        ("graphUpload", "cudaErrorMemoryAllocation"),
    ],
)
@pytest.mark.usefixtures("by_nccl")
def test_what_cannot_be_put_together_is_said_once_and_steps_run_in_buckets(gpus, monkeypatch, what, said):
    box = gpus(2)
    expected = train(wrapped(normalized, box.devices(2), graph="bucket"))
    parallel = wrapped(normalized, box.devices(2), graph="step")
    if what == "no driver":
        del box.sim.driver._functions["cuGraphAddChildGraphNode"]
    elif what == "child":
        monkeypatch.setattr(importlib.import_module("simulated_graphs").SimulatedGraph, "raw_cuda_graph", lambda _: 3)
    elif what == "allReduce":  # the first is eager and warms up
        nccl, calls = importlib.import_module("fastdp.runtime.cuda.cupy_api"), []
        all_reduce = nccl.all_reduce

        def refusing(*args):
            calls.append(box.sim.captures and len(calls))
            if box.sim.captures:
                raise nccl.NcclError(1)
            all_reduce(*args)

        monkeypatch.setattr(nccl, "all_reduce", refusing)
        said = "NCCL_ERROR_UNHANDLED_CUDA_ERROR"
    else:
        box.sim.failures[what] = 2
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        got = train(parallel)
    messages = [str(w.message) for w in caught if "not as graph" in str(w.message)]
    assert len(messages) == 1
    assert said in messages[0]
    assert_same(got, expected)
    assert hows(parallel) == {"graph"}
    assert not box.launches
    assert not any(stream.capture for stream in box.sim.streams.values())
    assert not box.sim.execs


# Failures.


def failing(box, rank, error):
    """Have the recording of a rank fail before its launch; gives back how to end that."""
    stage = recording.Recording._stage
    replica = {}

    def staged(self, inputs):
        if self.step_graph is not None and threading.current_thread().name.endswith(f":{rank}"):
            replica["failed"] = True
            raise error
        stage(self, inputs)

    return staged, replica


@pytest.mark.parametrize("seed", [None, 3])
def test_a_failure_before_a_launch_lets_nobody_launch_and_changes_no_weight(gpus, monkeypatch, seed):
    box = gpus(3, seed=seed)
    devices = box.devices(3)
    parallel = wrapped(normalized, delayed(devices), graph="step")
    train(parallel, 6, sizes=(8,))
    before, launches = [np.array(weight) for weight in parallel.get_weights()], launched(box, devices)
    staged, replica = failing(box, 1, FloatingPointError("no number"))
    x, y = next(batches(1))
    with monkeypatch.context() as patch:
        patch.setattr(recording.Recording, "_stage", staged)
        with pytest.raises(FloatingPointError, match=r"gpu:1.*no number"):
            parallel.train_on_batch(x, y)
    assert replica["failed"]
    assert launched(box, devices) == launches
    for ours, theirs in zip(before, parallel.get_weights(), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    other = wrapped(normalized, box.devices(3), graph="step")
    train(other, 6, sizes=(8,))
    assert parallel.train_on_batch(x, y) == other.train_on_batch(x, y)
    assert hows(parallel) == {"step graph"}
    assert not box.sim.calls["abort"]


@pytest.mark.usefixtures("by_nccl")
def test_without_the_barrier_others_would_launch_and_wait(gpus, monkeypatch):
    """What the workers' barrier is for. The GPUs that then wait in a collective come free when the step is given up."""
    box = gpus(2)
    devices = box.devices(2)
    parallel = wrapped(normalized, devices, graph="step")
    train(parallel, 6, sizes=(8,))
    parallel.engine.host_launch.enabled = False
    launches = launched(box, devices)
    staged, _ = failing(box, 1, FloatingPointError("no number"))
    rendezvous = importlib.import_module("fastdp.comm.rendezvous").Rendezvous
    x, y = next(batches(1))
    with monkeypatch.context() as patch:
        patch.setattr(recording.Recording, "_stage", staged)
        patch.setattr(rendezvous, "exchange", lambda self, rank, value, place: [])
        patch.setattr(parallel.engine, "timeout", 2.0)
        with pytest.raises((FloatingPointError, DeviceTimeoutError)):
            parallel.train_on_batch(x, y)
    assert launched(box, devices) == [launches[0] + 1, launches[1]]
    assert box.sim.calls["abort"] == 2
    parallel.train_on_batch(x, y)
    parallel.train_on_batch(x, y)
    assert hows(parallel) == {"step graph"}


@pytest.mark.usefixtures("by_nccl")
@pytest.mark.parametrize("seed", [None, 4])
def test_a_launch_that_fails_leaves_no_gpu_waiting_and_graphs_are_made_anew(gpus, seed):
    box = gpus(3, seed=seed)
    devices = box.devices(3)
    parallel = wrapped(normalized, delayed(devices), graph="step")
    train(parallel, 6, sizes=(8,))
    before, connected = [np.array(weight) for weight in parallel.get_weights()], box.sim.calls["initAll"]
    launch, handle = box.launch_graph, devices[1].compute.handle

    def refused(graph, stream):
        if stream == handle:
            time.sleep(0.05)  # the others are waiting by now
            raise box.runtime.CudaError(719)
        launch(graph, stream)

    box.launch_graph = refused
    x, y = next(batches(1))
    began = time.monotonic()
    with pytest.raises(ReplicaError, match=r"gpu:1.*cudaErrorLaunchFailure"):
        parallel.train_on_batch(x, y)
    assert time.monotonic() - began < 15
    box.launch_graph = launch
    assert box.sim.calls["abort"] == 3
    for ours, theirs in zip(before, parallel.get_weights(), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    other = wrapped(normalized, box.devices(3), graph="step")
    train(other, 6, sizes=(8,))
    for _ in range(2):
        assert parallel.train_on_batch(x, y) == other.train_on_batch(x, y)
    assert hows(parallel) == {"step graph"}
    assert box.sim.calls["initAll"] >= connected + 1


@pytest.mark.usefixtures("by_nccl")
def test_a_first_launch_that_fails_is_said_and_steps_run_in_buckets(gpus):
    box = gpus(2)
    expected = train(wrapped(normalized, box.devices(2), graph="bucket"))
    devices = box.devices(2)
    parallel = wrapped(normalized, devices, graph="step")
    launch = box.launch_graph

    def refused(graph, stream):
        if stream == devices[0].compute.handle:
            raise box.runtime.CudaError(2)
        launch(graph, stream)

    box.launch_graph = refused
    with pytest.warns(UserWarning, match="not as graph=.*cudaErrorMemoryAllocation"):
        got = train(parallel)
    assert_same(got, expected)
    assert hows(parallel) == {"graph"}


def test_a_replica_that_does_not_come_in_time(gpus, monkeypatch):
    box = gpus(2)
    devices = box.devices(2)
    parallel = wrapped(normalized, devices, graph="step")
    train(parallel, 6, sizes=(8,))
    parallel.engine.host_launch.enabled = False
    launches, late = launched(box, devices), threading.Event()
    stage = recording.Recording._stage

    def staged(self, inputs):
        if threading.current_thread().name.endswith(":1"):
            assert late.wait(20.0)
        stage(self, inputs)

    x, y = next(batches(1))
    with monkeypatch.context() as patch:
        patch.setattr(recording.Recording, "_stage", staged)
        patch.setattr(parallel.engine, "timeout", 0.5)
        with pytest.raises(TimeoutError):
            parallel.train_on_batch(x, y)
        assert launched(box, devices) == launches
        late.set()
    parallel.train_on_batch(x, y)
    assert parallel.engine.holds_gradients is False
    parallel.train_on_batch(x, y)
    assert hows(parallel) == {"step graph"}


def test_ranks_that_gave_up_waiting_before_an_update_go_on_after_the_next_cleaning(gpus):
    box = gpus(2)
    devices = box.devices(2)
    parallel = wrapped(normalized, devices, graph="step")
    train(parallel, 6, sizes=(8,))
    kernels = parallel.engine._communicator._kernels
    devices[1].copy(kernels._ranks[1].error, np.ones(1, np.uint32))
    devices[0].unsettled = True
    x, y = next(batches(1))
    parallel.train_on_batch(x, y)
    assert not kernels.given_up()


def test_weights_that_were_updated_by_wrong_sums_are_not_used(gpus):
    """Keras's own update is trusted after its first success, so that there is no snapshot to go back to."""
    box = gpus(2)
    devices = box.devices(2)
    parallel = wrapped(normalized, devices, graph="step")
    train(parallel, 6, sizes=(8,))
    for memory in parallel.engine._communicator._kernels._ranks:
        devices[0].copy(memory.error, np.ones(1, np.uint32))
    x, y = next(batches(1))
    with pytest.raises(RuntimeError, match="gave up waiting"):
        parallel.train_on_batch(x, y)
    for call in (lambda: parallel.train_on_batch(x, y), lambda: parallel.predict_on_batch(x)):
        with pytest.raises(RuntimeError, match="may be wrong: an all-reduce was given up"):
            call()


# What the recordings depend on.


def test_a_recording_made_anew_is_joined_anew(gpus):
    box = gpus(2)
    devices = box.devices(2)
    parallel = wrapped(normalized, devices, graph="step")
    train(parallel, 4, sizes=(8,))
    (shape,) = parallel._steps.captures._shapes.values()
    shape.captured.use(shape.captured.run)
    assert hows(parallel) == {"traced"}
    x, y = next(batches(1))
    parallel.train_on_batch(x, y)
    assert hows(parallel) == {"step graph"}
    assert len({graph for graph, _ in box.launches}) == 4


def test_kernels_that_move_to_other_memory_have_graphs_made_anew(gpus):
    box = gpus(2)
    devices = box.devices(2)
    expected = wrapped(normalized, box.devices(2), graph="bucket")
    parallel = wrapped(normalized, devices, graph="step")
    train(expected, 4, sizes=(8,))
    train(parallel, 4, sizes=(8,))
    kernels = parallel.engine._communicator._kernels
    kernels._allocate(1 << 16)
    gc.collect()
    assert_same(train(parallel, 4, sizes=(8,)), train(expected, 4, sizes=(8,)))
    assert hows(parallel) == {"step graph"}
    assert len({graph for graph, _ in box.launches}) == 4


# Order. The race detector sees what is left out.


@pytest.mark.usefixtures("by_nccl")
def test_a_collective_that_does_not_come_after_its_segment_is_found(gpus, monkeypatch):
    box = gpus(2)
    graphs = importlib.import_module("fastdp.runtime.cuda.child_graphs")
    add = graphs._add

    def forgetful(graph, after, child):
        nodes = box.sim.graphs[child]
        is_collective = bool(nodes) and "torch" not in nodes[0][0].name
        return add(graph, after[1:] if is_collective else after, child)

    monkeypatch.setattr(graphs, "_add", forgetful)
    devices = box.devices(2)
    parallel = wrapped(normalized, devices, graph="step")
    # The graphs are launched once before the step that is to use them: what goes wrong there is told, and ends no step
    # by itself. Here the next step comes upon the same accesses, which nothing has ordered since.
    said = r"RaceError: allReduce .* nothing orders it after a graph of torch's"
    with pytest.warns(UserWarning, match=said), pytest.raises(ReplicaError, match="RaceError"):
        train(parallel, 6, sizes=(8,))
    box.drain(devices)


def test_an_update_that_does_not_come_after_the_last_collective_is_found(gpus):
    """The graph is launched behind all that was enqueued, on a stream that nobody waits for."""
    box = gpus(2)
    devices = box.devices(2)
    parallel = wrapped(normalized, devices, graph="step")
    train(parallel, 4, sizes=(8,))
    assert hows(parallel) == {"step graph"}
    launch, runtime = box.launch_graph, box.runtime
    aside = {device.compute.handle: device.copy_out.handle for device in devices}

    def launch_aside(graph, stream):
        event = runtime.event_create()
        runtime.event_record(event, stream)
        runtime.stream_wait_event(aside[stream], event)
        runtime.event_destroy(event)
        launch(graph, aside[stream])

    box.launch_graph = launch_aside
    with pytest.raises((RuntimeError, RaceError), match="nothing orders"):
        train(parallel, 2, sizes=(8,))
    assert any("update" in str(violation) for violation in box.sim.violations)
    box.launch_graph = launch
    box.drain(devices)


def test_collectives_are_in_one_order_on_all_ranks_though_they_are_cut_in_other_places(gpus):
    """The first replica counts the regularizers: its step is another graph, with other segments."""
    box = gpus(3)
    parallel = wrapped(dense, box.devices(3), graph="step")
    train(parallel, 4, sizes=(9,))
    orders = []
    for nodes in list(box.sim.execs.values()):
        collectives = [i for i, (op, _) in enumerate(nodes) if "torch" not in op.name]
        orders.append([nodes[i][0].writes[0][1] for i in collectives])
        for one, other in itertools.pairwise(collectives):
            assert one in nodes[other][1]
    assert len(orders) == 3
    assert len(orders[0]) > 2
    assert orders == orders[:1] * 3


# The graphs themselves.


def test_segments_are_a_chain_and_branches_another_beside_it(gpus):
    box = gpus(1)
    (device,) = box.devices(1)
    graphs = importlib.import_module("fastdp.runtime.cuda.child_graphs")
    recorder = box.graphs_of(device, parts=True)
    x = torch.ones(3)
    kept = [recorder.record(lambda: [x + 1])[0] for _ in range(6)]
    raw = [graph.raw_cuda_graph() for graph in kept]
    with box.runtime.on(0):
        # The second branch waits for the third segment, and the third branch for the second one.
        graph = graphs.chained(raw[:3], [(0, raw[3]), (2, raw[4]), (1, raw[5])])
        edges = [set(after) for _, after in box.sim.graphs[graph]]
        assert edges == [set(), {0}, {0}, {2}, {3, 1}, {2, 4}]
        with pytest.raises(ValueError, match="expected numbers below 2"):
            graphs.chained(raw[:2], [(2, raw[3])])
        with pytest.raises(
            graphs.DriverCallError, match=r"cuGraphAddChildGraphNode: CUDA_ERROR_INVALID_HANDLE \(400\)"
        ):
            graphs.chained([raw[0], 7], [])
        box.runtime.graph_destroy(graph)
    assert sorted(box.sim.graphs) == sorted(raw)


def test_the_option(gpus):
    box = gpus(1)
    with pytest.warns(UserWarning, match='graph="step" records captured steps, and compile=None captures none'):
        wrapped(dense, box.devices(1), graph="step", compile=None)
    parallel = wrapped(dense, box.devices(1), graph="step")  # one device has nothing to reduce
    train(parallel, 4, sizes=(8,))
    (entry,) = parallel.report()
    assert (entry["how"], entry["segments"]) == ("step graph", 1)


# The end of the process.


@pytest.mark.usefixtures("by_nccl")
def test_at_the_end_graphs_go_before_the_communicators_whose_collectives_they_hold(gpus):
    box = gpus(2)
    parallel = wrapped(dense, box.devices(2), graph="step")
    train(parallel, 4, sizes=(8,))
    assert hows(parallel) == {"step graph"}
    assert len(box.sim.comms) == 4  # the engine's, and those of the graphs
    assert box.sim.execs
    importlib.import_module("fastdp.comm.cuda.at_exit").close(20.0)  # the simulation finds what would wait for ever
    assert all(comm.closed for comm in box.sim.comms)
    assert box.sim.calls["destroy"] == 4
    assert not box.sim.execs


@pytest.mark.usefixtures("by_nccl")
def test_the_end_waits_for_nccl_no_longer_than_its_limit(gpus, monkeypatch, capsys):
    box = gpus(2)
    parallel = wrapped(dense, box.devices(2), graph="bucket")
    train(parallel, 2, sizes=(8,))
    ends, destroy = threading.Event(), box.runtime.nccl_destroy

    def slow(comm):
        ends.wait(20.0)
        destroy(comm)

    monkeypatch.setattr(box.runtime, "nccl_destroy", slow)
    importlib.import_module("fastdp.comm.cuda.at_exit").close(0.05)
    assert "NCCL did not close its communicators within 0.05 seconds" in capsys.readouterr().err
    (thread,) = [thread for thread in threading.enumerate() if thread.name == "fastdp-exit"]
    ends.set()
    thread.join(20.0)
    assert all(comm.closed for comm in box.sim.comms)
