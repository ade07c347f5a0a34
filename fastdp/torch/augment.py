"""`augment=` of torch modules: a transform of the first argument, which runs on each device on its rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

__all__ = ["Augmentation", "set_augmentation"]


class Augmentation:
    """A forward pre-hook that transforms the module's first argument, in training mode alone.

    Args:
        transform: an nn.Module or a function of the first argument.
    """

    def __init__(self, transform: Callable[[Any], Any]) -> None:
        self.transform = transform

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The arguments with which the module goes on."""
        if not module.training:
            return None
        if not args:
            raise TypeError(
                "`augment` transforms the module's first argument, which must be given by position. Received: only "
                f"arguments by name, {sorted(kwargs)}."
            )
        return (self.transform(args[0]), *args[1:]), kwargs


def set_augmentation(module: nn.Module, transform: Any) -> None:
    """Let a module transform its first argument; None: no longer. The hook of an earlier call goes.

    Raises:
        TypeError: `transform` cannot be called.
        ValueError: it has parameters, which nothing would train.
    """
    if transform is not None and not callable(transform):
        raise TypeError(
            "`augment` of a torch module must be an nn.Module or a function of its first argument. "
            f"Received: {transform!r} (of type {type(transform).__name__})"
        )
    if isinstance(transform, nn.Module) and any(one.requires_grad for one in transform.parameters()):
        raise ValueError(
            "`augment` has parameters that require gradients, but the optimizer of the module does not train them. "
            "Call augment.requires_grad_(False), or make it a part of the module."
        )
    before = [key for key, hook in module._forward_pre_hooks.items() if isinstance(hook, Augmentation)]
    for key in before:
        del module._forward_pre_hooks[key]
        module._forward_pre_hooks_with_kwargs.pop(key, None)
    if transform is not None:
        module.register_forward_pre_hook(Augmentation(transform), with_kwargs=True)
