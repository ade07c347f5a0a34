"""What a replica draws, and the targets that it gets, are put where torch keeps what it works on."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import torch

from fastdp.comm.context import Context
from fastdp.comm.rendezvous import Rendezvous
from fastdp.program.torch.batch import Structure, flatten_batch
from fastdp.program.torch.random.counted import counted
from fastdp.program.torch.replica import ReplicaContext
from fastdp.shard import Rows

# Stands in for a GPU: a tensor of torch's "meta" device cannot be mixed with the host's.
META = SimpleNamespace(torch_device="meta", on_gpu=True)


def context(device):
    structure = SimpleNamespace(seed=lambda: 3)
    return Context(0, Rows(0, 4, 8), 0, Rendezvous(1, 1.0), 1, [], structure, device=device)


def test_random_draws():
    assert counted(ReplicaContext(context(META), Rows(0, 4, 8)), (4, 2)).device.type == "meta"
    assert counted(ReplicaContext(context(None), Rows(0, 4, 8)), (4, 2)).device.type == "cpu"


def test_targets_of_a_merged_loss():
    arrays, nest = flatten_batch((torch.ones(3), {"y": torch.zeros(3)}))
    structure = Structure(nest)
    assert structure.pack(arrays, context(META).torch_device)[1]["y"].device.type == "meta"
    np.testing.assert_array_equal(structure.pack(arrays)[0].numpy(), np.ones(3))
