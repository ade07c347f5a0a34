"""Adam's update by torch's fused kernel, which reads and writes everything once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import numpy as np
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

    def step(gradient: torch.Tensor, variable: Any) -> None:
        i = optimizer._get_variable_index(variable)
        slots = {name: [getattr(optimizer, name)[i].tensor] for name in _slots_of_adam(optimizer)}
        adam_of_all([variable.tensor], [gradient], slots)(optimizer, rate)

    return step


def adam_of_all(
    variables: Sequence[torch.Tensor], gradients: Sequence[torch.Tensor], slots: Mapping[str, Sequence[torch.Tensor]]
) -> Callable[[Any, Any], None]:
    """`step(optimizer, rate)`: Adam's update of several tensors, by the optimizer's settings and this learning rate.

    Args:
        variables, gradients: the tensors.
        slots: by attribute of the optimizer, those of its variables that belong to them.
    """
    corrections = [torch.full((), _NO_CORRECTION, device=variables[0].device)] * len(variables)
    tensors = [list(slots[name]) for name in ("_momentums", "_velocities")]
    hats = list(slots.get("_velocity_hats", []))

    def step(optimizer: Any, rate: Any) -> None:
        torch._fused_adam_(
            variables,
            gradients,
            *tensors,
            hats if optimizer.amsgrad else [],
            corrections,
            lr=rate,
            beta1=float(optimizer.beta_1),
            beta2=float(optimizer.beta_2),
            weight_decay=0.0,  # Keras decays before the step, by the rate without corrections
            eps=float(optimizer.epsilon),
            amsgrad=bool(optimizer.amsgrad),
            maximize=False,
        )

    return step


def _slots_of_adam(optimizer: Any) -> list[str]:
    return ["_momentums", "_velocities", *(["_velocity_hats"] if optimizer.amsgrad else [])]


def sgd_step(rate: float, momentum: float, *, nesterov: bool) -> Callable[..., None]:
    """`step(value, gradient, velocity)`: SGD with or without momentum, by Keras's operations."""

    def step(value: torch.Tensor, gradient: torch.Tensor, velocity: torch.Tensor | None) -> None:
        if momentum == 0:
            value.add_(gradient, alpha=-rate)
            return
        assert velocity is not None, "SGD with momentum has them"
        velocity.mul_(momentum).add_(gradient, alpha=-rate)
        if nesterov:
            value.add_(gradient, alpha=-rate).add_(velocity, alpha=momentum)
        else:
            value.add_(velocity)

    return step


def _sgd_step(optimizer: Any, rate: float) -> Step:
    """SGD on variables of Keras's."""
    momentum = float(optimizer.momentum)
    on_tensors = sgd_step(rate, momentum, nesterov=bool(optimizer.nesterov))

    def step(gradient: torch.Tensor, variable: Any) -> None:
        at = optimizer._get_variable_index(variable)
        on_tensors(variable.tensor, gradient, optimizer.momentums[at].tensor if momentum else None)

    return step


def rate_of_adam(rate: float, iterations: int, dtype: torch.dtype, beta_1: float, beta_2: float) -> float:
    """Keras's learning rate with bias corrections, rounded as Keras rounds it on a CPU, without an operation of torch.

    Args:
        rate: the learning rate, in float32.
        iterations: the number of updates so far.
        dtype: that of the variables, float32 or float64.
    """
    number = np.float32 if dtype == torch.float32 else np.float64
    step, one = number(iterations + 1), number(1)
    with np.errstate(all="ignore"):
        power_1, power_2 = number(beta_1) ** step, number(beta_2) ** step
        return float(number(rate) * np.sqrt(one - power_2) / (one - power_1))


def _adam_rate(optimizer: Any, like: torch.Tensor, learning_rate: Any) -> torch.Tensor | float:
    """Keras's learning rate with bias corrections, rounded as Keras rounds it. A tensor on a GPU."""
    if not isinstance(learning_rate, torch.Tensor):
        learning_rate = keras.ops.convert_to_tensor(learning_rate)
    number = learning_rate.to(like.device, like.dtype)
    iterations = optimizer.iterations  # with gradient accumulation Keras counts updates here
    if like.device.type == "cpu":
        done = int(getattr(iterations, "tensor", iterations))
        return rate_of_adam(float(number), done, like.dtype, optimizer.beta_1, optimizer.beta_2)
    step = keras.ops.convert_to_tensor(getattr(iterations, "tensor", iterations) + 1).to(like.dtype)
    power_1, power_2 = (torch.full_like(step, beta).pow(step) for beta in (optimizer.beta_1, optimizer.beta_2))
    rate: torch.Tensor = number * torch.sqrt(1 - power_2) / (1 - power_1)
    return rate
