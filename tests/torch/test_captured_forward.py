"""Calls without gradients are captured, and give plain torch's numbers on any number of devices, or say why not.

In float64, on eleven rows: the first call of a shape runs eagerly, two more are compared with the captured one, and
all others are replays.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

import fastdp

ROWS, CALLS, DEVICES = 11, 6, (2, 3, 8)
TOLERANCE = 1e-11


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


class Gpt(nn.Module):
    """A block of attention with dropout, on token ids."""

    def __init__(self, rate: float = 0.2) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(10, 8), nn.Embedding(5, 8)
        self.norm, self.qkv, self.out = nn.LayerNorm(8), nn.Linear(8, 24), nn.Linear(8, 10, bias=False)
        self.drop, self.rate = nn.Dropout(rate), rate

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.drop(self.tokens(ids) + self.places(torch.arange(ids.shape[1])))
        q, k, v = self.qkv(self.norm(x)).reshape(*ids.shape, 3, 2, 4).permute(2, 0, 3, 1, 4)
        rate = self.rate if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=rate)
        return self.out(x + y.transpose(1, 2).reshape(x.shape))


class Norms(nn.Module):
    """Batch normalization of the inputs, a buffer that counts, and one that is another tensor each time."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.last = nn.BatchNorm1d(6), nn.Linear(6, 3)
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen += 1.0
        self.mean = 0.9 * self.mean + 0.1 * x.mean(0)
        return self.last(self.norm(x) if not self.training else x + 0.0 * self.norm(x)) * self.seen


class Lstm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(6, 5, 2, batch_first=True, dropout=0.3)

    def forward(self, x: torch.Tensor) -> Any:
        return self.lstm(x)


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.scale = nn.Linear(6, 3), 2.0

    def forward(self, x: torch.Tensor, mask: torch.Tensor, *, name: str = "y") -> dict[str, Any]:
        y = self.layer(x).masked_fill(mask, 0.0) * self.scale
        return {name: y, "more": (y.sum(1), [x[:, :2], None]), "count": 3, "loss": y.square().mean()}


class Modes(nn.Module):
    """Does something else where gradients are recorded, and in inference mode."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.layer(x)
        return y * (2.0 if torch.is_grad_enabled() else 1.0) * (3.0 if torch.is_inference_mode_enabled() else 1.0)


class Scribbles(nn.Module):
    """Writes to its argument."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x.mul_(0.5)) + x[:, :1]


def ids(i: int) -> tuple[Any, ...]:
    return (torch.randint(10, (ROWS, 5), generator=torch.Generator().manual_seed(i)),)


def rows(i: int, *shape: int, count: int = ROWS) -> tuple[Any, ...]:
    return (torch.randn(count, *(shape or (6,)), generator=torch.Generator().manual_seed(i)),)


def masked(i: int) -> tuple[Any, ...]:
    return (*rows(i), torch.tensor([False, i % 2 == 0, True]))


Around = Callable[[], Any]
Change = Callable[[int, nn.Module], Any]


def called(
    run: Any, module: nn.Module, batches: list[tuple[Any, ...]], around: Around, change: Change | None = None
) -> list[Any]:
    """What calls give, what they leave in their arguments, buffers and torch's generator, call by call."""
    found = []
    torch.manual_seed(5)
    for i, batch in enumerate(copy.deepcopy(batches)):
        if change is not None:
            change(i, module)
        with around():
            outputs = run(*batch)
        leaves, spec = pytree.tree_flatten(outputs)
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        others = [leaf for leaf in leaves if not isinstance(leaf, torch.Tensor)]
        kept = [tensor.clone() for tensor in tensors]
        found.append(
            ([str(spec), others], kept, copy.deepcopy(list(batch)), copy.deepcopy(dict(module.named_buffers())))
        )
        for tensor in tensors:  # the caller owns the outputs: what is done to them reaches no later call
            with torch.inference_mode(tensor.is_inference()), torch.no_grad():
                tensor.zero_()
    found.append(([], [torch.rand(2)], [], {}))
    return found


def check(
    make: Callable[[], nn.Module],
    batches: list[tuple[Any, ...]],
    devices: int,
    *,
    around: Around = torch.no_grad,
    change: Change | None = None,
    training: bool = False,
    mode: str = "trace",
) -> Any:
    """Captured calls give what plain torch gives. The parallel module."""
    torch.manual_seed(1)
    module = make().train(training)
    reference = copy.deepcopy(module)
    expected = called(reference, reference, batches, around, change)
    parallel = fastdp.wrap(module, gpus=devices, compile=mode)
    found = called(parallel, module, batches, around, change)
    for i, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert one[0] == other[0]
        torch.testing.assert_close(
            one[1:], other[1:], rtol=TOLERANCE, atol=TOLERANCE, msg=lambda m, i=i: f"call {i}: {m}"
        )
    return parallel


def hows(parallel: Any) -> set[str]:
    return {entry["how"] for entry in parallel.report().passes}


def whys(parallel: Any) -> str:
    return "; ".join(entry.get("why", "") for entry in parallel.report().passes)


KINDS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], tuple[Any, ...]], bool]] = {
    "attention in evaluation": (Gpt, ids, False),
    "attention with dropout": (Gpt, ids, True),
    "running statistics": (Norms, rows, False),
    "moving statistics": (Norms, rows, True),
    "recurrent layers": (Lstm, lambda i: rows(i, 4, 6), False),
    "a nest of outputs": (Nested, masked, False),
    "a written argument": (Scribbles, rows, False),
}


@pytest.mark.parametrize("devices", DEVICES)
@pytest.mark.parametrize("kind", KINDS)
def test_captured_calls_give_what_plain_torch_gives(kind, devices):
    make, batch, training = KINDS[kind]
    parallel = check(make, [batch(i) for i in range(CALLS)], devices, training=training)
    assert hows(parallel) == {"traced"}


@pytest.mark.parametrize("devices", DEVICES)
@pytest.mark.parametrize("around", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_forward_sees_the_modes_around_the_call(around, devices):
    parallel = check(lambda: Modes().requires_grad_(False), [rows(i) for i in range(CALLS)], devices, around=around)
    assert hows(parallel) == {"traced"}


def test_other_shapes_and_a_short_last_batch_are_captured_apart():
    counts = [11, 11, 5, 11, 11, 5, 11, 5, 1, 5, 1, 2, 2, 2, 1]
    parallel = check(Gpt, [(ids(i)[0][:n],) for i, n in enumerate(counts)], 3, training=True)
    assert {entry["of"] for entry in parallel.report().passes} >= {11, 5, 2}
    assert hows(parallel) <= {"traced", "eager"}
