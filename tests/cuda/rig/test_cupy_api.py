"""CUDA's calls as functions over ints: devices, contexts, the environment, errors."""

from __future__ import annotations

import os

import numpy as np
import pytest


def test_what_can_be_asked_of_a_card(runtime, cards):
    assert runtime.device_count() == cards.count
    assert runtime.compute_capability(3) == 90
    assert runtime.multiprocessors(3) == 132
    assert runtime.pci_bus_id(1) == "00000000:3C:00.0"  # as nvmlPciInfo_t.busId
    assert runtime.driver_version() == 12090
    assert runtime.can_access_peer(0, 1)
    assert not runtime.can_access_peer(0, 0)


def test_a_device_is_current_inside_and_the_one_before_afterwards(runtime):
    current = runtime.cudart.getDevice
    with runtime.on(1):
        with runtime.on(2):
            assert current() == 2
        assert current() == 1
        with pytest.raises(KeyError), runtime.on(2):
            raise KeyError
        assert current() == 1


def test_streams_take_priorities_in_cudas_range(runtime):
    assert runtime.stream_priority_range(1) == (0, -5)
    stream = runtime.stream_create(1, -100)
    assert runtime.cudart.streamGetPriority(stream) == -5
    runtime.stream_destroy(stream)


def test_an_event_is_done_not_done_or_an_error(runtime, cards):
    stream = runtime.stream_create(0)
    with runtime.on(0):
        event = runtime.event_create()
    assert runtime.event_done(event)  # never recorded
    cards.hold(True)
    runtime.event_record(event, stream)
    assert not runtime.event_done(event)
    cards.hold(False)
    runtime.cudart.streamSynchronize(stream)
    assert runtime.event_done(event)
    runtime.event_destroy(event)
    with pytest.raises(runtime.CudaError, match="InvalidResourceHandle"):
        runtime.event_done(event)
    runtime.stream_destroy(stream)


@pytest.mark.parametrize("value", ["1", " 1 ", "2"])
def test_launch_blocking_is_refused_with_several_gpus(runtime, monkeypatch, value):
    monkeypatch.setenv("CUDA_LAUNCH_BLOCKING", value)
    with pytest.raises(RuntimeError, match=r"CUDA_LAUNCH_BLOCKING=.* with 2 GPUs.*Unset it"):
        runtime.check_environment([0, 1])
    runtime.check_environment([0])
    runtime.check_environment([0, 0])  # two virtual devices of one GPU


def test_the_environment_of_several_gpus_respects_the_users(runtime, monkeypatch):
    monkeypatch.setenv("CUDA_MODULE_LOADING", "LAZY")
    monkeypatch.setenv("CUDA_LAUNCH_BLOCKING", "0")
    monkeypatch.delenv("NCCL_GRAPH_MIXING_SUPPORT", raising=False)
    runtime.check_environment([0, 1])
    assert os.environ["CUDA_MODULE_LOADING"] == "LAZY"
    assert os.environ["NCCL_GRAPH_MIXING_SUPPORT"] == "0"


def test_arrays_lie_where_they_are_told_and_keep_their_owner(runtime):
    pointer = runtime.malloc(1, 96)
    array = runtime.array(pointer, (4, 6), "float32", 1, object())
    assert (array.shape, array.dtype, runtime.array_device(array)) == ((4, 6), np.float32, 1)
    assert runtime.array_pointer(array[2:]) == pointer + 48
    assert runtime.is_array(array)
    assert not runtime.is_array(np.zeros(3))
    assert runtime.array(pointer, (0, 6), "float32", 1, None).size == 0
    runtime.free(pointer)


@pytest.mark.parametrize(("status", "said"), [(6, "REMOTE_ERROR"), (8, "TIMEOUT"), (9, "code 9 of NCCL"), (7, None)])
def test_codes_of_nccl_that_cupy_has_no_name_for_are_nccl_errors(runtime, monkeypatch, status, said):
    comms = runtime.nccl_init_all([0, 1])
    assert runtime.nccl_async_error(comms[0]) is None
    monkeypatch.setenv("RIG_NCCL_ERROR", str(status))
    found = runtime.nccl_async_error(comms[0])
    if said is None:
        assert found is None
    else:
        assert isinstance(found, runtime.NcclError)
        assert found.status == status
        assert said in str(found)
    for comm in comms:
        runtime.nccl_destroy(comm)


def test_nccls_own_words(runtime):
    assert runtime.nccl_available()
    assert runtime.nccl_version() == 23003
    with pytest.raises(ValueError, match=r"devices=\[1, 1\]: expected each GPU once"):
        runtime.nccl_init_all([1, 1])
    comms = runtime.nccl_init_all([1, 0])
    assert [comm.device_id() for comm in comms] == [1, 0]
    with pytest.raises(ValueError, match="dtype_name='bool': expected one of int8"):
        runtime.all_reduce(comms[0], 0, 0, 1, "bool", 0)
    for comm in comms:
        runtime.nccl_destroy(comm)
