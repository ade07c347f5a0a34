"""Results of `fastdp bench`, schema 1, made by hand: what displays and pages are tested with."""

from __future__ import annotations

import copy
from typing import Any

VERBS = {
    "scatter": 0.00021,
    "compute": 0.0064,
    "merge": 0.0001,
    "wait": 0.0003,
    "communication": 0.0007,
    "update": 0.0005,
}


def spread(median: float, part: float = 0.02) -> dict[str, Any]:
    """A spread of five rounds around a median."""
    rounds = [median * (1 + part * step) for step in (-1.0, -0.5, 0.0, 0.5, 1.0)]
    return {"median": median, "q1": rounds[1], "q3": rounds[3], "rounds": rounds}


def entry(library: str = "fastdp", devices: int = 2, mode: str = "compiled", rate: float = 20_000.0) -> dict[str, Any]:
    """One entry, with times per device where the library is fastdp."""
    count = f"{devices} device{'s' * (devices > 1)}"
    step = 256 / rate
    scale = step / 0.0085
    verbs = [
        {
            "device": f"virtual:{rank}",
            "rows": 256 // devices,
            "seconds": {verb: taken * scale * (1 + 0.03 * rank) for verb, taken in VERBS.items()},
            "nbytes": {
                "variables": 4_400_000,
                "slots": 4_400_000,
                "gradients": 4_400_000,
                "spare": 0 if rank else 8_800_000,
            },
            "peak_nbytes": None,
        }
        for rank in range(devices)
    ]
    own = library == "fastdp"
    return {
        "name": f"{library}, {count}, {mode}" if mode else f"{library}, {count}",
        "library": library,
        "devices": devices,
        "kind": "virtual",
        "mode": mode,
        "batch": 256,
        "samples_per_second": spread(rate),
        "step_seconds": spread(step),
        "efficiency": None if devices == 1 else 0.87,
        "warm_up": {"steps": 40, "seconds": 1.3},
        "first_step_seconds": 0.31,
        "capture_seconds": 0.82 if own and mode != "eager" else None,
        "compile_seconds": 12.4 if mode == "compiled" else None,
        "how": "compiled by TorchInductor" if mode == "compiled" else mode,
        "why": "",
        "verbs": verbs if own else [],
        "between_seconds": 0.00012 if own else None,
        "overhead_seconds": 0.0009 if own else None,
        "peak_host_nbytes": 612_000_000,
        "buckets": [2_200_000, 2_200_000] if own else [],
        "utilization": None,
        "joules_per_sample": None,
        "trace": None,
    }


def result(entries: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    """A result as a laptop gives it; by default fastdp on 1, 2 and 4 devices, compiled and eager, and torch."""
    if entries is None:
        entries = [
            *(
                entry("fastdp", devices, "eager", rate)
                for devices, rate in ((1, 9_000.0), (2, 15_500.0), (4, 22_000.0))
            ),
            *(entry("fastdp", devices, rate=rate) for devices, rate in ((1, 15_120.0), (2, 26_300.0), (4, 38_450.0))),
            entry("torch", 1, "", 8_800.0),
        ]
    return {
        "schema": 1,
        "fastdp": "0.9.0",
        "date": "2026-11-29T14:30:00+00:00",
        "command": ["fastdp", "bench", "mlp", "--virtual", "1,2,4", "--output", "a folder"],
        "machine": {
            "cpu": "Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz",
            "cores": 2,
            "memory_nbytes": 16_700_000_000,
            "system": "Linux 6.1, x86_64",
            "gpus": [],
            "driver": None,
        },
        "versions": {"python": "3.11.7", "numpy": "2.4.6", "torch": "2.13.0", "keras": "3.15.1"},
        "noise": {
            "idle_loop": {"median_seconds": 0.0101, "q1": 0.01, "q3": 0.0103},
            "relative_spread": 0.03,
            "verdict": "quiet",
        },
        "target": {
            "name": "mlp",
            "title": "MLP of 3 layers",
            "framework": "keras",
            "parameters": 1_109_386,
            "inputs": [{"name": "x", "shape": [784], "dtype": "float32"}],
            "loss": "sparse_categorical_crossentropy",
            "optimizer": "sgd",
        },
        "settings": {
            "batch": 256,
            "precision": "float32",
            "data": "synthetic",
            "steps": 50,
            "seconds": None,
            "rounds": 5,
            "seed": 0,
        },
        "entries": entries,
        "failed": [],
        "batches": None,
    }


def gpu_result() -> dict[str, Any]:
    """A result as a box with GPUs could give it: peaks, utilization, energy, batches that were tried, a failure."""
    made = result(
        [
            entry("fastdp", devices, "graph", rate)
            for devices, rate in ((1, 2_480.0), (2, 4_900.0), (4, 9_600.0), (8, 18_700.0))
        ]
        + [
            entry("ddp", devices, "", rate)
            for devices, rate in ((1, 2_300.0), (2, 4_480.0), (4, 8_700.0), (8, 16_900.0))
        ]
    )
    made["machine"]["gpus"] = [
        {"name": "NVIDIA H100 80GB HBM3", "memory_nbytes": 85_000_000_000, "compute_capability": [9, 0]}
        for _ in range(8)
    ]
    made["machine"]["driver"] = "570.86"
    for one in made["entries"]:
        one["kind"] = "gpu"
        one["utilization"] = [0.97] * one["devices"]
        one["joules_per_sample"] = 0.23
        for rank, device in enumerate(one["verbs"]):
            device["device"] = f"cuda:{rank}"
            device["peak_nbytes"] = 31_000_000_000
    made["failed"] = [{"name": "keras-jax, 8 devices", "reason": "ModuleNotFoundError: no module named 'jax'"}]
    made["batches"] = {
        "tried": [
            {"batch": 256, "samples_per_second": 18_700.0},
            {"batch": 512, "samples_per_second": 19_900.0},
            {"batch": 1024, "reason": "CUDA out of memory on cuda:3: 2.1 GB asked for, 1.2 GB free"},
        ],
        "largest": 512,
        "best": 512,
    }
    return made


def many(count: int = 40) -> dict[str, Any]:
    """A result with so many entries."""
    modes = ("eager", "traced", "compiled", "graph", "keras", "torch", "ddp", "jax")
    return result([entry("fastdp", 1 + place // 8, modes[place % 8], 1_000.0 * (place + 1)) for place in range(count)])


def without_figures() -> dict[str, Any]:
    """A result with None wherever the schema allows it."""
    made = result([entry("torch", 1, "", 10.0), entry("fastdp", 2)])
    for one in made["entries"]:
        for key in (
            "efficiency", "warm_up", "first_step_seconds", "capture_seconds", "compile_seconds", "how", "why",
            "between_seconds", "overhead_seconds", "peak_host_nbytes", "utilization", "joules_per_sample", "trace",
            "batch",
        ):  # fmt: skip
            one[key] = None
        one["verbs"] = [dict(device, rows=None, seconds=None, nbytes=None) for device in one["verbs"]] or None
        one["buckets"] = None
    made["noise"] = made["target"]["parameters"] = made["target"]["inputs"] = made["target"]["loss"] = None
    made["machine"] = dict.fromkeys(made["machine"])
    made["settings"] = dict.fromkeys(made["settings"])
    made["versions"], made["command"], made["date"] = {}, [], None
    return made


HOSTILE = (
    "<script>alert('x')</script><img src=x onerror=\"y\"> & [bold red]no[/] \x1b[31m\x07\u202e\ud800 \r\n\u2028end"
)


def hostile(value: Any = None) -> Any:
    """A result in which every text that a file may choose is hostile."""
    if value is None:
        value = copy.deepcopy(gpu_result())
        value["noise"]["verdict"] = f"noisy: {HOSTILE}"
        value["entries"][0]["trace"] = HOSTILE
    if isinstance(value, dict):
        kept = ("kind", "verdict")
        return {
            key if key in _KEYS else HOSTILE + key: one if key in kept else one if one is None else hostile(one)
            for key, one in value.items()
        }
    if isinstance(value, list):
        return [hostile(one) for one in value]
    return HOSTILE if isinstance(value, str) else value


_LEAVES = """name reason device rows seconds nbytes peak_nbytes median q1 q3 rounds steps shape dtype memory_nbytes
tried largest compute_capability batch best median_seconds samples_per_second"""
_PARTS = (VERBS, result(), entry(), *(result()[key] for key in ("machine", "target", "settings", "noise")))
_KEYS = frozenset([*_LEAVES.split(), *(key for part in _PARTS for key in part)])
