"""The peak of each GPU's memory in `report()`, held to what the simulated CUDA has given out."""

from __future__ import annotations

import csv
import gc

import keras
import numpy as np
import pynvml
import pytest
import torch
from test_placed_on_gpus import shared_lstm

from fastdp.callbacks import Monitor, TensorBoard
from fastdp.keras.parallel_model import ParallelModel
from fastdp.monitoring import usage
from fastdp.options import Options
from fastdp.runtime.host.device import HostDevice
from fastdp.runtime.topology import DeviceInfo
from fastdp.tensors.arrays import peak_nbytes
from fastdp.torch.parallel_module import TorchParallel

LIMIT = 30.0


@pytest.fixture
def box(gpus, monkeypatch):
    """Two GPUs, and the most memory that was allocated on each."""
    made = gpus(2)
    made.peaks = [0, 0]
    allocate = made.sim.allocate

    def allocating(nbytes, *, pinned):
        address = allocate(nbytes, pinned=pinned)
        for card in (0, 1):
            used = sum(a.nbytes for a in made.sim.memory.alive() if a.device == card)
            made.peaks[card] = max(made.peaks[card], used)
        return address

    monkeypatch.setattr(made.sim, "allocate", allocating)
    return made


def trained(devices):
    # More than the patterns that links between cards are tried with at the beginning.
    model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(20000), keras.layers.Dense(1)])
    parallel = ParallelModel(model, devices, Options(timeout=LIMIT))
    parallel.compile("adam", "mse")
    parallel.fit(np.ones((30, 8), "float32"), np.ones((30, 1), "float32"), batch_size=10, verbose=0)
    return parallel


def test_the_peak_is_what_cuda_gave_out_at_most(box):
    report = trained(box.devices(2)).report()
    assert [card.name for card in report.cards] == ["cuda:0", "cuda:1"]
    assert [card.engine_nbytes for card in report.cards] == box.peaks
    assert [device.peak_nbytes for device in report.devices] == box.peaks
    for device, peak in zip(report.devices, box.peaks, strict=True):
        assert peak >= device.nbytes["variables"] + device.nbytes["gradients"] + device.nbytes["slots"]
    assert "share its figure" not in str(report)


def test_virtual_gpus_of_one_card_share_its_figure_and_the_report_says_so(box):
    report = trained(box.devices(4)).report()
    assert [card.devices for card in report.cards] == [["virtual:0", "virtual:2"], ["virtual:1", "virtual:3"]]
    assert [card.engine_nbytes for card in report.cards] == box.peaks
    assert [device.peak_nbytes for device in report.devices] == [*box.peaks, *box.peaks]
    text = str(report)
    assert "Devices on one GPU share its figure." in text
    (row,) = [line for line in text.splitlines() if line.split()[:1] == ["cuda:1"]]
    assert row.split()[1:3] == ["virtual:1", "virtual:3"]
    assert float(row.split()[-1]) == pytest.approx(box.peaks[1] / 1e6, abs=0.06)


def test_memory_that_was_freed_stays_in_the_peak(box):
    (device,) = box.devices(1)
    array = device.empty((1 << 20,), np.dtype("uint8"))
    before = device.peak_nbytes
    assert before == box.peaks[0]
    del array
    gc.collect()
    device.arena.trim()
    small = device.empty((1 << 10,), np.dtype("uint8"))
    assert device.peak_nbytes == before == box.peaks[0]
    assert small.nbytes == 1 << 10


def test_torchs_part_is_added_on_its_card(box, monkeypatch):
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", {"cuda:0": 5_000_000, "cuda:1": 7_000_000}.__getitem__)
    devices = box.devices(2)
    parallel = trained(devices)
    dp = TorchParallel(torch.nn.Linear(8, 1), devices, Options(timeout=LIMIT))
    step = dp.train_step(torch.nn.MSELoss(), torch.optim.Adam)
    step(torch.ones(6, 8), torch.ones(6, 1))
    for device in devices:
        monkeypatch.setattr(device, "torch_device", f"cuda:{device.ordinal}")
    for model in (parallel, dp):
        report = model.report()
        assert [card.library_nbytes for card in report.cards] == [5_000_000, 7_000_000]
        assert [card.peak_nbytes - card.engine_nbytes for card in report.cards] == [5_000_000, 7_000_000]
        assert report.to_dict()["cards"][1]["library_nbytes"] == 7_000_000
        assert [device.peak_nbytes for device in report.devices] == [card.peak_nbytes for card in report.cards]


def test_a_gpu_that_only_placed_layers_use_is_there_too(box):
    devices = box.devices(2)
    groups = (tuple(devices),)
    parallel = ParallelModel(shared_lstm(), devices[:1], Options(timeout=LIMIT), device_groups=groups)
    parallel.predict([np.ones((2, 5, 3), "float32")] * 2, verbose=0)
    assert [card.devices for card in parallel.report().cards] == [["gpu:0"], ["gpu:1"]]


def test_in_host_memory_torch_has_no_gpu_to_ask():
    assert peak_nbytes(HostDevice(0)) == 0


class Nvml:
    """The calls of NVML that a monitor makes, of two GPUs at work."""

    users = 0
    gpu, used = 60, 4_000_000_000  # per cent and bytes

    def __init__(self, monkeypatch):
        monkeypatch.setattr(
            usage, "physical_devices", lambda: [DeviceInfo(i, "gpu", "cuda", physical=i) for i in range(2)]
        )
        for name, call in {
            "nvmlInit": lambda: self.use(1),
            "nvmlShutdown": lambda: self.use(-1),
            "nvmlDeviceGetHandleByIndex": lambda index: index,
            "nvmlDeviceGetUtilizationRates": lambda handle: self,
            "nvmlDeviceGetMemoryInfo": lambda handle: self,
        }.items():
            monkeypatch.setattr(pynvml, name, call)

    def use(self, change):
        self.users += change


def test_a_monitor_reads_each_gpu_and_changes_nothing(box, monkeypatch, tmp_path):
    nvml = Nvml(monkeypatch)
    monkeypatch.chdir(tmp_path)

    def weights(*callbacks):
        keras.utils.set_random_seed(2)
        model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(6), keras.layers.Dense(1)])
        parallel = ParallelModel(model, box.devices(2), Options(timeout=LIMIT, compile=None))
        parallel.compile("sgd", "mse")
        assert parallel.fetch_ahead
        x = np.arange(240, dtype="float32").reshape(30, 8) / 240
        history = parallel.fit(x, x[:, :1], batch_size=10, epochs=2, verbose=0, callbacks=[*callbacks]).history
        return model.get_weights(), history

    wanted, _ = weights()
    found, history = weights(Monitor("watched.csv", every=2, interval=0), TensorBoard("logs", histogram_freq=1))
    for one, other in zip(wanted, found, strict=True):
        np.testing.assert_array_equal(one, other)
    assert nvml.users == 0
    assert history["utilization_0"] == history["utilization_1"] == [0.6, 0.6]
    assert history["memory_mb"] == [4000.0, 4000.0]
    rows = list(csv.DictReader((tmp_path / "watched.csv").read_text().splitlines()))
    assert [row["step"] for row in rows] == ["2", "3", "4", "6", "6"]
    assert {row["memory_mb_1"] for row in rows} == {"4000.0"}
