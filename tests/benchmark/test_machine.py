"""What is told of the machine: noise from an idle loop, utilization and energy from a stand-in for NVML."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pynvml
import pytest

from fastdp.benchmark import machine, noise
from fastdp.benchmark.machine import Meter


@pytest.fixture
def nvml(monkeypatch):
    """Two GPUs at 100 and 300 watts, of which the second is half busy, and the order of the calls."""
    facts = SimpleNamespace(calls=[], energy=True, rates=True)

    def answer(name, value):
        def call(*arguments):
            facts.calls.append((name, *arguments))
            return value(*arguments)

        monkeypatch.setattr(pynvml, name, call)

    def energy(handle):
        if not facts.energy:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return time.perf_counter() * 1000 * (100, 300)[handle - 5]

    def rates(handle):
        if not facts.rates:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return SimpleNamespace(gpu=(100, 50)[handle - 5])

    answer("nvmlInit", lambda: None)
    answer("nvmlShutdown", lambda: None)
    answer("nvmlDeviceGetHandleByIndex", lambda ordinal: ordinal)
    answer("nvmlDeviceGetTotalEnergyConsumption", energy)
    answer("nvmlDeviceGetUtilizationRates", rates)
    cards = [SimpleNamespace(physical=ordinal) for ordinal in (5, 6)]
    monkeypatch.setattr(machine, "physical_devices", lambda: cards)
    monkeypatch.setattr(machine, "POLL_SECONDS", 0.01)
    return facts


def measured(gpus):
    began = time.perf_counter()
    with Meter(gpus) as meter:
        time.sleep(0.1)
    return meter, time.perf_counter() - began


def test_energy_and_utilization_of_the_gpus_in_use(nvml):
    meter, seconds = measured(2)
    assert 0.1 * 400 <= meter.joules <= seconds * 400
    assert meter.utilization == [1.0, 0.5]
    assert ("nvmlDeviceGetHandleByIndex", 5) in nvml.calls
    assert nvml.calls[-1] == ("nvmlShutdown",)
    assert measured(1)[0].utilization == [1.0]


def test_a_gpu_that_does_not_tell_leaves_the_figure_out(nvml):
    nvml.energy = False
    meter, _ = measured(2)
    assert (meter.joules, meter.utilization) == (None, [1.0, 0.5])
    nvml.energy, nvml.rates = True, False
    meter, _ = measured(2)
    assert meter.joules > 0
    assert meter.utilization is None


def test_without_gpus_nvml_is_not_asked(nvml):
    meter, _ = measured(0)
    assert (meter.joules, meter.utilization, nvml.calls) == (None, None, [])


def test_the_machine_has_a_processor_and_versions():
    found = machine.machine()
    assert found["cpu"]
    assert found["cores"] >= 1
    assert machine.versions()["fastdp"]
    assert 0 < machine.free_nbytes() <= machine.memory_nbytes()


class Quiet(noise.Noise):
    """A machine whose idle loop takes these seconds, with so many cores busy."""

    def __init__(self, seconds, busy=0.0):
        super().__init__()
        self._seconds, self._busy_cores = seconds, busy

    @property
    def busy_cores(self):
        return self._busy_cores


def test_a_quiet_machine_and_a_noisy_one(monkeypatch):
    quiet = Quiet([0.010, 0.010, 0.0101, 0.010]).result()
    assert quiet["verdict"] == "quiet"
    assert quiet["idle_loop"]["median_seconds"] == 0.01
    noisy = Quiet([0.010, 0.012, 0.020, 0.010]).result()
    assert noisy["verdict"].startswith("noisy: the same work takes")
    monkeypatch.setattr(noise.os, "cpu_count", lambda: 8)
    assert "other programs keep 1.5 of 8 cores busy" in Quiet([0.01], busy=1.5).result()["verdict"]


def test_the_cores_that_others_keep_busy_are_told_apart_from_the_loop_s_own(monkeypatch):
    ticks = iter([(100.0, 1000.0), (108.0, 1020.0)])  # 20 ticks of 2 cores: 8 busy, of which the loop's own are 5
    own = iter([1.0, 1.05])
    monkeypatch.setattr(noise.os, "cpu_count", lambda: 2)
    monkeypatch.setattr(noise.os, "sysconf", lambda name: 100)
    found = noise.Noise()
    monkeypatch.setattr(noise, "_ticks", lambda: next(ticks))
    monkeypatch.setattr(noise, "_own_seconds", lambda: next(own))
    found.sample()
    assert found.busy_cores == pytest.approx(2 * 3 / 20)
