"""`KerasPureStep`: the training step of a Keras program as captured steps ask for it."""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import keras
import torch

from fastdp.capture.pure_step import Draw, Draws, Moved
from fastdp.capture.watch import Watch
from fastdp.comm.context import Context
from fastdp.errors import NotCapturable
from fastdp.program.keras.capture.guard import watch_step
from fastdp.program.keras.capture.own_code import losses_of, own_code
from fastdp.program.keras.patches import replica_aware
from fastdp.program.keras.prepared_rows import PreparedRows
from fastdp.program.keras.program import KerasProgram
from fastdp.program.keras.replica import keras_device, replica_scope
from fastdp.program.keras.step_sums import StepSums, StepSumsForm
from fastdp.program.keras.variables import ReplicaScope, ReplicaState


class KerasPureStep:
    """Implements `PureStep` with `StepSums` as its outcome.

    Args:
        program: the program whose step it is.
    """

    def __init__(self, program: KerasProgram) -> None:
        self._program = program

    @property
    def name(self) -> str:
        """As `PureStep.name`."""
        return str(self._program.model.name)

    @property
    def variables(self) -> list[torch.Tensor]:
        """As `PureStep.variables`."""
        return [variable.value.detach() for variable in self._program.variables]

    @property
    def trained(self) -> list[int]:
        """As `PureStep.trained`."""
        return self._program.trained

    @property
    def replicas(self) -> Mapping[int, ReplicaState]:
        """As `PureStep.replicas`."""
        return self._program.states

    @property
    def most_replicas(self) -> int:
        """As `PureStep.most_replicas`."""
        return self._program.most_replicas

    @property
    def spans_devices(self) -> bool:
        """As `PureStep.spans_devices`."""
        return self._program.spans_devices

    def why_never(self) -> str:
        """As `PureStep.why_never`."""
        program = self._program
        if isinstance(program.optimizer, keras.optimizers.LossScaleOptimizer):
            return "loss scaling: the scale changes from step to step"
        return ""

    def own_code(self) -> str:
        """As `PureStep.own_code`."""
        return own_code(self._program)

    def prepare(self) -> None:
        """As `PureStep.prepare`: decide how the loss is computed."""
        self._program.loss.prepare()

    def key(self, context: Context) -> tuple[bool, Any]:
        """As `PureStep.key`. The first replica counts regularizers; NumPy does not know all dtypes of a batch."""
        is_regularized = context.rank == 0 and any(v.regularizer is not None for v in self._program.trainable)
        return is_regularized, context.structure.dtypes

    def shape_name(self, context: Context) -> str:
        """As `PureStep.shape_name`."""
        rows = context.rows
        return repr((rows.count, rows.total, context.wants_outputs, context.batch.shapes, self.key(context)))

    def structure(self) -> str:
        """As `PureStep.structure`."""
        program = self._program
        parts = [type(layer).__qualname__ for layer in program.model._flatten_layers()]
        losses = [getattr(loss, "__qualname__", type(loss).__qualname__) for loss in losses_of(program)]
        return repr((parts, losses, [(tuple(v.shape), v.dtype) for v in program.variables], program.trained))

    def rows(self, batch: Sequence[Any], context: Context) -> list[torch.Tensor]:
        """As `PureStep.rows`. Layers in front of the model are no part of the step: it gets what they return."""
        program = self._program
        if isinstance(batch, PreparedRows):
            return batch.tensors
        if program.passes.call.augmented is not None:
            mapping = list(zip(program.variables, self.variables, strict=True))
            apart = Context.alone(batch, context.structure, context.rows.start, context.rows.stop, context.rows.total)
            apart.device = context.device
            return PreparedRows.of(program.passes.call, mapping, batch, apart, program.running_replica(apart)).tensors
        return [tensor.contiguous() for tensor in context.structure.tensors(batch)]

    def compute(
        self, variables: Sequence[torch.Tensor], rows: Sequence[torch.Tensor], context: Context, draws: Draws
    ) -> StepSums:
        """As `PureStep.compute`."""
        program = self._program
        run = program.running_replica(context)
        run.draws = draws
        mapping = list(zip(program.variables, variables, strict=True))
        prepared = program.passes.call.augmented is not None
        return program.passes.train(mapping, context.structure.nested(rows), run, prepared=prepared)

    def flatten(self, outcome: StepSums) -> tuple[list[torch.Tensor], StepSumsForm]:
        """As `PureStep.flatten`."""
        program = self._program
        if any(id(program.variables[i]) in program.effects.seeds for i, _ in outcome.effects.assigned):
            raise NotCapturable("a seed generator that the model reads itself")
        return outcome.flatten()

    def draw(
        self, draws: Sequence[Draw], variables: Sequence[torch.Tensor], context: Context
    ) -> tuple[list[torch.Tensor], Moved]:
        """As `PureStep.draw`."""
        mapping = list(zip(self._program.variables, variables, strict=True))
        run = self._program.running_replica(context)
        with keras_device(context.device), replica_scope(run), ReplicaScope(mapping, set()) as scope:
            outcomes = [draw().contiguous() for draw in draws]
        return outcomes, scope.assigned(mapping)

    @contextmanager
    def tracing(self) -> Iterator[None]:
        """As `PureStep.tracing`. Disables Keras's filtering of tracebacks and errors meanwhile."""
        filtering = keras.config.is_traceback_filtering_enabled()
        keras.config.disable_traceback_filtering()
        try:
            with replica_aware():
                yield
        except NotCapturable as error:
            cause = error.__cause__
            place = _place(error.__traceback__) or (_place(cause.__traceback__) if cause is not None else "")
            raise NotCapturable(f"{error}{place}") from error
        finally:
            if filtering:
                keras.config.enable_traceback_filtering()

    def watch(self, watch: Watch) -> None:
        """As `PureStep.watch`."""
        watch_step(watch, self._program)


def _place(trace: TracebackType | None) -> str:
    """The innermost layer in a traceback, as the end of a sentence."""
    layers = [frame.f_locals.get("self") for frame, _ in traceback.walk_tb(trace)]
    found = [layer for layer in layers if isinstance(layer, keras.layers.Layer) and not isinstance(layer, keras.Model)]
    return f", in the layer {found[-1].name!r} ({type(found[-1]).__name__})" if found else ""
