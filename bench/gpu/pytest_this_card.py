"""A pytest plugin: `-p bench.gpu.pytest_this_card` makes the virtual devices of any tests parts of this machine's GPU.

The reference runs on the GPU too, since Keras on torch puts its tensors there. Both compute in full fp32 with
deterministic algorithms, so that tests compare the arithmetic and not cuDNN's choices. Without a GPU all tests are
skipped.
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
    """The reason why tests cannot run on a GPU here; empty if they can."""
    for name in ("torch", "keras", "cupy"):
        if importlib.util.find_spec(name) is None:
            return f"{name} is not installed"
    return "" if torch.cuda.is_available() else "torch sees no GPU"


def pytest_configure(config: pytest.Config) -> None:
    """Make virtual devices parts of the GPU, and matrix products full precision."""
    if missing():
        return
    os.environ["FASTDP_VIRTUAL_KIND"] = "gpu"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.deterministic = True


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Without a GPU, skip all tests and give the reason."""
    reason = missing()
    for item in items if reason else ():
        item.add_marker(pytest.mark.skip(reason=f"needs a GPU: {reason}"))
