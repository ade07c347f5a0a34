"""Updates flat buffers in host memory by one call of torch, where Keras's `apply` would only step and count.

Behind the weights, gradients and slots of a small network Python finds nothing in the caches, so the calls around the
kernel took as long as the kernel.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import torch

from fastdp.program.keras.optimizer.fused import adam_of_all, rate_of_adam, sgd_step


class DirectUpdate:
    """The update of pieces of flat buffers by Keras's Adam or SGD.

    Args:
        optimizer: the user's optimizer.
        variables, gradients: the pieces.
        slots: by attribute of the optimizer, the pieces of that kind.
        iterations, rate: the replica's counter and learning rate.
    """

    def __init__(
        self,
        optimizer: Any,
        variables: Sequence[torch.Tensor],
        gradients: Sequence[torch.Tensor],
        slots: Mapping[str, Sequence[torch.Tensor]],
        iterations: torch.Tensor,
        rate: torch.Tensor,
    ) -> None:
        self._variables, self._gradients, self._slots = list(variables), list(gradients), slots
        self._iterations, self._rate = iterations, rate
        self._is_sgd = isinstance(optimizer, keras.optimizers.SGD)
        self._kernel = None if self._is_sgd else adam_of_all(self._variables, self._gradients, slots)

    def __call__(self, optimizer: Any) -> bool:
        """Update, by the present settings, and say whether the gaps between variables are still zero.

        Args:
            optimizer: as before, for which `is_plain` is true.
        """
        rate = self._rate.item()
        if self._kernel is None:
            momentum = float(optimizer.momentum)
            step = sgd_step(float(rate), momentum, nesterov=bool(optimizer.nesterov))
            momentums: Sequence[Any] = self._slots["momentums"] if momentum else [None] * len(self._variables)
            for one in zip(self._variables, self._gradients, momentums, strict=True):
                step(*one)
        else:
            like = self._variables[0].dtype
            rate = rate_of_adam(rate, self._iterations.item(), like, optimizer.beta_1, optimizer.beta_2)
            self._kernel(optimizer, rate)
        self._iterations.add_(1)
        return math.isfinite(rate) and (self._is_sgd or optimizer.epsilon > 0)


def direct_update(
    optimizer: Any,
    variables: Sequence[torch.Tensor],
    gradients: Sequence[torch.Tensor],
    slots: Mapping[str, Sequence[torch.Tensor]],
    scalars: Mapping[str, torch.Tensor],
) -> DirectUpdate | None:
    """The update of these pieces; None for other optimizers, dtypes and devices, and where a schedule gives the rate.

    Args:
        optimizer, variables, gradients, slots: as for the class.
        scalars: by attribute of the optimizer, the replica's scalars.
    """
    is_sgd = isinstance(optimizer, keras.optimizers.SGD)
    if not (is_sgd or isinstance(optimizer, keras.optimizers.Adam)) or not {"_iterations", "_learning_rate"} <= {
        *scalars
    }:
        return None
    like = variables[0] if variables else None
    if like is None or like.device.type != "cpu" or not (is_sgd or like.dtype in (torch.float32, torch.float64)):
        return None
    return DirectUpdate(optimizer, variables, gradients, slots, scalars["_iterations"], scalars["_learning_rate"])


def is_plain(optimizer: Any) -> bool:
    """Whether Keras's `apply` only runs the update step by a number as learning rate, and counts."""
    return (
        optimizer.weight_decay is None and isinstance(optimizer._learning_rate, keras.Variable) and is_bare(optimizer)
    )


def is_bare(optimizer: Any) -> bool:
    """Whether Keras's `apply` only decays the weights, runs the update step and counts."""
    around = (
        *(optimizer.gradient_accumulation_steps, optimizer.use_ema, optimizer.loss_scale_factor),
        *(optimizer.clipnorm, optimizer.clipvalue, optimizer.global_clipnorm),
    )
    return not hasattr(optimizer, "inner_optimizer") and not any(around)
