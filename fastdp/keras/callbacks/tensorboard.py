"""`TensorBoard`: Keras's callback of that name without TensorFlow, for parallel models and plain ones."""

from __future__ import annotations

import os
import time
import weakref
from collections.abc import Iterator, Mapping
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import keras

from fastdp.keras.callbacks.embeddings import Embeddings
from fastdp.keras.callbacks.event_files import EventFile
from fastdp.keras.callbacks.profile import Profile
from fastdp.keras.callbacks.watched import Watched
from fastdp.keras.callbacks.weight_images import pixels_of
from fastdp.keras.fit.callbacks import WritesFiles
from fastdp.options import check_flag
from fastdp.warn import warn_user


class TensorBoard(WritesFiles):
    """Writes losses, metrics, histograms and images of weights for TensorBoard, by torch's writer or tensorboardX.

    Arguments, tags and folders are those of `keras.callbacks.TensorBoard`, which needs TensorFlow: `log_dir/train` and
    `log_dir/validation` with `epoch_loss` and the like by epoch, `batch_loss` by batch,
    `evaluation_loss_vs_iterations`, and `NAME/histogram` and `NAME/image` by epoch for each weight. The weights of a
    parallel model are its template's.

    Args:
        log_dir: the folder.
        histogram_freq: write histograms of all weights every so many epochs. 0: never.
        write_graph: write the layers of a Functional or Sequential model, which TensorBoard shows as a graph.
        write_images: with histograms, also write weights of up to three dimensions as images, from black, the smallest
            number in it, to white, the largest. (Keras shows numbers from 0 to 1 and cuts off the others.)
        write_steps_per_second: write `epoch_steps_per_second`, and `batch_steps_per_second` where batches are written.
        update_freq: "epoch", "batch" for each batch, or a number of batches: how often to write losses and metrics.
        profile_batch: the number of a batch, counted from 1 over all epochs, or (first, last): write a trace of their
            steps to `log_dir/train/trace_batch_N.json`, for https://ui.perfetto.dev (see `fastdp.trace`). 0: never.
        embeddings_freq: write the weights of Embedding layers every so many epochs, for TensorBoard's projector.
            0: never.
        embeddings_metadata: the file with a label for each row of an Embedding, in `log_dir` or by its whole path; or
            a dict of such files by the layers' names.

    Raises:
        ImportError: neither tensorboard nor tensorboardX is installed: pip install 'fastdp[tensorboard]'.
        ValueError: an argument is none of these; `embeddings_metadata` names a layer that is no Embedding (in `fit`).

    `tf.summary` calls inside a model write nothing here. The callback changes no result, and steps are captured as
    without it.

    Example:
        >>> board = fastdp.callbacks.TensorBoard("logs", histogram_freq=1)  # doctest: +SKIP
        >>> parallel.fit(x, y, validation_data=(u, v), callbacks=[board])  # doctest: +SKIP
    """

    def __init__(
        self,
        log_dir: Any = "logs",
        histogram_freq: int = 0,
        write_graph: bool = True,
        write_images: bool = False,
        write_steps_per_second: bool = False,
        update_freq: str | int = "epoch",
        profile_batch: Any = 0,
        embeddings_freq: int = 0,
        embeddings_metadata: Any = None,
    ) -> None:
        super().__init__()
        self._arguments = {
            "log_dir": log_dir,
            "histogram_freq": histogram_freq,
            "write_graph": write_graph,
            "write_images": write_images,
            "write_steps_per_second": write_steps_per_second,
            "update_freq": update_freq,
            "profile_batch": profile_batch,
            "embeddings_freq": embeddings_freq,
            "embeddings_metadata": embeddings_metadata,
        }
        if not isinstance(log_dir, (str, os.PathLike)):
            raise TypeError(f"`log_dir` must be the path of a folder. Received: {log_dir!r}.")
        for name in ("write_graph", "write_images", "write_steps_per_second"):
            check_flag(name, self._arguments[name])
        self.log_dir = str(log_dir)
        self.histogram_freq = _every("histogram_freq", histogram_freq)
        self.write_graph, self.write_images = write_graph, write_images
        self.write_steps_per_second = write_steps_per_second
        self.update_freq = _update_freq(update_freq)
        self.embeddings_freq = _every("embeddings_freq", embeddings_freq)
        self.embeddings_metadata = embeddings_metadata
        self._profile = Profile(profile_batch, Path(self.log_dir, "train"))
        self._train = EventFile(Path(self.log_dir, "train"), "fastdp.callbacks.TensorBoard")
        self._validation = EventFile(Path(self.log_dir, "validation"), "fastdp.callbacks.TensorBoard")
        self._batches = 0
        self._training = False
        self._told_of: set[str] = set()
        # Batches of each epoch are of no interest then: Keras may tell of them in another thread, as it does without.
        self.async_safe = self.update_freq is None and self._profile.batches is None
        self._closing = weakref.finalize(self, _close, self._train, self._validation, self._profile)

    def set_model(self, model: keras.Model) -> None:
        """Keras calls it at the beginning of `fit`, `evaluate` and `predict`."""
        super().set_model(model)
        self._watched = Watched(model)

    def close(self) -> None:
        """Close the event files."""
        self._training = False
        _close(self._train, self._validation, self._profile)

    # What Keras calls.

    def on_train_begin(self, logs: Any = None) -> None:
        """Write the graph."""
        self.close()
        self._training = True
        self._batches = 0
        self._embeddings = Embeddings(self._watched.template, self.embeddings_metadata, self.log_dir)
        if self.write_graph:
            self._write_graph()

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Begin to count steps per second."""
        self._began, self._iterations_before = time.perf_counter(), self._iterations or 0

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        """Begin a batch."""
        self._batches += 1
        self._profile.begin(self._batches)
        self._batch_began = time.perf_counter()

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Write the values of a batch."""
        self._profile.end(self._batches)
        if self.update_freq is None or self._batches % self.update_freq:
            return
        values = {f"batch_{name}": value for name, value in _scalars(logs)}
        if self.write_steps_per_second:
            values["batch_steps_per_second"] = 1 / max(1e-9, time.perf_counter() - self._batch_began)
        self._train.scalars(values, self._batches)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Write the values of an epoch, and weights if it is time."""
        train = {f"epoch_{name}": value for name, value in _scalars(logs) if not name.startswith("val_")}
        train |= {f"epoch_{name}": value for name, value in self._learning_rates()}
        if self.write_steps_per_second and self._iterations is not None:
            seconds = max(1e-9, time.perf_counter() - self._began)
            train["epoch_steps_per_second"] = (self._iterations - self._iterations_before) / seconds
        self._train.scalars(train, epoch)
        validation = {f"epoch_{name[4:]}": value for name, value in _scalars(logs) if name.startswith("val_")}
        self._validation.scalars(validation, epoch)
        if self.histogram_freq and epoch % self.histogram_freq == 0:
            self._write_weights(epoch)
        if self.embeddings_freq and epoch % self.embeddings_freq == 0:
            self._embeddings.write(self._train, epoch)
        self._train.flush()
        self._validation.flush()

    def on_test_end(self, logs: Any = None) -> None:
        """Write what `evaluate`, or validation, has found, over the optimizer's steps."""
        if self._iterations is not None:
            values = {f"evaluation_{name}_vs_iterations": value for name, value in _scalars(logs)}
            self._validation.scalars(values, self._iterations)
        if not self._training:  # an `evaluate` of its own has no other end
            self._validation.close()

    def on_train_end(self, logs: Any = None) -> None:
        """Close the event files."""
        self.close()
        self._profile.check(self._batches)

    # What is written.

    @property
    def _optimizer(self) -> Any:
        """The optimizer, without the one that scales its loss; None for a model that is not compiled."""
        optimizer = getattr(self.model, "optimizer", None)
        return getattr(optimizer, "inner_optimizer", optimizer)

    @property
    def _iterations(self) -> int | None:
        """The steps of the optimizer so far."""
        optimizer = getattr(self.model, "optimizer", None)
        iterations = getattr(optimizer, "iterations", None)
        return None if iterations is None else int(keras.ops.convert_to_numpy(iterations))

    def _learning_rates(self) -> Iterator[tuple[str, float]]:
        """The learning rate, by its tag; of several optimizers each one's."""
        optimizer = self._optimizer
        several = getattr(optimizer, "optimizers", None)
        if several is not None:
            for one in several:
                yield f"learning_rate_{one.name}", float(keras.ops.convert_to_numpy(one.learning_rate))
        elif isinstance(optimizer, keras.optimizers.Optimizer):
            yield "learning_rate", float(keras.ops.convert_to_numpy(optimizer.learning_rate))

    def _write_graph(self) -> None:
        """Write the model's configuration, if TensorBoard can draw it. One that has none is told of."""
        template = self._watched.template
        if type(template).__name__ not in ("Functional", "Sequential"):
            return
        try:
            self._train.keras_graph(template.to_json())
        except (TypeError, ValueError, NotImplementedError) as error:
            self._tell("graph", f"TensorBoard gets no graph of the model {template.name!r}, which has no JSON: {error}")

    def _write_weights(self, epoch: int) -> None:
        """Write histograms of weights, and images."""
        for layer in self._watched.template.layers:
            for weight in layer.weights:
                name = weight.path.replace(":", "_")
                values = keras.ops.convert_to_numpy(keras.ops.cast(weight, "float32"))
                if not self._train.histogram(f"{name}/histogram", values, epoch):
                    self._tell(name, f"TensorBoard gets no histogram of {name}, which has no finite number.")
                pixels = pixels_of(values) if self.write_images else None
                if pixels is not None:
                    self._train.image(f"{name}/image", pixels, epoch)

    def _tell(self, what: str, message: str) -> None:
        """Warn, once for each thing."""
        if what not in self._told_of:
            self._told_of.add(what)
            warn_user(message)


def _close(*files: Any) -> None:
    """Close what is open."""
    for file in files:
        file.close()


def _scalars(logs: Mapping[str, Any] | None) -> list[tuple[str, float]]:
    """The numbers among Keras's values; a `train_step` may return anything."""
    found = []
    for name, value in (logs or {}).items() if isinstance(logs, dict) else ():
        try:
            found.append((name, float(value)))
        except (TypeError, ValueError):
            continue
    return found


def _every(name: str, epochs: Any) -> int:
    """Check a number of epochs.

    Raises:
        ValueError: it is not a whole number, at least 0.
    """
    whole = isinstance(epochs, Integral) or (isinstance(epochs, Real) and float(epochs).is_integer())
    if isinstance(epochs, bool) or not whole or epochs < 0:
        raise ValueError(f"`{name}` must be a number of epochs, or 0 for never. Received: {epochs!r}.")
    return int(epochs)


def _update_freq(asked: str | int) -> int | None:
    """Every how many batches to write; None for epochs only.

    Raises:
        ValueError: it is neither "epoch", "batch" nor a number of batches.
    """
    if asked == "epoch":
        return None
    batches = 1 if asked == "batch" else asked
    if isinstance(batches, bool) or not isinstance(batches, int) or batches < 1:
        raise ValueError(f'`update_freq` must be "epoch", "batch" or a number of batches. Received: {asked!r}.')
    return batches
