"""How long is a training step on one card: fastdp on 1, 2, 4 and 8 virtual GPUs, plain Keras, torch eager and compiled?

The MLP and, where Keras is, ResNet50 of bench/peer_workers. A round trains a few batches from host memory, timed by the
wall clock from its first batch to its last loss on the host; in every round each way takes its turn, and medians over
the rounds count. Virtual GPUs share one card: more of them show what the engine costs, not what several cards would
gain. Keras on JAX runs afterwards in a process of its own. TF32 is as the libraries have it by default.

fastdp on one device is timed with the rows of a half, a quarter and an eighth of a batch too: bench/scaling_model.py
reads them.

Writes a line of JSON for each measurement, to FASTDP_GPU_LOG where it is set.
"""

from __future__ import annotations

import gc
import importlib
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from gpu_parts import emit
from peer_workers.cases import CASES, Case
from report import ratio, spread

HERE = Path(__file__).parent
COUNTS = (1, 2, 4, 8)
ROUNDS = 5
STEPS = {"mlp": 30, "resnet50": 4}
LEFT_OUT = {"resnet50": ("fastdp torch 8", "torch compiled")}  # they would take the time of the others
JAX_SECONDS = 25.0
# A way that does not work is left out with its reason, and the others are measured.
FAILURES = (RuntimeError, ValueError, TypeError, AttributeError, KeyError, NotImplementedError, MemoryError,
            ImportError, AssertionError)  # fmt: skip

Way = Callable[[], object]  # trains one round


def batches(case: Case, steps: int, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """A round's data."""
    x, y = case.data(steps)
    return x[: steps * rows], y[: steps * rows]


def keras_way(name: str, steps: int, rows: int, gpus: Sequence[int] = (), compile: str | None = None) -> Way:
    """Keras's own `fit`, plain or on virtual GPUs."""
    keras, models = importlib.import_module("keras"), importlib.import_module("peer_workers.keras_models")
    keras.utils.set_random_seed(0)
    model = models.BUILDERS[name]()
    if gpus:
        model = importlib.import_module("fastdp").wrap(model, gpus=list(gpus), compile=compile)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(0.01, momentum=0.9), loss)
    x, y = batches(CASES[name], steps, rows)

    def train() -> None:
        model.fit(x, y, batch_size=rows, shuffle=False, verbose=0)

    train.model = model  # type: ignore[attr-defined]
    return train


def torch_way(name: str, steps: int, mode: str | None) -> Way:
    """torch's usual loop on one GPU; the forward and backward pass compiled with `mode`."""
    torch, models = importlib.import_module("torch"), importlib.import_module("peer_workers.torch_models")
    case = CASES[name]
    torch.manual_seed(0)
    module = models.BUILDERS[name]().cuda()
    compiled = module if mode is None else torch.compile(module, mode=mode)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.01, momentum=0.9)
    x, y = (torch.from_numpy(array) for array in batches(case, steps, case.rows))
    if x.ndim == 4:
        x = x.permute(0, 3, 1, 2).contiguous()
    x, y = x.pin_memory(), y.long().pin_memory()

    def train() -> None:
        for start in range(0, steps * case.rows, case.rows):
            span = slice(start, start + case.rows)
            optimizer.zero_grad()
            outputs = compiled(x[span].to("cuda", non_blocking=True))
            loss = torch.nn.functional.cross_entropy(outputs, y[span].to("cuda", non_blocking=True))
            loss.backward()
            optimizer.step()
        float(loss.detach())

    return train


def facade_way(name: str, steps: int, gpus: Sequence[int]) -> Way:
    """fastdp's torch facade."""
    torch, models = importlib.import_module("torch"), importlib.import_module("peer_workers.torch_models")
    case = CASES[name]
    torch.manual_seed(0)
    dp = importlib.import_module("fastdp").wrap(models.BUILDERS[name](), gpus=list(gpus))
    step = dp.train_step(
        torch.nn.functional.cross_entropy, lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9), reduction="mean"
    )
    x, y = (torch.from_numpy(array) for array in batches(case, steps, case.rows))
    x, y = (x.permute(0, 3, 1, 2).contiguous() if x.ndim == 4 else x), y.long()

    def train() -> None:
        for start in range(0, steps * case.rows, case.rows):
            step(x[start : start + case.rows], y[start : start + case.rows])

    return train


def ways(name: str, steps: int) -> dict[str, Callable[[], Way]]:
    """What is compared on a model, by name; made one after the other."""
    rows = CASES[name].rows
    found: dict[str, Callable[[], Way]] = {}
    if importlib.util.find_spec("keras") is not None:
        found["Keras torch"] = lambda: keras_way(name, steps, rows)
        for count in COUNTS:
            found[f"fastdp {count}"] = lambda c=count: keras_way(name, steps, rows, range(c))  # type: ignore[misc]
        found["fastdp 1 traced"] = lambda: keras_way(name, steps, rows, range(1), "trace")
        for part in COUNTS[1:]:
            found[f"fastdp 1, rows/{part}"] = lambda p=part: keras_way(name, steps, rows // p, range(1))  # type: ignore[misc]
        found["fastdp 1, 1 row"] = lambda: keras_way(name, steps, 1, range(1))
    for count in (1, 8):
        found[f"fastdp torch {count}"] = lambda c=count: facade_way(name, steps, range(c))  # type: ignore[misc]
    found["torch eager"] = lambda: torch_way(name, steps, None)
    found["torch compiled"] = lambda: torch_way(name, steps, "reduce-overhead")
    return found


def prepared(name: str, makers: dict[str, Callable[[], Way]]) -> dict[str, Way]:
    """Those that can be made and train one round, which warms them up."""
    ready = {}
    for title, make in makers.items():
        began = time.perf_counter()
        try:
            way = make()
            way()
            way()
        except FAILURES as error:
            emit(skipped=f"{name}: {title}", reason=f"{type(error).__name__}: {error}"[:600])
            continue
        ready[title] = way
        print(f"{name}: {title} ready after {time.perf_counter() - began:.1f} s", flush=True)
    return ready


def compare(
    name: str, makers: dict[str, Callable[[], Way]], steps: int, rounds: int = ROUNDS
) -> dict[str, list[float]]:
    """Seconds of a step of each way, a value a round; printed and kept as they come."""
    ready = prepared(name, makers)
    times: dict[str, list[float]] = {title: [] for title in ready}
    for _ in range(rounds):
        for title, way in list(ready.items()):
            began = time.perf_counter()
            try:
                way()
            except FAILURES as error:
                emit(skipped=f"{name}: {title}", reason=f"{type(error).__name__}: {error}"[:600])
                del ready[title], times[title]
                continue
            times[title].append((time.perf_counter() - began) / steps)
    base = times.get("Keras torch") or times.get("torch eager")
    for title, seconds in times.items():
        emit(**step_line(name, title, seconds, base))
    for title, way in ready.items():
        report = getattr(getattr(way, "model", None), "report", None)
        if report is not None:
            emit(what="report", model=name, way=title, report=str(report()).splitlines())
    return times


def step_line(name: str, title: str, seconds: Sequence[float], base: Sequence[float] | None) -> dict[str, Any]:
    """One way's times as a measurement."""
    rows = CASES[name].rows
    if "rows/" in title:
        rows //= int(title.rsplit("/", 1)[1])
    elif "1 row" in title:
        rows = 1
    return {
        "what": "step",
        "model": name,
        "way": title,
        "rows": rows,
        "milliseconds": spread([1e3 * value for value in seconds], 4),
        "samples_per_second": round(rows / statistics.median(seconds), 1),
        "times_the_base": ratio(seconds, base) if base else None,
        "clock": "wall, waiting for the last loss",
    }


JAX = """
import json, os, sys, time
sys.modules["tensorflow"] = None
sys.path.insert(0, sys.argv[1])
import keras
from cases import CASES
from keras_models import BUILDERS
name, steps, rounds = sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
case = CASES[name]
x, y = case.data(steps)
model = BUILDERS[name]()
loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
model.compile(keras.optimizers.SGD(0.01, momentum=0.9), loss)
times = []
for _ in range(rounds + 2):
    began = time.perf_counter()
    model.fit(x, y, batch_size=case.rows, shuffle=False, verbose=0)
    times.append((time.perf_counter() - began) / steps)
print(json.dumps(times[2:]))
"""


def jax(name: str, steps: int, rounds: int = ROUNDS) -> None:
    """Keras on JAX, after the others and not in turns with them."""
    missing = [library for library in ("keras", "jax") if importlib.util.find_spec(library) is None]
    if missing:
        emit(skipped=f"{name}: Keras JAX", reason=f"{' and '.join(missing)} not installed")
        return
    environment = {**os.environ, "KERAS_BACKEND": "jax", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    command = [sys.executable, "-c", JAX, str(HERE / "peer_workers"), name, str(steps), str(rounds)]
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=JAX_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        emit(skipped=f"{name}: Keras JAX", reason=f"not over within {JAX_SECONDS} seconds")
        return
    if done.returncode:
        emit(skipped=f"{name}: Keras JAX", reason=done.stderr.strip()[-600:])
        return
    emit(**step_line(name, "Keras JAX (not in turns)", json.loads(done.stdout.strip().splitlines()[-1]), None))


def main() -> int:
    """The MLP, ResNet50, and both on JAX."""
    torch = importlib.import_module("torch") if importlib.util.find_spec("torch") else None
    if torch is None or not torch.cuda.is_available() or importlib.util.find_spec("cupy") is None:
        emit(skipped="steps", reason="torch sees no GPU, or CuPy is not installed")
        return 0
    importlib.import_module("fastdp").set_virtual_devices(max(COUNTS), kind="gpu")
    for name, steps in STEPS.items():
        makers = ways(name, steps)
        for title in LEFT_OUT.get(name, ()):
            del makers[title]
            emit(skipped=f"{name}: {title}", reason="it would take the time of the others")
        compare(name, makers, steps, ROUNDS if name == "mlp" else 3)
        gc.collect()
    importlib.import_module("fastdp").set_virtual_devices(0)
    for name, steps in STEPS.items():
        jax(name, steps)
    return 0


if __name__ == "__main__":
    sys.exit(main())
