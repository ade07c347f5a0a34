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

ROWS, CALLS = 11, 6
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
    """Batch normalization of the inputs, a buffer that counts, and one that follows the batches."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.last = nn.BatchNorm1d(6), nn.Linear(6, 3)
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen += 1.0
        self.follow(x.mean(0))
        return self.last(self.norm(x) if not self.training else x + 0.0 * self.norm(x)) * self.seen

    def follow(self, mean: torch.Tensor) -> None:
        self.mean.lerp_(mean, 0.1)


class Replaces(Norms):
    """Puts another tensor in the place of a buffer each time."""

    def follow(self, mean: torch.Tensor) -> None:
        self.mean = 0.9 * self.mean + 0.1 * mean


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


class Encoder(nn.Module):
    """Torch's own encoder, which computes nothing for padding in evaluation if all of it is at the ends of rows."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(6, 2, 8, batch_first=True)
        self.encoder, self.last = nn.TransformerEncoder(layer, 2), nn.Linear(6, 3)

    def forward(self, x: torch.Tensor, padding: torch.Tensor | None = None) -> torch.Tensor:
        return self.last(self.encoder(x, src_key_padding_mask=padding))


def padded(i: int, *, at_the_end: bool = True) -> tuple[Any, ...]:
    padding = torch.zeros(ROWS, 4, dtype=torch.bool)
    if i > 2:
        padding[1::4, 3 if at_the_end else 1] = True
    return (*rows(i, 4, 6), padding)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors", "ignore:fastdp runs")
@pytest.mark.parametrize("devices", [1, 3])
@pytest.mark.parametrize("at_the_end", [True, False])
def test_what_an_encoder_gives_for_padding_is_that_of_plain_torch(devices, at_the_end):
    batches = [padded(i, at_the_end=at_the_end) for i in range(CALLS)]
    assert hows(check(Encoder, batches, devices)) == {"eager"}


KINDS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], tuple[Any, ...]], bool]] = {
    "attention in evaluation": (Gpt, ids, False),
    "attention with dropout": (Gpt, ids, True),
    "running statistics": (Norms, rows, False),
    "moving statistics": (Norms, rows, True),
    "recurrent layers": (Lstm, lambda i: rows(i, 4, 6), False),
    "a nest of outputs": (Nested, masked, False),
    "a written argument": (Scribbles, rows, False),
    "torch's own encoder": (Encoder, lambda i: rows(i, 4, 6), False),
}


# Each kind on one device and on three, with equal and unequal parts; some on all numbers of devices.
CASES = [(kind, devices) for kind in KINDS for devices in (1, 3)]
CASES += [(kind, devices) for kind in ("attention with dropout", "moving statistics") for devices in (2, 8)]


@pytest.mark.parametrize(("kind", "devices"), CASES)
def test_captured_calls_give_what_plain_torch_gives(kind, devices):
    make, batch, training = KINDS[kind]
    parallel = check(make, [batch(i) for i in range(CALLS)], devices, training=training)
    assert hows(parallel) == {"traced"}


@pytest.mark.parametrize("devices", [1, 3])
@pytest.mark.parametrize("around", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_forward_sees_the_modes_around_the_call(around, devices):
    parallel = check(lambda: Modes().requires_grad_(False), [rows(i) for i in range(CALLS)], devices, around=around)
    assert hows(parallel) == {"traced"}


@pytest.mark.parametrize("devices", [1, 3])
def test_a_buffer_that_forward_replaces_is_another_tensor_on_one_device(devices):
    batches = [rows(i) for i in range(CALLS)]
    if devices > 1:
        assert hows(check(Replaces, batches, devices)) == {"traced"}
        return
    with pytest.warns(UserWarning, match="in whose place forward puts another tensor"):
        assert hows(check(Replaces, batches, devices)) == {"eager"}


def test_other_shapes_and_a_short_last_batch_are_captured_apart():
    counts = [11, 11, 5, 11, 11, 5, 11, 5, 1, 5, 1, 2, 2, 2, 1]
    parallel = check(Gpt, [(ids(i)[0][:n],) for i, n in enumerate(counts)], 3, training=True)
    assert {entry["of"] for entry in parallel.report().passes} >= {11, 5, 2}
    assert hows(parallel) <= {"traced", "eager"}


class Shares(nn.Module):
    """Returns what it gets, views of it and of a parameter, two equal values, and a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> Any:
        y = self.layer(x)
        first, second = y.relu(), y.relu()
        return [x, x.t(), self.layer.weight[:2], first, second, first[:1], *torch.split(y, 3, 1), torch.ones(3)]


def test_outputs_share_memory_as_in_plain_torch_and_with_nothing_else():
    torch.manual_seed(1)
    module = Shares().requires_grad_(False)
    parallel, x = fastdp.wrap(module, gpus=1, compile="trace"), torch.randn(4, 6)
    for _ in range(CALLS):
        found = []
        for run in (module, parallel):
            with torch.no_grad():
                outputs = run(x)
            given = [x, module.layer.weight, *outputs]
            places = [one.untyped_storage().data_ptr() for one in given]
            found.append(([places.index(place) for place in places], [one.clone() for one in outputs]))
            for one in outputs[3:]:
                one += 1.0
        assert found[0][0] == found[1][0]
        torch.testing.assert_close(found[0][1], found[1][1], rtol=TOLERANCE, atol=TOLERANCE)
    assert hows(parallel) == {"traced"}


def test_calls_from_several_threads_are_plain_torch():
    from concurrent.futures import ThreadPoolExecutor

    torch.manual_seed(1)
    module = Gpt().eval()
    parallel, (batch,) = fastdp.wrap(module, gpus=1, compile="trace"), ids(0)
    with torch.no_grad():
        expected = module(batch)

    def work(_: int) -> list[torch.Tensor]:
        with torch.no_grad():
            return [parallel(batch) for _ in range(8)]

    with ThreadPoolExecutor(4) as pool:
        for outputs in pool.map(work, range(4)):
            for one in outputs:
                torch.testing.assert_close(one, expected, rtol=TOLERANCE, atol=TOLERANCE)


def scale(i: int, module: Any) -> None:
    if i == 5:
        module.rate, module.factor = 0.4, 3.0


def hook(i: int, module: Any) -> None:
    if i == 5:
        module.norm.register_forward_hook(lambda part, inputs, output: output * 2.0)


def write(i: int, module: Any) -> None:
    if i >= 4:
        module.out.weight.data.mul_(0.5)
        module.tokens.weight.data = module.tokens.weight.detach() + float(i)


def freeze(i: int, module: Any) -> None:
    if i == 5:
        module.requires_grad_(False)


def switch(i: int, module: Any) -> None:
    module.train(i % 3 == 0)


def load(i: int, module: Any) -> None:
    if i == 6:
        module.load_state_dict({name: one + 0.1 for name, one in module.state_dict().items()})


class Scaled(Gpt):
    def __init__(self) -> None:
        super().__init__()
        self.factor = 2.0

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return super().forward(ids) * self.factor if self.factor > 1.0 else super().forward(ids)


CHANGES = [*((change, 1) for change in (scale, hook, write, freeze, switch, load)), (scale, 3), (switch, 3), (write, 3)]


@pytest.mark.parametrize(("change", "devices"), CHANGES)
def test_what_changes_between_two_calls_counts_in_the_next(change, devices):
    batches = [ids(i) for i in range(18 if change is switch else 10)]
    parallel = check(Scaled, batches, devices, change=change, training=True)
    assert hows(parallel) == {"traced"}


class ByShape(Modes):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) / self.layer.weight.shape[0]


def test_a_parameter_of_another_shape_counts_on_one_device():
    def widen(i: int, module: Any) -> None:
        if i == 5:
            module.layer.weight.data, module.layer.bias.data = torch.ones(1, 6), torch.ones(1)

    parallel = check(ByShape, [rows(i) for i in range(10)], 1, change=widen)
    assert hows(parallel) == {"traced"}


def test_autocast_around_a_call_is_a_kind_of_its_own():
    torch.manual_seed(1)
    module = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3)).float()
    expected, parallel = copy.deepcopy(module), [fastdp.wrap(module, gpus=n, compile="trace") for n in (1, 2)]
    for i in range(12):
        x = rows(i)[0].float()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=i % 2 == 0):
            for one in parallel:
                torch.testing.assert_close(one(x), expected(x), rtol=1e-6, atol=1e-6)
    assert [hows(one) for one in parallel] == [{"traced"}] * 2


class Counts(Modes):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls = getattr(self, "calls", 0) + 1
        return super().forward(x) / self.calls


class Reads(Modes):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * (2.0 if x.sum() > 0 else 1.0)


class Keeps(Modes):
    def __init__(self) -> None:
        super().__init__()
        self.table = torch.arange(3.0)

    def forward(self, x: torch.Tensor) -> Any:
        return super().forward(x), self.table


class Fills(Modes):
    def forward(self, x: dict[str, Any]) -> torch.Tensor:
        x["seen"] = x["x"].sum()
        return super().forward(x["x"])


class Objects(Modes):
    def forward(self, x: torch.Tensor) -> Any:
        y = super().forward(x)
        return y, y.shape


class Trained(Modes):
    def forward(self, x: torch.Tensor) -> Any:
        return self.layer.weight, super().forward(x)


REFUSED: dict[Any, str] = {
    Counts: "calls, which changes while",
    Reads: "needs values on the host",
    Keeps: "shares memory with module.table",
    Fills: "an argument (a list or a dict) that forward changes",
    Objects: "such as a torch.Size",
    Trained: "an output that requires a gradient",
}


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.filterwarnings("ignore:fastdp runs")
def test_a_call_that_no_graph_can_repeat_is_plain_torch_and_the_report_says_why(kind):
    torch.manual_seed(1)
    module = kind()
    reference = copy.deepcopy(module)
    parallel = fastdp.wrap(module, gpus=1, compile="trace")
    for (x,) in map(rows, range(CALLS)):
        batch, given = [({"x": x.clone()},) if kind is Fills else (x.clone(),) for _ in range(2)]
        with torch.no_grad():
            assert str(parallel(*batch)) == str(reference(*given))
        assert str(batch) == str(given)
    assert hows(parallel) == {"eager"}
    assert REFUSED[kind] in whys(parallel)
