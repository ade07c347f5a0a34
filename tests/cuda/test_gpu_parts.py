"""bench/gpu_parts.py runs to its end on the simulated CUDA: its calls are right; its figures mean nothing there."""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path

import pytest
from gpus import Gpus

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))

import gpu_parts

LIMIT = 20.0


@pytest.fixture
def box(fake_cuda, monkeypatch):
    one = Gpus(fake_cuda(1), monkeypatch)
    yield one
    gc.collect()
    for device in one.made:
        device.close(LIMIT)
    gc.collect()
    for device in one.made:
        device.arena.trim()
        device.pinned.close()


@pytest.fixture
def lines(tmp_path, monkeypatch):
    log = tmp_path / "log.jsonl"
    monkeypatch.setenv("FASTDP_GPU_LOG", str(log))
    return lambda: [json.loads(line) for line in log.read_text().splitlines()]


def test_kernels_transfers_and_launches(box, lines):
    (device,) = box.devices(1)
    card = gpu_parts.Card(device, gpu_parts.WallClock, rounds=2)
    gpu_parts.kernels(card, 12_288)
    gpu_parts.transfers(card, 12_288)
    gpu_parts.launches(card, 40)
    card.close()
    found = {line["what"]: line for line in lines()}
    named = {
        "copy",
        "slice_rows shuffled",
        "concat_rows",
        "fused_adam",
        "l2_norm",
        "pinned to card",
        "take_rows (wall)",
    }
    assert named <= set(found)
    assert found["copy"]["of_copy"] == 1.0
    assert all(line["GBps"]["median"] > 0 for line in found.values() if "GBps" in line)
    assert found["host time: a graph of 100 kernels"]["microseconds"]["median"] > 0


def test_all_reduces_of_virtual_gpus(box, lines):
    gpu_parts.all_reduces(box.devices(4, 1), 64 << 10, 2)
    (line,) = lines()
    assert line["way"] == ["one-shot"]
    assert line["bus_GBps"]["median"] > 0
