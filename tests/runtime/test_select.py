"""`gpus=` turned into devices; how many virtual devices there are; what NVML and CUDA_VISIBLE_DEVICES show."""

from __future__ import annotations

import subprocess
import sys
import threading
from types import SimpleNamespace

import numpy as np
import pynvml
import pytest

import fastdp
from fastdp.runtime.select import resolve

devices_module = sys.modules["fastdp.runtime.select"]  # the attribute of this name is the function


@pytest.fixture(autouse=True)
def no_gpus(monkeypatch):
    """No GPU, whatever the machine has, and no virtual device afterwards."""
    monkeypatch.setattr(pynvml, "nvmlInit", _no_driver)
    monkeypatch.delenv("FASTDP_VIRTUAL_DEVICES", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(devices_module._default, "told", False)
    yield
    fastdp.set_virtual_devices(0)


def _no_driver():
    raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)


def names(gpus, minimum=2):
    return [device.name for device in resolve(gpus, minimum=minimum, caller="multi_gpu_model")]


@pytest.mark.parametrize(
    ("gpus", "expected"),
    [
        (None, [0, 1, 2, 3]),
        (0, [0, 1, 2, 3]),
        ([], [0, 1, 2, 3]),
        ((), [0, 1, 2, 3]),
        (range(0), [0, 1, 2, 3]),
        (2, [0, 1]),
        (4, [0, 1, 2, 3]),
        (np.int64(2), [0, 1]),
        ([1, 3], [1, 3]),
        ((3, 1), [3, 1]),
        (range(2), [0, 1]),
        (range(3, 0, -1), [3, 2, 1]),
        (np.array([0, 1]), [0, 1]),
        (np.array([3, 0], np.uint8), [3, 0]),
        ([np.int32(2), 0], [2, 0]),
    ],
)
def test_gpus_names_these_devices_in_this_order(gpus, expected):
    fastdp.set_virtual_devices(4)
    assert names(gpus) == [f"virtual:{i}" for i in expected]


ALL_WRONG = [
    (1, r"gpus >= 2.*1 of 4.*Received: gpus=1"),
    (-3, r"gpus=-3"),
    (True, r"whole number.*gpus=True \(of type bool\)"),
    ([0], r"at least 2 devices.*gpus=\[0\]"),
    ((0,), r"at least 2 devices.*gpus=\(0,\)"),
    ([0, 0], r"each device once.*set_virtual_devices.*gpus=\[0, 0\]"),
    ([0, 7], r"wants the devices \[0, 7\].*has 4.*'virtual:3'.*from 0 to 3"),
    ([-1, 0], r"wants the devices \[-1, 0\].*has 4"),
    (8, r"gpus=8 wants the devices \[0, 1, 2, 3, 4, 5, 6, 7\].*has 4.*'virtual:3'.*fewer devices"),
    (10**12, r"wants the devices \[0, 1,.*\.\.\.\].*has 4"),
    (range(10**12), r"wants the devices \[0, 1,.*\.\.\.\].*has 4"),
    (2.0, r"whole number.*gpus=2\.0 \(of type float\)"),
    ("2", r"whole number.*gpus='2' \(of type str\)"),
    ("01", r"whole number.*gpus='01'"),
    ({0, 1}, r"list of device ordinals.*gpus=\{0, 1\} \(of type set\)"),
    ({0: 1, 1: 0}, r"of type dict"),
    (np.array([0.0, 1.0]), r"whole number.*of type ndarray"),
    (np.array([True, False]), r"whole number.*of type ndarray"),
    (np.array([[0, 1], [2, 3]]), r"whole number.*of type ndarray"),
    (np.array(2), r"whole number.*of type ndarray"),
    ([0, 1.0], r"whole number.*gpus=\[0, 1\.0\]"),
    ([True, 0], r"whole number.*gpus=\[True, 0\]"),
    ([[0], [1]], r"whole number"),
]


@pytest.mark.parametrize(("gpus", "message"), ALL_WRONG, ids=[repr(gpus) for gpus, _ in ALL_WRONG])
def test_wrong_gpus_is_a_value_error_that_says_what_came_and_what_is_there(gpus, message):
    fastdp.set_virtual_devices(4)
    with pytest.raises(ValueError, match=f"(?s){message}"):
        names(gpus)


@pytest.mark.parametrize(
    "gpus", [None, 0, [], (), 1, 2, 8, [0], [0, 1], [0, 7], np.int64(2), range(2), np.array([0, 1])]
)
def test_without_devices_the_message_says_so_and_offers_virtual_ones(gpus):
    with pytest.raises(ValueError, match=r"multi_gpu_model.*no visible NVIDIA GPU.*set_virtual_devices\(n\)"):
        names(gpus)


@pytest.mark.parametrize("gpus", [True, -3, 2.0, "2", {0, 1}])
def test_without_devices_a_wrong_type_is_still_a_value_error(gpus):
    with pytest.raises(ValueError, match="gpus="):
        names(gpus)


@pytest.mark.parametrize("gpus", [None, 0, [], 1, [0]])
def test_one_device_is_too_few_and_the_message_counts_it(gpus):
    fastdp.set_virtual_devices(1)
    with pytest.raises(ValueError, match=r"gpus >= 2.*1 of 1 available.*set_virtual_devices"):
        names(gpus)


@pytest.mark.parametrize("gpus", [None, 0, 1, [0]])
def test_wrap_takes_one_device(gpus):
    fastdp.set_virtual_devices(1)
    assert names(gpus, minimum=1) == ["virtual:0"]


@pytest.mark.parametrize("count", [-1, 2.0, "2", None, True, [2], np.array(2), 1025, 10**20])
def test_a_count_that_is_no_whole_number_is_refused(count):
    fastdp.set_virtual_devices(2)
    with pytest.raises(ValueError, match=r"`count` must be a whole number from 0 to 1024\. Received: count="):
        fastdp.set_virtual_devices(count)
    assert len(fastdp.devices()) == 2


def test_devices_that_stay_are_kept_and_those_dropped_refuse_work():
    fastdp.set_virtual_devices(3)
    first, _, third = resolve(None)
    third.compute.record().synchronize(5)
    fastdp.set_virtual_devices(1)
    assert resolve(None) == [first]
    first.compute.record().synchronize(5)
    with pytest.raises(RuntimeError, match=r"virtual:2 is closed.*Wrap the model again"):
        third.compute.enqueue(print)
    fastdp.set_virtual_devices(3)
    assert resolve(None)[0] is first
    assert resolve(None)[2] is not third


def test_dropping_devices_ends_their_threads():
    fastdp.set_virtual_devices(3)
    for device in resolve(None):
        device.compute.enqueue(lambda: None)  # an event alone needs no worker
        device.synchronize(5)
    alive = lambda: {t.name for t in threading.enumerate()} & {f"fastdp-virtual:{i}" for i in range(3)}  # noqa: E731
    assert len(alive()) == 3
    fastdp.set_virtual_devices(0)
    assert alive() == set()


def test_the_environment_asks_for_virtual_devices_until_a_call_does(monkeypatch):
    monkeypatch.setattr(devices_module, "_virtual", devices_module._VirtualDevices())
    monkeypatch.setenv("FASTDP_VIRTUAL_DEVICES", " 3 ")
    assert [device.name for device in fastdp.devices()] == ["virtual:0", "virtual:1", "virtual:2"]
    assert {device.kind for device in fastdp.devices()} == {"virtual"}
    fastdp.set_virtual_devices(1)
    assert len(fastdp.devices()) == 1
    fastdp.set_virtual_devices(0)
    assert fastdp.devices() == []


@pytest.mark.parametrize("text", ["", " ", "0"])
def test_an_environment_variable_without_a_count_asks_for_none(monkeypatch, text):
    monkeypatch.setattr(devices_module, "_virtual", devices_module._VirtualDevices())
    monkeypatch.setenv("FASTDP_VIRTUAL_DEVICES", text)
    assert fastdp.devices() == []


@pytest.mark.parametrize("text", ["two", "-1", "2.0", "1e1", "²"])
def test_a_bad_environment_variable_is_a_value_error_that_names_it(monkeypatch, text):
    monkeypatch.setattr(devices_module, "_virtual", devices_module._VirtualDevices())
    monkeypatch.setenv("FASTDP_VIRTUAL_DEVICES", text)
    with pytest.raises(ValueError, match="FASTDP_VIRTUAL_DEVICES must be a whole number"):
        fastdp.devices()


UUIDS = ["GPU-aa11", "GPU-aa22", "GPU-bb33", "GPU-cc44"]


@pytest.fixture
def four_gpus(monkeypatch):
    """NVML of a box with four GPUs; the last cannot tell its memory."""

    def memory(handle):
        if handle == 3:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return SimpleNamespace(total=(handle + 1) << 30)

    closed = []
    monkeypatch.setattr(pynvml, "nvmlInit", lambda: None)
    monkeypatch.setattr(pynvml, "nvmlShutdown", lambda: closed.append(True))
    monkeypatch.setattr(pynvml, "nvmlDeviceGetCount", lambda: 4)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByIndex", lambda i: i)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetName", lambda h: f"card {h}" if h % 2 else f"card {h}".encode())
    monkeypatch.setattr(pynvml, "nvmlDeviceGetMemoryInfo", memory)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetUUID", UUIDS.__getitem__)
    yield
    assert closed


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, [0, 1, 2, 3]),
        ("0,1,2,3", [0, 1, 2, 3]),
        ("2", [2]),
        ("3,1", [3, 1]),
        (" 1 , 0 ", [1, 0]),
        ("", []),
        ("-1", []),
        ("none", []),
        ("NoDevFiles", []),
        ("0,-1,1", [0]),
        ("0,9,1", [0]),
        ("1,x,0", [1]),
        ("1,,0", [1]),
        ("GPU-bb33,GPU-aa11", [2, 0]),
        ("GPU-c", [3]),
        ("GPU-aa", []),  # names two
        ("GPU-zz,0", []),
    ],
)
def test_cuda_visible_devices_selects_and_orders_the_gpus(four_gpus, monkeypatch, text, expected):
    if text is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", text)
    found = fastdp.devices()
    assert [device.name for device in found] == [f"card {i}" for i in expected]
    assert [device.index for device in found] == list(range(len(expected)))
    assert [device.memory_nbytes for device in found] == [[1 << 30, 2 << 30, 3 << 30, 0][i] for i in expected]
    assert {device.kind for device in found} <= {"cuda"}


@pytest.mark.parametrize("count", [1, 2, 7])
def test_each_part_of_a_gpu_counts_as_one_device(four_gpus, monkeypatch, count):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", ",".join(f"MIG-{i}" for i in range(count)))
    assert len(fastdp.devices()) == count


def test_virtual_devices_hide_the_gpus_that_are_there(four_gpus):
    fastdp.set_virtual_devices(2)
    assert [device.kind for device in fastdp.devices()] == ["virtual", "virtual"]
    fastdp.set_virtual_devices(0)
    assert len(fastdp.devices()) == 4


def test_at_the_end_collectives_are_closed_before_the_devices():
    code = """
import sys, types, fastdp
from fastdp.runtime import select
sys.modules["fastdp.comm.cuda.at_exit"] = types.SimpleNamespace(close=lambda seconds: print("collectives"))
select._gpus._devices[0] = types.SimpleNamespace(
    begin_close=lambda: None, close=lambda seconds: print("device"), unsettled=False, parts=()
)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.split() == ["collectives", "device"]


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


def test_auto_is_all_devices_where_there_are_any(capsys):
    fastdp.set_virtual_devices(3)
    assert names("auto", minimum=1) == ["virtual:0", "virtual:1", "virtual:2"]
    assert capsys.readouterr().err == ""


def test_auto_without_devices_is_one_on_the_cpu_and_one_line_says_so(capsys):
    first, again = resolve("auto"), resolve("auto")
    assert [device.name for device in first] == ["cpu:0"]
    assert first == again
    assert fastdp.devices() == []  # it is not one that `gpus=` counts
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("fastdp: no GPU is visible, so fastdp.wrap runs on one device on the CPU")
    assert "`fastdp devices` says what is missing" in line
    with pytest.raises(ValueError, match="no visible NVIDIA GPU"):
        resolve(2)


def test_closing_all_virtual_devices_closes_the_one_on_the_cpu():
    (device,) = resolve("auto")
    device.compute.enqueue(lambda: None)
    device.synchronize(5)
    fastdp.set_virtual_devices(0)
    with pytest.raises(RuntimeError, match="cpu:0 is closed"):
        device.compute.enqueue(print)
    assert resolve("auto")[0] is not device


def test_where_two_devices_are_needed_auto_is_no_number_of_them():
    fastdp.set_virtual_devices(2)
    with pytest.raises(ValueError, match=r"gpus='auto'"):
        names("auto")


def test_a_default_of_auto_is_all_devices_where_two_are_needed():
    devices_module.set_default_devices("auto")
    try:
        assert [device.name for device in resolve(None)] == ["cpu:0"]
        with pytest.raises(ValueError, match="no visible NVIDIA GPU"):
            names(None)
        fastdp.set_virtual_devices(2)
        assert names(None) == ["virtual:0", "virtual:1"]
    finally:
        devices_module.set_default_devices(None)


@pytest.mark.parametrize(("gpus", "left"), [(4, [0, 1]), ([0, 3], [0]), (2, [0, 1])])
def test_a_script_that_was_started_again_goes_on_with_the_devices_that_are_left(monkeypatch, recwarn, gpus, left):
    fastdp.set_virtual_devices(2)
    try:
        monkeypatch.setenv("_FASTDP_RESTARTED", "1")
        assert [device.index for device in resolve(gpus)] == left
        assert len(recwarn) == (gpus != 2)
        monkeypatch.setenv("_FASTDP_RESTARTED", "0")
        if gpus != 2:
            with pytest.raises(ValueError, match="this machine has 2"):
                resolve(gpus)
    finally:
        fastdp.set_virtual_devices(0)
