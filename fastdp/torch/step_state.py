"""The state of a train step for checkpoints: optimizers, gradients that wait, counters, and torch's generators."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.amp import GradScaler

from fastdp.comm.processes import several
from fastdp.engine.data_parallel import DataParallel
from fastdp.program.torch.gradients import Found
from fastdp.program.torch.optimizer import Optimizers
from fastdp.program.torch.program import TorchProgram
from fastdp.program.torch.window import Window
from fastdp.runtime.queue import QueueDevice
from fastdp.tensors.arrays import settle, tensors_of

_KEYS = ("parameters", "classes", "optimizers", "scaler", "calls", "window", "draws")
_LATER = "captures"  # states of before do not have it


def read_state(engine: DataParallel[TorchProgram]) -> dict[str, Any]:
    """The state of the step that an engine runs; see `TrainStep.state_dict`."""
    program = engine.program
    optimizers = _optimizers(program)
    return {
        "parameters": _parameters(program),
        "classes": _classes(optimizers),
        "optimizers": optimizers.state_dict(),
        "scaler": program.rules.scaler and program.rules.scaler.state_dict(),
        "calls": program.calls,
        "captures": program.captures and program.captures.state_dict(),
        "window": _read_window(engine),
        "draws": {"cpu": torch.get_rng_state(), "cuda": [torch.cuda.get_rng_state(gpu) for gpu in _gpus(engine)]},
    }


def write_state(engine: DataParallel[TorchProgram], state: Mapping[str, Any]) -> None:
    """Take over what `read_state` has returned; see `TrainStep.load_state_dict`."""
    program = engine.program
    optimizers = _optimizers(program)
    _check_keys(state)
    _check_parameters(state["parameters"], _parameters(program))
    _check_optimizers(state, optimizers)
    _check_scaler(state["scaler"], program.rules.scaler)
    _check_window(state["window"], program)
    torch.set_rng_state(state["draws"]["cpu"].cpu())  # `map_location` of torch.load moves them too
    for gpu, drawn in zip(_gpus(engine), state["draws"]["cuda"], strict=False):
        torch.cuda.set_rng_state(drawn.cpu(), gpu)
    optimizers.load_state_dict(state["optimizers"])
    if program.rules.scaler is not None:
        program.rules.scaler.load_state_dict(state["scaler"] or {})
    _write_window(engine, state["window"])
    program.calls = state["calls"]
    if program.captures is not None and state.get("captures") is not None:
        program.captures.load_state_dict(state["captures"])


def _optimizers(program: TorchProgram) -> Optimizers:
    assert program.optimizers is not None
    return program.optimizers


def _parameters(program: TorchProgram) -> dict[str, list[int]]:
    """The shapes of the parameters that can have a gradient, by name."""
    return {spec.name: list(spec.shape) for spec in program.gradients}


def _classes(optimizers: Optimizers) -> list[str]:
    """The names of the optimizers' classes."""
    return [type(one).__name__ for one in optimizers.all]


def _gpus(engine: DataParallel[TorchProgram]) -> list[str]:
    """Torch's names of the GPUs, each of which has a generator."""
    devices: Sequence[QueueDevice] = engine.devices
    return [str(device.torch_device) for device in devices if device.on_gpu]


# The window of accumulation.


def _read_window(engine: DataParallel[TorchProgram]) -> dict[str, Any]:
    """The gradients that wait, by replica, and what is known of the calls that have left them."""
    window, names = engine.program.window, [spec.name for spec in engine.program.gradients]
    if window.calls and several():
        raise NotImplementedError(
            f"Gradients of {window.calls} calls wait in each of several processes, and a state has those of one "
            f"process. Read the state behind each {engine.program.accumulate_calls}th call, or `flush()` before."
        )
    sums = engine.accumulated() if window.calls else []
    used = sorted(window.found.used)
    return {
        "accumulate": engine.program.accumulate_calls,
        "calls": window.calls,
        "losses": window.losses,
        "used": [names[i] for i in used],
        "sparse": {names[i]: [part.cpu() for part in parts] for i, parts in window.found.sparse.items()},
        "gradients": [{names[i]: tensors[i].to("cpu", copy=True) for i in used} for tensors in map(tensors_of, sums)],
    }


def _write_window(engine: DataParallel[TorchProgram], saved: Mapping[str, Any]) -> None:
    """Give the replicas the gradients that wait. Those of further replicas are added to the ones that are there."""
    places = {spec.name: i for i, spec in enumerate(engine.program.gradients)}
    parts: list[dict[str, torch.Tensor]] = saved["gradients"]
    sums = [tensors_of(flat) for flat in engine.hold(min(len(parts), len(engine.devices)))]
    for rank, part in enumerate(parts):
        for name, values in part.items():
            sums[rank % len(sums)][places[name]].add_(values.to(sums[rank % len(sums)][places[name]].device))
    settle(tensor for tensors in sums for tensor in tensors)
    found = Found(
        frozenset(places[name] for name in saved["used"]),
        {places[name]: list(values) for name, values in saved["sparse"].items()},
    )
    engine.program.window = Window(saved["calls"], found, saved["losses"])


# Checks, all made before anything changes.


def _check_keys(state: Any) -> None:
    if not isinstance(state, Mapping):
        raise TypeError(
            "`state_dict` must be a dict that `step.state_dict()` has returned. Received an object of type "
            f"{type(state).__name__}."
        )
    if state.keys() - {_LATER} != set(_KEYS):
        hint = ""
        if "param_groups" in state:
            hint = " This looks like the state of an optimizer: step.optimizer.load_state_dict(...) takes it."
        elif state and all(isinstance(value, torch.Tensor) for value in state.values()):
            hint = " This looks like the state of a module: model.load_state_dict(...) takes it."
        raise ValueError(
            f"`state_dict` must be what `step.state_dict()` has returned, with the names {list(_KEYS)}. Received the "
            f"names {list(state)[:20]}.{hint}"
        )


def _check_parameters(saved: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    for name in dict.fromkeys([*own, *saved]):
        if saved.get(name) != own.get(name):
            ours, theirs = (
                "is not there" if one.get(name) is None else f"has shape {tuple(one[name])}" for one in (own, saved)
            )
            raise ValueError(
                f"`state_dict` is of a step that trains another module: the parameter `{name}` {theirs} in it, and "
                f"{ours} in the module. Load it into a step of a module with the same parameters."
            )
    if list(saved) != list(own):
        first = next(pair for pair in zip(own, saved, strict=True) if pair[0] != pair[1])
        raise ValueError(
            f"`state_dict` has the parameters in another order than the module: `{first[1]}` in the place of "
            f"`{first[0]}`. Optimizers know parameters by their places: define the module's parts in the same order."
        )


def _check_optimizers(state: Mapping[str, Any], optimizers: Optimizers) -> None:
    ours, theirs = _classes(optimizers), list(state["classes"])
    if ours != theirs:
        raise ValueError(
            f"`state_dict` has the states of {theirs}, and the step has the optimizers {ours}. Make the step with the "
            "same optimizers, in the same order; or load a part: "
            'step.optimizers[0].load_state_dict(state["optimizers"][0]).'
        )
    for at, (one, saved) in enumerate(zip(optimizers.all, state["optimizers"], strict=True)):
        own = [len(group["params"]) for group in one.param_groups]
        there = [len(group["params"]) for group in saved["param_groups"]]
        if own != there:
            raise ValueError(
                f"`state_dict` has parameter groups of {there} parameters for optimizer {at} ({theirs[at]}), and the "
                f"step's has groups of {own}. Make the optimizer with the same groups."
            )


def _check_scaler(saved: Mapping[str, Any] | None, scaler: GradScaler | None) -> None:
    """Check that both steps have a scaler that scales, or that neither has."""
    ours = scaler is not None and scaler.is_enabled()
    if bool(saved) is not ours:
        has = ("has no scaler, or one that is off", "has a scaler")
        raise ValueError(
            f"`state_dict` is of a step that {has[bool(saved)]}, and this step {has[ours]}. Make the step with the "
            'same scaler=; or load a part: step.optimizers[0].load_state_dict(state["optimizers"][0]).'
        )


def _check_window(saved: Mapping[str, Any], program: TorchProgram) -> None:
    if saved["calls"] and saved["accumulate"] != program.accumulate_calls:
        raise ValueError(
            f"`state_dict` was saved after {saved['calls']} of {saved['accumulate']} calls of an accumulation window, "
            f"and the step has accumulate={program.accumulate_calls}. Make it with accumulate={saved['accumulate']}, "
            "or save after step.flush()."
        )
