"""Lists the images of a folder by class, and decodes them to arrays of one size."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"))


class BrokenImageError(ValueError):
    """An image cannot be decoded; the message names its file."""


@dataclass(frozen=True)
class ImageFolder:
    """Images and their classes.

    Attributes:
        files: paths of the images below the folder, in the order in which they are packed.
        labels: the class of each, as a number; None if the folder has no subfolders.
        classes: the names of the classes, sorted: those of the subfolders.
    """

    folder: Path
    files: tuple[str, ...]
    labels: NDArray[np.int64] | None
    classes: tuple[str, ...]

    def digest(self, settings: dict[str, Any]) -> str:
        """A number that is another one if files, their sizes, their order or settings are others."""
        sizes = [(self.folder / file).stat().st_size for file in self.files]
        text = json.dumps([self.files, sizes, self.classes, settings], sort_keys=True)
        return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()


def list_images(folder: Path, seed: int | None) -> ImageFolder:
    """List the images below a folder. Subfolders are classes; without any, the images have no labels.

    Args:
        folder: `folder/CLASS/.../image.jpg`, or `folder/image.jpg`.
        seed: mixes the images by this seed, so that a chunk of rows holds several classes; None sorts them.

    Raises:
        FileNotFoundError, NotADirectoryError: there is no such folder.
        ValueError: it has no images, or images both beside and inside subfolders.
    """
    if not folder.is_dir():
        kind = NotADirectoryError if folder.exists() else FileNotFoundError
        raise kind(f"{folder} is no folder of images: pass one with a subfolder for each class")
    found = sorted(
        Path(here, name).relative_to(folder)
        for here, _, names in os.walk(folder)
        for name in names
        if Path(name).suffix.lower() in SUFFIXES
    )
    loose = [path for path in found if len(path.parts) == 1]
    if not found:
        raise ValueError(f"{folder} has no images ({', '.join(sorted(SUFFIXES))}): pass a folder that has some")
    if loose and len(loose) < len(found):
        raise ValueError(
            f"{folder} has images beside its subfolders, such as {loose[0]}: move them into subfolders too"
        )
    if seed is not None:
        found = [found[place] for place in np.random.default_rng(seed).permutation(len(found))]
    classes = () if loose else tuple(sorted({path.parts[0] for path in found}))
    numbers = {name: number for number, name in enumerate(classes)}
    labels = None if loose else np.array([numbers[path.parts[0]] for path in found], np.int64)
    return ImageFolder(folder, tuple(path.as_posix() for path in found), labels, classes)


def load_image(path: Path, height: int, width: int) -> NDArray[np.uint8]:
    """Decode an image to RGB of one size: scaled until it covers the size, and cut to its middle.

    Raises:
        BrokenImageError: it cannot be decoded, or has so many pixels that Pillow refuses it.
    """
    pillow = importlib.import_module("PIL.Image")
    ops = importlib.import_module("PIL.ImageOps")
    try:
        with pillow.open(path) as image:
            image.draft("RGB", (2 * width, 2 * height))  # JPEG: decode no more than twice the size
            whole = ops.exif_transpose(image).convert("RGB")
            return np.asarray(ops.fit(whole, (width, height), pillow.Resampling.BILINEAR), np.uint8)
    except (OSError, ValueError, SyntaxError, EOFError, pillow.DecompressionBombError) as error:
        raise BrokenImageError(f"{path} cannot be decoded: {error}") from error
