"""What a loss function returns: one number, or a nest of several of which the first or `loss` is trained on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fastdp.tensors import pytree


class _Trained:
    """The place of the number that is trained on."""

    def __reduce__(self) -> str:
        return "_TRAINED"  # the same one in other processes


_TRAINED = _Trained()


@dataclass(frozen=True, slots=True)
class Reported:
    """The numbers that a loss function has returned besides the one that is trained on, in their nest.

    Args:
        spec: the structure of the nest.
        leaves: a replica's own values, detached; `_TRAINED` for the number that is trained on. Empty if only the first
            replica has the values.
    """

    spec: pytree.TreeSpec
    leaves: tuple[Any, ...]

    def read(self, weight: float) -> Reported:
        """The values as Python's numbers with their dtypes, times a weight. Waits for them."""
        return Reported(self.spec, tuple(_read(leaf, weight) for leaf in self.leaves))

    @property
    def tensors(self) -> list[torch.Tensor]:
        """The values that are tensors."""
        return [leaf for leaf in self.leaves if isinstance(leaf, torch.Tensor)]

    def filled(self, tensors: Iterator[torch.Tensor]) -> Reported:
        """The same nest with other tensors."""
        leaves = tuple(next(tensors) if isinstance(leaf, torch.Tensor) else leaf for leaf in self.leaves)
        return Reported(self.spec, leaves)

    def elsewhere(self) -> Reported:
        """The nest, for a replica that has none of the values."""
        return Reported(self.spec, ())


@dataclass(frozen=True, slots=True)
class _Number:
    """A replica's part of a number."""

    value: Any
    dtype: torch.dtype


def _read(leaf: Any, weight: float) -> Any:
    if not isinstance(leaf, torch.Tensor):
        return leaf
    value = leaf.item()
    return _Number(value if weight == 1.0 else value * weight, leaf.dtype)


def split(returned: Any, reduction: str | None) -> tuple[torch.Tensor, Reported | None]:
    """The number that is trained on, without axes, and the others; None if there are none.

    Args:
        returned: by the loss function: a tensor; a dict with `loss` in it; a tuple or list, of which the first counts.
        reduction: of the loss, as in `TorchParallel.train_step`.

    Raises:
        TypeError: the number that is trained on is not a tensor; with a `reduction`, another one is not.
        ValueError: a number has more than one element; a dict lacks `loss`; whole numbers are no means.
    """
    if isinstance(returned, torch.Tensor):
        return _number(returned, "one number for the batch"), None
    trained = returned
    if isinstance(returned, Mapping):
        if "loss" not in returned:
            raise ValueError(
                '`loss_fn` must return the number that is trained on under the name "loss" if it returns a dict. '
                f"Received the names {list(returned)}."
            )
        trained = returned["loss"]
    elif isinstance(returned, (tuple, list)) and returned:
        trained = returned[0]
    if not isinstance(trained, torch.Tensor):
        raise TypeError(
            "`loss_fn` must return a tensor, or the one to train on as the first of a tuple or list, or as `loss` in a "
            f"dict. Received: {returned!r} (of type {type(returned).__name__})"
        )
    found, spec = pytree.tree_flatten_with_path(returned)
    if not any(leaf is trained for _, leaf in found):
        raise TypeError(
            "`loss_fn` must return its numbers in tuples, lists and dicts. Received: an object of type "
            f"{type(returned).__name__}. Make it a dict: dict(...)."
        )
    leaves = tuple(_TRAINED if leaf is trained else _checked(path, leaf, reduction) for path, leaf in found)
    return _number(trained, "one number to train on"), Reported(spec, leaves)


def whole(every: Sequence[Reported | None], loss: torch.Tensor) -> Any:
    """The numbers of the global batch in their nest: the sums over the replicas that have them.

    Args:
        every: what each replica has read.
        loss: the number that is trained on, of the global batch.
    """
    there = [one for one in every if one is not None and one.leaves]
    leaves = [_summed(parts, loss) for parts in zip(*(one.leaves for one in there), strict=True)]
    return pytree.tree_unflatten(leaves, there[0].spec)


def check_equal_nests(every: Sequence[Reported | None]) -> None:
    """Check that all replicas report the same numbers.

    Raises:
        ValueError: they do not.
    """
    specs = [None if one is None else one.spec for one in every]
    if any(spec != specs[0] for spec in specs):
        raise ValueError(
            "`loss_fn` must return the same numbers on all devices. It returned others for other rows: "
            f"{['only the loss' if spec is None else ' '.join(str(spec).split()) for spec in specs]}. Return all of "
            "them always, or use reduction=None."
        )


def _summed(parts: tuple[Any, ...], loss: torch.Tensor) -> Any:
    first = parts[0]
    if first is _TRAINED:
        return loss
    if not isinstance(first, _Number):
        return first
    return torch.tensor(sum((one.value for one in parts[1:]), first.value), dtype=first.dtype, device="cpu")


def _number(loss: torch.Tensor, what: str) -> torch.Tensor:
    """The tensor without axes."""
    if loss.numel() != 1:
        raise ValueError(
            f"`loss_fn` must return {what}. Received: shape {tuple(loss.shape)}. Reduce it, for example by .mean()."
        )
    return loss.reshape(())


def _checked(path: pytree.KeyPath, leaf: Any, reduction: str | None) -> Any:
    """A number that is only reported, without its graph."""
    name = f"what `loss_fn` returns at {pytree.keystr(path)}"
    if isinstance(leaf, torch.Tensor):
        if leaf.numel() != 1:
            raise ValueError(
                f"{name} must be one number for the batch. Received: shape {tuple(leaf.shape)}. Reduce it, or return "
                "it from the module's forward and read it from `step.result.outputs` (train_step(..., outputs=True))."
            )
        if reduction == "mean" and not (leaf.is_floating_point() or leaf.is_complex()):
            raise ValueError(
                f'{name} has dtype {leaf.dtype}, which is no mean over samples as reduction="mean" says. Make a mean '
                "of it, such as (prediction == target).double().mean(), or use reduction=None."
            )
        if reduction == "sum" and leaf.dtype == torch.bool:
            raise ValueError(
                f'{name} has dtype {leaf.dtype}, which is no sum over samples as reduction="sum" says. Make it a count '
                "of rows, or use reduction=None."
            )
        return leaf.detach().reshape(())
    if reduction is not None:
        raise TypeError(
            f"{name} must be a tensor with reduction={reduction!r}, since each device has its own. Received: {leaf!r} "
            f"(of type {type(leaf).__name__}). Leave .item() out, or use reduction=None."
        )
    return leaf
