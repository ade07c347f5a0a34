"""Wraps Keras models: `multi_gpu_model`, and the Keras side of `fastdp.wrap`."""

from __future__ import annotations

from typing import Any

import keras

from fastdp.comm.processes import launched
from fastdp.keras.checks import check_backend
from fastdp.keras.parallel_model import ParallelModel
from fastdp.keras.placement import check_places, resolve_groups, spans_groups
from fastdp.options import Options
from fastdp.runtime.select import resolve
from fastdp.runtime.shards import resolve_devices


def multi_gpu_model(
    model: keras.Model,
    gpus: Any = None,
    cpu_merge: bool = True,
    cpu_relocation: bool = False,
    *,
    on_oom: str = "raise",
    on_device_loss: str = "raise",
) -> ParallelModel:
    """Replicate a Keras model on several devices: Keras 2.3.1's function, with its rules for `gpus`.

    The global batch is split over the devices, each device runs the model on its rows, and the outputs are merged into
    one batch. Training gives the same weights as one device on the whole batch.

    Args:
        model: a built Keras model, the template. Its weights are shared, not copied: save it after training.
        gpus: a whole number >= 2, a list of at least two device ordinals, or None for all.
        cpu_merge: merge outputs in host memory; False: on the first device of the list.
        cpu_relocation: keep the template's weights in host memory. The model is never cloned, so its weights stay.
        on_oom, on_device_loss: as in `fastdp.wrap`. Keras 2 did not have them.

    Returns:
        A Keras model to compile and fit. Outputs that share a name are called `name_1`, `name_2` and so on.

    Raises:
        ValueError: invalid `gpus` (including fewer than two devices), or a model that cannot be replicated.
        TypeError: `model` is not a Keras model.
        RuntimeError: Keras runs on another backend than torch.

    Example:
        >>> parallel = multi_gpu_model(model, gpus=8)  # doctest: +SKIP
        >>> parallel.compile(loss="categorical_crossentropy", optimizer="rmsprop")  # doctest: +SKIP
        >>> parallel.fit(x, y, epochs=20, batch_size=256)  # doctest: +SKIP
        >>> model.save("my_model.h5")  # doctest: +SKIP
    """
    check_backend("multi_gpu_model")
    _check_model(model, "multi_gpu_model")
    check_places(model, None)
    devices = resolve(gpus, minimum=2, caller="multi_gpu_model")
    options = Options(cpu_merge=cpu_merge, cpu_relocation=cpu_relocation, on_oom=on_oom, on_device_loss=on_device_loss)
    return ParallelModel(model, devices, options, numbers_all_outputs=True)


def wrap_keras(model: keras.Model, gpus: Any, options: Options) -> ParallelModel:
    """`fastdp.wrap` for a Keras model; same arguments."""
    check_backend("fastdp.wrap")
    _check_model(model, "fastdp.wrap")
    groups = resolve_groups(gpus) if spans_groups(gpus) else None
    check_places(model, groups)
    if groups and options.shards is not None:
        raise ValueError(
            f"`shards` is for replicas on one device each. Received: shards={options.shards} with gpus={gpus!r}, whose "
            "replicas span several devices. Leave `shards` out, or name one device for each replica."
        )
    if groups and options.survives:
        raise ValueError(
            "`on_oom` and `on_device_loss` are for replicas on one device each. Received: "
            f"on_oom={options.on_oom!r}, on_device_loss={options.on_device_loss!r} with gpus={gpus!r}, whose replicas "
            "span several devices. Leave them out."
        )
    if groups:
        devices = [group[0] for group in groups]
    else:
        devices, options = resolve_devices(gpus, options, process=launched())
    return ParallelModel(model, devices, options, device_groups=groups and tuple(map(tuple, groups)))


def _check_model(model: object, caller: str) -> None:
    """Check that the model is a Keras model and not parallel already."""
    if isinstance(model, ParallelModel):
        raise ValueError(
            f"`{caller}` got a model that is parallel already ({model.name!r}). Wrap its template: model.template."
        )
    if not isinstance(model, keras.Model):
        remedy = (
            "Put a layer into a model, such as keras.Sequential([keras.Input(shape), layer])."
            if isinstance(model, keras.Layer)
            else "For a torch.nn.Module use fastdp.wrap."
        )
        raise TypeError(
            f"`model` must be a keras.Model. Received: {model!r} (of type {type(model).__name__}). {remedy}"
        )
