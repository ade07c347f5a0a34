"""What `fastdp devices` tells of a box, from a stand-in for NVML: links, and what is missing with its remedy."""

from __future__ import annotations

import ctypes.util
import importlib.metadata
import importlib.util
import re
from types import SimpleNamespace

import pynvml
import pytest

import fastdp
from fastdp.cli import main
from fastdp.runtime import topology


@pytest.fixture(autouse=True)
def _clean(monkeypatch):
    monkeypatch.delenv("FASTDP_VIRTUAL_DEVICES", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    fastdp.set_virtual_devices(0)


@pytest.fixture
def box(monkeypatch):
    """Three GPUs: 0 and 1 joined by four NVLinks, 2 behind a host bridge and without peer access."""
    facts = SimpleNamespace(cuda=13010, wheels={"cupy-cuda13x", "nvidia-nccl-cu13"}, torch=None)

    def p2p(a, b, what):
        joined = {a, b} == {0, 1}
        return 0 if joined else 5

    def nvlink(handle, link):
        if handle == 2 or link >= 4:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_INVALID_ARGUMENT)
        return 1

    def version(name):
        if name in facts.wheels:
            return "1"
        raise importlib.metadata.PackageNotFoundError(name)

    answers = {
        "nvmlInit": lambda: None,
        "nvmlShutdown": lambda: None,
        "nvmlDeviceGetCount": lambda: 3,
        "nvmlDeviceGetHandleByIndex": lambda i: i,
        "nvmlDeviceGetName": lambda h: f"card {h}",
        "nvmlDeviceGetUUID": lambda h: f"GPU-{h}",
        "nvmlDeviceGetPciInfo": lambda h: SimpleNamespace(busId=f"00000000:{0x3B + h:02X}:00.0".encode()),
        "nvmlDeviceGetMemoryInfo": lambda h: SimpleNamespace(total=80 << 30),
        "nvmlDeviceGetCudaComputeCapability": lambda h: (9, 0),
        "nvmlDeviceGetMaxPcieLinkGeneration": lambda h: 5,
        "nvmlDeviceGetMaxPcieLinkWidth": lambda h: 16,
        "nvmlDeviceGetNvLinkState": nvlink,
        "nvmlDeviceGetP2PStatus": p2p,
        "nvmlDeviceGetTopologyCommonAncestor": lambda a, b: 30,
        "nvmlSystemGetDriverVersion": lambda: b"580.1",
        "nvmlSystemGetCudaDriverVersion_v2": lambda: facts.cuda,
    }
    for name, answer in answers.items():
        monkeypatch.setattr(pynvml, name, answer)
    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(topology, "_torch_build", lambda: facts.torch)
    monkeypatch.setattr(topology, "_driver_bus_ids", lambda: facts.bus_ids)
    monkeypatch.delenv("CUDA_DEVICE_ORDER", raising=False)
    facts.bus_ids = None
    monkeypatch.setattr(ctypes.util, "find_library", lambda name: None)
    return facts


def no_driver(kind):
    def init():
        raise pynvml.NVMLError(kind)

    return init


def test_links_tell_nvlink_from_pcie_and_missing_peer_access(box):
    matrix = topology.peer_matrix(fastdp.devices())
    away = "PCIe host bridge, no peer access"
    assert matrix == [["", "NVLink", away], ["NVLink", "", away], [away, away, ""]]


def test_links_follow_the_order_of_cuda_visible_devices(box, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,0,1")
    assert topology.peer_matrix(fastdp.devices())[1][2] == "NVLink"


def test_the_command_prints_every_gpu_with_its_facts_and_links(box, capsys):
    assert main(["devices"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "0: card 0 (cuda, 80.0 GiB, compute capability 9.0, PCIe 5 x16, 4 NVLinks)"
    assert printed[2] == "2: card 2 (cuda, 80.0 GiB, compute capability 9.0, PCIe 5 x16)"
    assert "driver 580.1, CUDA 13.1" in printed
    assert "0 -> 1: NVLink" in printed
    assert topology.problems() == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cuda": 11080}, r"runs CUDA 11\.8 at most, and CuPy 14 needs 12\.0\. Update the driver"),
        ({"wheels": {"nvidia-nccl-cu13"}}, r"CuPy is not installed.*fastdp\[cuda13\]"),
        ({"wheels": {"nvidia-nccl-cu12"}, "cuda": 12040}, r"CuPy is not installed.*fastdp\[cuda12\]"),
        ({"cuda": 12080}, r"cupy-cuda13x is newer than the driver 580\.1 \(CUDA 12\)\. Install cupy-cuda12x"),
        ({"wheels": {"cupy-cuda13x"}}, r"libnccl is missing.*nvidia-nccl-cu13"),
    ],
)
def test_what_is_missing_is_named_with_its_remedy(box, change, message):
    vars(box).update(change)
    (problem,) = topology.problems()
    assert re.search(message, problem), problem


@pytest.mark.parametrize(
    ("order", "visible", "bus_ids", "names"),
    [
        (None, None, ["0000:3D:00.0", "0000:3b:00.0", "0000:3C:00.0"], ["card 2", "card 0", "card 1"]),
        ("FASTEST_FIRST", "0,2", ["0000:3D:00.0", "0000:3C:00.0"], ["card 2", "card 1"]),
        ("PCI_BUS_ID", "0,2", ["not asked"], ["card 0", "card 2"]),
        (None, "2,0", None, ["card 2", "card 0"]),
    ],
)
def test_gpus_are_named_in_cuda_s_order(box, monkeypatch, order, visible, bus_ids, names):
    """CUDA puts the fastest first, and its driver alone knows which they are."""
    box.bus_ids = bus_ids
    for name, value in (("CUDA_DEVICE_ORDER", order), ("CUDA_VISIBLE_DEVICES", visible)):
        if value is not None:
            monkeypatch.setenv(name, value)
    assert [device.name for device in topology.physical_devices()] == names


@pytest.mark.parametrize(
    ("cuda", "torch", "said"),
    [
        (12090, ("2.13.0", "13.0"), "torch 2.13.0 is built for CUDA 13.0, and the driver 580.1 runs CUDA 12.9 at most"),
        (13010, ("2.13.0+cpu", ""), "torch 2.13.0\\+cpu is built for the CPU"),
        (13010, ("2.13.0+cu126", "12.6"), None),
        (13010, None, None),
    ],
)
def test_a_torch_for_another_cuda_is_named(box, cuda, torch, said):
    box.cuda, box.torch = cuda, torch
    box.wheels = {"cupy-cuda12x" if cuda < 13000 else "cupy-cuda13x", "nvidia-nccl-cu12"}
    problems = topology.problems()
    assert len(problems) == (said is not None)
    line = rf"pip install --force-reinstall torch==2\.13\.0 --index-url \S+/{'cu126' if cuda < 13000 else 'cu130'}$"
    assert said is None or re.search(f"{said}.*{line}", problems[0])


@pytest.mark.parametrize(
    ("system", "line"),
    [
        ({"ID": "ubuntu", "ID_LIKE": "debian"}, "sudo ubuntu-drivers install"),
        ({"ID": "mint", "ID_LIKE": "ubuntu debian"}, "sudo ubuntu-drivers install"),
        ({"ID": "debian"}, "sudo apt install nvidia-driver"),
        ({"ID": "nixos"}, "https://www.nvidia.com/drivers"),
        (None, "https://www.nvidia.com/drivers"),
    ],
)
def test_a_missing_driver_comes_with_the_line_that_installs_it(monkeypatch, system, line):
    def release():
        if system is None:
            raise OSError
        return system

    def no_driver():
        raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    monkeypatch.setattr(topology.platform, "freedesktop_os_release", release)
    monkeypatch.setattr(pynvml, "nvmlInit", no_driver)
    (problem,) = topology.problems()
    assert line in problem
    assert "--gpus all" in problem


def test_the_build_of_torch_is_read_without_importing_it(monkeypatch, tmp_path):
    for text, built in (
        ("__version__ = '2.13.0+cpu'\ncuda: Optional[str] = None\n", ("2.13.0+cpu", "")),
        ("__version__ = '2.11.0'\ncuda: Optional[str] = '13.0'\nhip = None\n", ("2.11.0", "13.0")),
    ):
        (tmp_path / "version.py").write_text(text)
        spec = SimpleNamespace(origin=str(tmp_path / "__init__.py"))
        monkeypatch.setattr(importlib.util, "find_spec", lambda name, spec=spec: spec)
        assert topology._torch_build() == built
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert topology._torch_build() is None


def test_hidden_gpus_are_counted(box, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    (problem,) = topology.problems()
    assert problem.startswith("CUDA_VISIBLE_DEVICES='1' shows 1 of 3 GPUs")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (pynvml.NVML_ERROR_LIBRARY_NOT_FOUND, "No NVIDIA driver is installed"),
        (pynvml.NVML_ERROR_DRIVER_NOT_LOADED, "The NVIDIA driver does not answer"),
    ],
)
def test_without_a_driver_the_command_works_and_says_so(monkeypatch, capsys, error, message):
    monkeypatch.setattr(pynvml, "nvmlInit", no_driver(error))
    assert main(["devices"]) == 0
    printed = capsys.readouterr().out
    assert message in printed
    assert "FASTDP_VIRTUAL_DEVICES=4" in printed
    assert topology.driver() is None


def test_with_virtual_devices_missing_gpus_are_no_problem(monkeypatch, capsys):
    monkeypatch.setattr(pynvml, "nvmlInit", no_driver(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND))
    fastdp.set_virtual_devices(2)
    assert main(["devices"]) == 0
    first, second, *libraries = capsys.readouterr().out.splitlines()
    assert (first, second) == ("0: virtual:0 (virtual, host memory)", "1: virtual:1 (virtual, host memory)")
    assert all(line.startswith(("torch is not installed", "keras is not installed")) for line in libraries)
    fastdp.set_virtual_devices(0)
