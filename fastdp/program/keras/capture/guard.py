"""Lists what a trace of a Keras model's step has read: layers, losses, hooks, and Keras's settings."""

from __future__ import annotations

from functools import partial
from typing import Any

import keras
from torch.nn.modules import module as torch_module
from torch.utils.hooks import RemovableHandle

from fastdp.capture.watch import Watch
from fastdp.program.keras import patches
from fastdp.program.keras.capture.reach import reach_of
from fastdp.program.keras.program import KerasProgram
from fastdp.program.keras.rows.known_layers import HOOKS

_GLOBAL_HOOKS = (torch_module._global_forward_hooks, torch_module._global_forward_pre_hooks)


def watch_step(watch: Watch, program: KerasProgram) -> None:
    """Add everything that a training step of a program reads besides its variables and its batch."""
    layers, trainer = program.model._flatten_layers(), program.trainer
    watch.answer(keras.config.floatx, "keras.config.floatx()")
    watch.answer(keras.config.epsilon, "keras.config.epsilon()")
    watch.answer(keras.config.image_data_format, "keras.config.image_data_format()")
    reach = reach_of(watch, program.variables, patches.replaced_places())
    for layer in layers:
        reach.walk(layer, layer.name)
    for variable in program.trainable:
        reach.walk(variable, variable.path)
    watch.answer(partial(getattr, trainer, "_compile_loss"), "the compiled loss")
    reach.walk(trainer._compile_loss, "loss")
    if program.optimizer is not None:
        watch.values(vars(program.optimizer), ["loss_scale_factor"], program.optimizer.name)
    # New hooks: collected only after any hook has been registered in the process.
    watch.answer(lambda: _hooks(program.model), "a hook of a layer", partial(getattr, RemovableHandle, "next_id"))
    for hooks in _GLOBAL_HOOKS:
        if hooks:  # if empty, no hook can be removed
            watch.size(hooks, "global forward hooks")
    for layer in layers:
        for name in HOOKS:
            hooks = getattr(layer, name)
            if hooks:
                reach.walk(hooks, f"a hook of {layer.name}")
                watch.values(vars(layer), [name], layer.name)


def _hooks(model: keras.Model) -> list[list[Any]]:
    """The hooks of all modules, and of all layers."""
    layers = model._flatten_layers()
    own = [hooks for layer in layers for name in HOOKS if (hooks := getattr(layer, name))]
    return [list(hooks.values()) for hooks in (*_GLOBAL_HOOKS, *own)]
