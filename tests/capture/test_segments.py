"""A captured step in segments: cut where buckets of gradients are complete, it computes what the whole one does."""

from __future__ import annotations

import contextlib
import functools
import gc
import inspect
import types

import keras
import numpy as np
import pytest
import torch
from small_buckets import make_buckets_small
from torch.fx.experimental.proxy_tensor import make_fx

import fastdp
import fastdp.buffers
from fastdp.capture import trace as capture_trace
from fastdp.capture.cuda_graphs import recording
from fastdp.capture.cuda_graphs.recorder import chosen_graphs
from fastdp.capture.graph.passes import in_place, stored
from fastdp.capture.graph.segments import cut, placed
from fastdp.options import Options

aten = torch.ops.aten
L = keras.layers


def two_layers(x, y, v, w, gradient_w, gradient_v):
    """A step by hand: the gradient of w first, as backward finds it; the loss at the end."""
    hidden = torch.tanh(x @ v)
    error = hidden @ w - y
    for_w = hidden.t() @ error
    behind = (error @ w.t()) * (1 - hidden * hidden)
    for_v = x.t() @ behind
    return [for_w, for_v, (error * error).sum() + torch.full((), 3.0, device=x.device)]


def arguments(device="cpu"):
    torch.manual_seed(0)
    shapes = [(5, 4), (5, 2), (4, 3), (3, 2), (3, 2), (4, 3)]
    return [torch.randn(*shape).to(device) for shape in shapes]


@pytest.fixture
def step():
    return in_place(stored(make_fx(two_layers)(*arguments()), 2))


def names(module):
    return [str(node.target) for node in module.graph.nodes if node.op == "call_function"]


def test_a_gradient_is_stored_as_soon_as_it_is_known(step):
    found = names(step)
    assert found.count("aten.mm.out") == 2
    assert found.index("aten.mm.out") < found.index("aten.rsub.Scalar")


def test_a_gradient_that_is_written_to_later_is_stored_after_that():
    def step(x, buffer):
        gradient = x * 2
        loss = gradient.sum()
        gradient.view(-1).add_(1)
        return [gradient, loss]

    module = stored(make_fx(step)(torch.ones(3), torch.zeros(3)), 1)
    buffer = torch.zeros(3)
    (loss,) = module(torch.ones(3), buffer)
    assert (buffer.tolist(), float(loss)) == ([3.0, 3.0, 3.0], 6.0)


def test_segments_compute_what_the_graph_computes_and_say_what_is_complete(step):
    segments = cut(step, {4: 1, 5: 0}, [0, 1, 2])
    assert [part.buckets for part in segments.parts] == [[1, 2], [0]]
    given, expected = arguments(), arguments()
    (loss,) = step(*expected)
    told = []

    def ready(bucket):
        told.append((bucket, torch.equal(given[4], expected[4]), torch.equal(given[5], expected[5])))

    (found,) = segments(given, ready)
    assert told == [(1, True, False), (2, True, False), (0, True, True)]
    assert torch.equal(found, loss)


def test_each_segment_drops_what_nobody_needs_any_more(step):
    first, second = cut(step, {4: 1, 5: 0}, [0, 1]).parts
    carried = set(first.outputs)
    assert carried <= set(second.inputs) | {number for number in carried if number not in second.last}
    assert set(second.last) >= set(second.inputs) & carried


@pytest.mark.parametrize("stores", [{}, {4: 0, 5: 0}])
def test_a_graph_whose_gradients_are_in_one_bucket_stays_whole(step, stores):
    segments = cut(step, stores, [0, 1])
    (part,) = segments.parts
    assert part.run is step
    assert part.buckets == [0, 1]


def test_a_graph_for_another_device_makes_nothing_on_the_first(step):
    step.register_buffer("constant", torch.ones(()))
    with step.graph.inserting_before(step.graph.find_nodes(op="output")[0]):
        step.graph.output_node().args = ([*step.graph.output_node().args[0], step.graph.get_attr("constant")],)
    step.recompile()
    there = placed(step, torch.device("cpu"), torch.device("meta"))
    given = arguments("meta")
    assert [t.device.type for t in there(*given)] == ["meta", "meta"]
    segments = cut(there, {4: 1, 5: 0}, [0, 1])
    assert [t.device.type for t in segments(given, lambda bucket: None)] == ["meta", "meta"]
    assert [t.device.type for t in step(*arguments())] == ["cpu", "cpu"]  # the first is as it was


@pytest.fixture
def small_buckets(monkeypatch):
    make_buckets_small(monkeypatch)


def train(mode, gpus=3):
    keras.utils.set_random_seed(5)
    layers = [keras.Input((6,)), L.Dense(8, "relu", kernel_regularizer="l2"), L.BatchNormalization()]
    model = keras.Sequential([*layers, L.Dropout(0.4, seed=1), L.Dense(7, "tanh"), L.Dense(3)])
    parallel = fastdp.wrap(model, gpus=gpus, compile=mode, check_replicas=True)
    parallel.compile(keras.optimizers.Adam(0.01), "mse")
    rng = np.random.default_rng(0)
    losses = []
    for rows in (8, 8, 8, 7, 7, 7):
        x, y = rng.normal(size=(rows, 6)).astype("float32"), rng.normal(size=(rows, 3)).astype("float32")
        losses.append(parallel.train_on_batch(x, y))
    return losses, model.get_weights(), parallel


@pytest.fixture
def _devices():
    fastdp.set_virtual_devices(4, kind="host")
    yield
    fastdp.set_virtual_devices(0)


@pytest.mark.usefixtures("_devices", "small_buckets")
def test_steps_in_segments_on_virtual_devices_tell_each_bucket_once_and_give_what_eager_ones_give(monkeypatch):
    told = []
    replay = capture_trace.Captured.replay

    def noted(self, replica, batch, context):
        mine, gradients = [], replica.gradients
        context.ready = lambda bucket: mine.append((bucket, [gradients[i].clone() for i in members[bucket]]))
        members = [bucket.arrays for bucket in replica.gradient_buffers.buckets()]
        outcome = replay(self, replica, batch, context)
        told.append(mine)
        for bucket, values in mine:  # nothing has been written to a bucket after it was complete
            assert all(torch.equal(a, gradients[i]) for a, i in zip(values, members[bucket], strict=True))
        return outcome

    expected = train(None)
    monkeypatch.setattr(capture_trace.Captured, "replay", noted)
    losses, weights, parallel = train("trace")
    buckets = len(parallel.engine.group.buckets)
    assert buckets > 3
    assert len(told) == 4 * 3  # all steps but the first of each shape, on each device
    assert all(sorted(bucket for bucket, _ in mine) == list(range(buckets)) for mine in told)
    (segments,) = {len(s._steps["cpu"].parts) for s in captured(parallel)}
    assert segments > 2
    np.testing.assert_allclose(losses, expected[0], rtol=1e-5)
    for weight, other in zip(weights, expected[1], strict=True):
        np.testing.assert_allclose(weight, other, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("_devices", "small_buckets")
def test_one_replica_has_nobody_to_reduce_with_and_its_step_stays_whole():
    _, _, parallel = train("trace", gpus=1)
    assert {len(s._steps["cpu"].parts) for s in captured(parallel)} == {1}


def captured(parallel):
    return [shape.captured for shape in parallel._steps.captures._shapes.values()]


# The option.


@pytest.mark.usefixtures("_devices")
def test_what_graph_may_be():
    wrap = functools.partial(fastdp.wrap, keras.Sequential([keras.Input((6,)), L.Dense(3)]), gpus=2)
    with pytest.raises(ValueError, match=r"`graph` must be one of \('auto', 'bucket', 'step', None\).*graph='fast'"):
        wrap(graph="fast")
    for graph in ("bucket", "step"):
        with pytest.warns(
            UserWarning, match=f'graph="{graph}" has nothing to record on virtual devices in host memory'
        ):
            wrap(graph=graph, compile="trace")
    gpu = [types.SimpleNamespace(on_gpu=True)]
    chosen = [chosen_graphs(Options(graph=graph), gpu) for graph in ("auto", "bucket", "step", None)]
    assert chosen == ["auto", "auto", "step", ""]  # of the first two, one is another name for the other
    for graph in ("auto", None):
        assert wrap(graph=graph, compile="trace") is not None
    module = torch.nn.Linear(2, 2)
    with pytest.warns(UserWarning, match="has nothing to record on virtual devices"):
        fastdp.wrap(module, gpus=2, graph="bucket")
    assert fastdp.wrap(module, gpus=2, graph=None) is not None


def test_torch_is_asked_for_graphs_by_names_that_it_has(monkeypatch):
    """Without a GPU: the calls, held to torch's own signatures. What they do there, `make gpu-check` finds out."""
    cuda, calls, made = torch.cuda, [], []
    signatures = {name: inspect.signature(getattr(cuda, name)) for name in ("graph", "memory_snapshot")}
    external = inspect.signature(cuda.ExternalStream.__new__)

    class Graph:
        """As torch.cuda.CUDAGraph, which needs CUDA."""

        def __init__(self, keep_graph=False):
            made.append(inspect.signature(torch.cuda.graphs.CUDAGraph.__new__).bind(Graph, keep_graph).arguments)

        def instantiate(self):
            calls.append("instantiated")

        def raw_cuda_graph(self):
            return 17

    @contextlib.contextmanager
    def graph(*args, **options):
        calls.append(signatures["graph"].bind(*args, **options).arguments)
        yield

    pools = iter([(0, i) for i in range(1, 9)])
    monkeypatch.setattr(cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(cuda, "graph", graph)
    monkeypatch.setattr(cuda, "graph_pool_handle", lambda: next(pools))
    monkeypatch.setattr(cuda, "ExternalStream", lambda *a, **o: external.bind(None, *a, **o).arguments)
    segment = {"segment_pool_id": (0, 2), "total_size": 512}
    monkeypatch.setattr(cuda, "memory_snapshot", lambda: [segment, segment, {**segment, "segment_pool_id": (0, 0)}])
    device = types.SimpleNamespace(compute=types.SimpleNamespace(for_torch=lambda: 7), torch_device="cuda:1")
    graphs = recording.TorchGraphs(device)
    kept = [graphs.record(lambda: [3])[0] for _ in range(2)]
    assert [call["pool"] for call in calls] == [(0, 2), (0, 2)]
    assert {call["capture_error_mode"] for call in calls} == {"thread_local"}
    assert calls[0]["stream"]["stream_ptr"] == 7
    assert calls[0]["stream"]["device"] == "cuda:1"
    assert calls[0]["cuda_graph"] is kept[0]
    assert graphs.nbytes == 1024
    kept.clear()
    calls.clear()
    gc.collect()
    graphs.record(list)
    assert calls[-1]["pool"] == (0, 3)  # torch has given the first pool up
    assert [arguments["keep_graph"] for arguments in made] == [False] * 3
    made.clear()
    parts = recording.TorchGraphs(device, parts=True)
    graph, _ = parts.record(list)
    assert calls[-1] == "instantiated"  # after its capture, not at the first replay
    assert made[0]["keep_graph"] is True
    assert graph.raw_cuda_graph() == 17
    for name in ("instantiate", "raw_cuda_graph"):
        assert callable(getattr(torch.cuda.graphs.CUDAGraph, name))


@pytest.mark.parametrize("left", [True, False])
def test_after_a_failed_recording_torch_s_allocator_and_generator_record_no_more(monkeypatch, left):
    """Torch before 2.13 leaves both recording; where it does not, ending the allocator's recording fails."""
    calls = []

    @contextlib.contextmanager
    def graph(*args, **options):
        yield
        raise RuntimeError("CUDA error: operation failed due to a previous error during capture")

    def end(device, pool):
        calls.append(("end", device, pool))
        if not left:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")

    generator = torch.Generator()  # has both methods, whose work on a GPU is torch's
    clone = generator.clone_state()
    stuck = types.SimpleNamespace(
        clone_state=lambda: clone, graphsafe_set_state=lambda state: calls.append(("generator", state))
    )
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: None)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 5))
    monkeypatch.setattr(torch.cuda, "ExternalStream", lambda *a, **o: types.SimpleNamespace(device="cuda:1"))
    monkeypatch.setattr(torch.cuda, "default_generators", (None, stuck))
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", end, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_releasePool", lambda *a: calls.append(("release", *a)), raising=False)
    device = types.SimpleNamespace(compute=types.SimpleNamespace(for_torch=lambda: 7), torch_device="cuda:1")
    with pytest.raises(RuntimeError, match="previous error during capture"):
        recording.TorchGraphs(device).record(list)
    rest = [("release", 1, (0, 5)), ("generator", clone)]
    assert calls == [("end", 1, (0, 5)), *(rest if left else [])]
    assert hasattr(generator, "graphsafe_set_state")
