"""The engine of a Keras model, made anew when the model, its compile settings or its flags have changed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import keras
import torch

from fastdp.capture.cuda_graphs.recorder import Recorder, chosen_graphs
from fastdp.capture.steps import Captures
from fastdp.capture.trace import Captured
from fastdp.comm.processes import SEVERAL, launched, several
from fastdp.engine.across import all_replicas
from fastdp.engine.data_parallel import DataParallel
from fastdp.engine.step_scope import alone_for
from fastdp.keras.steps.custom import has_own
from fastdp.keras.steps.layer_calls import LayerCalls
from fastdp.options import Options
from fastdp.program.keras.augmented import augmented
from fastdp.program.keras.capture.pure_step import KerasPureStep
from fastdp.program.keras.layer_calls import CallProgram
from fastdp.program.keras.optimizer.slots import optimizer_of
from fastdp.program.keras.rows.policy import Policy
from fastdp.program.keras.step_sums import StepSums
from fastdp.runtime.queue import QueueDevice
from fastdp.runtime.roster import Roster


class ModelEngine:
    """The engine for steps and calls of `template`, with the compile settings of `trainer`.

    Args:
        template: a built Keras model, or any Keras layer that is also a trainer.
        trainer: supplies loss, metrics and optimizer: a parallel model, or the template.
        devices: where the replicas run.
        options: the options chosen for the model.
        template_state: a context manager factory that lends the template the trainer's settings; None where both
            are the same model.
        device_groups: all devices of each replica, where replicas span several; `devices` has the first of each.
        falls_back: whether the caller runs plain Keras where the model cannot be split.
    """

    def __init__(
        self,
        template: keras.Model,
        trainer: keras.Model,
        devices: Sequence[QueueDevice],
        options: Options,
        *,
        template_state: Callable[[], AbstractContextManager[None]] | None = None,
        device_groups: Sequence[Sequence[QueueDevice]] | None = None,
        falls_back: bool = False,
    ) -> None:
        self.template = template
        self.trainer = trainer
        self.roster = Roster(devices, options, launched())
        self.devices = self.roster.follow(list(devices))
        self.device_groups = device_groups
        self._options = options
        self._capture_mode = options.compile
        self._graphs = chosen_graphs(options, self.devices)
        self._template_state = template_state
        self._falls_back = falls_back
        self.augmented = augmented(template, options.augment)
        self._policy = Policy(options.row_policy, falls_back)
        self._engine: DataParallel[CallProgram] | None = None
        self._calls: LayerCalls | None = None
        self._trains: list[bool] = []
        self._layers: list[keras.Layer] = []
        self._parts = 0
        self._variables_known = False

    @property
    def engine(self) -> DataParallel[CallProgram]:
        """The engine for the model as it is compiled now, with its optimizer built: for Keras's training loops."""
        trainer = self.trainer
        if trainer.compiled and trainer.optimizer is not None and not trainer.optimizer.built:
            trainer.optimizer.build(self.template.trainable_variables)
        return self.engine_of_model

    @property
    def engine_of_model(self) -> DataParallel[CallProgram]:
        """The engine for the model as it is now. An optimizer that is not built yet is left so."""
        if self._engine is None or not self.is_unchanged() or self._stale(self._engine.program):
            self.forget_engine()
            self._engine = self._made()
            self._calls = LayerCalls(self._engine)
            self._variables_known = False
            self._layers = self.template._flatten_layers()
            self._parts = self._count_parts()
        self._trains = self._trainability(self._engine.program)
        return self._engine

    def _with_targets(self, outputs: Any, y: Any) -> tuple[Any, Any]:
        """The model's outputs of a step, and the targets: those of the batch, or as they have moved with the inputs."""
        return outputs if self.augmented is not None and self.augmented.moves(y) else (outputs, y)

    def _made(self) -> DataParallel[CallProgram]:
        """Make an engine."""
        in_parts = self._options.shard_optimizer and len(self.devices) > 1
        if in_parts and has_own(self.template, "train_step"):
            raise ValueError(
                f"`shard_optimizer` needs the train step of Keras, and {type(self.template).__name__} has a "
                "`train_step` of its own, which updates all weights on the first device. Leave `shard_optimizer` out."
            )
        with torch.inference_mode(False):  # tensors made in inference mode can never take part in autograd
            program = CallProgram(
                self.template if self.augmented is None else self.augmented,
                self.trainer,
                own_train_step=has_own(self.template, "train_step"),
                sync_batch_norm=self._options.sync_batch_norm,
                template_state=self._template_state,
                replicas=all_replicas(len(self.devices)),
                policy=self._policy,
                groups=self.device_groups,
                in_parts=in_parts,
            )
            program.why_eager = self._why_eager(program)
            if self._capture_mode is not None and not program.why_eager:
                parts = self._graphs == "step"
                step, within = KerasPureStep(program), alone_for(self._options)
                recording = alone_for(self._options, records=True)
                recorder = Recorder(self.template.name, recording, parts=parts) if self._graphs else None
                program.capture_by(
                    Captures(step, self._capture_mode, len(self.devices), recorder, within, self._options.deterministic)
                )
            return DataParallel(program, self.roster, options=self._options)

    def _why_eager(self, program: CallProgram) -> str:
        """Why a program's training steps are not captured; empty if they are."""
        if self._capture_mode is None or several():
            return "compile=None" if self._capture_mode is None else SEVERAL
        if program.own_train_step:
            return "a train_step of the model's own; calls of its layers are split"
        return "" if program.optimizer is not None else "no optimizer: the model is not compiled"

    @property
    def engine_within_loop(self) -> DataParallel[CallProgram]:
        """The engine for the next batch: a new one if a callback froze weights or changed the optimizer.

        It runs for each batch, so it compares flags rather than the lists of variables that Keras derives from them.
        """
        optimizer = self.trainer.optimizer if self.trainer.compiled else None
        return self._engine if self._engine is not None and self._is_for(optimizer) else self.engine

    @property
    def engine_for_calls(self) -> DataParallel[CallProgram]:
        """The engine for a call that does not train: as within a loop, but the optimizer is not built."""
        if self._engine is not None and self._is_for(optimizer_of(self.trainer)):
            return self._engine
        return self.engine_of_model

    def _is_for(self, optimizer: keras.optimizers.Optimizer | None) -> bool:
        """Whether the engine was made for this optimizer and for the variables that are trained now."""
        program = self._engine.program if self._engine is not None else None
        if program is None or program.optimizer is not optimizer or self._trainability(program) != self._trains:
            return False
        return self.is_unchanged()

    def is_unchanged(self) -> bool:
        """Whether the template has the layers and variables that the engine was made for, and none built since."""
        return self._engine is not None and self._count_parts() == self._parts

    def _count_parts(self) -> int:
        """A number that grows with each layer and variable added to the template."""
        return sum(
            len(layer._layers) + len(layer._trainable_variables) + len(layer._non_trainable_variables)
            for layer in self._layers
        )

    def _trainability(self, program: CallProgram) -> list[bool]:
        """The flags from which Keras derives which variables are trained."""
        return [self.template.trainable, *[variable._trainable for variable in program.variables]]

    @property
    def made_engine(self) -> DataParallel[CallProgram] | None:
        """The engine, or None if none was made yet."""
        return self._engine

    def forget_engine(self) -> None:
        """Drop the engine and stop its compilations. The next step makes a new engine."""
        captures = self.captures
        if captures is not None:
            captures.close()
            captures.forget_graphs()
        self._engine = None

    def settle(self) -> None:
        """Hand the gradients of an unfinished accumulation cycle to the optimizer's own accumulators."""
        if self._engine is not None:
            self._engine.program.accumulation.settle()

    def capture_by(self, mode: str | None) -> None:
        """Set the mode in which the next engine captures steps."""
        self._capture_mode = mode

    @property
    def captures(self) -> Captures[Captured[StepSums]] | None:
        """The captured steps of the current engine."""
        return self._engine.program.captures if self._engine is not None else None

    def _stale(self, program: CallProgram) -> bool:
        """Whether the program was made for another optimizer or other variables than those trained now."""
        trainable = program.trainable if program.follows_trainable else self.template.trainable_variables
        optimizer = optimizer_of(self.trainer)
        slots = optimizer.variables if optimizer is not None else []
        return (
            program.optimizer is not optimizer
            or [id(v) for v in program.trainable] != [id(v) for v in trainable]
            or [id(v) for v in program.slot_variables] != [id(v) for v in slots]
        )
