"""The checks of tests/gpu pass on the simulated CUDA, so that on a real card a failure is the card's."""

from __future__ import annotations

import gc
import importlib
import sys
import threading
from pathlib import Path

import keras
import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "gpu"))

import engine_checks
import kernel_checks
import kinds_checks
import model_checks
from kernel_device import on_device

from fastdp.tensors.threads import prepare_worker

LIMIT = 20.0


@pytest.fixture
def hosts():
    from fastdp.runtime.host.device import HostDevice

    made = [HostDevice(i) for i in range(4)]
    yield made
    for device in made:
        device.close(LIMIT)


# An array that arithmetic made is not on the simulated GPU.
off_gpu = engine_checks.through(lambda x: x, lambda x: np.array(x, subok=False))


@pytest.mark.parametrize("count", [1, 4])
def test_the_engine_checks(box, hosts, count):
    engine_checks.trains_as_on_the_host(box.devices(count, 1), hosts[:count], 7, off_gpu)


@pytest.mark.parametrize("name", ["mlp", "cnn"])
@pytest.mark.parametrize("count", [1, 4])
def test_the_check_of_recorded_steps(box, name, count):
    told = model_checks.recorded_steps_equal_traced_and_eager_ones(box.devices(count, 1), name)
    assert all(entry["graph_nbytes"] > 0 for entry in told)
    box.graphs.clear()
    keras.backend.clear_session()
    gc.collect()


def test_the_check_of_data_sets(box):
    model_checks.a_data_set_on_the_devices_equals_arrays(box.devices(4, 1), "cnn")
    box.graphs.clear()
    keras.backend.clear_session()
    gc.collect()


@pytest.mark.parametrize(("name", "count", "cards", "way"), [("mlp", 2, 2, "nccl"), ("cnn", 3, 1, "kernels")])
def test_the_check_of_whole_steps(gpus, monkeypatch, name, count, cards, way):
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "32")  # as gpu-check has it
    devices = gpus(cards).devices(count)
    assert kinds_checks.whole_steps_give_the_losses_of_those_in_buckets(devices, name, way) == 0.0


def test_the_checks_of_failures_memory_and_merging(box):
    devices = box.devices(2, 1)
    engine_checks.recovers_from_a_failure(devices, off_gpu)
    assert engine_checks.allocates_nothing_in_the_steady_state(devices, off_gpu)["staging"] > 0
    engine_checks.merges_where_asked(devices, off_gpu)
    gc.collect()


@pytest.mark.parametrize("count", [1, 4])
def test_the_check_of_buckets_during_backward(box, hosts, count):
    engine_checks.reduces_during_backward(box.devices(count, 1), hosts[:count], off_gpu)
    gc.collect()


@pytest.mark.parametrize(
    ("n", "dtype", "way"),
    [
        (1, "float16", "one-shot"),
        (70_000, "float32", "two-shot"),
        (1000, "float64", "host"),
        (700_000, "bfloat16", "two-shot"),
    ],
)
def test_the_checks_of_the_all_reduce(box, n, dtype, way):
    assert engine_checks.all_reduces(box.devices(4, 1), n, dtype, idle=1) == way


def test_the_kernel_checks(box):
    (device,) = box.devices(1)
    ready, streams = on_device(device)
    kernel_checks.slice_rows(ready, 784, "float32", shuffled=False, leads=(0, 0), seed=0)
    kernel_checks.concat_rows(ready, [3, 0, 5], 12, 5, 0)
    kernel_checks.all_16_bit_numbers(ready, "bfloat16")
    kernel_checks.rounding(ready, "float16")
    kernel_checks.overflow_and_nan(ready, "bfloat16")
    for kind in ("one_shot", "two_shot"):
        kernel_checks.all_reduce(ready, kind, 3, 1000, "float32", blocks=2, threads=32, turns=2)
    for stream in streams:
        box.runtime.stream_destroy(stream)


def test_bytes_written_outside_are_found(box):
    (device,) = box.devices(1)
    ready, streams = on_device(device, 1)

    def write_past_the_end():
        with ready.scope():
            array, before = ready._arrays[ready.empty(16)]
            device.copy(array[before + 16 : before + 20], np.zeros(4, np.uint8))

    with pytest.raises(AssertionError, match="were written"):
        write_past_the_end()
    box.runtime.stream_destroy(streams[0])


def test_backward_runs_in_the_worker_s_own_thread(box):
    """Torch's threads are one per card: replicas that meet in backward would wait for each other there."""
    (device,) = box.devices(1)
    seen = {}

    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, gradient):
            seen["backward"] = threading.current_thread()
            return gradient * 2

    def work():
        prepare_worker(1, device)
        seen["enabled"] = torch._C._is_multithreading_enabled()
        seen["worker"] = threading.current_thread()
        Doubled.apply(torch.ones(2, requires_grad=True)).sum().backward()

    device.compute.enqueue(work)
    device.compute.record().finish(LIMIT)
    assert seen == {"enabled": False, "worker": seen["worker"], "backward": seen["worker"]}
    assert torch._C._is_multithreading_enabled()  # the user's own threads keep it


def test_each_collective_is_launched_by_itself_before_ranks_wait_for_each_other(box, monkeypatch):
    cuda = importlib.import_module("fastdp.comm.cuda.peer_kernels")
    launched = []
    kinds = ("all_reduce_one_shot", "all_reduce_two_shot", "reduce_scatter")
    for kind in kinds:
        original = getattr(cuda, kind)

        def noted(kernels, group, *, original=original, kind=kind, **options):
            launched.append((kernels, kind, options["dtype"], len(group.signals)))
            original(kernels, group, **options)

        monkeypatch.setattr(cuda, kind, noted)
    devices = box.devices(2, 1)
    assert engine_checks.all_reduces(devices, 10, "float16") == "one-shot"
    for device in devices:
        own = [launch[1:] for launch in launched if launch[0] is device.kernels]
        assert own[:9] == [(kind, t, 1) for t in kernel_checks.FLOATS for kind in kinds]
        assert set(own[9:]) == {("all_reduce_one_shot", "float16", 2)}
