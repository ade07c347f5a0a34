"""The rules of the CUDA of tests/cuda/rig, as the real CuPy meets them."""

from __future__ import annotations

import pytest
from rig_runs import HEAD, run_on, said_by


def test_streams_run_beside_each_other_and_events_order_them(rig, tmp_path):
    program = """
n = 1 << 20
host = rt.hostAlloc(4 * n, 1)
a, b = rt.malloc(n), rt.malloc(n)
s, t = rt.streamCreateWithPriority(1, -9), rt.streamCreateWithFlags(1)
print(rt.streamGetPriority(s))
first, second = rt.eventCreateWithFlags(2), rt.eventCreateWithFlags(2)
print(rt.eventQuery(first))
for value in range(50):
    rt.memsetAsync(a, value, n, s)
rt.eventRecord(first, s)
print(rt.eventQuery(first))
rt.streamWaitEvent(t, first)
rt.memcpyAsync(host, a, n, 4, t)
rt.eventRecord(second, t)
rt.streamDestroy(s)
rt.eventDestroy(first)
rt.eventSynchronize(second)
print(np.ctypeslib.as_array((__import__("ctypes").c_uint8 * n).from_address(host)).min())
"""
    # A busy stream may be destroyed, and so may an event that a stream waits for.
    assert said_by(rig, tmp_path, program, 1, RIG_DELAY_US="100") == ["-5", "0", "600", "49"]


def test_contexts_belong_to_threads(rig, tmp_path):
    program = """
def look():
    seen = [driver.ctxGetCurrent()]
    try:
        driver.moduleLoadData(b"")
    except driver.CUDADriverError as error:
        seen.append(str(error).split(":")[0])
    rt.setDevice(1)
    print(seen, driver.ctxGetCurrent() != 0)
rt.setDevice(0)
thread = threading.Thread(target=look)
thread.start()
thread.join()
print(rt.getDevice())
"""
    assert said_by(rig, tmp_path, program) == ["[0, 'CUDA_ERROR_INVALID_CONTEXT'] True", "0"]


def test_cards_that_are_not_used_get_no_context(rig, tmp_path):
    program = """
import ctypes, sys
sys.path.insert(0, "tests/gpu")
import engine_checks, fastdp
from fastdp.runtime.cuda import cupy_api
from fastdp.runtime.cuda.device import CudaDevice
has = ctypes.CDLL("libcuda.so.1").rigHasContext
def contexts():
    return [card for card in range(4) if has(card)]
cupy_api.compute_capability(3), cupy_api.multiprocessors(3), cupy_api.pci_bus_id(1), cupy_api.can_access_peer(0, 1)
print(cupy_api.device_count(), contexts())
def work():
    for card in (2, 1):
        with cupy_api.on(card):
            pass
    print(rt.getDevice(), contexts())
thread = threading.Thread(target=work)
thread.start()
thread.join()
devices = [CudaDevice(3, 3), CudaDevice(1, 1)]
engine = fastdp.DataParallel(engine_checks.linear(engine_checks.through(cupy.asnumpy, cupy.asarray)), devices)
engine.train(engine_checks.rows(5))
print(contexts())
del engine
for device in devices:
    device.close()
with cupy_api.on(0):
    for _ in range(2):
        with cupy_api.on(1):
            pass
        print(rt.getDevice())
"""
    said = said_by(rig, tmp_path, program, 4, CUDA_MODULE_LOADING="EAGER")
    assert said == ["4 []", "2 [1, 2]", "[1, 2, 3]", "0", "0"]


def test_calls_that_cuda_refuses(rig, tmp_path):
    program = """
def refused(call, *arguments):
    try:
        call(*arguments)
    except rt.CUDARuntimeError as error:
        print(call.__name__, error.status)
rt.setDevice(1)
stream, event, memory = rt.streamCreate(), rt.eventCreate(), rt.malloc(100)
rt.setDevice(0)
here = rt.streamCreate()
refused(rt.setDevice, 2)
refused(rt.deviceEnablePeerAccess, 0)
rt.deviceEnablePeerAccess(1)
refused(rt.deviceEnablePeerAccess, 1)
refused(rt.eventRecord, event, here)
refused(rt.memsetAsync, memory, 0, 100, stream)
refused(rt.memcpyAsync, memory + 60, memory, 50, 4, stream)
refused(rt.malloc, 1 << 46)
refused(rt.free, memory + 8)
rt.streamDestroy(here)
refused(rt.streamSynchronize, here)
attributes = rt.pointerGetAttributes(memory + 99)
print(attributes.type, attributes.device)
"""
    assert said_by(rig, tmp_path, program) == [
        "setDevice 101",
        "deviceEnablePeerAccess 101",
        "deviceEnablePeerAccess 704",
        "eventRecord 400",
        "memsetAsync 400",
        "memcpyAsync 1",
        "malloc 2",
        "free 1",
        "streamSynchronize 400",
        "2 1",
    ]


def test_a_failed_card_answers_every_call_with_its_failure(rig, tmp_path):
    """A kernel of card 0 is given memory of card 1, which it does not reach; card 1 goes on."""
    program = """
from fastdp.launch import RowPiece, concat_rows
from fastdp.runtime.cuda.device import CudaDevice
near, far = CudaDevice(0, 0), CudaDevice(1, 1)
x, y = far.zeros((64,), np.dtype("float32")), near.zeros((64,), np.dtype("float32"))
concat_rows(near.kernels, [RowPiece(x.data.ptr, y.data.ptr, 64, 4, 0)], stream=near.compute.handle)
for attempt in range(2):
    try:
        near.to_host(y)
    except rt.CUDARuntimeError as error:
        print(error)
rt.setDevice(1)
print(far.to_host(x).sum())
__import__("os")._exit(0)
"""
    said, errors, violations = run_on(rig, tmp_path, 2, ["-c", HEAD + program])
    failure = "cudaErrorIllegalAddress: cudaErrorIllegalAddress"
    assert said.splitlines() == [failure, failure, "0.0"], errors
    assert violations == ["concat_rows on card 0 was given memory of card 1, which it does not reach"]


def test_a_query_that_blocks_in_the_driver_keeps_no_thread_from_launching_a_missing_rank(rig, tmp_path):
    """One thread asks for an event all the time, and no query returns while a rank waits for another."""
    program = """
import ctypes, time
from fastdp.buffers import ArraySpec, FlatBuffers
from fastdp.comm.cuda.communicator import CudaCommunicator
from fastdp.runtime import select
from fastdp.runtime.cuda import cupy_api
held = ctypes.CDLL("libcuda.so.1").rigHeldQueries
devices = select.resolve(2)
comm = CudaCommunicator(devices, 20.0)
flats = [FlatBuffers([ArraySpec("g", (100,), "float32")], device) for device in devices]
over, launch = threading.Event(), cupy_api.launch
def slow(*arguments):
    launch(*arguments)
    time.sleep(0.05)
def ask():
    with cupy_api.on(1):
        event = cupy_api.event_create()
        while not over.wait(0.001):
            cupy_api.event_done(event)
asking = threading.Thread(target=ask)
cupy_api.launch = slow
asking.start()
comm.all_reduce(flats, flats, flats[0].buckets())
for device in devices:
    device.communication.record().finish(20.0)
over.set()
asking.join()
print(held() > 0)
"""
    settings = {"RIG_QUERY_HOLD_MS": "5000", "CUDA_MODULE_LOADING": "EAGER"}
    assert said_by(rig, tmp_path, program, 2, **settings) == ["True"]


EARLY = """
import ctypes, os, warnings
def eager():
    mode = ctypes.c_int()
    ctypes.CDLL("libcuda.so.1").cuModuleGetLoadingMode(ctypes.byref(mode))
    return mode.value == 1
def use_two():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fastdp.set_virtual_devices(2, kind="gpu")
        fastdp.devices()
        fastdp.set_virtual_devices(2, kind="gpu")
        fastdp.devices()
    print([str(w.message)[:55] for w in caught])
"""


@pytest.mark.parametrize(
    ("visible", "starts_first", "lines"),
    [
        ("0,1", False, ["True", "32", "[]"]),
        ("0", False, ["False", "None", "['CUDA had started before fastdp could set CUDA_MODULE_LO']"]),
        ("0,1", True, ["False", "None", "['CUDA had started before fastdp could set CUDA_MODULE_LO']"]),
    ],
)
def test_variables_are_set_before_cuda_starts_or_it_is_said_that_it_has(rig, tmp_path, visible, starts_first, lines):
    start = "rt.getDeviceCount()\n"
    use = "print(eager(), os.environ.get('CUDA_DEVICE_MAX_CONNECTIONS'), sep='\\n')\nuse_two()\n"
    program = EARLY + (start if starts_first else "") + "import fastdp\n" + start + use
    assert said_by(rig, tmp_path, program, 2, CUDA_VISIBLE_DEVICES=visible) == lines


def test_a_stream_that_torch_was_given_outlives_its_device_and_serves_the_next(rig, tmp_path):
    """Torch records events on it when memory is freed that was used there."""
    program = """
from fastdp.runtime.cuda.device import CudaDevice
first = CudaDevice(0, 0)
given, other = first.compute.for_torch(), first.copy_in.handle
first.close()
event = rt.eventCreateWithFlags(2)
rt.eventRecord(event, given)
try:
    rt.eventRecord(event, other)
except rt.CUDARuntimeError as error:
    print(error.status)
second, third = CudaDevice(0, 0), CudaDevice(1, 0)
print(given == second.compute.handle, given == third.compute.handle)
second.close()
third.close()
"""
    assert said_by(rig, tmp_path, program, 1) == ["400", "True False"]


def test_streams_are_recorded_with_those_that_wait_for_their_events(rig, tmp_path):
    program = """
from fastdp.runtime.cuda.child_graphs import chained
n = 4096
def refused(call, *arguments):
    try:
        return call(*arguments)
    except rt.CUDARuntimeError as error:
        print(error.status)
rt.setDevice(0)
a, host = rt.malloc(n), rt.hostAlloc(n, 1)
s, t = rt.streamCreateWithFlags(1), rt.streamCreateWithFlags(1)
fork, join = rt.eventCreateWithFlags(2), rt.eventCreateWithFlags(2)
def value():
    rt.streamSynchronize(s)
    return np.ctypeslib.as_array((__import__("ctypes").c_uint8 * n).from_address(host))[0]
rt.memsetAsync(a, 1, n, s)
rt.streamBeginCapture(s, 1)
rt.memsetAsync(a, 2, n, s)
rt.eventRecord(fork, s)
rt.streamWaitEvent(t, fork)
rt.memcpyAsync(host, a, n, 4, t)
print(rt.streamIsCapturing(t))
rt.eventRecord(join, t)
rt.streamWaitEvent(s, join)
graph = rt.streamEndCapture(s)
print(rt.streamIsCapturing(t))
ready = rt.graphInstantiate(graph)
rt.memcpyAsync(host, a, n, 4, s)
print(value())
rt.graphLaunch(ready, s)
print(value())
both = rt.graphInstantiate(chained([graph, graph], [(0, graph)]))
rt.memsetAsync(a, 3, n, s)
rt.graphLaunch(both, s)
rt.graphExecDestroy(both)
print(value())
rt.streamBeginCapture(s, 1)
refused(rt.malloc, 10)
refused(rt.streamEndCapture, s)
rt.streamBeginCapture(s, 1)
rt.eventRecord(fork, s)
rt.streamWaitEvent(t, fork)
rt.memsetAsync(a, 4, n, t)
refused(rt.streamEndCapture, s)
rt.streamBeginCapture(s, 1)
refused(rt.streamSynchronize, s)
refused(rt.streamEndCapture, s)
print(value())
"""
    assert said_by(rig, tmp_path, program, 1) == [
        "True",
        "False",
        "1",
        "2",
        "2",
        "900",
        "901",
        "904",
        "900",
        "901",
        "2",
    ]


def test_calls_that_a_recording_forbids(rig, tmp_path):
    """The number of the failure, and of the one at the recording's end, which has become invalid."""
    program = """
n = 4096
rt.setDevice(0)
a, host = rt.malloc(n), rt.hostAlloc(n, 1)
s, t, blocking = rt.streamCreateWithFlags(1), rt.streamCreateWithFlags(1), rt.streamCreate()
plain, old, own = (rt.eventCreateWithFlags(2) for _ in range(3))
rt.eventRecord(old, t)
def status(call, *arguments):
    try:
        call(*arguments)
        return 0
    except (rt.CUDARuntimeError, driver.CUDADriverError) as error:
        return error.status
def recorded(stream, mode, call, *arguments):
    rt.streamBeginCapture(stream, mode)
    rt.eventRecord(own, stream)
    found = status(call, *arguments)
    print(call.__name__, mode, found, status(rt.streamEndCapture, stream))
for call, *arguments in (
    (rt.malloc, 8), (rt.free, a), (rt.hostAlloc, 8, 1), (rt.freeHost, host), (rt.deviceSynchronize,),
    (rt.memcpy, a, host, 8, 4), (driver.moduleLoadData, b"//"), (rt.deviceEnablePeerAccess, 1),
    (rt.eventSynchronize, old),
):
    recorded(s, 1, call, *arguments)
def elsewhere(call, *arguments):
    found = []
    thread = threading.Thread(target=lambda: found.append(status(call, *arguments)))
    thread.start()
    thread.join()
    return rt.check_status(found[0])
recorded(s, 0, elsewhere, rt.malloc, 8)
recorded(s, 1, elsewhere, rt.malloc, 8)
recorded(s, 1, lambda: rt.check_status(rt.eventQuery(old)))
recorded(s, 1, lambda: rt.check_status(rt.eventQuery(own)))
recorded(s, 1, rt.streamWaitEvent, s, old)
recorded(s, 1, rt.streamWaitEvent, s, plain)
recorded(s, 1, rt.memsetAsync, a, 0, 8, 0)
recorded(blocking, 1, rt.memsetAsync, a, 0, 8, 0)
recorded(blocking, 1, rt.eventRecord, old, 0)
rt.streamBeginCapture(t, 1)
recorded(s, 1, rt.streamWaitEvent, t, own)
print(status(rt.streamEndCapture, t), status(rt.streamWaitEvent, t, own))
rt.eventRecord(own, s)
print(status(rt.streamWaitEvent, t, own), status(rt.streamBeginCapture, 0, 1))
"""
    assert said_by(rig, tmp_path, program) == [
        "malloc 1 900 901",
        "free 1 900 901",
        "hostAlloc 1 900 901",
        "freeHost 1 900 901",
        "deviceSynchronize 1 900 901",
        "memcpy 1 900 901",
        "moduleLoadData 1 900 901",
        "deviceEnablePeerAccess 1 900 901",
        "eventSynchronize 1 900 901",
        "elsewhere 0 900 901",
        "elsewhere 1 0 0",
        "<lambda> 1 900 901",
        "<lambda> 1 907 901",
        "streamWaitEvent 1 905 901",
        "streamWaitEvent 1 0 0",
        "memsetAsync 1 0 0",
        "memsetAsync 1 906 901",
        "eventRecord 1 906 901",
        "streamWaitEvent 1 902 901",
        "901 907",
        "0 900",
    ]


def test_what_cuda_and_nccl_forbid_and_do_not_detect(rig, tmp_path):
    program = """
from cupy.cuda import nccl
from fastdp.runtime.cuda import cupy_api
def buffers():
    made = []
    for card in (0, 1):
        with cupy_api.on(card):
            made.append((rt.malloc(64), rt.streamCreateWithFlags(1)))
    return made
def reduce(rank, buffer=None):
    memory, stream = places[rank]
    comms[rank].allReduce(buffer or memory, buffer or memory, 16, 7, 0, stream)
def settle():
    for _, stream in places:
        rt.streamSynchronize(stream)
def warm():
    with cupy_api.nccl_group():
        reduce(0), reduce(1)
    settle()
places, comms = buffers(), cupy_api.nccl_init_all([0, 1])
rt.setDevice(0)
warm()
nccl.groupStart()
rt.streamSynchronize(places[0][1])
nccl.groupEnd()
reduce(0)
rt.malloc(64)
reduce(1)
settle()
with cupy_api.nccl_group():
    reduce(0, places[1][0]), reduce(1)
settle()
with cupy_api.nccl_group():
    reduce(0, places[0][0] + 32), reduce(1)
settle()
comms = cupy_api.nccl_init_all([0, 1])
def record():
    for _, stream in places:
        rt.streamBeginCapture(stream, 1)
    with cupy_api.nccl_group():
        reduce(0), reduce(1)
    return [rt.streamEndCapture(stream) for _, stream in places]
for graph in record():
    rt.graphDestroy(graph)
warm()
graphs = record()
warm()
for graph in graphs:
    rt.graphDestroy(graph)
warm()
ids = nccl.get_unique_id()
nccl.NcclCommunicator(2, ids, 0)
rt.mallocAsync(64, places[0][1])
__import__("os")._exit(0)
"""
    *_, violations = run_on(rig, tmp_path, 2, ["-c", HEAD + program])
    assert violations == [
        "cudaStreamSynchronize inside a group of NCCL's, which enqueues nothing before its end",
        "cudaMalloc while a collective waits for other ranks",
        "one thread calls the collectives of several ranks outside of a group",
        "a collective of card 0 uses memory that is not in one allocation of the card",
        "a collective of card 0 uses memory that is not in one allocation of the card",
        "a collective of card 0 uses memory that is not in one allocation of the card",
        "a collective of card 0 uses memory that is not in one allocation of the card",
        "a collective is recorded on a communicator that has not run it before",
        "a collective is recorded on a communicator that has not run it before",
        "an eager collective on a communicator that is in a graph",
        "an eager collective on a communicator that is in a graph",
        "a thread makes one of several ranks outside of a group",
        "cudaMallocAsync is not modelled",
    ]
