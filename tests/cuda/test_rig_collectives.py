"""Collectives and graphs that fail, hang or are measured, on the cards of tests/cuda/rig."""

from __future__ import annotations

import shutil

import pytest
from rig_runs import HEAD, run_on, said_by

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
    shutil.copytree(rig.folder / "cache", tmp_path / "cache", ignore=shutil.ignore_patterns("all-reduce"))
    settings = {"FASTDP_ALL_REDUCE": "measured", "FASTDP_CACHE_DIR": str(tmp_path / "cache")}
    settings["CUDA_MODULE_LOADING"] = "EAGER"
    first, fixed = said_by(rig, tmp_path, program, 3, **settings)
    later, fixed_later = said_by(rig, tmp_path, program, 3, **settings)
    assert first.startswith("1 Limits(one_shot=")
    assert later == "0" + first[1:]
    assert fixed.startswith("1 None ")
    assert fixed_later == "0" + fixed[1:]


def test_the_command_measures_all_algorithms_and_marks_those_that_are_used(rig, tmp_path):
    shutil.copytree(rig.folder / "cache", tmp_path / "cache", ignore=shutil.ignore_patterns("all-reduce"))
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
    shutil.copytree(rig.folder / "cache", tmp_path / "cache", ignore=shutil.ignore_patterns("all-reduce"))
    said = said_by(rig, tmp_path, STUCK + program, 3, FASTDP_ALL_REDUCE="fixed", **settings)
    assert said[1:] == ["['What all-reduces take on these devices was not measured'] None", "True"]
    assert not list((tmp_path / "cache" / "all-reduce").iterdir())
