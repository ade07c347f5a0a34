"""Captured train steps of torch.nn.LSTM on a CPU, which oneDNN runs: in float32 and bfloat16."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional

import fastdp
from fastdp.capture.graph import recurrent  # noqa: F401  registers the operations
from fastdp.tensors import at_once, rnn_layer

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch is built without oneDNN")


# Without it plain torch refuses such an LSTM too.
NEEDS_BFLOAT16 = pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="this processor has no bfloat16 for oneDNN's LSTM"
)


class Reader(nn.Module):
    """A recurrent network over a sequence, and a classifier of its last output."""

    def __init__(self, **options) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, 4, batch_first=True, **options)
        self.head = nn.Linear(4 * (1 + self.lstm.bidirectional), 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.lstm(x)[0][:, -1])


def optimizer(parameters):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}, {"bias": False}])
@pytest.mark.parametrize("precision", [torch.float32, pytest.param(torch.bfloat16, marks=NEEDS_BFLOAT16)])
def test_captured_steps_of_an_lstm_train_as_plain_torch(options, precision):
    torch.manual_seed(0)
    module, x, y = Reader(**options), torch.randn(6, 7, 5, 3), torch.randint(0, 2, (6, 7))
    plain = copy.deepcopy(module)
    mixed = precision != torch.float32
    expected, update = [], optimizer(plain.parameters())
    for inputs, labels in zip(x, y, strict=True):
        update.zero_grad()
        with torch.autocast("cpu", precision) if mixed else contextlib.nullcontext():
            loss = functional.cross_entropy(plain(inputs), labels)
        loss.backward()
        update.step()
        expected.append(float(loss.detach()))
    fastdp.set_virtual_devices(2)
    parallel = fastdp.wrap(module, gpus=2, compile="trace")
    step, found = parallel.train_step(functional.cross_entropy, optimizer), []
    for inputs, labels in zip(x, y, strict=True):
        with torch.autocast("cpu", precision) if mixed else contextlib.nullcontext():
            found.append(float(step(inputs, labels)))
    assert {entry["how"] for entry in parallel.report()} == {"traced"}
    assert found == pytest.approx(expected, rel=2e-3 if mixed else 1e-5)


@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}, {"bias": False}])
def test_rows_in_parts_train_as_plain_torch(options, monkeypatch):
    monkeypatch.setattr(at_once, "LEAST_ROWS", 1)
    monkeypatch.setattr(at_once, "LEAST_WORK", 1)
    counts, original, cores = [], rnn_layer.at_once, torch.get_num_threads()
    monkeypatch.setattr(rnn_layer, "at_once", lambda f, count, **o: counts.append(count) or original(f, count, **o))
    torch.manual_seed(0)
    module, x, y = Reader(**options), torch.randn(4, 7, 5, 3), torch.randint(0, 2, (4, 7))
    plain = copy.deepcopy(module)
    update = optimizer(plain.parameters())
    for inputs, labels in zip(x, y, strict=True):
        update.zero_grad()
        functional.cross_entropy(plain(inputs), labels).backward()
        update.step()
    fastdp.set_virtual_devices(1)
    torch.set_num_threads(3)
    try:
        step = fastdp.wrap(module, gpus=1, compile="trace").train_step(functional.cross_entropy, optimizer)
        for inputs, labels in zip(x, y, strict=True):
            step(inputs, labels)
    finally:
        torch.set_num_threads(cores)
    assert set(counts) == {3}
    for value, expected in zip(module.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("train", [True, False])
def test_a_compiler_is_told_what_the_operations_return(train, parts):
    steps, rows, features, units = 5, 7, 3, 4
    shapes = ((steps, rows, features), (4 * units, features), (4 * units, units), (4 * units,), (4 * units,))
    operands = [torch.randn(shape) for shape in (*shapes, (rows, units), (rows, units))]
    options = (False, [], 2, units, 1, True, False, True, train, parts)

    def run(operands):
        results = torch.ops.fastdp.rnn_layer(*operands, *options)
        given = (torch.ones_like(results[0]), None, None)
        more = (False, 2, units, 1, True, True, False, [], True, results[3])
        assert len(results[3]) == parts
        return (*results[:3], *results[3], *torch.ops.fastdp.rnn_layer_backward(*operands, *results[:3], *given, *more))

    def told(tensor):
        return tensor.shape, tensor.stride(), tensor.dtype

    with torch.no_grad():
        found = run(operands)
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            fake = run([mode.from_tensor(one) for one in operands])
    assert [told(one) for one in fake] == [told(one) for one in found]
    memory = [one.untyped_storage().data_ptr() for one in found]
    assert len(set(memory)) == len(memory)
