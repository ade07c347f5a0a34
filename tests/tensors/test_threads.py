"""Pools of OpenMP threads end with their use."""

from __future__ import annotations

import queue
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest
import torch

import fastdp
from fastdp.runtime.host.resources import CORES
from fastdp.tensors import threads
from fastdp.tensors.threads import in_place_of_workers

SCRIPT = """
import os, threading, torch
from fastdp.tensors.threads import end_pool, replicas_run

def helpers():
    return len(os.listdir("/proc/self/task")) - threading.active_count() - idle

torch.set_num_threads(2)
idle = 0
idle = helpers()
x = torch.randn(512, 512)
x @ x
print(helpers())
end_pool()
print(helpers())
torch.relu(torch.randn(1 << 20)); x @ x
with replicas_run(1):
    print(helpers())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux") or CORES < 2, reason="counts threads of Linux, on 2 cores")
def test_a_pool_ends_when_it_is_told_and_while_replicas_run():
    said = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=120, check=True)
    assert said.stdout.split() == ["1", "0", "0"]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("gpus", [1, 2])
def test_training_does_not_depend_on_the_modes_of_the_calling_thread(mode, gpus):
    fastdp.set_virtual_devices(2)
    module = torch.nn.Linear(3, 1)
    before = module.weight.detach().clone()
    step = fastdp.wrap(module, gpus=gpus).train_step(torch.nn.functional.mse_loss, lambda p: torch.optim.SGD(p, 0.1))
    x, y = torch.randn(4, 3), torch.randn(4, 1)
    with mode():
        step(x, y)
    assert not torch.equal(module.weight, before)
    fastdp.set_virtual_devices(0)


SEEN: queue.SimpleQueue[int] = queue.SimpleQueue()


class CountsCores(torch.nn.Linear):
    """Notes how many cores torch may use on the thread that runs forward."""

    def forward(self, x):
        SEEN.put(torch.get_num_threads())
        return super().forward(x)


@pytest.mark.parametrize(("given", "gpus", "expected"), [(1, 1, 1), (1, 2, 1), (3, 1, 3), (3, 2, 1), (4, 2, 2)])
def test_replicas_share_the_cores_that_the_user_has_given_to_torch(given, gpus, expected):
    fastdp.set_virtual_devices(2)
    step = fastdp.wrap(CountsCores(3, 1), gpus=gpus, compile=None).train_step(
        torch.nn.functional.mse_loss, lambda p: torch.optim.SGD(p, 0.1)
    )
    before = torch.get_num_threads()
    torch.set_num_threads(given)
    try:
        step(torch.randn(4, 3), torch.randn(4, 1))
        while not SEEN.empty():  # of trials too
            SEEN.get_nowait()
        step(torch.randn(4, 3), torch.randn(4, 1))
        assert torch.get_num_threads() == given
    finally:
        torch.set_num_threads(before)
        fastdp.set_virtual_devices(0)
    assert [SEEN.get_nowait() for _ in range(SEEN.qsize())] == [expected] * gpus


def test_a_thread_that_works_in_place_of_workers_gets_its_streams_device_and_modes_back(monkeypatch):
    streams, current = {"cuda:0": "the user's", "cuda:1": "default"}, [1]
    monkeypatch.setattr(torch.cuda, "current_stream", lambda name: (name, streams[name]))
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: streams.update([stream]))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "set_device", lambda card: current.__setitem__(0, card))
    monkeypatch.setattr(torch.cuda, "ExternalStream", lambda handle, device: (device, handle))
    devices = [
        SimpleNamespace(torch_device=name, compute=SimpleNamespace(for_torch=lambda: "ours"))
        for name in ("cuda:0", "cuda:1", "cuda:1")
    ]

    def work() -> None:
        with in_place_of_workers(devices, torch.get_num_threads()):
            assert streams == {"cuda:0": "ours", "cuda:1": "ours"}
            assert not torch._C._is_multithreading_enabled()
            current[0] = 0
            raise ArithmeticError

    with pytest.raises(ArithmeticError):
        work()
    assert (streams, current) == ({"cuda:0": "the user's", "cuda:1": "default"}, [1])
    assert torch._C._is_multithreading_enabled()


@pytest.fixture
def cores():
    """Two virtual devices, and four cores given to torch."""
    fastdp.set_virtual_devices(2)
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield torch.get_num_threads
    torch.set_num_threads(before)
    fastdp.set_virtual_devices(0)


def test_a_loop_has_a_device_s_share_of_the_cores_from_forward_to_the_optimizer_s_step(cores):
    module = torch.nn.Linear(3, 1)
    model, optimizer = fastdp.wrap(module, gpus=2, compile=None), torch.optim.SGD(module.parameters(), 0.1)
    for _ in range(2):
        loss = model(torch.randn(4, 3)).sum()
        assert cores() == 2
        loss.backward()
        assert cores() == 2
        optimizer.step()
        assert cores() == 4
    with torch.no_grad():
        model(torch.randn(4, 3))
    assert cores() == 4


def test_a_loop_without_optimizer_gets_the_cores_back_with_its_last_graph(cores):
    model = fastdp.wrap(torch.nn.Linear(3, 1), gpus=2, compile=None)
    first, second = model(torch.randn(4, 3)), model(torch.randn(4, 3))
    del first
    assert cores() == 2
    del second
    assert cores() == 4


def test_a_graph_that_another_thread_drops_leaves_no_share_behind(cores):
    model = fastdp.wrap(torch.nn.Linear(3, 1), gpus=2, compile=None)
    outputs = [model(torch.randn(4, 3))]
    thread = threading.Thread(target=outputs.clear)
    thread.start()
    thread.join()
    last = model(torch.randn(4, 3))
    assert cores() == 2
    del last
    assert cores() == 4


def test_a_backward_pass_behind_an_optimizer_s_step_has_the_share_again(cores):
    module = torch.nn.Linear(3, 1)
    model, optimizer = fastdp.wrap(module, gpus=2, compile=None), torch.optim.SGD(module.parameters(), 0.1)
    seen = []
    module.weight.register_hook(lambda gradient: seen.append(cores()))
    loss = model(torch.randn(4, 3)).sum()
    loss.backward(retain_graph=True)
    optimizer.step()
    assert cores() == 4
    loss.backward()
    assert (seen, cores()) == ([2, 2], 2)


def test_a_loop_leaves_the_cores_that_the_user_gives_torch_meanwhile(cores):
    module = torch.nn.Linear(3, 1)
    model, optimizer = fastdp.wrap(module, gpus=2, compile=None), torch.optim.SGD(module.parameters(), 0.1)
    loss = model(torch.randn(4, 3)).sum()
    torch.set_num_threads(3)
    loss.backward()
    optimizer.step()
    assert cores() == 3


@pytest.mark.parametrize(("inputs", "outputs"), [(3, 1 << 21), (1 << 21, 2)])
def test_a_loop_of_large_outputs_or_weights_keeps_all_cores(cores, inputs, outputs):
    model = fastdp.wrap(torch.nn.Linear(inputs, outputs, bias=False), gpus=2, compile=None)
    made = model(torch.randn(2, inputs))
    assert made.requires_grad
    assert cores() == 4


def test_replicas_that_cannot_begin_leave_torch_without_gradients_where_it_was(monkeypatch):
    """The mode of the caller, also when what comes before it fails."""

    def fails(count):
        raise OSError("no threads")

    monkeypatch.setattr(threads, "end_pool", lambda: fails(1))
    with torch.no_grad():
        with pytest.raises(OSError, match="no threads"), threads.replicas_run(0):
            pass
        assert not torch.is_grad_enabled()
