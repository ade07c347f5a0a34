"""A forked child trains the torch modules that its parent has wrapped, and wraps others."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from forked_child import in_child

import fastdp

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork"),
    # Python warns of every fork in a process with threads.
    pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning"),
]


def trained(model: torch.nn.Module, parallel: Any) -> list[float]:
    """The weights after a step on eight rows."""
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    optimizer.zero_grad()
    parallel(torch.arange(24.0).reshape(8, 3)).square().mean().backward()
    optimizer.step()
    return [value for parameter in model.parameters() for value in parameter.detach().flatten().tolist()]


def test_a_forked_child_trains_a_model_of_its_parent_and_wraps_others():
    model = torch.nn.Linear(3, 2)
    parallel = fastdp.wrap(model, gpus=2)
    trained(model, parallel)

    def train() -> list[float]:
        return trained(model, parallel) + trained(model, fastdp.wrap(model, gpus=2))

    assert in_child(train) == train()
