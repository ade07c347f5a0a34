"""Tensors that go from GPU to GPU: in which order of streams, and how long their memory lives. On fake CUDA tensors."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fastdp.tensors import device_copies

FIRST, SECOND = SimpleNamespace(torch_device="cuda:0"), SimpleNamespace(torch_device="cuda:1")


class Stream:
    """Notes what it is asked for."""

    def __init__(self, name, said):
        self.name, self.said = name, said

    def wait_stream(self, other):
        self.said.append(f"{self.name} waits for {other.name}")

    def __enter__(self):
        self.said.append(f"on {self.name}")

    def __exit__(self, *_):
        self.said.append(f"off {self.name}")


@pytest.fixture
def said(monkeypatch):
    """What is asked of torch's streams and its allocator, in order."""
    said = []
    monkeypatch.setattr(device_copies, "_lanes", SimpleNamespace())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream(f"compute of {device}", said))
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream(f"lane of {device}", said))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: said.append(f"kept for {stream.name}"))
    to = torch.Tensor.to

    def copy(tensor, *args, **kwargs):
        said.append(f"copy to {args[0]}")
        return to(tensor, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "to", copy)
    with FakeTensorMode():
        yield said


def test_a_copy_takes_a_lane_between_the_two_waits_and_its_source_is_kept(said):
    value = torch.empty(3, device="cuda:0")
    made = device_copies.arrived(value, SECOND)
    assert made.device == torch.device("cuda:1")
    assert said == [
        "lane of cuda:0 waits for compute of cuda:1",
        "on lane of cuda:0",
        "copy to cuda:1",
        "off lane of cuda:0",
        "compute of cuda:1 waits for lane of cuda:0",
        "kept for lane of cuda:0",
    ]


def test_a_lane_is_made_once(said, monkeypatch):
    made, stream = [], torch.cuda.Stream
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: made.append(device) or stream(device))
    for device in ("cuda:0", "cuda:0", "cuda:2"):
        device_copies.arrived(torch.empty(3, device=device), SECOND)
    assert made == [torch.device("cuda:0"), torch.device("cuda:2")]


def test_on_the_same_card_nothing_is_copied_and_memory_is_kept_for_the_other_stream(said):
    value = torch.empty(3, device="cuda:1")
    assert device_copies.arrived(value, SECOND) is value
    assert said == ["kept for compute of cuda:1"]


def test_what_is_on_the_host_is_copied_by_the_gpu_that_takes_it(said):
    assert device_copies.arrived(torch.empty(3), FIRST).device == torch.device("cuda:0")
    assert said == ["copy to cuda:0"]


def test_in_host_memory_nothing_is_copied():
    value = torch.ones(3, requires_grad=True)
    assert device_copies.arrived(value, SimpleNamespace(torch_device="cpu")) is value
