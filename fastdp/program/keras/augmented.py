"""A Keras model with layers between the data and it: augmentation on each device, by rows of the global batch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import keras
import numpy as np
import torch
from keras.src.backend import get_stateless_scope, in_stateless_scope
from keras.src.layers.preprocessing.image_preprocessing.base_image_preprocessing_layer import (
    BaseImagePreprocessingLayer,
)

from fastdp.data.augment import Augment
from fastdp.program.keras.random.ops import whole_batch
from fastdp.program.keras.replica import running
from fastdp.program.keras.variables import ReplicaScope
from fastdp.shard import Rows
from fastdp.tensors.row_effects import NotByRowsError

layers = keras.layers
_MIXES = (layers.MixUp, layers.CutMix)
# Layers that move pixels to other places, and with them masks and boxes.
_MOVES_PIXELS = (
    *(layers.RandomFlip, layers.RandomCrop, layers.CenterCrop, layers.Resizing, layers.RandomRotation),
    *(layers.RandomTranslation, layers.RandomZoom, layers.RandomShear, layers.RandomPerspective),
    *(layers.RandomElasticTransform, layers.RandAugment, layers.AugMix, layers.CutMix),
)


class AugmentedModel(keras.Model):
    """A model whose inputs go through layers first. It has the model's name, and the layers of both.

    Args:
        template: the user's model.
        augment: the layers, and which targets move along.

    Attributes:
        stages: the layers, one after the other; those inside a `Pipeline` or a `Sequential` one by one.

    Raises:
        TypeError: something else than layers.
        ValueError: a layer has weights that are trained.
    """

    def __init__(self, template: keras.Model, augment: Augment) -> None:
        super().__init__(name=template.name, dtype=template.dtype_policy)
        self.template = template
        self.stages = _stages(augment.layers)
        self._augment = augment
        self._mixes = any(isinstance(stage, _MIXES) for stage in self.stages)
        self.built = True

    def _flatten_layers(self, include_self: bool = True, recursive: bool = True) -> list[Any]:
        """The layers of both. Not this model itself, which is no code of the user's."""
        every = [one for part in (self.template, *self.stages) for one in part._flatten_layers()]
        return list({id(layer): layer for layer in every}.values())

    @property
    def trainable_variables(self) -> list[keras.Variable]:
        """The template's."""
        return list(self.template.trainable_variables)

    def call(self, inputs: Any, training: bool = False) -> Any:
        """The model's outputs for inputs as they are in the data."""
        x, _ = self.prepared(inputs, None, None, training=training)
        return self.of_prepared(x, training=training)

    def of_prepared(self, x: Any, *, training: bool) -> Any:
        """The model's outputs for inputs that have gone through the layers."""
        return self.template(x, training=training) if self.template._call_has_training_arg else self.template(x)

    @property
    def stages_built(self) -> bool:
        """Whether all layers in front are built."""
        return all(layer.built for stage in self.stages for layer in stage._flatten_layers())

    def build_stages(self, batch: Any) -> None:
        """Build the layers in front, by the first row of a batch."""
        x, _, _ = keras.utils.unpack_x_y_sample_weight(batch)
        row = keras.tree.map_structure(lambda array: keras.ops.convert_to_tensor(np.array(array[:1])), x)
        self.prepared(row, None, None, training=False)

    def moves(self, y: Any) -> bool:
        """Whether targets of this nest go through the layers."""
        return bool(self._augment.kinds_of(y, mixes=self._mixes))

    def prepared(self, x: Any, y: Any, sample_weight: Any, *, training: bool) -> tuple[Any, Any]:
        """Inputs and targets behind the layers. Nothing that is given is changed.

        Args:
            x, y, sample_weight: a batch, or a replica's rows of it, as tensors.
            training: whether layers draw at random.

        Raises:
            NotByRowsError: targets that the layers would have to move, and cannot.
        """
        images, key = self._images(x)
        kinds = self._augment.kinds_of(y, mixes=self._mixes)
        moved = {kind: y if key is None else y[key] for kind, key in kinds.items()}
        self._check(images, y, moved, sample_weight, training)
        forms = _Masks(moved)
        with nullcontext() if training else self._seeds_kept():
            images, moved = self._through(images, moved, training)
        moved = forms.restored(moved)
        if kinds:
            whole = next((moved[kind] for kind, place in kinds.items() if place is None), None)
            y = whole if whole is not None else {**y, **{place: moved[kind] for kind, place in kinds.items()}}
        return (images if key is None else {**x, key: images}), y

    def _through(self, images: Any, moved: dict[str, Any], training: bool) -> tuple[Any, dict[str, Any]]:
        """Images and targets behind all layers."""
        for stage in self.stages:
            if isinstance(stage, _MIXES):  # these would draw outside of training, too
                images, moved = _mixed(stage, images, moved) if training else (images, moved)
            elif isinstance(stage, BaseImagePreprocessingLayer) and set(moved) - {"labels"}:
                found = stage({"images": images, **moved}, training=training)
                images = found.pop("images")
                moved = {kind: found[kind] for kind in moved}
            else:
                images = stage(images, training=training) if stage._call_has_training_arg else stage(images)
        return images, moved

    @contextmanager
    def _seeds_kept(self) -> Iterator[None]:
        """Let no draw count: some layers (`RandomSharpness`) draw outside of training and do not use it."""
        scope: Any = get_stateless_scope() if in_stateless_scope() else None
        if isinstance(scope, ReplicaScope):
            with scope.twin():
                yield
            return
        layers = [layer for stage in self.stages for layer in stage._flatten_layers()]
        states = [generator.state for layer in layers for generator in layer._seed_generators] if scope is None else []
        before = [keras.ops.copy(state.value) for state in states]
        try:
            yield
        finally:
            for state, value in zip(states, before, strict=True):
                state.assign(value)

    def _images(self, x: Any) -> tuple[Any, str | None]:
        """The images among the inputs, and their key."""
        key = self._augment.images
        if key is None and (not keras.tree.is_nested(x) or isinstance(x, torch.Tensor)):
            return x, None
        if key is not None and isinstance(x, dict) and key in x:
            return x[key], key
        keys = sorted(x) if isinstance(x, dict) else type(x).__name__
        raise NotByRowsError(
            f"`images` of fastdp.data.Augment must be the key of the images in a dict x, or None for an array x. "
            f"Received: images={key!r}, and x has {keys}."
        )

    def _check(self, images: Any, y: Any, moved: dict[str, Any], sample_weight: Any, training: bool) -> None:
        """Refuse what would not move along with the images.

        Raises:
            NotByRowsError: as `prepared` says.
        """
        if y is not None and not moved and self._augment.targets is None:
            self._check_masks(images, y)
        if not (training and self._mixes):
            return
        mixing = next(stage for stage in self.stages if isinstance(stage, _MIXES))
        name = type(mixing).__name__
        others = sorted(set(moved) - {"labels"})
        if others:
            raise NotByRowsError(
                f"{name} cannot mix targets of the kind {others[0]!r} in Keras {keras.__version__}. Take it out of "
                "`augment`, or mix them in the data, before fit."
            )
        if sample_weight is not None:
            raise NotByRowsError(
                f"{name} mixes rows, so weights of rows (`sample_weight`, `class_weight`) have no meaning behind it. "
                "Leave them out, or take it out of `augment`."
            )
        labels = moved.get("labels")
        if labels is not None and (not isinstance(labels, torch.Tensor) or labels.ndim != 2):
            shape = tuple(labels.shape) if isinstance(labels, torch.Tensor) else type(labels).__name__
            raise NotByRowsError(
                f"{name} must get labels of the shape (rows, classes), such as keras.utils.to_categorical(y, classes). "
                f'Received: {shape}. Where targets shall stay as they are: fastdp.data.Augment(..., targets="keep").'
            )

    def _check_masks(self, images: torch.Tensor, y: Any) -> None:
        """Refuse targets that look like masks of the images where layers move pixels."""
        moving = [stage for stage in self.stages if isinstance(stage, _MOVES_PIXELS)]
        if not moving or images.ndim != 4:
            return
        sizes = {tuple(images.shape[1:3]), tuple(images.shape[2:])}
        for target in keras.tree.flatten(y):
            if isinstance(target, torch.Tensor) and target.ndim >= 3 and tuple(target.shape[1:3]) in sizes:
                raise NotByRowsError(
                    f"The layer {moving[0].name!r} moves pixels of the images, and the targets have the shape "
                    f"{tuple(target.shape)}: if they are masks or images, they must move along. Pass augment="
                    'fastdp.data.Augment(layers, targets="segmentation_masks"), or targets="keep" where they stay.'
                )


class _Masks:
    """Masks as Keras moves them: with an axis of channels, and with their own dtype afterwards."""

    def __init__(self, moved: dict[str, Any]) -> None:
        mask = moved.get("segmentation_masks")
        self._dtype = mask.dtype if mask is not None else None
        self._flat = mask is not None and mask.ndim == 3
        if mask is not None and self._flat:
            moved["segmentation_masks"] = mask[..., None]

    def restored(self, moved: dict[str, Any]) -> dict[str, Any]:
        """With masks in the form in which they came. Pixels are those of the nearest place, so integers stay exact."""
        if self._dtype is None:
            return moved
        mask = moved["segmentation_masks"]
        mask = mask[..., 0] if self._flat else mask
        return {**moved, "segmentation_masks": mask.to(self._dtype).contiguous()}  # as data come


def _mixed(stage: Any, images: Any, moved: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Run a layer that mixes the rows of the global batch: on all of them, of which the replica keeps its own."""
    run = running()
    if run is not None and (run.frozen_moments or (run.context.size == 1 and run.context.rows.share != 1.0)):
        # A trial of whether the model itself mixes rows, or rows for a trace.
        return keras.ops.cast(images, stage.compute_dtype), moved
    if run is None:
        found = stage({"images": images, **moved}, training=True)
        return found.pop("images"), found
    parts = run.context.exchange([images, *moved.values()], ("rows that a layer mixes", stage.name))
    whole = [torch.cat(list(column)) for column in zip(*parts, strict=True)]
    with whole_batch(run):
        found = stage(dict(zip(("images", *moved), whole, strict=True)), training=True)
    rows: Rows = run.context.rows
    own = {kind: value[rows.start : rows.stop] for kind, value in found.items()}
    return own.pop("images"), own


def _stages(given: Any) -> list[Any]:
    """The layers of a nest of lists, pipelines and sequential models.

    Raises:
        TypeError, ValueError: as in `AugmentedModel`.
    """
    if isinstance(given, (list, tuple)):
        return [stage for part in given for stage in _stages(part)]
    if isinstance(given, (keras.Sequential, layers.Pipeline)):
        return _stages([one for one in given.layers if not isinstance(one, layers.InputLayer)])
    if not isinstance(given, layers.Layer):
        raise TypeError(
            "`augment` must be a Keras layer, a list of layers, a keras.layers.Pipeline, a keras.Sequential or a "
            f"fastdp.data.Augment. Received: {given!r} (of type {type(given).__name__})"
        )
    if given.trainable_variables:
        raise ValueError(
            f"The layer {given.name!r} of `augment` has weights that would be trained, but layers between the data and "
            "the model are not. Set layer.trainable = False, or make it a part of the model."
        )
    return [given]


def prepared_call(
    model: AugmentedModel | None, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call of the template: inputs as they leave the layers in front, run on this thread."""
    if model is None:
        return args, kwargs
    kwargs = dict(kwargs)
    inputs, *others = args or (kwargs.pop("inputs"),)
    inputs = keras.tree.map_structure(keras.ops.convert_to_tensor, inputs)
    x, _ = model.prepared(inputs, None, None, training=bool(kwargs.get("training")))
    return (x, *others), kwargs


def augmented(template: keras.Model, augment: Any) -> AugmentedModel | None:
    """A model with the layers of `augment` in front of it; None without any."""
    if augment is None:
        return None
    return AugmentedModel(template, augment if isinstance(augment, Augment) else Augment(augment))
