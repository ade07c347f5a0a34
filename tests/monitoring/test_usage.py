"""Memory of the process, and utilization and memory of GPUs by NVML."""

from __future__ import annotations

import mmap

import pynvml
import pytest

from fastdp.engine.report import CardReport, DeviceReport, Report
from fastdp.monitoring import usage
from fastdp.monitoring.devices import DeviceMeter, DeviceUsage, memory_mb
from fastdp.monitoring.usage import CardMeter, host_nbytes
from fastdp.runtime.topology import DeviceInfo


def test_the_memory_of_the_process_grows_with_it():
    before = host_nbytes()
    with mmap.mmap(-1, 64 << 20) as kept:  # not from the heap, which may have room for it
        kept[:: 1 << 10] = b"1" * len(kept[:: 1 << 10])
        assert before > 1 << 20
        assert host_nbytes() - before > 48 << 20


@pytest.fixture
def nvml(monkeypatch):
    """Two GPUs; the process sees them in the other order. Returns the number of users of NVML."""
    users = [0]
    monkeypatch.setattr(
        usage,
        "physical_devices",
        lambda: [DeviceInfo(0, "b", "cuda", physical=1), DeviceInfo(1, "a", "cuda", physical=0)],
    )

    def use(change):
        users[0] += change

    class Memory:
        used = 3_000_000_000

    class Rates:
        def __init__(self, gpu):
            self.gpu = gpu

    def rates(handle):
        if handle == 0:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return Rates(87)

    monkeypatch.setattr(pynvml, "nvmlInit", lambda: use(1))
    monkeypatch.setattr(pynvml, "nvmlShutdown", lambda: use(-1))
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByIndex", lambda index: index)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetUtilizationRates", rates)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetMemoryInfo", lambda handle: Memory)
    return users


def test_nvml_is_asked_for_the_gpu_that_cuda_means_and_let_go(nvml):
    meter = CardMeter([0, 1])
    assert nvml == [1]
    found = meter.read()
    assert (found[0].utilization, found[0].nbytes) == (0.87, 3_000_000_000)
    assert found[1].utilization is None
    meter.close()
    meter.close()
    assert nvml == [0]
    del meter
    assert nvml == [0]
    CardMeter([0])
    assert nvml == [0]  # gone with the meter


def test_without_gpus_nvml_is_left_alone(nvml):
    assert CardMeter([]).read() == {}
    assert nvml == [0]


def device(name, *, compute=0.0, peak=None):
    seconds = {"scatter": 0.1, "compute": compute, "merge": 0.0, "wait": 0.2, "communication": 0.1, "update": 0.1}
    return DeviceReport(name, 4, seconds, {"variables": 1000, "gradients": 500}, peak)


def test_devices_on_gpus_are_those_of_nvml(nvml):
    cards = [CardReport("cuda:0", ["cuda:0"], 1, 2, 3), CardReport("cuda:1", ["cuda:1"], 1, 2, 3)]
    report = Report([], [device("cuda:0", peak=3), device("cuda:1", peak=3)], cards=cards, timed=3, step_seconds=1.0)
    meter = DeviceMeter(lambda: report)
    first, second = meter.read()
    assert first == DeviceUsage("cuda:0", 3_000_000_000, 0.87, True)
    assert second == DeviceUsage("cuda:1", 3_000_000_000, None, True)
    assert memory_mb([first, second]) == 3000.0
    meter.close()
    assert nvml == [0]


def test_a_virtual_device_is_busy_while_its_worker_computes_and_updates():
    report = Report(
        [], [device("virtual:0", compute=0.5), device("virtual:1")], timed=3, step_seconds=1.0, between_seconds=1.0
    )
    first, second = DeviceMeter(lambda: report).read()
    assert first == DeviceUsage("virtual:0", 1500, pytest.approx(0.3))
    assert second.utilization == pytest.approx(0.05)
    assert memory_mb([first, second]) == pytest.approx(host_nbytes() / 1e6, rel=0.2)


def test_before_the_first_step_there_is_nothing_to_read():
    assert DeviceMeter(lambda: None).read() == []
    (found,) = DeviceMeter(lambda: Report([], [device("virtual:0")])).read()
    assert found.utilization is None
