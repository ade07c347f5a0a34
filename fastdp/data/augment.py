"""`Augment`: which layers stand between the data and a model, and which targets move along with the images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

KINDS = ("labels", "bounding_boxes", "segmentation_masks")
KEEP = "keep"


@dataclass(frozen=True, slots=True)
class Augment:
    """Layers between the data and a Keras model, for `fastdp.wrap(model, augment=...)`.

    Args:
        layers: a Keras layer, a list of layers, a `keras.layers.Pipeline` or a `keras.Sequential`.
        images: the key of the images if `x` is a dict; None if `x` is one array. Other inputs stay as they are.
        targets: which targets move along with the images, and how.

            - None: those of a dict `y` under Keras's own keys "labels", "bounding_boxes" and "segmentation_masks". An
              array `y` is labels if a layer mixes rows (`MixUp`, `CutMix`), and stays as it is otherwise. An array of
              the height and width of the images, which are moved, is an error: it may be a mask.
            - "labels" or "segmentation_masks": `y` is of this kind.
            - a dict from keys of a dict `y` to kinds: `{"mask": "segmentation_masks"}`.
            - "keep": targets stay as they are.

    Raises:
        ValueError: another kind of target.
        TypeError: `targets` is neither a string, nor a dict, nor None; `images` is neither a string nor None.

    Example:
        >>> stages = [keras.layers.RandomFlip(seed=1), keras.layers.MixUp(seed=2)]  # doctest: +SKIP
        >>> augment = Augment(stages, images="photo")  # doctest: +SKIP
        >>> parallel = fastdp.wrap(model, gpus=8, augment=augment)  # doctest: +SKIP
    """

    layers: Any
    images: str | None = None
    targets: str | Mapping[str, str] | None = None

    def __post_init__(self) -> None:
        targets = self.targets
        if self.images is not None and not isinstance(self.images, str):
            raise TypeError(f"`images` must be the key of the images in a dict, or None. Received: {self.images!r}")
        if targets is not None and not isinstance(targets, (str, Mapping)):
            raise TypeError(f"`targets` must be None, a kind of targets, or a dict of kinds. Received: {targets!r}")
        kinds = (*KINDS, KEEP)
        given = [targets] if isinstance(targets, str) else [] if targets is None else list(targets.values())
        for kind in given:
            if kind not in kinds:
                raise ValueError(f"`targets` must be of the kinds {kinds}. Received: {kind!r}")

    def kinds_of(self, y: Any, *, mixes: bool) -> dict[str, Any]:
        """Which parts of `y` move: the kind of each, and its key in `y` (None: all of `y`).

        Args:
            y: the targets of a batch, in any nest; None if there are none.
            mixes: whether a layer mixes rows.
        """
        if y is None or self.targets == KEEP:
            return {}
        if isinstance(self.targets, str):
            return {self.targets: None}
        if isinstance(self.targets, Mapping):
            return {kind: key for key, kind in self.targets.items() if kind != KEEP}
        named = {kind: kind for kind in KINDS if isinstance(y, Mapping) and kind in y}
        return named or ({"labels": None} if mixes else {})
