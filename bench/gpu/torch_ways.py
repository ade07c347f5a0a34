"""torch's own ways to train the cases of cases.py, and fastdp's torch facade: what bench/gpu/worker.py runs.

The code follows the usual performance advice: channels last, fused optimizers, TF32, gradients set to None, and pinned
input with non-blocking copies.
"""

from __future__ import annotations

import atexit
import contextlib
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional

import fastdp
from bench.gpu.cases import CLASSES, Case
from fastdp.benchmark import models

WARM_UP = 3
Run = Callable[[], float]


class EncoderBlock(nn.Module):
    """Attention and a wide layer, each with a residual sum and normalization after it."""

    def __init__(self, width: int, heads: int, wide: int) -> None:
        super().__init__()
        self.heads = heads
        self.queries, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.wide, self.narrow = nn.Linear(width, wide), nn.Linear(wide, width)
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map rows of vectors to rows of the same shape."""
        rows, tokens, width = x.shape
        q, k, v = self.queries(x).view(rows, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(rows, tokens, width)
        x = self.norms[0](x + self.out(mixed))
        return self.norms[1](x + self.narrow(functional.gelu(self.wide(x))))


class Encoder(nn.Module):
    """Embeddings with positions, blocks, and a classifier of the mean over tokens. No dropout, as in Keras's twin."""

    def __init__(self, width: int, depth: int, heads: int, wide: int, vocabulary: int, tokens: int) -> None:
        super().__init__()
        self.embedding, self.norm = nn.Embedding(vocabulary, width), nn.LayerNorm(width)
        self.positions = nn.Parameter(torch.empty(tokens, width).normal_(std=0.02))
        self.blocks = nn.Sequential(*(EncoderBlock(width, heads, wide) for _ in range(depth)))
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map tokens to logits."""
        return self.head(self.blocks(self.norm(self.embedding(x) + self.positions)).mean(1))


def build(case: Case) -> nn.Module:
    """The module of a case, with a fixed seed."""
    torch.manual_seed(0)
    if case.model == "encoder":
        return Encoder(**case.options)
    return models.build(f"{case.model}:classes={CLASSES}", "torch")


def optimizer_of(case: Case, parameters: Any, **more: Any) -> torch.optim.Optimizer:
    """The fused optimizer of a case."""
    if case.optimizer == "adam":
        return torch.optim.Adam(parameters, lr=1e-4, fused=True, **more)
    return torch.optim.SGD(parameters, lr=0.01, momentum=0.9, fused=True)


def batches(case: Case, steps: int, where: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A round's data, pinned if there is a card. Images have channels-first axes and channels-last memory."""
    x, y = (torch.from_numpy(array) for array in case.data(steps, case.rows))
    y = y.long()
    if x.ndim == 4:
        x = x.permute(0, 3, 1, 2)  # a channels-last view of the same bytes
    return (x.pin_memory(), y.pin_memory()) if where == "cuda" else (x, y)


class Loop:
    """torch's usual loop.

    Args:
        wrap: turns the plain module into the trained one: compiled, in DDP, or unchanged.
    """

    def __init__(self, case: Case, steps: int, where: str, wrap: Callable[[nn.Module], nn.Module]) -> None:
        torch.set_float32_matmul_precision("high")
        self.case, self.steps, self.where = case, steps, where
        module = build(case).to(where)
        if len(case.shape) == 3:
            module = module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.plain, self.module = module, wrap(module)
        self.optimizer = optimizer_of(case, module.parameters())
        self.x, self.y = batches(case, max(steps, WARM_UP), where)

    def precision(self, **more: Any) -> contextlib.AbstractContextManager[Any]:
        """Autocast if the case uses mixed precision."""
        if self.case.precision != "bf16":
            return contextlib.nullcontext()
        return torch.autocast(self.where, dtype=torch.bfloat16, **more)

    def step(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Forward, backward and update; returns the loss, still on the card."""
        self.optimizer.zero_grad(set_to_none=True)
        with self.precision():
            loss = functional.cross_entropy(self.module(x), y)
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def train(self, count: int) -> float:
        """Train `count` steps; returns the seconds until the last loss is on the host."""
        began = time.perf_counter()
        for start in range(0, count * self.case.rows, self.case.rows):
            span = slice(start, start + self.case.rows)
            loss = self.step(
                self.x[span].to(self.where, non_blocking=True), self.y[span].to(self.where, non_blocking=True)
            )
        float(loss)
        return time.perf_counter() - began


class GraphLoop(Loop):
    """The whole step, including the update, as one CUDA graph over static inputs: a lower bound of captured steps."""

    def __init__(self, case: Case, steps: int, where: str) -> None:
        super().__init__(case, steps, where, lambda module: module)
        if case.optimizer == "adam":
            self.optimizer = optimizer_of(case, self.plain.parameters(), capturable=True)
        self.static_x, self.static_y = self.x[: case.rows].to(where), self.y[: case.rows].to(where)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                super().step(self.static_x, self.static_y)
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.cuda.graph(self.graph):
            self.loss = super().step(self.static_x, self.static_y)

    def precision(self, **more: Any) -> contextlib.AbstractContextManager[Any]:
        """Disable autocast's cache of weights, which would outlive the capture."""
        return super().precision(cache_enabled=False)

    def train(self, count: int) -> float:
        """Copy each batch to the static inputs and replay."""
        began = time.perf_counter()
        for start in range(0, count * self.case.rows, self.case.rows):
            span = slice(start, start + self.case.rows)
            self.static_x.copy_(self.x[span], non_blocking=True)
            self.static_y.copy_(self.y[span], non_blocking=True)
            self.graph.replay()
        float(self.loss)
        return time.perf_counter() - began


class FacadeLoop(Loop):
    """fastdp's torch facade on `devices` devices."""

    def __init__(self, case: Case, steps: int, where: str, devices: int) -> None:
        super().__init__(case, steps, "cpu", lambda module: module)
        if case.precision == "bf16":
            raise ValueError("fastdp's torch facade does not take torch.autocast over")
        self.dp = fastdp.wrap(build(case), gpus=devices)
        self.own_step = self.dp.train_step(
            functional.cross_entropy, lambda parameters: optimizer_of(case, parameters), reduction="mean"
        )

    def step(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """One step of the facade."""
        return self.own_step(x, y)  # type: ignore[no-any-return]


def in_ddp(module: nn.Module) -> nn.Module:
    """Wrap a module in DistributedDataParallel with one process."""
    where = next(module.parameters()).device
    folder = tempfile.TemporaryDirectory()
    store = f"file://{folder.name}/store"
    dist.init_process_group("nccl" if where.type == "cuda" else "gloo", init_method=store, rank=0, world_size=1)
    atexit.register(folder.cleanup)
    atexit.register(dist.destroy_process_group)
    return nn.parallel.DistributedDataParallel(module, device_ids=[0] if where.type == "cuda" else None)


def prepare(way: str, case: Case, steps: int, where: str) -> tuple[Run, dict[str, Any]]:
    """Build and warm up; returns a function that trains a round, and facts.

    Args:
        way: eager, compiled, graph, ddp, or facade-N.
    """
    if way.startswith("facade-"):
        loop: Loop = FacadeLoop(case, steps, where, int(way.removeprefix("facade-")))
    elif way == "graph":
        loop = GraphLoop(case, steps, where)
    else:
        wraps: dict[str, Callable[[nn.Module], Any]] = {
            "eager": lambda module: module,
            "compiled": lambda module: torch.compile(module, mode="reduce-overhead"),
            "ddp": in_ddp,
        }
        loop = Loop(case, steps, where, wraps[way])
    began = time.perf_counter()
    for _ in range(2):
        loop.train(WARM_UP)
    facts = {"parameters": sum(p.numel() for p in loop.plain.parameters() if p.requires_grad)}
    return (lambda: loop.train(steps)), {**facts, "warm_up_seconds": round(time.perf_counter() - began, 2)}
