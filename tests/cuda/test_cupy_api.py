"""CUDA's calls as functions over ints: devices, contexts, the environment, errors."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import numpy as np
import pytest


@pytest.fixture
def runtime(fake_cuda):
    def start(*args, **options):
        sim = fake_cuda(*args, **options)
        from fastdp.runtime.cuda import cupy_api as runtime

        return sim, runtime

    return start


def test_what_can_be_asked_without_a_context(runtime):
    sim, rt = runtime(4)
    assert rt.device_count() == 4
    assert rt.compute_capability(3) == 90
    assert rt.multiprocessors(3) == 4
    assert rt.pci_bus_id(1) == "00000000:3C:00.0"  # as nvmlPciInfo_t.busId
    assert rt.driver_version() == 12090
    assert rt.can_access_peer(0, 1)
    assert not rt.can_access_peer(0, 0)
    assert sim.contexts == set()


def test_a_device_is_current_inside_and_the_one_before_afterwards(runtime):
    sim, rt = runtime(3)
    with rt.on(1):
        with rt.on(2):
            assert sim.thread.device == 2
        assert sim.thread.device == 1
        with pytest.raises(KeyError), rt.on(2):
            raise KeyError
        assert sim.thread.device == 1
    assert sim.contexts == {1, 2}


def test_a_fresh_thread_gives_device_0_no_context(runtime):
    sim, rt = runtime(3, contexts_on=[1, 2])
    seen = []

    def work() -> None:
        with rt.on(2):
            pass
        with rt.on(1):
            pass
        seen.append(sim.thread.device)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [2]
    assert sim.contexts == {1, 2}


def test_a_device_0_that_is_in_use_is_given_back(runtime):
    sim, rt = runtime(2)
    with rt.on(0), rt.on(1):
        pass
    with rt.on(1):
        pass
    assert sim.thread.device == 0


def test_streams_take_priorities_in_cudas_range(runtime):
    sim, rt = runtime(2)
    assert rt.stream_priority_range(1) == (0, -5)
    stream = rt.stream_create(1, -100)
    assert sim.streams[stream].priority == -5
    assert sim.streams[stream].device == 1
    rt.stream_destroy(stream)


def test_an_event_is_done_not_done_or_an_error(runtime):
    sim, rt = runtime(1)
    stream = rt.stream_create(0)
    event = rt.event_create()
    assert rt.event_done(event)  # never recorded
    sim.held = True
    rt.event_record(event, stream)
    assert not rt.event_done(event)
    sim.held = False
    assert rt.event_done(event)
    sim.failures["eventRecord"] = 700
    with pytest.raises(rt.CudaError, match="cudaErrorIllegalAddress"):
        rt.event_record(event, stream)
    rt.event_destroy(event)
    with pytest.raises(rt.CudaError, match="InvalidResourceHandle"):
        rt.event_done(event)
    rt.stream_destroy(stream)


def test_peer_access_that_is_enabled_already_is_fine(runtime):
    sim, rt = runtime(2, cannot_access=[(1, 0)])
    rt.enable_peer_access(0, 1)
    rt.enable_peer_access(0, 1)
    assert sim.peers == {(0, 1)}
    with pytest.raises(rt.CudaError, match="PeerAccessNotEnabled"):
        rt.enable_peer_access(1, 0)


@pytest.mark.parametrize("value", ["1", " 1 ", "2"])
def test_launch_blocking_is_refused_with_several_gpus(runtime, monkeypatch, value):
    _, rt = runtime(2)
    monkeypatch.setenv("CUDA_LAUNCH_BLOCKING", value)
    with pytest.raises(RuntimeError, match=r"CUDA_LAUNCH_BLOCKING=.* with 2 GPUs.*Unset it"):
        rt.check_environment([0, 1])
    rt.check_environment([0])
    rt.check_environment([0, 0])  # two virtual devices of one GPU


def test_the_environment_of_several_gpus_respects_the_users(runtime, monkeypatch):
    _, rt = runtime(2)
    rt.check_environment([0])
    assert "CUDA_MODULE_LOADING" not in os.environ
    monkeypatch.setenv("CUDA_MODULE_LOADING", "LAZY")
    monkeypatch.setenv("CUDA_LAUNCH_BLOCKING", "0")
    rt.check_environment([0, 1])
    assert os.environ["CUDA_MODULE_LOADING"] == "LAZY"
    assert os.environ["NCCL_GRAPH_MIXING_SUPPORT"] == "0"


def test_arrays_lie_where_they_are_told_and_keep_their_owner(runtime):
    _, rt = runtime(2)
    ptr = rt.malloc(1, 96)
    array = rt.array(ptr, (4, 6), "float32", 1, object())
    assert (array.shape, array.dtype, rt.array_device(array)) == ((4, 6), np.float32, 1)
    assert rt.array_pointer(array[2:]) == ptr + 48
    assert rt.is_array(array)
    assert not rt.is_array(np.zeros(3))
    empty = rt.array(ptr, (0, 6), "float32", 1, None)
    assert empty.size == 0
    rt.free(ptr)


@pytest.mark.parametrize(("status", "said"), [(6, "REMOTE_ERROR"), (8, "TIMEOUT"), (9, "code 9 of NCCL"), (7, None)])
def test_codes_of_nccl_that_cupy_has_no_name_for_are_nccl_errors(runtime, status, said):
    _, rt = runtime(2)
    comms = rt.nccl_init_all([0, 1])
    comms[0]._comm.async_error = status
    found = rt.nccl_async_error(comms[0])
    if said is None:
        assert found is None
    else:
        assert isinstance(found, rt.NcclError)
        assert found.status == status
        assert said in str(found)
    for comm in comms:
        rt.nccl_destroy(comm)


def test_nccls_own_words(runtime):
    _, rt = runtime(2)
    assert rt.nccl_available()
    assert rt.nccl_version() == 22907
    with pytest.raises(ValueError, match=r"devices=\[1, 1\]: expected each GPU once"):
        rt.nccl_init_all([1, 1])
    comms = rt.nccl_init_all([1, 0])
    assert [comm.device_id() for comm in comms] == [1, 0]
    assert rt.nccl_async_error(comms[0]) is None
    comms[0]._comm.async_error = 5
    assert isinstance(rt.nccl_async_error(comms[0]), rt.NcclError)
    with pytest.raises(ValueError, match="dtype_name='bool': expected one of int8"):
        rt.all_reduce(comms[0], 0, 0, 1, "bool", 0)
    for comm in comms:
        rt.nccl_destroy(comm)


def test_without_cupy_fastdp_works_and_the_gpu_layer_says_what_is_missing():
    code = """
import sys
sys.modules["cupy"] = None
import fastdp
fastdp.set_virtual_devices(1)
print(len(fastdp.devices()))
try:
    import fastdp.runtime.cuda.memory
except ImportError as error:
    print(error.name)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.split() == ["1", "cupy"]
