"""What the checks of tests/gpu rest on. The checks themselves run on the rig (test_gpu_tests_on_rig.py)."""

from __future__ import annotations

import importlib
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "gpu"))

import engine_checks
import kernel_checks
from kernel_device import on_device

from fastdp.tensors.threads import prepare_worker

LIMIT = 20.0


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
