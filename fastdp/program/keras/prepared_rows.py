"""`PreparedRows`: what the layers in front of a model make of a replica's rows, for a captured step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import keras
import torch

from fastdp.comm.context import Context
from fastdp.program.keras.passes import ModelCall
from fastdp.program.keras.replica import ReplicaContext, keras_device, replica_scope
from fastdp.program.keras.variables import Mapping, ReplicaScope


@dataclass(frozen=True, slots=True)
class PreparedRows:
    """The arrays of a batch as contiguous tensors, and what the layers have assigned.

    The layers are not captured: they may read their draws on the host (`RandomCrop`), and `MixUp` needs the rows of
    other devices. So they never keep a step from being captured.

    Attributes:
        tensors: the replica's rows, in the order of the batch's arrays.
        moved: numbers of the variables that were assigned (the layers' seeds), and their values.
    """

    tensors: list[torch.Tensor]
    moved: list[tuple[int, torch.Tensor]]

    @classmethod
    def of(
        cls, call: ModelCall, mapping: Mapping, batch: Sequence[Any], context: Context, run: ReplicaContext
    ) -> PreparedRows:
        """Run the layers on a replica's rows.

        Args:
            call: calls the model.
            mapping: its variables, each with the replica's tensor.
            batch, context: the rows, and the replica's place in the step.
            run: the replica.
        """
        structure = context.structure
        scope = ReplicaScope(mapping, set())
        with torch.no_grad(), keras_device(context.device), replica_scope(run), scope:
            nest = call.prepare(structure.pack(batch), training=True)
        leaves = zip(keras.tree.flatten(nest), structure.dtypes, strict=True)
        tensors = [leaf.contiguous() for leaf, dtype in leaves if dtype is not None]
        return cls(tensors, scope.assigned(mapping))
