"""Torch modules that are measured: their inputs, labels and losses, from the user's functions."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from fastdp.benchmark.data import batches_of
from fastdp.benchmark.request import Request
from fastdp.benchmark.target import load
from fastdp.benchmark.torch_target import cross_entropy, optimizer


@pytest.fixture
def written(tmp_path):
    """Write a file of the user's and load its target."""

    def of(text: str, **fields):
        path = tmp_path / "my_file.py"
        path.write_text("import torch\nfrom torch import nn\n" + text)
        request = Request(target=f"{path}:make_model", framework="torch", batch=4, **fields)
        return load(request), request

    return of


def loss_on_a_batch(target, request):
    x, y = batches_of(target, request)(0)
    x, y = torch.as_tensor(x), torch.as_tensor(y)
    loss = target.loss(target.model(x), y)
    loss.backward()
    target.optimizer(target.model.parameters()).step()
    return loss.item()


def test_a_module_that_begins_with_a_linear_layer_needs_no_batches(written):
    text = "make_model = lambda: nn.Sequential(nn.Flatten(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))"
    target, request = written(text)
    assert (target.inputs[0].shape, target.targets[0].below) == ((6,), 3)
    assert (target.loss_title, target.optimizer_title, target.reduction) == ("cross_entropy", "adam", "mean")
    assert loss_on_a_batch(target, request) > 0


def test_make_batch_gives_the_batches_and_its_labels_the_loss(written):
    text = "make_model = lambda: nn.Conv2d(3, 7, 1)\n"
    target, request = written(text + "make_batch = lambda rows: (torch.ones(rows, 3, 5, 5), torch.ones(rows, 7, 5, 5))")
    assert target.loss_title == "mse_loss"
    assert loss_on_a_batch(target, request) > 0
    labels = "torch.zeros(rows, 5, 5, dtype=torch.long)"
    target, request = written(text + f"make_batch = lambda rows: (torch.ones(rows, 3, 5, 5), {labels})")
    assert target.loss_title == "cross_entropy"
    assert loss_on_a_batch(target, request) > 0


def test_a_pair_of_module_and_loss(written):
    target, _ = written(
        "def own(outputs, targets): return outputs.sum()\n"
        "make_model = lambda: (nn.Conv2d(3, 7, 1), own)\n"
        "make_batch = lambda rows: (torch.ones(rows, 3, 5, 5), ())"
    )
    assert (target.loss_title, target.reduction) == ("own", None)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("make_model = lambda: nn.Conv2d(3, 7, 1)", r"inputs of a torch module.*make_batch\(rows\)"),
        ("make_model = lambda: 3", "must return a keras.Model or a torch.nn.Module, got int"),
        ("make_model = lambda: (nn.Linear(2, 1), nn.MSELoss())", r"labels that its loss takes are unknown.*make_batch"),
        (
            "make_model = lambda: nn.Linear(2, 1)\nmake_batch = lambda rows: (torch.ones(rows, 2), ())",
            r"no loss is known.*\(module, loss\)",
        ),
        ("make_model = lambda: nn.Linear(2, 1)\nmake_batch = lambda rows: 3", r"make_batch\(2\) must return"),
    ],
)
def test_what_cannot_be_measured_is_said_with_the_remedy(written, text, said):
    with pytest.raises(ValueError, match=said):
        written(text)


def test_classes_may_be_the_last_axis_or_the_second():
    logits = torch.randn(4, 5, 7)
    labels = torch.randint(0, 7, (4, 5))
    wanted = functional.cross_entropy(logits.transpose(1, 2), labels)
    torch.testing.assert_close(cross_entropy(logits, labels), wanted)
    torch.testing.assert_close(cross_entropy(logits.transpose(1, 2), labels.int()), wanted)


@pytest.mark.parametrize(("name", "kind"), [("sgd", torch.optim.SGD), ("AdamW", torch.optim.AdamW)])
def test_optimizers_by_name(name, kind):
    made = optimizer(name)([torch.nn.Parameter(torch.zeros(1))])
    assert type(made) is kind


def test_an_unknown_loss_or_optimizer_lists_the_known_ones(written):
    with pytest.raises(ValueError, match=r"`--optimizer` must be one of adadelta.*adam.*Received: 'best'"):
        optimizer("best")
    with pytest.raises(ValueError, match=r"`--loss` of a torch module must be one of cross_entropy.*Received: 'best'"):
        written("make_model = lambda: nn.Linear(2, 1)", loss="best")
