"""Makes a parallel model look like its template: layers, weights, summary, files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import torch

from fastdp.keras.compile_state import borrowed, follows
from fastdp.keras.h5_files.by_name import is_keras_2_file, load_weights, save_weights
from fastdp.keras.names import numbered_names


class TemplateView(keras.Model):
    """A Keras model with the layers, names, configuration, loss, metrics and files of its `template`."""

    template: keras.Model
    _merge_layer: keras.layers.Layer
    numbers_all_outputs = False  # also number the first of repeated names, as Keras 2.3's multi_gpu_model

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
        """The template's output names, made unique. Keys of losses, metrics and the history use them."""
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

    @property
    def input(self) -> Any:
        """The template's input tensors, in their nest. A subclassed model has none."""
        return super().input if self._inbound_nodes else self.template.input  # inside another model: its input there

    @property
    def output(self) -> Any:
        """The template's output tensors, in their nest. A subclassed model has none."""
        return super().output if self._inbound_nodes else self.template.output

    @property
    def trainable(self) -> bool:
        """Whether the template is trainable. Setting it applies to the template and all its layers."""
        template = self.__dict__.get("_modules", {}).get("template")
        return self._trainable if template is None else template.trainable

    @trainable.setter
    def trainable(self, value: bool) -> None:
        keras.Model.trainable.fset(self, value)

    def get_layer(self, name: str | None = None, index: int | None = None) -> Any:
        """By name: the template, or one of the template's layers. By index: one of `layers`."""
        if name is not None and index is None and name not in {layer.name for layer in self.layers}:
            return self.template.get_layer(name)
        return super().get_layer(name, index)

    def quantize(self, *args: Any, **kwargs: Any) -> Any:
        """Quantize the template. Arguments as in Keras."""
        return self.template.quantize(*args, **kwargs)

    def summary(self, *args: Any, **kwargs: Any) -> None:
        """Print the template's summary. Arguments as in Keras."""
        self.template.summary(*args, **kwargs)

    def get_config(self) -> dict[str, Any]:
        """The template's configuration."""
        return self.template.get_config()

    @classmethod
    def from_config(cls, config: Any, custom_objects: Any = None) -> Any:
        """Refuse: a parallel model belongs to the devices of this process. Copy or save the template instead.

        Raises:
            ValueError: always; the message says what to copy or save instead.
        """
        raise ValueError(
            "A parallel model cannot be copied, pickled, or loaded as a part of another model. Copy or save its "
            "template (parallel.template), and wrap the copy by fastdp.wrap. To train a larger model around it, "
            "build that with the template, and wrap the whole."
        )

    def to_json(self, **kwargs: Any) -> str:
        """The template as JSON, which loads as a plain Keras model."""
        return self.template.to_json(**kwargs)

    # Its loss and metrics, with the compile settings of the parallel model.

    @property
    def losses(self) -> list[Any]:
        """The template's additional losses; within a test step, those of the global batch."""
        return self.template.losses

    def compute_loss(
        self,
        x: Any = None,
        y: Any = None,
        y_pred: Any = None,
        sample_weight: Any = None,
        training: bool = True,
    ) -> Any:
        """Keras's loss of merged outputs, or that of the template's own `compute_loss`."""
        if type(self.template).compute_loss is keras.Model.compute_loss:
            return super().compute_loss(x, y, y_pred, sample_weight, training)
        with borrowed(self.template, self):
            return self.template._compute_loss(x, y, y_pred, sample_weight, training)

    @property
    def metrics(self) -> list[keras.metrics.Metric]:
        """Those of the compile settings, the template's own, and those of its layers, in Keras's order."""
        if follows(self.template, getattr(self, "_loss_tracker", None)):
            return self.template.metrics
        with borrowed(self.template, self):
            return self.template.metrics

    def compute_metrics(self, x: Any, y: Any, y_pred: Any, sample_weight: Any = None) -> Any:
        """Keras's metrics of merged outputs, or those of the template's own `compute_metrics`."""
        if type(self.template).compute_metrics is keras.Model.compute_metrics:
            return super().compute_metrics(x, y, y_pred, sample_weight=sample_weight)
        with borrowed(self.template, self):
            return self.template.compute_metrics(x, y, y_pred, sample_weight=sample_weight)

    # The torch module interface: the template's parameters under the template's names.

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """The template's parameters with their names, each once. Arguments as in torch."""
        return self.template.named_parameters(*args, **kwargs)

    def get_parameter(self, target: str) -> torch.nn.Parameter:
        """One of the template's parameters, by name."""
        return self.template.get_parameter(target)

    def named_buffers(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, torch.Tensor]]:
        """The template's buffers with their names. Arguments as in torch."""
        return self.template.named_buffers(*args, **kwargs)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The template's state dict, which loads into the template too. Arguments as in torch."""
        return self.template.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Load the template's values; all replicas follow at the next step. Arguments as in torch."""
        return self.template.load_state_dict(*args, **kwargs)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        """Implement `to`, `cuda`, `half` and the like: do nothing if no parameter would change.

        Raises:
            ValueError: a parameter would move or change its dtype.
        """
        for name, parameter in self.named_parameters():
            empty = parameter.detach().new_empty(0)
            changed = fn(empty)
            if (changed.dtype, changed.device) != (empty.dtype, empty.device):
                raise ValueError(
                    f"The parameter {name!r} of the parallel model {self.name!r} cannot become {changed.dtype} on "
                    f"{changed.device}: it is {empty.dtype} on {empty.device}, and replicas are copies of it. Devices "
                    "are chosen by gpus= of fastdp.wrap, the dtype by keras.config.set_dtype_policy() before the model "
                    "is made."
                )
        return self

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            template = self.__dict__.get("_modules", {}).get("template")
            if template is None or not hasattr(template, name):
                raise
        raise AttributeError(
            f"A parallel model has no attribute {name!r}; its template has: parallel.template.{name}. (The template's "
            "own methods run its layers on one device.)"
        )

    # Files: the template's.

    def save(self, filepath: Any, overwrite: bool = True, zipped: bool | None = None, **kwargs: Any) -> None:
        """Save the template with this model's loss and optimizer. Loading the file does not need fastdp."""
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

        `by_name=True` loads layers of an `.h5` file by their names; see `fastdp.utils.load_weights`.
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
    """Represents the merge of the replicas' outputs in `layers`. It has no weights and returns its inputs."""

    def call(self, inputs: Any) -> Any:
        """The inputs."""
        return inputs


def merged_outputs() -> keras.layers.Layer:
    """The last of a parallel model's `layers`. It is built, because Keras rebuilds a model with an unbuilt layer for
    each batch.
    """
    layer = _MergedOutputs(name="merged")
    layer.built = True
    return layer


def unique_names(names: Sequence[str]) -> list[str]:
    """Make names unique: repeats get `_1`, `_2`, ... in order. A new name never equals that of another output.

    Example:
        >>> unique_names(["a", "a", "a_1", "a"])
        ['a', 'a_2', 'a_1', 'a_3']
    """
    taken = set(names)
    seen: set[str] = set()
    unique = []
    for name in names:
        candidate, number = name, 0
        while candidate in seen or (number and candidate in taken):
            number += 1
            candidate = f"{name}_{number}"
        seen.add(candidate)
        unique.append(candidate)
    return unique
