"""A torch module on n devices held to plain torch on one; the devices come from the caller."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import numpy as np
import torch

from fastdp.options import Options
from fastdp.torch.parallel_module import TorchParallel

LIMIT = 60.0
# Where torch computes: on the cards, or in host memory for cards that cannot run its kernels (FASTDP_GPU_COMPUTE=host).
PLACE = "cpu" if os.environ.get("FASTDP_GPU_COMPUTE") == "host" else "cuda" if torch.cuda.is_available() else ""


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """No TF32, and the same algorithms each time: what is compared is the arithmetic, not cuDNN's choices."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32, torch.backends.cudnn.deterministic
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.deterministic = True
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before[:2]
        torch.backends.cudnn.deterministic = before[2]


def torch_module() -> torch.nn.Module:
    torch.manual_seed(1)
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 6, 3), torch.nn.BatchNorm2d(6), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(216, 3)
    )


def a_torch_module_equals_plain_torch(devices: list, where: str, rows: int = 11) -> float:
    """Four steps of SGD with momentum. Returns the largest difference of a loss."""
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.normal(size=(rows, 3, 8, 8)).astype("float32"))
    y = torch.from_numpy(rng.integers(0, 3, rows))
    with full_precision():
        plain = torch_module().to(where)
        optimizer = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9)
        expected = []
        for _ in range(4):
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(plain(x.to(where)), y.to(where))
            loss.backward()
            optimizer.step()
            expected.append(float(loss.detach()))
        module = torch_module()
        dp = TorchParallel(module, devices, Options(sync_batch_norm=True, timeout=LIMIT, check_replicas=True))
        step = dp.train_step(torch.nn.functional.cross_entropy, lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9))
        got = [float(step(x, y)) for _ in range(4)]
        np.testing.assert_allclose(got, expected, rtol=1e-4)
        for (key, a), b in zip(module.state_dict().items(), plain.state_dict().values(), strict=True):
            np.testing.assert_allclose(a.cpu().numpy(), b.cpu().numpy(), rtol=1e-3, atol=1e-4, err_msg=key)
    return max(abs(a - b) for a, b in zip(got, expected, strict=True))
