"""What these examples share: their arguments, and the losses of plain torch beside those of several devices."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import fastdp

Batch = tuple[Tensor, ...]
Modules = nn.Module | tuple[nn.Module, ...]


def arguments(description: str | None, *, rows: int, steps: int) -> argparse.Namespace:
    """Parse the command line, make the devices that are missing, and set torch's default dtype."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, default=4, help="virtual ones where there are not so many GPUs")
    parser.add_argument("--rows", type=int, default=rows, help="of the global batch: each device gets its share")
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--double", action="store_true", help="float64 instead of float32")
    options = parser.parse_args()
    if len(fastdp.devices()) < options.devices:
        fastdp.set_virtual_devices(options.devices)
    if options.double:
        torch.set_default_dtype(torch.float64)
    return options


def batches_of(data: Sequence[Tensor], rows: int, steps: int) -> list[Batch]:
    """Cut data into batches, over and over."""
    per_epoch = len(data[0]) // rows
    starts = [step % per_epoch * rows for step in range(steps)]
    return [tuple(tensor[start : start + rows] for tensor in data) for start in starts]


def compare(
    build: Callable[[], Modules],
    loop: Callable[[Any, Iterable[Batch]], Iterable[Tensor]],
    train_step: Callable[..., Iterable[Tensor]],
    batches: list[Batch],
    devices: int,
) -> None:
    """Train by plain torch, then by the same loop and by train steps on several devices, and print the losses."""
    modules = build()  # from a seed of its own
    torch.manual_seed(1)
    wanted = [float(loss) for loss in loop(modules, batches)]
    print(f"plain torch: loss {wanted[0]:.6f} -> {wanted[-1]:.6f}")
    modules = build()
    wrapped = [fastdp.wrap(m, gpus=devices, sync_batch_norm=True) for m in _each(modules)]
    torch.manual_seed(1)
    _show("loop", devices, wanted, loop(wrapped if isinstance(modules, tuple) else wrapped[0], batches))
    modules = build()
    torch.manual_seed(1)
    _show("train_step", devices, wanted, train_step(modules, batches, gpus=devices, sync_batch_norm=True))


def _each(modules: Modules) -> tuple[nn.Module, ...]:
    """One or several modules as a tuple."""
    return modules if isinstance(modules, tuple) else (modules,)


def _show(way: str, devices: int, wanted: Sequence[float], found: Iterable[Tensor]) -> None:
    """Print the losses of one way, and the largest relative difference from plain torch."""
    losses = [float(loss) for loss in found]
    apart = max(abs(a - b) / abs(b) for a, b in zip(losses, wanted, strict=True))
    print(f"{way} on {devices} devices: loss {losses[0]:.6f} -> {losses[-1]:.6f}, differs by {apart:.1e}")
