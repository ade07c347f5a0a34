"""One way to train one case, in a process of its own: `worker.py WAY CASE STEPS`, started by bench/gpu/steps.py.

WAY is `torch/...`, `keras/fit` on the backend that KERAS_BACKEND names, or `fastdp/...`. FASTDP_BENCH_DEVICE is cuda,
or cpu in tests. Each way has its own process, so that a way that fails on the card or fills it does not affect others.
"""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from typing import Any

if os.environ.get("KERAS_BACKEND") != "tensorflow":  # Keras would import it if installed: slower, more threads
    sys.modules["tensorflow"] = None  # type: ignore[assignment]

sys.path.insert(0, str(Path(__file__).parents[2]))

from bench.gpu.cases import CASES
from fastdp.benchmark.request import Prepared, Round
from fastdp.benchmark.serve import serve


def memory() -> dict[str, Any]:
    """Bytes of card memory that this process holds, from NVML, which asks the driver, and torch's own counters.

    They include the context and the code of libraries. Frameworks keep memory that they have allocated, so this is the
    peak.
    """
    found: dict[str, Any] = {}
    nvml = importlib.import_module("pynvml")
    try:
        nvml.nvmlInit()
        handle = nvml.nvmlDeviceGetHandleByIndex(0)
        for process in nvml.nvmlDeviceGetComputeRunningProcesses(handle):
            if process.pid == os.getpid() and process.usedGpuMemory:
                found["held_nbytes"] = int(process.usedGpuMemory)
        nvml.nvmlShutdown()
    except nvml.NVMLError as error:
        found["nvml"] = str(error)
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        found["torch_allocated_peak_nbytes"] = int(torch.cuda.max_memory_allocated())
        found["torch_reserved_peak_nbytes"] = int(torch.cuda.max_memory_reserved())
        # All memory in use on the card, for drivers that do not report memory by process.
        free, total = torch.cuda.mem_get_info()
        found["card_used_nbytes"] = int(total - free)
    return found


def prepare(way: str, name: str, steps: int) -> Prepared:
    """Build and warm up. Each round trains `steps` steps: that many batches are ready."""
    where = os.environ.get("FASTDP_BENCH_DEVICE", "cuda")
    library, _, how = way.partition("/")
    ways = importlib.import_module("bench.gpu.torch_ways" if library == "torch" else "bench.gpu.keras_ways")
    run, facts = ways.prepare(how, CASES[name], steps, where)
    return Prepared(lambda count: Round(steps, run()), {**facts, "memory": memory() if where == "cuda" else {}})


if __name__ == "__main__":
    serve(lambda: prepare(sys.argv[1], sys.argv[2], int(sys.argv[3])))
