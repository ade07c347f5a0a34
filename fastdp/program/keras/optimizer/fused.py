"""Adam's update by torch's fused kernel, which reads and writes everything once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import torch

# A step count at which torch's bias corrections 1 - beta ** step are exactly 1 for every beta below 1. Keras's
# corrections are part of the learning rate.
_NO_CORRECTION = 1e30
Step = Callable[[torch.Tensor, Any], None]


def fused_step(optimizer: Any, like: torch.Tensor, learning_rate: Any) -> Step | None:
    """`step(gradient, variable)` for SGD, Adam and AdamW on tensors like `like`; None for anything else.

    SGD runs Keras's operations, bitwise equal, without the calls around them. Torch's kernel for Adam computes
    `p -= rate * m / (sqrt(v) + epsilon)`, as Keras does. Adam in float16 and bfloat16 is left to Keras, which rounds
    after each operation; the kernel does not.
    """
    if isinstance(optimizer, keras.optimizers.SGD):
        return _sgd_step(optimizer, float(learning_rate))
    if not isinstance(optimizer, keras.optimizers.Adam) or like.dtype not in (torch.float32, torch.float64):
        return None
    rate = _adam_rate(optimizer, like, learning_rate)
    correction = torch.full((), _NO_CORRECTION, device=like.device)

    def step(gradient: torch.Tensor, variable: Any) -> None:
        i = optimizer._get_variable_index(variable)
        torch._fused_adam_(
            [variable.tensor],
            [gradient],
            [optimizer._momentums[i].tensor],
            [optimizer._velocities[i].tensor],
            [optimizer._velocity_hats[i].tensor] if optimizer.amsgrad else [],
            [correction],
            lr=rate,
            beta1=float(optimizer.beta_1),
            beta2=float(optimizer.beta_2),
            weight_decay=0.0,  # Keras decays before the step, by the rate without corrections
            eps=float(optimizer.epsilon),
            amsgrad=bool(optimizer.amsgrad),
            maximize=False,
        )

    return step


def _sgd_step(optimizer: Any, rate: float) -> Step:
    """SGD with or without momentum."""
    momentum = float(optimizer.momentum)

    def step(gradient: torch.Tensor, variable: Any) -> None:
        value = variable.tensor
        if momentum == 0:
            value.add_(gradient, alpha=-rate)
            return
        velocity = optimizer.momentums[optimizer._get_variable_index(variable)].tensor
        velocity.mul_(momentum).add_(gradient, alpha=-rate)
        if optimizer.nesterov:
            value.add_(gradient, alpha=-rate).add_(velocity, alpha=momentum)
        else:
            value.add_(velocity)

    return step


def _adam_rate(optimizer: Any, like: torch.Tensor, learning_rate: Any) -> torch.Tensor:
    """Keras's learning rate with bias corrections, rounded as Keras rounds it."""
    if not isinstance(learning_rate, torch.Tensor):
        learning_rate = keras.ops.convert_to_tensor(learning_rate)
    number = learning_rate.to(like.device, like.dtype)
    iterations = optimizer.iterations  # with gradient accumulation Keras counts updates here
    step = keras.ops.convert_to_tensor(getattr(iterations, "tensor", iterations) + 1).to(like.dtype)
    power_1, power_2 = (torch.full_like(step, beta).pow(step) for beta in (optimizer.beta_1, optimizer.beta_2))
    rate: torch.Tensor = number * torch.sqrt(1 - power_2) / (1 - power_1)
    return rate
