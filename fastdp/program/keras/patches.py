"""Patches Keras so that random ops and normalization know their replica while replicas run.

While replicas run, `replica_aware` replaces a few functions of Keras, torch, NumPy and Python
(`fastdp.patching`). The replacements behave as before in every thread that runs no replica.

Random draws are indexed by the global row: a replica draws for the whole global batch, with the seed
that one device would use, and keeps its own rows. So 1, 2 and 8 devices see the same masks and noise as plain Keras.
(The exception is unseeded dropout: it takes one number per step from torch's global generator, where plain Keras draws
all numbers from it.)

BatchNormalization's moments are recorded, so that the moving statistics can be updated with the mean and
the variance of the global batch. With `sync_batch_norm` the layer itself uses the moments of the global batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
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

from fastdp.patching import Patch
from fastdp.program.keras import forward_mode, recompute, torch_modules
from fastdp.program.keras.batch_norm import moments_of_replica
from fastdp.program.keras.placement import graph as placed_graph
from fastdp.program.keras.random import augmentation
from fastdp.program.keras.random import ops as random_ops
from fastdp.program.keras.random.host_draws import PYTHON_AND_NUMPY
from fastdp.program.keras.recurrent import fused
from fastdp.program.keras.rows import units
from fastdp.tensors.checkpoint_place import checkpoint_place


def _by_replica() -> Iterator[tuple[Any, str, Callable[[Any], Any]]]:
    """The owner, name and replacement of each function of Keras, torch, NumPy and Python that must know its replica."""
    yield keras.layers.BatchNormalization, "_moments", moments_of_replica
    # Random draws.
    yield torch_random, "dropout", random_ops.dropout_by_rows
    for name in ("gamma", "binomial", "beta"):
        yield torch_random, name, random_ops.alone_by_rows
    yield torch_random, "categorical", random_ops.categorical_by_rows
    yield torch_random, "shuffle", random_ops.shuffle_by_rows
    for name in random_ops.SHAPED:
        yield torch_random, name, random_ops.by_rows
    yield torch_random, "torch_seed_generator", random_ops.generator_of_replica
    yield seed_generator, "global_seed_generator", random_ops.global_of_replica
    yield seed_generator, "python_random", augmentation.PythonRandom
    yield SeedGenerator, "next", random_ops.next_of_replica
    for owner in (torch, torch.random):  # Keras and torch use both
        for name in ("manual_seed", "get_rng_state", "set_rng_state"):
            yield owner, name, random_ops.state_of_replica
    yield from PYTHON_AND_NUMPY
    # Layers that draw, or hold state that all replicas share.
    for kind in ("dropout", "recurrent_dropout"):
        yield DropoutRNNCell, f"get_{kind}_mask", partial(random_ops.own_mask, kind)
        yield DropoutRNNCell, f"reset_{kind}_mask", partial(random_ops.forget_mask, kind)
    for layer in (keras.layers.SpatialDropout1D, keras.layers.SpatialDropout2D, keras.layers.SpatialDropout3D):
        yield layer, "_get_noise_shape", random_ops.noise_shape
    for layer in (keras.layers.RNN, keras.layers.LSTM, keras.layers.GRU):
        yield layer, "inner_loop", fused
    yield torch_image, "elastic_transform", augmentation.elastic_by_rows
    yield keras.layers.Equalization, "_custom_histogram_fixed_width", augmentation.histogram_of_batch
    yield aug_mix, "py_random", augmentation.PythonRandom
    yield from forward_mode.changes()
    # Calls of layers and operations.
    yield Function, "_run_through_graph", placed_graph.run_through_graph
    yield keras.Operation, "__call__", units.call_of_unit
    yield keras.Layer, "add_loss", units.loss_of_unit
    yield TorchModuleWrapper, "call", torch_modules.call_of_replica
    yield checkpoint_place(recompute.checkpoint_of_replica)
    yield checkpoint, "CheckpointFunction", recompute.CheckpointOfReplica


def replica_aware() -> AbstractContextManager[None]:
    """A context in which Keras's random ops, BatchNormalization and recurrent dropout know their replica."""
    return _patch


def replaced_places() -> frozenset[tuple[Any, str]]:
    """The attributes of Keras, torch, NumPy and Python that are replaced while replicas run, as (owner, name)."""
    return _patch.places


_patch = Patch(_by_replica())
