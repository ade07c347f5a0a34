"""Gradients of torch modules are announced bucket by bucket from the middle of backward, and stay the same bits."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastdp
from fastdp.buffers import FlatBuffers
from fastdp.comm.host import communicator, reduction
from fastdp.comm.host.reduction import HostReduction
from fastdp.program.torch.gradients import _Accumulated
from fastdp.program.torch.rows.outside import StepWatch

LIMIT = 20.0


@pytest.fixture(autouse=True)
def _three_devices(monkeypatch):
    monkeypatch.setattr(communicator, "CORES", 64)  # to spare
    fastdp.set_virtual_devices(3)
    yield
    fastdp.set_virtual_devices(0)
    Gate.waits = None


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


class Net(nn.Module):
    """A shared layer, an unused one, and a gate between the first layers and the last ones."""

    def __init__(self, norm=False, how=None):
        super().__init__()
        self.first, self.shared = nn.Linear(6, 8), nn.Linear(8, 8)
        self.norm = nn.BatchNorm1d(8) if norm else nn.Identity()
        self.unused, self.last = nn.Linear(3, 3), nn.Linear(8, 1)
        self.how, self.then = how, how

    def forward(self, x):
        x = torch.tanh(self.first(x))
        x = self._call(self.shared, x, self.how)
        x = self.norm(Gate.apply(x))
        return self.last(torch.tanh(self._call(self.shared, x, self.then)))

    @staticmethod
    def _call(layer, x, how):
        return layer(x) if how is None else checkpoint(layer, x, use_reentrant=how == "reentrant")


def data(rows=11):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(rows, 6, generator=generator), torch.randn(rows, 1, generator=generator)


def trained(steps=4, module=None, loss=nn.functional.mse_loss, train=None, **options):
    torch.manual_seed(1)
    module = module or Net()
    dp = fastdp.wrap(module, gpus=3, **options)
    step = dp.train_step(loss, lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), **(train or {}))
    for _ in range(steps):
        step(*data())
    return dp, step, [p.detach().numpy().tobytes() for p in module.parameters()]


def net(**options):
    torch.manual_seed(2)
    return Net(**options)


CASES = {
    "any loss": {},
    "mean": {"train": {"reduction": "mean"}},
    "batch norm": {"module": {"norm": True}},
    "synchronized": {"module": {"norm": True}, "sync_batch_norm": True},
    "checkpoint": {"module": {"how": "once"}},
    "nested backward": {"module": {"how": "reentrant"}},
    "accumulate": {"train": {"accumulate": 2}},
}


@pytest.mark.parametrize("case", CASES)
def test_small_buckets_give_the_bits_of_one_bucket(monkeypatch, case):
    def run():
        options = dict(CASES[case])
        return trained(module=net(**options.pop("module", {})), **options)

    want = run()
    monkeypatch.setattr(FlatBuffers.buckets, "__defaults__", (4, 200))
    got = run()
    assert got[2] == want[2]
    engine = got[0]._engine
    assert len(engine.group.buckets) > 3
    early = [watch.early for watch in engine.times._watches]
    assert early[0] == 0 or case != "nested backward"
    if case in ("nested backward",):
        assert not any(early)
    elif case != "accumulate":
        assert early[-1] > 0


def test_a_loss_that_uses_the_parameters_itself_is_counted_in_announced_buckets_too(monkeypatch):
    def run():
        module = net()

        def loss(outputs, y):
            return nn.functional.mse_loss(outputs, y) + sum((p**2).sum() for p in module.parameters())

        return trained(module=module, loss=loss)

    want = run()
    monkeypatch.setattr(FlatBuffers.buckets, "__defaults__", (4, 200))
    assert run()[2] == want[2]


def test_the_last_layers_are_reduced_while_backward_is_held_up_before_the_first_ones(monkeypatch):
    monkeypatch.setattr(FlatBuffers.buckets, "__defaults__", (4, 200))
    spans, changed, kept = [], threading.Condition(), HostReduction._sum

    def summed(reduction, dtype, span, owner):
        kept(reduction, dtype, span, owner)
        with changed:
            spans.append((span.start, span.stop))
            changed.notify_all()

    monkeypatch.setattr(HostReduction, "_sum", summed)
    monkeypatch.setattr(StepWatch, "check", lambda watch: None)  # the gate of each device notes that it waits
    dp, step, _ = trained(steps=2)
    spans.clear()
    engine = dp._engine
    first, waited = engine.group.buckets[0], []

    def wait():
        waited.append(threading.current_thread().name)
        with changed:
            assert changed.wait_for(lambda: (first.start, first.stop) in spans, LIMIT), "not reduced meanwhile"

    Gate.waits = wait
    step(*data())
    assert len(waited) == 3


def test_from_a_nested_backward_on_nothing_is_announced(monkeypatch):
    monkeypatch.setattr(FlatBuffers.buckets, "__defaults__", (4, 200))
    module, other = net(), net()
    dp, step, _ = trained(module=module, steps=2)
    module.how = module.then = "reentrant"
    for _ in range(3):
        step(*data())
    early = [watch.early for watch in dp._engine.times._watches]
    assert early[1] > 0
    assert early[3:] == [0, 0]
    assert [p.detach().numpy().tobytes() for p in module.parameters()] == trained(module=other, steps=5)[2]


def test_a_module_that_begins_to_run_backward_inside_backward_loses_one_step_and_no_weight(monkeypatch):
    monkeypatch.setattr(FlatBuffers.buckets, "__defaults__", (4, 200))
    module, other = net(), net()
    _, step, before = trained(module=module, steps=2)
    # The shared layer's second call is announced before the first one's part of its gradient is found.
    module.how = "reentrant"
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        step(*data())
    assert [p.detach().numpy().tobytes() for p in module.parameters()] == before
    step(*data())
    assert [p.detach().numpy().tobytes() for p in module.parameters()] == trained(module=other, steps=3)[2]


@pytest.mark.parametrize("in_a_loop", [False, True])
def test_where_all_cores_compute_no_bucket_is_summed_early_and_backward_calls_no_hook(monkeypatch, in_a_loop):
    monkeypatch.setattr(FlatBuffers.buckets, "__defaults__", (4, 200))
    told = []
    monkeypatch.setattr(
        _Accumulated, "accumulated", lambda self, number, parameter: told.append(threading.current_thread().name)
    )

    def run():
        told.clear()
        if not in_a_loop:
            return trained()[2]
        module = net()
        model, optimizer = fastdp.wrap(module, gpus=3), torch.optim.SGD(module.parameters(), lr=0.1)
        for _ in range(3):
            x, y = data()
            optimizer.zero_grad()
            nn.functional.mse_loss(model(x), y).backward()
            optimizer.step()
        return [p.detach().numpy().tobytes() for p in module.parameters()]

    want = run()
    assert len(set(told)) == 3, "with cores to spare each device tells of its gradients"
    monkeypatch.setattr(communicator, "CORES", 3)
    assert run() == want
    assert told == []


def test_few_gradients_of_a_loop_are_summed_by_the_thread_that_waits_and_many_by_workers_to_the_same_bits(monkeypatch):
    threads, kept = [], HostReduction._sum

    def summed(reduction, dtype, span, owner):
        threads.append(threading.current_thread().name)
        kept(reduction, dtype, span, owner)

    monkeypatch.setattr(HostReduction, "_sum", summed)

    def gradients(fails=False, **options):
        module = net()
        model = fastdp.wrap(module, gpus=3, **options)
        threads.clear()
        x, y = data()
        loss = nn.functional.mse_loss(model(x), y)
        Gate.waits = trouble if fails else None
        loss.backward()
        return [None if p.grad is None else p.grad.numpy().tobytes() for p in module.parameters()]

    def trouble():
        raise FloatingPointError("no gradient")

    want = gradients()
    assert set(threads) == {threading.main_thread().name}
    assert gradients(on_nonfinite="raise") == want, "a worker checks what workers have summed"
    assert threading.main_thread().name not in threads
    with pytest.raises(FloatingPointError):
        gradients(fails=True)
    assert not threads
    Gate.waits = None
    monkeypatch.setattr(communicator, "SUMMED_NBYTES", 1)
    assert gradients() == want
    assert threading.main_thread().name not in threads


@pytest.mark.parametrize("unit", [1, 1 << 30])
def test_workers_are_woken_for_sums_that_are_worth_it(monkeypatch, unit):
    monkeypatch.setattr(communicator, "SUMMED_NBYTES", unit)
    woken, kept = [], HostReduction.work_all
    monkeypatch.setattr(
        HostReduction, "work_all", lambda self: (woken.append(threading.current_thread().name), kept(self))
    )
    monkeypatch.setattr(reduction, "TILE", 4)  # many pieces
    trained(steps=1)
    assert len(set(woken)) == (3 if unit == 1 else 1)
