"""Prints one line of JSON: the cards of this machine, their driver, and the versions of what uses them."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from bench.report import result_line
from fastdp.benchmark.machine import hardware
from fastdp.runtime import topology

LIBRARIES = ("torch", "keras", "jax", "jaxlib", "cupy-cuda13x", "cupy-cuda12x", "nvidia-cuda-nvrtc", "nvidia-nccl-cu13",
             "nvidia-nccl-cu12", "nvidia-cudnn-cu13", "triton", "pytest", "h5py", "optree", "nvidia-ml-py")  # fmt: skip
QUERY = "name,driver_version,pstate,clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu,memory.total"
LINK = "pcie.link.gen.max"


def main() -> None:
    """Collect the facts and print them."""
    found: dict[str, Any] = {"hardware": hardware(), **_of_result_line(), "gpus": [], "reason": ""}
    driver = topology.driver()
    if driver is not None:
        found["driver"] = {"version": driver.version, "cuda": list(driver.cuda)}
    found["problems"] = topology.problems()
    found["environment"] = {k: v for k, v in os.environ.items() if k.startswith(("CUDA_", "NCCL_", "CUPY_"))}
    found["nvidia_smi"] = _nvidia_smi(QUERY)
    found["pcie_generation"] = _number(_nvidia_smi(LINK)[1:2])
    found |= _cupy()
    print(json.dumps(found))


def _of_result_line() -> dict[str, Any]:
    """Versions, commit, date and load average, as in all results."""
    line = result_line("gpu", None, libraries=[name for name in LIBRARIES if _installed(name)])
    if line["commit"] == "unknown":  # the files were copied without git
        line["commit"] = os.environ.get("FASTDP_COMMIT", "unknown")
    return {key: line[key] for key in ("versions", "commit", "date", "load_average")}


def _installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def _number(lines: list[str]) -> int | None:
    """The whole number from nvidia-smi, or None if it gave none."""
    return int(lines[0]) if lines and lines[0].strip().isdecimal() else None


def _nvidia_smi(query: str) -> list[str]:
    """A header line, and one line per card."""
    try:
        command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return []
    return done.stdout.strip().splitlines()


def _cupy() -> dict[str, Any]:
    """Facts from CUDA, read through fastdp's runtime layer."""
    if importlib.util.find_spec("cupy") is None:
        return {"reason": "CuPy is not installed"}
    try:
        runtime = importlib.import_module("fastdp.runtime.cuda.cupy_api")
        cards = runtime.device_count()
    except (ImportError, RuntimeError) as error:
        return {"reason": f"CuPy reaches no GPU ({error})"}
    named = topology.physical_devices()
    gpus = [
        {
            "name": named[i].name if i < len(named) else "gpu",
            "capability": runtime.compute_capability(i),
            "multiprocessors": runtime.multiprocessors(i),
            "pci": runtime.pci_bus_id(i),
            "memory": runtime.memory_info(i)[1],
            "nvlinks": named[i].nvlinks if i < len(named) else 0,
        }
        for i in range(cards)
    ]
    versions = {"driver": runtime.driver_version(), "runtime": runtime.runtime_version()}
    nccl = runtime.nccl_version() if runtime.nccl_available() else None
    return {"gpus": gpus, "cuda": versions, "nccl": nccl}


if __name__ == "__main__":
    main()
