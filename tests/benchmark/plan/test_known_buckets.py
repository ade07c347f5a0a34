"""The buckets of the built-in models: those that the engine makes of the models' parameters."""

from __future__ import annotations

import json
import math

import pytest
import torch

from fastdp.benchmark.models import MODELS
from fastdp.benchmark.plan.known_buckets import KNOWN_BUCKETS
from fastdp.cli import main
from fastdp.shard import plan_buckets


@pytest.mark.parametrize("name", MODELS)
def test_the_buckets_are_those_of_the_model(name):
    """On no device: nothing is allocated. Backward reaches the last parameters first."""
    with torch.device("meta"):
        module = MODELS[name].build("torch")
    sizes = [4 * math.prod(p.shape) for p in module.parameters() if p.requires_grad][::-1]
    assert KNOWN_BUCKETS[name] == tuple(sum(sizes[begin:end]) for begin, end in plan_buckets(sizes))
    assert sum(KNOWN_BUCKETS[name]) == 4 * MODELS[name].parameters


def test_an_embedding_is_left_after_backward_as_a_whole(capsys):
    given = ["plan", "gpt2-small", "--step-ms", "500", "--box", "pcie4", "--gpus", "8", "--json"]
    seconds = []
    for more in ([], ["--parameters", str(MODELS["gpt2-small"].parameters)]):
        assert main([*given, *more]) == 0
        seconds.append(json.loads(capsys.readouterr().out)["weak"][0]["all_reduce_seconds_after_backward"])
    whole, split = seconds
    assert whole == pytest.approx(42e-6 + 1.75 * 154_389_504 / 14e9)
    assert split < whole / 5
