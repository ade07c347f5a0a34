"""Embeddings of torch modules that look at all indices of a batch: `max_norm` and `scale_grad_by_freq`."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from fastdp.program.torch.replica import ReplicaContext
from fastdp.tensors.collectives import peers
from fastdp.tensors.function_mode import Handler

_FREQUENCIES = (
    "{} with `scale_grad_by_freq=True` counts the indices of the whole batch in backward, and a device has those of "
    "its own rows. Leave it out, or use gpus=[0]."
)
_BAGS = (
    "F.embedding_bag with `max_norm` scales the weights that the whole batch uses, and a device has the indices of its "
    "own rows. Use nn.Embedding with `max_norm` and sum its vectors, or use gpus=[0]."
)
# As in torch; `nn.Embedding` and `nn.EmbeddingBag` give all of them by position.
_EMBEDDING = ("input", "weight", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse")
_BAG = ("input", "weight", "offsets", "max_norm", "norm_type", "scale_grad_by_freq")


def _named(names: tuple[str, ...], args: Any, kwargs: Any) -> dict[str, Any]:
    """The arguments of a call by name."""
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _embedding(running: ReplicaContext, function: Any, args: Any, kwargs: Any) -> torch.Tensor:
    """F.embedding. Weights longer than `max_norm` are scaled wherever any replica uses them, on all replicas."""
    given = _named(_EMBEDDING, args, kwargs)
    if given.get("scale_grad_by_freq"):
        raise NotImplementedError(_FREQUENCIES.format("F.embedding"))
    among = peers()
    if given.get("max_norm") is None or among is None or running.backward:
        return function(*args, **kwargs)
    used = among.all_gather(given["input"].detach().reshape(-1), 0)
    with torch.no_grad():
        torch.embedding_renorm_(given["weight"], used, given["max_norm"], given.get("norm_type", 2.0))
    return function(**{**given, "max_norm": None})


def _embedding_bag(running: ReplicaContext, function: Any, args: Any, kwargs: Any) -> torch.Tensor:
    """F.embedding_bag, unless it looks at all indices of a batch."""
    given = _named(_BAG, args, kwargs)
    if given.get("scale_grad_by_freq"):
        raise NotImplementedError(_FREQUENCIES.format("F.embedding_bag"))
    if given.get("max_norm") is not None:
        raise NotImplementedError(_BAGS)
    return function(*args, **kwargs)


HANDLERS: dict[Any, Handler] = {F.embedding: _embedding, F.embedding_bag: _embedding_bag}
