"""Loads a torch module that is measured: its loss and optimizer, and the batches that it takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.utils import _pytree as pytree

from fastdp.benchmark import user_file
from fastdp.benchmark.arrays import Array
from fastdp.benchmark.models import find, is_builtin
from fastdp.benchmark.request import Request
from fastdp.benchmark.target import Target

REMEDY = "Write a function make_batch(rows) in the same file that returns (inputs, targets) of so many rows."
PAIR = "Let the function return (module, loss), with loss(outputs, targets) that returns one number."


def cross_entropy(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The mean cross-entropy of logits with whole-number labels. Classes: the last axis, or as in torch the second."""
    if outputs.shape[:-1] == labels.shape:
        outputs, labels = outputs.flatten(0, -2), labels.flatten()
    return functional.cross_entropy(outputs, labels.long())


# By name: the function of outputs and labels, which is a mean over samples.
LOSSES: dict[str, Callable[..., torch.Tensor]] = {
    "cross_entropy": cross_entropy,
    "mse_loss": functional.mse_loss,
    "l1_loss": functional.l1_loss,
    "smooth_l1_loss": functional.smooth_l1_loss,
    "binary_cross_entropy_with_logits": functional.binary_cross_entropy_with_logits,
}


def load(request: Request) -> Target:
    """The module of a request, on the CPU.

    Raises:
        ValueError: the module or something that its training needs is unknown; the message has the remedy.
    """
    torch.manual_seed(request.seed)
    if is_builtin(request.target):
        return _builtin(request)
    named = user_file.split(request.target)
    if named is None:
        raise ValueError(
            f"{request.target} holds no torch module: give file.py:function, with a function that makes one"
        )
    path, function = named
    return _own(request, *user_file.make(path, function), f"{path.name}:{function}")


def _builtin(request: Request) -> Target:
    known = find(request.target)
    name, loss = request.optimizer or known.optimizer, request.loss or "cross_entropy"
    return Target(
        known.title,
        "torch",
        known.build("torch"),
        loss_of(loss),
        optimizer(name),
        known.inputs_of("torch"),
        known.targets,
        reduction="mean",
        loss_title=loss,
        optimizer_title=name,
    )


def loss_of(name: str) -> Callable[..., torch.Tensor]:
    """A loss by its name in torch.nn.functional.

    Raises:
        ValueError: it is none of the known ones.
    """
    if name not in LOSSES:
        raise ValueError(f"`--loss` of a torch module must be one of {', '.join(LOSSES)}. Received: {name!r}")
    return LOSSES[name]


def optimizer(name: str) -> Callable[..., torch.optim.Optimizer]:
    """What makes an optimizer of parameters, by the name of its class in torch.optim; "sgd" has momentum 0.9.

    Raises:
        ValueError: torch has no optimizer of that name.
    """
    if name.lower() == "sgd":
        return lambda parameters: torch.optim.SGD(parameters, lr=0.01, momentum=0.9)
    classes = {
        key.lower(): value
        for key, value in vars(torch.optim).items()
        if isinstance(value, type) and issubclass(value, torch.optim.Optimizer) and value is not torch.optim.Optimizer
    }
    if name.lower() not in classes:
        raise ValueError(f"`--optimizer` must be one of {', '.join(sorted(classes))}. Received: {name!r}")
    made = classes[name.lower()]
    return lambda parameters: made(parameters, lr=1e-3)


def _own(request: Request, made: Any, make_batch: Any, title: str) -> Target:
    """The target of the user's own module, or pair of module and loss."""
    module, loss = made if isinstance(made, tuple) else (made, None)
    if not isinstance(module, nn.Module):
        raise ValueError(f"{title} must return a keras.Model or a torch.nn.Module, got {type(module).__name__}")
    inputs: tuple[Array, ...] = ()
    targets: tuple[Array, ...] = ()
    name = request.loss or ""
    if name:
        loss = loss_of(name)
    if make_batch is None:
        inputs = (first_input(module, title),)
        if loss is not None and not name:
            raise ValueError(f"{title}: the labels that its loss takes are unknown. {REMEDY}")
        targets = (_labels(_outputs(module, torch.from_numpy(inputs[0].zeros(2))), name, title),)
        name = name or ("cross_entropy" if targets[0].dtype == "int64" else "mse_loss")
    elif loss is None:
        name = _loss_for(module, user_file.batch_of(make_batch, 2), title)
    return Target(
        title,
        "torch",
        module,
        loss_of(name) if name else loss,
        optimizer(request.optimizer or "adam"),
        inputs,
        targets,
        make_batch,
        reduction="mean" if name else None,
        loss_title=name or str(getattr(loss, "__name__", type(loss).__name__)),
        optimizer_title=request.optimizer or "adam",
    )


def first_input(module: nn.Module, title: str) -> Array:
    """The input of a module that begins with a linear layer, whose size is known.

    Raises:
        ValueError: it begins with something else, which takes inputs of many sizes.
    """
    first = module
    while isinstance(first, nn.Sequential) and len(first):
        first = first[0]
    if isinstance(first, nn.Flatten) and isinstance(module, nn.Sequential) and isinstance(module[1], nn.Linear):
        first = module[1]
    if not isinstance(first, nn.Linear):
        raise ValueError(f"{title}: the inputs of a torch module are not known from the module. {REMEDY}")
    return Array("x", (first.in_features,), "float64" if first.weight.dtype is torch.float64 else "float32")


def _outputs(module: nn.Module, inputs: Any) -> Any:
    """What the module returns for inputs, without any change to it."""
    was = module.training
    module.eval()
    try:
        with torch.no_grad():
            if isinstance(inputs, Mapping):
                return module(**inputs)
            return module(*inputs) if isinstance(inputs, tuple | list) else module(inputs)
    finally:
        module.train(was)


def _labels(outputs: Any, loss: str, title: str) -> Array:
    """Labels for outputs and a loss: classes for the cross-entropy, else numbers of the same shape.

    Without a loss the last axis are taken for logits of classes if it is longer than 1.
    """
    if not isinstance(outputs, torch.Tensor):
        raise ValueError(f"{title}: the module returns {type(outputs).__name__}, and no loss is known for it. {PAIR}")
    if loss == "cross_entropy" or (not loss and outputs.ndim >= 2 and outputs.shape[-1] > 1):
        return Array("y", tuple(outputs.shape[1:-1]), "int64", int(outputs.shape[-1]))
    return Array("y", tuple(outputs.shape[1:]))


def _loss_for(module: nn.Module, batch: tuple[Any, Any], title: str) -> str:
    """The loss that fits the outputs and the labels of the user's own batch: by the dtype of the labels.

    Raises:
        ValueError: none fits.
    """
    inputs, labels = pytree.tree_map(torch.as_tensor, batch)
    outputs = _outputs(module, inputs)
    if isinstance(outputs, torch.Tensor) and isinstance(labels, torch.Tensor):
        if not labels.is_floating_point() and outputs.ndim == labels.ndim + 1:
            return "cross_entropy"
        if labels.is_floating_point() and outputs.shape == labels.shape:
            return "mse_loss"
    raise ValueError(f"{title}: no loss is known for its outputs and the targets of make_batch. {PAIR}")
