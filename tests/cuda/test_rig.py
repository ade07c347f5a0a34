"""The real CuPy on a CUDA of our own (tests/cuda/rig): that CUDA's rules, and tests/gpu on its cards."""

from __future__ import annotations

import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "rig"))

import build_rig

ROOT = Path(__file__).parents[2]
SECONDS, SECONDS_OF_TESTS = 60.0, 300.0
# Why tests of tests/gpu may be skipped on the rig.
SKIPPED = {
    "this torch is built without CUDA, or finds no GPU",
    "needs 2 GPU(s): 1 GPU here",
    "NCCL wants a card for each of 4 ranks",
    "NCCL wants a card for each of 8 ranks",
}


@pytest.fixture(scope="session")
def rig() -> Path:
    """The folder of the rig, built if it is not there yet."""
    try:
        return build_rig.built()
    except build_rig.NotToBeHad as why:
        pytest.skip(str(why))


def run_on(
    rig: Path, scratch: Path, cards: int, command: list[str], seconds: float = SECONDS, **more: str
) -> tuple[str, str, list[str]]:
    """The output of a Python process with so many cards, its errors, and what CUDA forbids and does not detect."""
    violations = scratch / "violations"
    environment = build_rig.environment(rig, cards, RIG_VIOLATIONS=str(violations), **more)
    command = [sys.executable, *command]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=seconds, check=False
    )
    errors = done.stderr + (f"exit status {done.returncode}" if done.returncode else "")
    return done.stdout, errors, violations.read_text(encoding="utf-8").splitlines() if violations.exists() else []


FAILING_CALLS = "tests/gpu/test_recorded.py::test_a_call_that_fails_wherever_it_is_leaves_no_step_half_done"

# By the number of cards: of how many devices tests run, of which models, how late streams are, how many tests pass.
CARDS = {
    1: ("1 4", "mlp recurrent", 0, 150),
    2: ("2 4", "cnn", 150, 60),
    4: ("4", "attention mlp", 50, 40),
    8: ("8", "mlp", 50, 35),
}


@pytest.mark.parametrize("cards", CARDS)
def test_the_tests_for_gpus_pass_with_the_real_cupy(rig, tmp_path, cards):
    """All of tests/gpu on one card, with torch in host memory, and on several what depends on their number."""
    counts, models, delay, at_least = CARDS[cards]
    settings = {"RIG_DELAY_US": str(delay), "RIG_COUNTS": counts, "RIG_MODELS": models, "FASTDP_GPU_SMALL": "1"}
    skipped = run_tests(rig, tmp_path, cards, [f"--deselect={FAILING_CALLS}", "tests/gpu"], at_least, **settings)
    assert skipped <= SKIPPED


def run_tests(rig: Path, scratch: Path, cards: int, files: list[str], at_least: int, **settings: str) -> set[str]:
    """Tests pass on so many cards, with torch in host memory, and do nothing that CUDA forbids.

    Returns the reasons for which others are skipped.
    """
    report = scratch / "report.xml"
    options = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", f"--junitxml={report}", "-o", "junit_family=xunit1"]
    settings |= {"RIG_QUERY_HOLD_MS": "20000", "FASTDP_GPU_COMPUTE": "host"}
    command = ["-m", "pytest", "-p", "torch_on_rig", *options, *files]
    said, errors, violations = run_on(rig, scratch, cards, command, SECONDS_OF_TESTS, **settings)
    assert report.exists(), said[-3000:] + errors[-3000:]
    cases = list(ET.parse(report).iter("testcase"))
    bad = [case.get("name") for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = [skip.get("message") for case in cases for skip in case.findall("skipped")]
    assert (bad, errors, violations) == ([], "", []), said[-6000:]
    assert len(cases) - len(skipped) >= at_least
    return {why or "" for why in skipped}


def test_what_knows_the_cards_runs_on_ten_of_them(rig, tmp_path):
    """The tests in the rig's own folder, and the one that holds the simulation's names to CuPy's.

    Two pairs of the cards do not reach each other, one of which says it does.
    """
    settings = {"RIG_DELAY_US": "20", "RIG_APART": "7-9", "RIG_FALSELY": "8-9", "CUDA_MODULE_LOADING": "EAGER"}
    names = "tests/cuda/test_fake.py::test_the_simulation_has_cupys_names_and_parameters"
    run_tests(rig, tmp_path, 10, ["tests/cuda/rig", names], 50, **settings)


def test_n_cards_equal_one_device(rig, tmp_path):
    """Tests of exactness that know nothing of GPUs."""
    files = [f"tests/exactness/{name}.py" for name in ("test_side_effects", "test_batch_norm")]
    settings = {"RIG_DELAY_US": "20", "FASTDP_VIRTUAL_KIND": "gpu", "CUDA_MODULE_LOADING": "EAGER"}
    run_tests(rig, tmp_path, 8, files, 40, CUDA_DEVICE_MAX_CONNECTIONS="32", **settings)


def test_a_call_of_a_captured_step_that_fails_leaves_no_step_half_done(rig, tmp_path):
    """Where queries of events are not held back: ranks wait for others that a failure has left out."""
    settings = {"RIG_DELAY_US": "20", "FASTDP_GPU_COMPUTE": "host", "FASTDP_GPU_SMALL": "1"}
    command = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", FAILING_CALLS]
    said, errors, violations = run_on(rig, tmp_path, 2, command, **settings)
    assert (errors, violations) == ("", []), said[-6000:]
    assert "8 passed" in said


HEAD = "import cupy, numpy as np, threading\nfrom cupy.cuda import driver, runtime as rt\n"


def said_by(rig: Path, scratch: Path, program: str, cards: int = 2, **more: str) -> list[str]:
    """The lines that a program prints on so many cards; it must do nothing that CUDA forbids."""
    said, errors, violations = run_on(rig, scratch, cards, ["-c", HEAD + program], **more)
    assert (errors, violations) == ("", []), said
    return said.splitlines()


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


STEP_GRAPH = """
import sys
from fastdp.buffers import ArraySpec, FlatBuffers
from fastdp.comm import algorithm
from fastdp.comm.cuda.communicator import CudaCommunicator
from fastdp.runtime import select
from fastdp.runtime.cuda import cupy_api
algorithm.ONE_SHOT_NBYTES = algorithm.TWO_SHOT_NBYTES = -1
devices = select.resolve(2)
comm = CudaCommunicator(devices, 20.0)
flats = [FlatBuffers([ArraySpec("g", (100,), "float32")], device) for device in devices]
buckets = flats[0].buckets()
print([comm.how(bucket) for bucket in buckets])
parts = []
for device, flat in zip(devices, flats):
    stream = device.compute.handle
    with cupy_api.on(device.ordinal):
        cupy_api.capture_begin(stream)
        cupy_api.fill_async(cupy_api.array_pointer(flat.views[0]), 0, 400, stream)
        parts.append([(cupy_api.capture_end(stream), [0])])
step = comm.step_graph(flats, buckets, parts, 20.0)
print(step.size)
"""


def test_a_process_with_graphs_that_hold_nccl_s_collectives_ends(rig, tmp_path):
    """Nobody destroys them before: NCCL waits for the graphs, for ever where they do not go first.

    From Python 3.12 on no thread starts at the end.
    """
    refuse = """
def refuse(thread):
    raise RuntimeError("can't create new thread at interpreter shutdown")
threading.Thread.start = refuse
"""
    said = said_by(rig, tmp_path, STEP_GRAPH + refuse, 2, CUDA_MODULE_LOADING="EAGER")
    assert said == ["['nccl']", "2"]


def test_a_graph_that_waits_for_another_gpu_s_for_good_is_aborted(rig, tmp_path):
    program = """
import time
from functools import partial
from fastdp.comm.rendezvous import Rendezvous
free, reduction, meeting = threading.Event(), step.begin(), Rendezvous(2, 20.0)
def block():
    cupy.cuda.get_current_stream().launch_host_func(lambda _: free.wait(100), None)
devices[1].compute.enqueue(block)
for rank, device in enumerate(devices):
    device.compute.enqueue(partial(reduction.launch, rank, meeting))
launched = devices[0].compute.record()
comm.finish(reduction)
launched.wait_issued(20.0)
time.sleep(0.3)
print(launched.done)
comm.abort()
launched.finish(20.0)
print(launched.done, step.broken, comm.cut_short)
free.set()
for device in devices:
    device.synchronize(20.0)
comm.recover()
print(comm.step_graph(flats, buckets, parts, 20.0).broken)
"""
    said = said_by(rig, tmp_path, STEP_GRAPH + program, 2, CUDA_MODULE_LOADING="EAGER")
    assert said[2:] == ["False", "True True 1", "False"]


def test_nccl_s_failures_come_through_cupy_as_errors_of_nccl(rig, tmp_path):
    program = """
from fastdp.runtime.cuda import cupy_api
comms = cupy_api.nccl_init_all([0, 1])
error = cupy_api.nccl_async_error(comms[0])
print(isinstance(error, cupy_api.NcclError), error)
for comm in comms:
    cupy_api.nccl_destroy(comm)
"""
    (line,) = said_by(rig, tmp_path, program, 2, RIG_NCCL_ERROR="8")
    assert line == "True NCCL_ERROR_TIMEOUT: code 8 of NCCL"


STUCK = """
import os, sys, time
sys.path.insert(0, "tests/gpu")
import engine_checks, fastdp
from fastdp.comm import algorithm
from fastdp.runtime import select
from fastdp.runtime.host.device import HostDevice
algorithm.ONE_SHOT_NBYTES = algorithm.TWO_SHOT_NBYTES = -1
select.EXIT_SECONDS = 0.2
free, hangs = threading.Event(), []
program = engine_checks.linear(engine_checks.through(cupy.asnumpy, cupy.asarray))
whole = program._train
def train(parameters, batch):
    result = whole(parameters, batch)
    if hangs and rt.getDevice() == 1:
        cupy.cuda.get_current_stream().launch_host_func(lambda _: free.wait(100), None)
    return result
program._train = train
devices, numbers = select.resolve(3), iter(range(100))
engine = fastdp.DataParallel(program, devices, timeout=20.0, check_replicas=True)
reference = fastdp.DataParallel(engine_checks.linear(), [HostDevice(0)], timeout=20.0)
def right():
    for _ in range(4):
        batch = engine_checks.rows(12, next(numbers))
        engine.train(batch), reference.train(batch)
    ours, theirs = engine.replicas[0].memory.variables, reference.replicas[0].memory.variables
    return np.allclose(devices[0].to_host(ours.buffers["float32"]), theirs.buffers["float32"], 1e-6, 1e-6)
def failed(limit=0.5):
    begin, engine.timeout = time.monotonic(), limit
    try:
        engine.train(engine_checks.rows(12))
    except (fastdp.DeviceTimeoutError, fastdp.ReplicaError) as error:
        print(str(error).splitlines()[0])
    engine.timeout = 20.0
    return time.monotonic() - begin < 15.0
def left():
    handles = [device.communication.handle for device in devices]
    for _ in range(500):
        if not any(map(rt.streamQuery, handles)):
            return True
        time.sleep(0.01)
print([engine._communicator.how(bucket) for bucket in engine.group.buckets], right())
"""
GIVEN_UP = {
    "refuses": "The replica on gpu:0 (rows 0 to 4 of the batch's 12) failed with RuntimeError: NCCL failed on gpu:0, "
    "gpu:1, gpu:2: NCCL_ERROR_UNHANDLED_CUDA_ERROR: an error of the tests' NCCL",
    "hangs": "The update took longer than timeout=0.5 seconds.",
}


@pytest.mark.parametrize("how", list(GIVEN_UP))
def test_a_collective_in_which_ranks_wait_for_good_is_aborted_and_the_next_steps_are_right(rig, tmp_path, how):
    """A launch fails on one rank, so that it never comes; or a link is broken."""
    program = f"""
os.environ["RIG_NCCL"] = "{how}"
print(failed(0.5 if "{how}" == "hangs" else 20.0), left())
del os.environ["RIG_NCCL"]
print(right())
"""
    said = said_by(rig, tmp_path, STUCK + program, 3, CUDA_MODULE_LOADING="EAGER")
    assert said == ["['nccl'] True", GIVEN_UP[how], "True True", "True"]


def test_a_gpu_that_holds_up_a_collective_is_named_and_the_process_ends(rig, tmp_path):
    """The first time it comes after the step's time is over, and the step is made all the same; then it never does."""
    program = """
hangs.append(True)
print(failed())
hangs.clear()
free.set()
reference.train(engine_checks.rows(12))
print(right())
free.clear()
hangs.append(True)
print(failed())
hangs.clear()
print(failed())
"""
    said, errors, violations = run_on(rig, tmp_path, 3, ["-c", HEAD + STUCK + program], CUDA_MODULE_LOADING="EAGER")
    late = "The all-reduce, which ['gpu:1'] did not come to, took longer than timeout=0.5 seconds."
    waiting = (
        "['gpu:1'] were not done with an earlier step within another timeout=0.5 seconds, and the other devices wait "
        "for them."
    )
    wanted = ["['nccl'] True", late, "True", "True", late, "True", waiting, "True"]
    assert (said.splitlines(), violations) == (wanted, []), errors
    assert [line.split(" did ")[0].split(" was ")[0] for line in errors.splitlines()] == [
        "fastdp: NCCL",
        *(f"fastdp: The worker of gpu:{i}" for i in range(3)),
    ]


def test_algorithms_are_measured_once_and_later_processes_sum_to_the_same_bits(rig, tmp_path):
    """`deterministic` goes by sizes alone."""
    program = """
import hashlib, sys
sys.path.insert(0, "tests/gpu")
import engine_checks, fastdp
from fastdp.comm import tuning
from fastdp.options import Options
from fastdp.runtime import select
measure, measured = tuning.measure, []
tuning.measure = lambda *arguments: measured.append(True) or measure(*arguments)
devices = select.resolve(3)
for deterministic in (False, True):
    program = engine_checks.linear(engine_checks.through(cupy.asnumpy, cupy.asarray))
    engine = fastdp.DataParallel(program, devices, options=Options(timeout=20.0, deterministic=deterministic))
    for number in range(3):
        engine.train(engine_checks.rows(12, number))
    weights = devices[0].to_host(engine.replicas[0].memory.variables.buffers["float32"])
    print(len(measured), engine._communicator.choice.limits, hashlib.sha256(weights.tobytes()).hexdigest())
"""
    shutil.copytree(rig / "cache", tmp_path / "cache", ignore=shutil.ignore_patterns("all-reduce"))
    settings = {"FASTDP_ALL_REDUCE": "measured", "FASTDP_CACHE_DIR": str(tmp_path / "cache")}
    settings["CUDA_MODULE_LOADING"] = "EAGER"
    first, fixed = said_by(rig, tmp_path, program, 3, **settings)
    later, fixed_later = said_by(rig, tmp_path, program, 3, **settings)
    assert first.startswith("1 Limits(one_shot=")
    assert later == "0" + first[1:]
    assert fixed.startswith("1 None ")
    assert fixed_later == "0" + fixed[1:]


def test_the_command_measures_all_algorithms_and_marks_those_that_are_used(rig, tmp_path):
    shutil.copytree(rig / "cache", tmp_path / "cache", ignore=shutil.ignore_patterns("all-reduce"))
    settings = {"FASTDP_ALL_REDUCE": "measured", "FASTDP_CACHE_DIR": str(tmp_path / "cache")}
    settings["CUDA_MODULE_LOADING"] = "EAGER"
    said, errors, violations = run_on(rig, tmp_path, 2, ["-m", "fastdp", "devices", "--measure"], **settings)
    assert (errors, violations) == ("", [])
    lines = said[said.index("all-reduce of float32 over 2 devices") :].splitlines()
    assert lines[1].split() == ["size", "one-shot", "two-shot", "nccl"]
    assert lines[2].split()[:2] == ["4", "KiB"]
    assert [line.count("*") for line in lines[2:-1]] == [1] * len(lines[2:-1])
    assert lines[-1].startswith("Kept for these devices")
    assert len(list((tmp_path / "cache" / "all-reduce").iterdir())) == 1


def test_measuring_that_fails_is_a_warning_and_the_next_steps_are_right(rig, tmp_path):
    program = """
import warnings
os.environ["RIG_NCCL"] = "refuses"
engine._communicator.choice._made = False
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    again = fastdp.DataParallel(program, devices, timeout=20.0)
print([str(one.message)[:55] for one in caught], engine._communicator.choice.limits)
del os.environ["RIG_NCCL"]
print(right())
"""
    settings = {"FASTDP_CACHE_DIR": str(tmp_path / "cache"), "CUDA_MODULE_LOADING": "EAGER"}
    shutil.copytree(rig / "cache", tmp_path / "cache", ignore=shutil.ignore_patterns("all-reduce"))
    said = said_by(rig, tmp_path, STUCK + program, 3, FASTDP_ALL_REDUCE="fixed", **settings)
    assert said[1:] == ["['What all-reduces take on these devices was not measured'] None", "True"]
    assert not list((tmp_path / "cache" / "all-reduce").iterdir())
