"""The engine on GPUs held to the engine in host memory; the devices come from the caller.

`compute` is applied to the functions of a program: where CuPy cannot compute, they compute on copies (`through`).
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import fastdp
from fastdp.bfloat16 import to_bfloat16
from fastdp.buffers import ArraySpec, FlatBuffers
from fastdp.engine.reductions import WARM_STEPS
from fastdp.errors import ReplicaError
from fastdp.program.base import Result
from fastdp.program.functions import FunctionProgram

LIMIT = 30.0
POISONED = 1e6

Function = Callable[..., Any]
Compute = Callable[[Function], Function]


def as_it_is(function: Function) -> Function:
    """The function computes with the arrays that it is given."""
    return function


def through(given: Callable[[Any], Any], made: Callable[[Any], Any]) -> Compute:
    """A decorator that hands each argument through `given`, and each array that the function returns through `made`."""

    def each(change: Callable[[Any], Any], value: Any) -> Any:
        if isinstance(value, dict):
            return {name: each(change, item) for name, item in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(each(change, item) for item in value)
        return change(value) if getattr(value, "ndim", 0) else value

    return lambda function: lambda *arguments: each(made, function(*each(given, arguments)))


def linear(compute: Compute = as_it_is, seed: int = 0) -> FunctionProgram:
    """A least-squares line with momentum; its functions work on NumPy's and CuPy's arrays. A row that begins with
    POISONED makes its replica fail."""
    rng = np.random.default_rng(seed)

    def forward(p, batch):
        return batch[0] @ p["w"] + p["b"]

    def train(p, batch):
        if float(batch[0][:, 0].max()) >= POISONED:
            raise FloatingPointError("a poisoned row")
        error = forward(p, batch) - batch[1]
        rows, columns = error.shape
        gradients = {"w": 2 * batch[0].T @ error / rows / columns, "b": 2 * error.mean(0) / columns}
        return float((error * error).mean()), gradients, [forward(p, batch)]

    def update(p, slots, gradients):
        moved = {f"m{k}": 0.9 * slots[f"m{k}"] - 0.1 * gradients[k] for k in p}
        return {k: p[k] + moved[f"m{k}"] for k in p}, moved

    start = {"w": rng.normal(size=(5, 3)).astype("float32"), "b": np.zeros(3, "float32")}
    slots = {f"m{k}": np.zeros_like(v) for k, v in start.items()}
    predict = compute(lambda p, batch: [forward(p, batch)])
    return FunctionProgram(start, compute(train), compute(update), predict, slots)


def rows(n: int, seed: int = 1) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.normal(size=(n, 5)).astype("float32"), rng.normal(size=(n, 3)).astype("float32")]


def trains_as_on_the_host(devices: list, hosts: list, n: int, compute: Compute = as_it_is) -> None:
    """Three steps and a prediction."""
    engine = fastdp.DataParallel(linear(compute), devices, timeout=LIMIT, check_replicas=True)
    reference = fastdp.DataParallel(linear(), hosts, timeout=LIMIT)
    for step in range(3):
        batch = rows(n, step)
        got, want = engine.train(batch), reference.train(batch)
        np.testing.assert_allclose(got.outputs[0], want.outputs[0], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(got.sums, want.sums, rtol=1e-5)
    got, want = engine.predict(rows(n, 9)).outputs[0], reference.predict(rows(n, 9)).outputs[0]
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(engine.replicas, reference.replicas, strict=True):
        values = ours.device.to_host(ours.memory.variables.buffers["float32"])
        np.testing.assert_allclose(values, theirs.memory.variables.buffers["float32"], rtol=1e-5, atol=1e-5)


def allocates_nothing_in_the_steady_state(devices: list, compute: Compute = as_it_is) -> dict[str, int]:
    """After the first steps no step asks CUDA for memory. Returns the counts."""
    engine = fastdp.DataParallel(linear(compute), devices, timeout=LIMIT)

    def counts() -> dict[str, int]:
        return {
            "arena": sum(d.arena.allocations for d in devices),
            "pinned": sum(d.pinned.allocations for d in devices),
            "staging": sum(d._feed._ring.allocations for d in devices),
        }

    for _ in range(4):
        engine.train(rows(16))
    before = counts()
    assert min(before.values()) > 0
    for _ in range(20):
        engine.train(rows(16))
    assert counts() == before
    return before


def recovers_from_a_failure(devices: list, compute: Compute = as_it_is) -> None:
    """The last replica fails: the error says where, no weight changes, and the next step works."""
    engine = fastdp.DataParallel(linear(compute), devices, timeout=LIMIT, check_replicas=True)
    engine.train(rows(16))

    def weights() -> list[np.ndarray]:
        return [r.device.to_host(r.memory.variables.buffers["float32"]) for r in engine.replicas]

    before = weights()
    batch = rows(16)
    batch[0][-1, 0] = POISONED
    with pytest.raises(FloatingPointError, match="a poisoned row") as caught:
        engine.train(batch)
    assert isinstance(caught.value, ReplicaError)
    for a, b in zip(before, weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    engine.train(rows(16))
    assert any((a != b).any() for a, b in zip(before, weights(), strict=True))


class Announcing(FunctionProgram):
    """Announces each array's gradient as soon as it has issued it, the last array first."""

    def train(self, state, batch, context):
        loss, gradients, _ = self._train(state.parameters, batch)
        share = context.rows.share
        for bucket, name in enumerate(reversed(state.gradients)):
            np.multiply(gradients[name], share, out=state.gradients[name], casting="same_kind")
            context.ready(bucket)
        return Result([], np.array([loss * share]))


def reduces_during_backward(devices: list, hosts: list, compute: Compute = as_it_is) -> int:
    """Buckets begin before the replicas are done, and the weights are those of the host. Returns how many begin."""
    engines = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FlatBuffers.buckets, "__defaults__", (4, 4))  # one array per bucket
        for these, how in ((devices, compute), (hosts, as_it_is)):
            program = linear(how)
            start, slots = program._initial, program._initial_slots
            program = Announcing(start, program._train, program._update, program._predict, slots)
            engines.append(fastdp.DataParallel(program, these, timeout=LIMIT, check_replicas=True))
        for step in range(WARM_STEPS + 20):
            for engine in engines:
                engine.train(rows(16, step), wants_outputs=False)
    for ours, theirs in zip(engines[0].replicas, engines[1].replicas, strict=True):
        values = ours.device.to_host(ours.memory.variables.buffers["float32"])
        np.testing.assert_allclose(values, theirs.memory.variables.buffers["float32"], rtol=1e-5, atol=1e-5)
    assert engines[0].times.early == (2 if len(devices) > 1 else 0)
    return engines[0].times.early


def merges_where_asked(devices: list, compute: Compute = as_it_is) -> None:
    """Outputs on a GPU hold the values of outputs on the host."""
    batch = rows(13)
    engine = fastdp.DataParallel(
        linear(compute), devices, timeout=LIMIT, cpu_merge=False, merge_device=len(devices) - 1
    )
    (output,) = engine.predict(batch).outputs
    (host,) = fastdp.DataParallel(linear(compute), devices, timeout=LIMIT).predict(batch).outputs
    np.testing.assert_array_equal(devices[-1].to_host(output), host)


def merges_outputs_of_any_order(devices: list, hosts: list, compute: Compute = as_it_is) -> None:
    """Views with any strides, merged on a GPU and in host memory, are those of the engine in host memory."""
    batch = rows(13)

    def views(p, given):
        (y,) = predict(p, given)
        turned = columns(y)[0].T
        return [turned, y[:, ::2], y[::-1], np.broadcast_to(y[:, :1], y.shape), y[:, None, 1:2]]

    def program(how):
        nonlocal predict, columns
        plain = linear(how)
        predict, columns = plain._predict, how(lambda y: [np.ascontiguousarray(y.T)])
        return FunctionProgram(plain._initial, plain._train, plain._update, views)

    predict = columns = as_it_is
    expected = fastdp.DataParallel(program(as_it_is), hosts, timeout=LIMIT).predict(batch).outputs
    for on_host in (True, False):
        engine = fastdp.DataParallel(program(compute), devices, timeout=LIMIT, cpu_merge=on_host, merge_device=0)
        for got, want in zip(engine.predict(batch).outputs, expected, strict=True):
            values = got if on_host else devices[0].to_host(got)
            np.testing.assert_allclose(values, want, rtol=1e-5, atol=1e-6)


def takes_arrays_of_the_card_for_parameters(devices: list, compute: Compute, on_card: Callable[[Any], Any]) -> None:
    """At the start and later; strides and dtypes may differ from the parameters'."""
    plain = linear(compute)
    start = {name: on_card(value) for name, value in plain._initial.items()}
    program = FunctionProgram(start, plain._train, plain._update, plain._predict)
    batch = rows(13)
    program.set_parameters({"b": on_card(np.arange(3.0))})
    engine = fastdp.DataParallel(program, devices, timeout=LIMIT)
    for w in (plain._initial["w"], np.arange(15.0).reshape(3, 5).T):
        program.set_parameters({"w": on_card(w)})
        want = batch[0] @ w.astype("float32") + np.arange(3.0)
        np.testing.assert_allclose(engine.predict(batch).outputs[0], want, rtol=1e-5, atol=1e-5)


def all_reduces(devices: list, n: int, dtype: str, *, idle: int = 0) -> str:
    """Sums over all but the last `idle` devices, on all; twice on the same memory. Returns the way it went."""
    from fastdp.comm.cuda.communicator import CudaCommunicator

    comm = CudaCommunicator(devices, LIMIT)
    spec = [ArraySpec("g", (n,), dtype)]
    flats = [FlatBuffers(spec, device) for device in devices]
    buckets = flats[0].buckets()
    ways = sorted({comm.how(bucket) for bucket in buckets})
    giving = len(devices) - idle
    for turn in range(2):
        given = np.random.default_rng(turn).integers(-4, 5, (len(devices), n)).astype("float32")
        for device, flat, values in zip(devices, flats, given, strict=True):
            device.copy(flat.views[0], _stored(values, dtype))
        with _host_warning() if "host" in ways else contextlib.nullcontext():
            comm.all_reduce(flats[:giving], flats, buckets)
            for device in devices:
                device.synchronize(LIMIT)
        comm.check()
        want = _stored(given[:giving].sum(0), dtype)
        for device, flat in zip(devices, flats, strict=True):
            np.testing.assert_array_equal(device.to_host(flat.views[0]), want)
    return "+".join(ways)


@contextlib.contextmanager
def _host_warning():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*added up in host memory", category=UserWarning)
        yield


def _stored(values: np.ndarray, dtype: str) -> np.ndarray:
    """fp32 numbers as the buffers of `dtype` keep them."""
    return to_bfloat16(values) if dtype == "bfloat16" else values.astype(dtype)


def shards_do_not_know_their_devices(all_devices: list[list], hosts: list, compute: Compute = as_it_is) -> None:
    """Eight shards have the same bits on each list of devices, and the sums of the host's tree where NumPy computes."""
    results = []
    for devices in all_devices:
        engine = fastdp.DataParallel(linear(compute), devices, shards=8, timeout=LIMIT, check_replicas=True)
        told = [engine.train(rows(n, seed)) for seed, n in enumerate((64, 5, 64))]
        values = engine.replicas[0].memory.variables.on_host()
        results.append([bytes(np.asarray(one)) for one in (*values, *[part.sums for part in told])])
        del engine
    assert all(result == results[0] for result in results[1:])
    reference = fastdp.DataParallel(linear(), hosts, shards=8, timeout=LIMIT)
    for seed, n in enumerate((64, 5, 64)):
        reference.train(rows(n, seed))
    (ours,) = reference.replicas[0].memory.variables.on_host()
    np.testing.assert_allclose(np.frombuffer(results[0][0], np.float32), ours, rtol=1e-5, atol=1e-5)
