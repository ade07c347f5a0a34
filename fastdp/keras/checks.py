"""Checks whether a Keras model can be wrapped, and says what to do if not."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Sequence

import keras
import torch
from keras.src.models.functional import Functional
from keras.src.utils.torch_utils import TorchModuleWrapper

from fastdp.capture.cuda_graphs.recorder import warn_of_graphs
from fastdp.keras.steps.custom import OWN_STEPS, has_own
from fastdp.options import Options
from fastdp.program.keras.torch_modules import REMEDY, draws_at_random, structure_of
from fastdp.runtime.queue import QueueDevice
from fastdp.tensors.deterministic import check_deterministic

_PARALLEL = ("ParallelModel", "TorchParallel")  # by name: their modules import this one, and torch's facade is optional

# Torch modules that wrap or replace other modules, by the package of their class, and what to use instead.
_OTHER_MODULES = {
    "torch.nn.parallel": "give the TorchModuleWrapper the module inside it (.module), and leave its devices to fastdp.",
    "torch.distributed": "give the TorchModuleWrapper the module as it was before, and leave its devices to fastdp.",
    "torch._dynamo": "give the TorchModuleWrapper the module that was compiled (._orig_mod).",
    "torch.jit": "give the TorchModuleWrapper the module from which it was made.",
    "torch.ao": "a quantized module's scale depends on all rows of a batch. Train the module as it was before.",
}


def check_backend(caller: str) -> None:
    """Check that Keras runs on torch.

    Raises:
        RuntimeError: another backend is active.
    """
    backend = keras.backend.backend()
    if backend != "torch":
        raise RuntimeError(
            f"`{caller}` needs Keras's torch backend; the active one is {backend!r}. Set the environment variable "
            "KERAS_BACKEND=torch before Python starts, or import fastdp before keras."
        )


def check_options(options: Options, devices: Sequence[QueueDevice]) -> None:
    """Check a Keras model's options against the devices. Warns if graphs are requested that cannot be recorded.

    Raises:
        RuntimeError: `deterministic` is set, but torch has already used a GPU.
    """
    warn_of_graphs(options, devices)
    if options.deterministic:
        check_deterministic(devices)


def check_augment(model: keras.Model, *, spans_devices: bool) -> None:
    """Check that a model can have layers between the data and it (`augment`).

    Args:
        model: the template.
        spans_devices: whether a replica spans several devices.

    Raises:
        ValueError: its own code would get the data without these layers, or a replica spans devices.
    """
    losses = ("compute_loss", "compute_metrics")
    own = [name for name in losses if getattr(type(model), name) is not getattr(keras.Model, name)]
    own += [step for step in OWN_STEPS if has_own(model, step)]
    if own:
        raise ValueError(
            f"`augment` is for models whose steps are Keras's own. The model {model.name!r} has its own {own[0]}(), "
            "which would get the data as they are. Call the layers there, or make them a part of the model."
        )
    if spans_devices:
        raise ValueError(
            "`augment` is for replicas on one device each. Received: `gpus` whose replicas span several devices. Make "
            "the layers a part of the model, or name one device for each replica."
        )


def is_built(model: keras.Model) -> bool:
    """Whether a model has all variables that its call uses. A layer that it holds but never calls does not count.

    A functional model has called its layers when it was made. Any other model builds the layers that it uses in its
    first call. A model's own step may call any layer; layers are checked there.
    """
    if not model.built:
        return False
    if model._called or type(model).call in (Functional.call, keras.Sequential.call):
        return True
    return any(has_own(model, step) for step in OWN_STEPS) or not unbuilt_layers(model)


def unbuilt_layers(model: keras.Model) -> list[keras.Layer]:
    """The layers of a model that are not built: they were never called, or only another mode calls them."""
    return [layer for layer in model._flatten_layers() if not layer.built]


def check_loop(model: keras.Model, loop: str, *maker: str) -> None:
    """Check that the model does not override one of Keras's loops, because a parallel model runs Keras's own.

    Args:
        model: the template.
        loop: the name of the loop ("fit").
        maker: the name of the method that makes the loop's step function ("make_train_function").

    Raises:
        ValueError: the model overrides one of them.
    """
    for name in (loop, *maker):
        if name in vars(model) or getattr(type(model), name) is not getattr(keras.Model, name):
            raise ValueError(
                f"The model {model.name!r} has its own {name}(), which a parallel model does not run, because its "
                f"{loop}() is Keras's. Call fastdp.install() instead of fastdp.wrap, and {loop}() of the model "
                "itself; or move its special code to train_step(), test_step() or predict_step(), which a parallel "
                "model does run."
            )


def check_template(model: keras.Model, *, any_batch_size: bool = False) -> None:
    """Check that a template is built and has no state that is tied to rows.

    `any_batch_size` allows inputs with a fixed batch size: a Sequential model that was built by its first call has the
    size of that batch, but runs with others.

    Raises:
        ValueError: a check fails; the message says what to do.
    """
    if not is_built(model):
        raise ValueError(
            f"The model {model.name!r} is not built, so it has no weights to replicate. Begin it with "
            "keras.Input(shape), call model.build((None, ...)), or call a subclassed model on a batch. Wrap it then."
        )
    for layer in model._flatten_layers():
        if getattr(layer, "stateful", False):
            raise ValueError(
                f"The layer {layer.name!r} is stateful: its state belongs to the rows of one batch, which devices "
                "cannot share. Use stateful=False, or train this model on one device without fastdp."
            )
        if isinstance(layer, (keras.layers.MixUp, keras.layers.CutMix)):
            raise ValueError(
                f"The layer {layer.name!r} mixes rows of the batch, but each device has only its own rows. Take it "
                "out of the model, and pass it as fastdp.wrap(model, augment=layer), which mixes labels "
                "along, or apply it to the data before fit."
            )
        if isinstance(layer, TorchModuleWrapper):
            _check_module(layer.name, layer.module)
        elif _is_parallel(layer):
            raise ValueError(
                f"The model {model.name!r} has a layer that is parallel already ({layer.name!r}). Build it with the "
                "model that you wrapped (parallel.template), and wrap it."
            )
        _check_hidden(layer)
    _check_shared(model)
    if not any_batch_size:
        _check_batch_size(model)


def _check_module(name: str, module: torch.nn.Module) -> None:
    """Check that a torch module inside a Keras model has only parameters, draws nothing and runs on one device.

    Random draws and changed attributes in its forward pass are found with the first batch
    (`program/keras/torch_modules.py`).

    Raises:
        ValueError: the module has buffers or random layers, or replicas cannot run its class on their own parameters.
    """
    said = f"The TorchModuleWrapper {name!r} holds"
    for inside in module.modules():
        known = [remedy for where, remedy in _OTHER_MODULES.items() if type(inside).__module__.startswith(where)]
        if known or isinstance(inside, torch.jit.ScriptModule):
            remedy = known[0] if known else _OTHER_MODULES["torch.jit"]
            raise ValueError(f"{said} a {type(inside).__name__}, which replicas cannot run: {remedy}")
    buffers = [name for name, _ in module.named_buffers()]
    if buffers:
        raise ValueError(
            f"{said} a module that has buffers ({', '.join(buffers[:3])}), which Keras does not track and devices "
            f"cannot share. {REMEDY}"
        )
    if any(isinstance(parameter, torch.nn.UninitializedParameter) for parameter in module.parameters()):
        raise ValueError(f"{said} a module with lazy parameters that have no shape yet. Call it on a batch first.")
    draws = [type(inside).__name__ for inside in module.modules() if draws_at_random(inside)]
    if draws:
        raise ValueError(
            f"{said} a module that draws at random ({draws[0]}), from torch's global generator, which devices cannot "
            f"share. {REMEDY}"
        )
    try:
        structure_of(module)
    # Errors of copying: locks, files and threads raise TypeError, tensors inside a graph RuntimeError, and others.
    except (TypeError, RuntimeError, AttributeError, ValueError, copy.Error, pickle.PickleError) as error:
        raise ValueError(
            f"{said} a module that cannot be copied for each replica ({type(error).__name__}: {error}). {REMEDY}"
        ) from error


def _check_hidden(layer: keras.Layer) -> None:
    """Check modules that Keras does not track, in a list or a dict of a layer, like those that it wraps.

    Raises:
        ValueError: a module fails a check, or is a parallel model.
    """
    for key, value in vars(layer).items():
        if key.startswith("_"):  # attributes of Keras and torch
            continue
        inside = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else [value]
        for one in inside:
            if _is_parallel(one):
                raise ValueError(
                    f"The layer {layer.name!r} holds a model that is parallel already ({key}). Build it with the model "
                    "that you wrapped."
                )
            if isinstance(one, torch.nn.Module) and not isinstance(one, keras.Layer) and one is not value:
                _check_module(layer.name, one)


def _is_parallel(thing: object) -> bool:
    """Whether this is one of fastdp's parallel models."""
    return any(one.__module__.startswith("fastdp.") and one.__name__ in _PARALLEL for one in type(thing).__mro__)


def _check_shared(model: keras.Model) -> None:
    """Check that no two variables share a tensor, because each variable gets its own memory.

    Raises:
        ValueError: two variables do, such as those of two wrappers around one torch module.
    """
    known: dict[int, keras.Variable] = {}
    for variable in {id(v): v for v in model.variables}.values():
        other = known.setdefault(id(variable._value), variable)
        if other is not variable and variable._value is not None:
            raise ValueError(
                f"The variables {other.path!r} and {variable.path!r} share one tensor, as those of two "
                "TorchModuleWrappers around one torch module do. Wrap the module once, and call that layer twice."
            )


def _check_batch_size(model: keras.Model) -> None:
    """Check that no input has a fixed number of rows."""
    for tensor in keras.tree.flatten(getattr(model, "inputs", None) or []):
        if tensor is not None and tensor.shape and tensor.shape[0] is not None:
            raise ValueError(
                f"The input {tensor.name!r} of model {model.name!r} has a fixed batch size of {tensor.shape[0]}, but "
                "each device gets only its part of a batch. Leave batch_size out of keras.Input. A Sequential model "
                "that was built by a call has the size of that batch: begin it with keras.Input(shape)."
            )
