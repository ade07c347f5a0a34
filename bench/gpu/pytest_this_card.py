"""A pytest plugin: `-p gpu_this_card` gives any tests that ask for virtual devices parts of this machine's GPU.

What they compare with runs on the GPU too, since Keras on torch puts its tensors there. Both compute in full fp32, by
the same algorithms each time: what is compared is the arithmetic, not cuDNN's choices. Without a GPU all is skipped.
"""

from __future__ import annotations

import importlib.util
import os

import pytest

if importlib.util.find_spec("torch") is not None:
    import torch
else:
    torch = None  # type: ignore[assignment]


def missing() -> str:
    """Why no test can run on a GPU here; empty where they can."""
    for name in ("torch", "keras", "cupy"):
        if importlib.util.find_spec(name) is None:
            return f"{name} is not installed"
    return "" if torch.cuda.is_available() else "torch sees no GPU"


def pytest_configure(config: pytest.Config) -> None:
    """Virtual devices are of the GPU, and products of full precision."""
    if missing():
        return
    os.environ["FASTDP_VIRTUAL_KIND"] = "gpu"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.deterministic = True


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip everything where there is no GPU, and say why."""
    reason = missing()
    for item in items if reason else ():
        item.add_marker(pytest.mark.skip(reason=f"needs a GPU: {reason}"))
