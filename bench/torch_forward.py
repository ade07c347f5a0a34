"""What does a call without gradients cost: plain torch, torch.compile, and fastdp eager and captured?

Three of the models of examples/pytorch/ and a small MLP, in evaluation under `torch.no_grad()`, in one process. The
ways take turns in each round, and ratios to plain torch are medians over the rounds. `auto` is what `compile="auto"`
comes to once a speed trial is over: what calls cost where they stay plain torch.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from report import finish, options, print_table

import fastdp
from bench.torch_model_cases import CASES, build
from fastdp.benchmark.rounds import alternate, ratio, spread
from fastdp.capture import patience

ROUNDS, SECONDS, PATIENCE = 9, 0.15, 120.0
MODELS = ("mlp", "graph_net", "gpt", "resnet")
Call = Callable[[], Any]


def case(name: str) -> tuple[nn.Module, Sequence[torch.Tensor]]:
    """A model in evaluation, and the arguments of a call."""
    if name == "mlp":
        return nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 10)).eval(), (torch.randn(64, 32),)
    return build(name).eval(), CASES[name].batches()[0][:-1]  # the last are the targets


def captured(module: nn.Module, arguments: Sequence[torch.Tensor], devices: int, mode: str) -> Call:
    """A parallel module's call, once it runs as it will go on."""
    parallel = fastdp.wrap(module, gpus=devices, compile=mode)
    began = time.perf_counter()
    while time.perf_counter() - began < PATIENCE:
        for _ in range(4):
            parallel(*arguments)
        parallel.wait_compiled(PATIENCE)
        entries = parallel.report().passes
        if mode != "auto" and all(entry["how"] == {"trace": "traced"}.get(mode, "compiled") for entry in entries):
            break
        if mode == "auto" and all("ms" in entry.get("why", "") or entry["how"] == "compiled" for entry in entries):
            break
    return lambda: parallel(*arguments)


def ways(module: nn.Module, arguments: Sequence[torch.Tensor]) -> dict[str, Call]:
    """The calls to compare."""
    compiled = torch.compile(module)
    found: dict[str, Call] = {"torch": lambda: module(*arguments), "torch.compile": lambda: compiled(*arguments)}
    for devices in (1, 2):
        eager = fastdp.wrap(module, gpus=devices, compile=None)
        found[f"{devices} eager"] = lambda eager=eager: eager(*arguments)
        for mode in ("trace", "inductor", *(("auto",) if devices == 1 else ())):
            found[f"{devices} {mode}"] = captured(module, arguments, devices, mode)
    return found


def main() -> None:
    arguments = options(__doc__)
    fastdp.set_virtual_devices(2)
    patience.COMPILE_SECONDS = 0.5  # "auto" decides soon
    results: dict[str, Any] = {}
    for name in MODELS:
        torch.manual_seed(0)
        with torch.no_grad():
            seconds = alternate(ways(*case(name)), rounds=2 if arguments.quick else ROUNDS, seconds=SECONDS)
        results[name] = {
            way: {"milliseconds": spread([1e3 * one for one in found], 4), "to_torch": ratio(found, seconds["torch"])}
            for way, found in seconds.items()
        }
        print(name, {way: one["to_torch"] for way, one in results[name].items()}, flush=True)
    table = [[way, *(results[name][way]["to_torch"] for name in MODELS)] for way in results[MODELS[0]]]
    print_table("A call without gradients, time : plain torch", ["way", *MODELS], table)
    finish("torch_forward", results, libraries=("torch",), save=arguments.save)


if __name__ == "__main__":
    main()
