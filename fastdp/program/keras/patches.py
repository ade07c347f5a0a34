"""Patches Keras so that random ops and normalization know their replica while replicas run.

Keras's random ops and BatchNormalization know nothing of replicas. While replicas run, `replica_aware`
puts a few functions of Keras in place of others, which behave as before in every thread that runs no
replica, and puts them back afterwards.

Random draws are indexed by the global row: a replica draws for the whole global batch, with the seed
that one device would use, and keeps its own rows. So 1, 2 and 8 devices see the same masks and noise, and
they are those of plain Keras. (Unseeded dropout takes one number for each step from torch's global generator, where
plain Keras draws all of it.)

BatchNormalization's moments are recorded, so that the moving statistics can be updated with the mean and
the variance of the global batch; with `sync_batch_norm` they are those of the global batch to begin with.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import keras
import torch
from keras.src.backend.torch import image as torch_image
from keras.src.backend.torch import random as torch_random
from keras.src.layers.preprocessing.image_preprocessing import aug_mix
from keras.src.layers.rnn.dropout_rnn_cell import DropoutRNNCell
from keras.src.ops.function import Function
from keras.src.random import seed_generator
from keras.src.random.seed_generator import SeedGenerator
from keras.src.utils.torch_utils import TorchModuleWrapper
from torch.utils import checkpoint

from fastdp.program.keras import recompute, torch_modules
from fastdp.program.keras.batch_norm import moments_of_replica
from fastdp.program.keras.placement import graph as placed_graph
from fastdp.program.keras.random import augmentation
from fastdp.program.keras.random import ops as random_ops
from fastdp.program.keras.random.host_draws import STAND_INS
from fastdp.program.keras.recurrent import fused
from fastdp.program.keras.rows import units

_originals: list[tuple[Any, str, Any]] = []


@contextmanager
def replica_aware() -> Iterator[None]:
    """Keep Keras's random ops, BatchNormalization and recurrent dropout aware of replicas."""
    _patched.enter()
    try:
        yield
    finally:
        _patched.leave()


class _Patched:
    """Counts who needs the replica-aware functions: the first puts them in place, the last takes them out."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._depth = 0

    def enter(self) -> None:
        """One more needs them."""
        with self._lock:
            self._depth += 1
            if self._depth == 1:
                _patch()

    def leave(self) -> None:
        """One less."""
        with self._lock:
            self._depth -= 1
            if self._depth == 0:
                _unpatch()


_patched = _Patched()


def _patch() -> None:
    """Put the replica-aware functions in place."""
    moments = keras.layers.BatchNormalization._moments
    targets: list[tuple[Any, str, Any]] = [
        (keras.layers.BatchNormalization, "_moments", moments_of_replica(moments)),
        (torch_random, "dropout", random_ops.dropout_by_rows(torch_random.dropout)),
        (torch_random, "gamma", random_ops.alone_by_rows(torch_random.gamma)),
        (torch_random, "binomial", random_ops.alone_by_rows(torch_random.binomial)),
        (torch_random, "beta", random_ops.alone_by_rows(torch_random.beta)),
        (torch_random, "categorical", random_ops.categorical_by_rows(torch_random.categorical)),
        (torch_random, "shuffle", random_ops.shuffle_by_rows(torch_random.shuffle)),
        (torch_random, "torch_seed_generator", random_ops.generator_of_replica(torch_random.torch_seed_generator)),
        (seed_generator, "global_seed_generator", random_ops.global_of_replica(seed_generator.global_seed_generator)),
        (seed_generator, "python_random", augmentation.PythonRandom()),
        (SeedGenerator, "next", random_ops.next_of_replica(SeedGenerator.next)),
        (DropoutRNNCell, "get_dropout_mask", random_ops.own_mask("dropout")),
        (DropoutRNNCell, "get_recurrent_dropout_mask", random_ops.own_mask("recurrent_dropout")),
        (DropoutRNNCell, "reset_dropout_mask", random_ops.forget_mask("dropout")),
        (DropoutRNNCell, "reset_recurrent_dropout_mask", random_ops.forget_mask("recurrent_dropout")),
    ]
    equalization, histogram = keras.layers.Equalization, "_custom_histogram_fixed_width"
    targets += [
        (torch_image, "elastic_transform", augmentation.elastic_by_rows(torch_image.elastic_transform)),
        (equalization, histogram, augmentation.histogram_of_batch(getattr(equalization, histogram))),
        (Function, "_run_through_graph", placed_graph.run_through_graph(Function._run_through_graph)),
        (aug_mix, "py_random", augmentation.PythonRandom()),
        (keras.Operation, "__call__", units.call_of_unit(keras.Operation.__call__)),
        (keras.Layer, "add_loss", units.loss_of_unit(keras.Layer.add_loss)),
        (TorchModuleWrapper, "call", torch_modules.call_of_replica(TorchModuleWrapper.call)),
    ]
    kept = "_checkpoint_without_reentrant_generator"
    targets += [
        (checkpoint, kept, recompute.checkpoint_of_replica(getattr(checkpoint, kept))),
        (checkpoint, "CheckpointFunction", recompute.CheckpointOfReplica(checkpoint.CheckpointFunction)),
    ]
    for owner in (torch, torch.random):  # Keras and torch read them from either
        targets += random_ops.states_of_replica(owner)
    recurrent = (keras.layers.RNN, keras.layers.LSTM, keras.layers.GRU)
    targets += [(layer, "inner_loop", fused(layer.inner_loop)) for layer in recurrent]
    spatial = (keras.layers.SpatialDropout1D, keras.layers.SpatialDropout2D, keras.layers.SpatialDropout3D)
    targets += [(layer, "_get_noise_shape", random_ops.noise_shape(layer._get_noise_shape)) for layer in spatial]
    targets += [(torch_random, name, random_ops.by_rows(getattr(torch_random, name))) for name in random_ops.SHAPED]
    for owner, name, function in [*targets, *STAND_INS]:
        _originals.append((owner, name, getattr(owner, name)))
        setattr(owner, name, function)


def _unpatch() -> None:
    """Put Keras's own functions back."""
    while _originals:
        setattr(*_originals.pop())


def seed_generators(model: keras.Model) -> list[SeedGenerator]:
    """The seed generators of a model's layers."""
    return [generator for layer in model._flatten_layers() for generator in layer._seed_generators]
