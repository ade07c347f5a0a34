"""With `shards=` three processes of one and two devices have the bits of one device, or an error that says why not."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import process_shards
import pytest
import torch
from torchrun import torchrun

import fastdp

PROCESSES = 3


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """What each of three processes finds."""
    folder = tmp_path_factory.mktemp("three")
    ended = torchrun(Path(process_shards.__file__), folder, processes=PROCESSES)
    assert ended.returncode == 0, ended.stderr
    return [pickle.loads((folder / f"{rank}.pickle").read_bytes()) for rank in range(PROCESSES)]


@pytest.fixture(scope="module")
def alone():
    """What one device of one process finds."""
    threads = torch.get_num_threads()
    fastdp.set_virtual_devices(1)
    yield process_shards.run((1,))
    fastdp.set_virtual_devices(0)
    torch.set_num_threads(threads)


@pytest.mark.parametrize("shards", process_shards.SHARDS)
@pytest.mark.parametrize("gpus", [1, 2])
@pytest.mark.parametrize("case", process_shards.CASES)
def test_three_processes_have_the_bits_of_one_device(case, gpus, shards, alone, together):
    for rank, (found, _) in enumerate(together):
        for one, other in zip(found[case, gpus, shards], alone[case, 1, shards], strict=True):
            np.testing.assert_array_equal(one, other, err_msg=f"process {rank}")


REFUSED = {
    "too few rows": "NotImplementedError: `shards` across 3 processes needs a batch of at least 3 rows, or of at",
    "too many devices": "ValueError: `shards` must be at least the number of devices, so that each has work. Received: "
    "shards=5 for 2 devices in each of 3 processes. Use fewer devices (gpus=1).",
    "devices that differ": "ValueError: `shards` needs as many devices in each process.",
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_processes_cannot_do_is_refused_in_all_of_them(what, together):
    for _, refused in together:
        assert refused[what].startswith(REFUSED[what])
