"""What a parallel model looks like from outside: the template, and its files."""

from __future__ import annotations

from typing import Any

import keras

from fastdp.keras.by_name import is_keras_2_file, load_weights, save_weights
from fastdp.keras.compile_state import borrowed
from fastdp.keras.names import numbered_names, unique_names


class TemplateView(keras.Model):
    """A Keras model with the layers, names, configuration and files of its `template`."""

    template: keras.Model
    _merge_layer: keras.layers.Layer
    numbers_all_outputs = False  # of a repeated name, the first too: as Keras 2.3's multi_gpu_model

    @property
    def layers(self) -> list[keras.layers.Layer]:
        """Input layers, the template, and the merge: `layers[-2]` is the template, as in Keras 2."""
        inputs = [layer for layer in self.template.layers if isinstance(layer, keras.layers.InputLayer)]
        return [*inputs, self.template, self._merge_layer]

    @layers.setter
    def layers(self, _: Any) -> None:
        raise AttributeError("`layers` of a parallel model cannot be set: change the template, and wrap it again.")

    @property
    def inputs(self) -> Any:
        """The template's inputs; None for a subclassed model."""
        return getattr(self.template, "inputs", None)

    @property
    def outputs(self) -> Any:
        """The template's outputs; None for a subclassed model."""
        return getattr(self.template, "outputs", None)

    @property
    def input_names(self) -> Any:
        """The template's input names; None for a subclassed model."""
        return getattr(self.template, "input_names", None)

    @property
    def output_names(self) -> list[str] | None:
        """The template's output names, made unique: loss, metric and history keys go by them."""
        names = getattr(self.template, "output_names", None)
        if names is None:
            return None
        return numbered_names(names) if self.numbers_all_outputs else unique_names(names)

    @property
    def input_shape(self) -> Any:
        """The template's input shape. A subclassed model has none."""
        return self.template.input_shape

    @property
    def output_shape(self) -> Any:
        """The template's output shape. A subclassed model has none."""
        return self.template.output_shape

    def summary(self, *args: Any, **kwargs: Any) -> None:
        """Print the template's summary. Arguments as in Keras."""
        self.template.summary(*args, **kwargs)

    def get_config(self) -> dict[str, Any]:
        """The template's configuration."""
        return self.template.get_config()

    @classmethod
    def from_config(cls, config: Any, custom_objects: Any = None) -> Any:
        """Refused: a parallel model belongs to the devices of this process. Files and copies are the template's.

        Raises:
            ValueError: always; says what to copy or save instead.
        """
        raise ValueError(
            "A parallel model cannot be copied, pickled, or loaded as a part of another model. Copy or save its "
            "template (parallel.template), and wrap the copy by fastdp.wrap. To train a larger model around it, "
            "build that with the template, and wrap the whole."
        )

    def to_json(self, **kwargs: Any) -> str:
        """The template as JSON: it loads as a plain Keras model."""
        return self.template.to_json(**kwargs)

    # Files: the template's.

    def save(self, filepath: Any, overwrite: bool = True, zipped: bool | None = None, **kwargs: Any) -> None:
        """Save the template, with this model's loss and optimizer. The file needs no fastdp to load."""
        with borrowed(self.template, self):
            self.template.save(filepath, overwrite=overwrite, zipped=zipped, **kwargs)

    def save_weights(self, filepath: Any, overwrite: bool = True, **kwargs: Any) -> None:
        """Save the template's weights, in Keras 3's format `.weights.h5` or Keras 2's `.h5`."""
        if is_keras_2_file(filepath):
            save_weights(self.template, filepath, overwrite, **kwargs)
            return
        with borrowed(self.template, self):
            self.template.save_weights(filepath, overwrite=overwrite, **kwargs)

    def load_weights(self, filepath: Any, skip_mismatch: bool = False, **kwargs: Any) -> None:
        """Load weights into the template; all replicas follow at the next step.

        `by_name=True` loads the layers of an `.h5` file that have a namesake: see `fastdp.utils.load_weights`.
        """
        if is_keras_2_file(filepath) or kwargs.get("by_name"):
            load_weights(self.template, filepath, skip_mismatch=skip_mismatch, **kwargs)
            return
        with borrowed(self.template, self):
            self.template.load_weights(filepath, skip_mismatch=skip_mismatch, **kwargs)

    def export(self, filepath: Any, *args: Any, **kwargs: Any) -> Any:
        """Export the template. Arguments as in Keras."""
        return self.template.export(filepath, *args, **kwargs)


class _MergedOutputs(keras.layers.Layer):
    """Stands for the merge of the replicas' outputs in `layers`. It has no weights, and passes values on."""

    def call(self, inputs: Any) -> Any:
        """The inputs."""
        return inputs


def merged_outputs() -> keras.layers.Layer:
    """The last of a parallel model's `layers`; built, since Keras builds a model with an unbuilt layer anew for
    each batch."""
    layer = _MergedOutputs(name="merged")
    layer.built = True
    return layer
