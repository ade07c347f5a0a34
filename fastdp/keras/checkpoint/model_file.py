"""A plain `.keras` file from a snapshot: values are copied at once, and another thread writes the file."""

from __future__ import annotations

import io
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import keras
import numpy as np
from keras.src.backend.common import global_state
from keras.src.random.seed_generator import GLOBAL_SEED_GENERATOR, global_seed_generator
from keras.src.saving import saving_lib

from fastdp.checkpoint import damage
from fastdp.keras.compile_state import borrowed
from fastdp.keras.parallel_model import ParallelModel

NAME = "model.keras"


class ModelSnapshot:
    """Copies of a model's weights and optimizer, with what else is in a `.keras` file.

    Args:
        model: the model that Keras trains: a parallel one, or a plain one.
    """

    def __init__(self, model: keras.Model) -> None:
        self._rest = io.BytesIO()
        with _template_of(model) as template, zipfile.ZipFile(self._rest, "w") as archive:
            config, metadata = saving_lib._serialize_model_as_json(template)
            archive.writestr("metadata.json", metadata)
            archive.writestr("config.json", config)
            self._values = _Recorded()
            assets = saving_lib.DiskIOStore("assets", archive=archive, mode="w")
            try:
                saving_lib._save_state(template, self._values, assets, inner_path="", visited_saveables=set())
            finally:
                assets.close()

    def write(self, folder: Path) -> None:
        """Write the file into a folder."""
        path = folder / NAME
        path.write_bytes(self._rest.getvalue())
        with zipfile.ZipFile(path, "a") as archive:
            store = saving_lib.H5IOStore("model.weights.h5", archive=archive, mode="w")
            for place, metadata, values in self._values.entries:
                entry = store.make(place, metadata=metadata)
                for name, value in values.items():
                    entry[name] = value
            store.close()


class _Recorded(saving_lib.H5IOStore):
    """Takes what Keras would write into an HDF5 file, and keeps copies."""

    def __init__(self) -> None:
        self.entries: list[tuple[str, dict[str, Any] | None, dict[str, np.ndarray]]] = []

    def __bool__(self) -> bool:
        return True

    def make(self, path: str, metadata: dict[str, Any] | None = None) -> _Recorded:
        """Begin an object's entry."""
        self.entries.append((path, metadata, {}))
        return self

    def __setitem__(self, name: str, value: Any) -> None:
        self.entries[-1][2][name] = np.array(keras.ops.convert_to_numpy(value))


def load_into(model: keras.Model, folder: Path) -> None:
    """Give a built and compiled model, whose optimizer is built too, the weights and the optimizer's state of a file.

    Raises:
        ValueError: it is of another model, or damaged; the message names the file and has Keras's reason.
        OSError: the machine does not let it be read.
    """
    with _template_of(model) as template, warnings.catch_warnings():
        warnings.filterwarnings("error", "Skipping variable loading for optimizer")  # it would begin anew
        try:
            saving_lib.load_weights_only(template, str(folder / NAME))
        except (ValueError, TypeError, RuntimeError, OSError) as error:  # the last two: h5py's, of a damaged file
            if damage.of_the_machine(error):
                raise
            raise ValueError(
                f"{folder / NAME} does not fit this model, or is damaged: {error} Build and compile the same model as "
                "before, or choose another folder."
            ) from error


class ModelValues:
    """Copies of all that `load_into` changes, in host memory: weights, the optimizer's state, seeds and metrics.

    Args:
        model: a built and compiled model. Its optimizer is built now, if it is not yet.
    """

    def __init__(self, model: keras.Model) -> None:
        self._model = model
        with _template_of(model) as template:
            if template.optimizer is not None and not template.optimizer.built:
                template.optimizer.build(template.trainable_variables)
            self._values = [np.array(keras.ops.convert_to_numpy(one)) for one in _variables(template)]

    def give_back(self) -> None:
        """Make all of it what it was."""
        with _template_of(self._model) as template:
            for variable, value in zip(_variables(template), self._values, strict=True):
                variable.assign(value)


def _variables(template: keras.Model) -> list[keras.Variable]:
    """Every variable of a model and of its optimizer, once."""
    optimizer = [] if template.optimizer is None else template.optimizer.variables
    found = [*template.variables, *_seeds(template), *template.metrics_variables, *optimizer]
    return list({id(one): one for one in found}.values())


@contextmanager
def _template_of(model: keras.Model) -> Iterator[keras.Model]:
    """The user's model with the settings that `fit` uses."""
    if not isinstance(model, ParallelModel):
        yield model
        return
    with borrowed(model.template, model):
        yield model.template


# What is in no `.keras` file: seeds and metrics.


def read_variables(model: keras.Model) -> dict[str, list[np.ndarray]]:
    """Copies of the states of a model's seed generators and metrics."""
    parts = {"seeds": _seeds(model), "metrics": model.metrics_variables}
    return {name: [np.array(keras.ops.convert_to_numpy(one)) for one in part] for name, part in parts.items()}


def write_variables(model: keras.Model, values: dict[str, list[np.ndarray]], name: str) -> None:
    """Give the model's "seeds" or "metrics" their values.

    Raises:
        ValueError: the model has another number of them.
    """
    variables = list(_seeds(model)) if name == "seeds" else list(model.metrics_variables)
    if len(variables) != len(values[name]):
        raise ValueError(
            f"The checkpoint has {len(values[name])} states of {name}, and the model {len(variables)}. Build and "
            "compile the model as before, or choose another folder."
        )
    for variable, value in zip(variables, values[name], strict=True):
        variable.assign(value)


def _seeds(model: keras.Model) -> Iterator[keras.Variable]:
    seen = set()
    for layer in model._flatten_layers():
        for generator in layer._seed_generators:
            if id(generator) not in seen:
                seen.add(id(generator))
                yield generator.state


def read_global_seed() -> np.ndarray | None:
    """The state of Keras's own generator, for draws without a seed; None where nothing has been drawn from it."""
    generator = global_state.get_global_attribute(GLOBAL_SEED_GENERATOR)
    return None if generator is None else np.array(keras.ops.convert_to_numpy(generator.state))


def write_global_seed(state: np.ndarray | None) -> None:
    """Set it."""
    if state is None:
        global_state.set_global_attribute(GLOBAL_SEED_GENERATOR, None)
    else:
        global_seed_generator().state.assign(state)
