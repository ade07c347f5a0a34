"""Keras's `fit` on the cases of cases.py, plain on any backend and by fastdp: what bench/gpu/worker.py runs."""

from __future__ import annotations

import importlib
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import keras

from bench.gpu.cases import CLASSES, Case
from fastdp.benchmark import models

layers = keras.layers
WARM_UP = 3
COMPILE_SECONDS = 240.0
Run = Callable[..., float]


class Positions(layers.Layer):  # type: ignore[misc]
    """Adds a trainable vector to each position."""

    def build(self, shape: Any) -> None:
        """Create a vector for each position."""
        self.positions = self.add_weight(shape=shape[1:], initializer=keras.initializers.RandomNormal(stddev=0.02))

    def call(self, x: Any) -> Any:
        """The sum."""
        return x + keras.ops.cast(self.positions, x.dtype)


def encoder(width: int, depth: int, heads: int, wide: int, vocabulary: int, tokens: int) -> keras.Model:
    """The layers of torch_ways.Encoder."""
    inputs = layers.Input((tokens,), dtype="int32")
    x = layers.LayerNormalization(epsilon=1e-5)(Positions()(layers.Embedding(vocabulary, width)(inputs)))
    for _ in range(depth):
        x = layers.LayerNormalization(epsilon=1e-5)(x + layers.MultiHeadAttention(heads, width // heads)(x, x))
        inner = layers.Dense(width)(layers.Dense(wide, activation="gelu")(x))
        x = layers.LayerNormalization(epsilon=1e-5)(x + inner)
    return keras.Model(inputs, layers.Dense(CLASSES, dtype="float32")(layers.GlobalAveragePooling1D()(x)))


def application(name: str, shape: tuple[int, ...]) -> keras.Model:
    """A model of keras.applications that ends in fp32 logits."""
    made = getattr(keras.applications, name)(weights=None, input_shape=shape, include_top=False, pooling="avg")
    return keras.Model(made.inputs, layers.Dense(CLASSES, dtype="float32")(made.outputs[0]))


def build(case: Case) -> keras.Model:
    """The model of a case, with a fixed seed and the case's dtype policy."""
    keras.config.set_dtype_policy("mixed_bfloat16" if case.precision == "bf16" else "float32")
    keras.utils.set_random_seed(0)
    if case.model == "encoder":
        return encoder(**case.options)
    if case.model == "mlp":
        return models.build("mlp", "keras")
    return application({"resnet50": "ResNet50", "xception": "Xception"}[case.model], case.shape)


def allow_tf32() -> None:
    """Allow TF32 matrix products, JAX's default."""
    if keras.backend.backend() == "torch":
        importlib.import_module("torch").set_float32_matmul_precision("high")


class Clock(keras.callbacks.Callback):  # type: ignore[misc]
    """The seconds of the last epoch, from its first batch to its last loss on the host."""

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Start."""
        self.began = time.perf_counter()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Stop once the loss is on the host."""
        float(logs["loss"])
        self.seconds = time.perf_counter() - self.began


class Fitted:
    """A compiled model and the data of a round.

    Args:
        wrap: turns the model into the object that is trained.
        part: divisor of the case's rows per batch; 0 is a batch of one row.
    """

    def __init__(self, case: Case, steps: int, wrap: Callable[[keras.Model], Any], part: int = 1) -> None:
        allow_tf32()
        self.rows = case.rows // part if part else 1
        self.template = build(case)
        self.model = wrap(self.template)
        adam = case.optimizer == "adam"
        optimizer = keras.optimizers.Adam(1e-4) if adam else keras.optimizers.SGD(0.01, momentum=0.9)
        self.model.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        self.data = case.data(max(steps, WARM_UP), self.rows)
        self.clock = Clock()

    def train(self, count: int) -> float:
        """Train `count` steps; returns their seconds."""
        x, y = (array[: count * self.rows] for array in self.data)
        how: dict[str, Any] = {"shuffle": False, "verbose": 0, "callbacks": [self.clock]}
        self.model.fit(x, y, batch_size=self.rows, **how)
        return self.clock.seconds

    @property
    def parameters(self) -> int:
        """The number of trainable parameters."""
        return sum(math.prod(variable.shape) for variable in self.template.trainable_variables)


def wrap_options(how: str) -> dict[str, Any]:
    """The arguments of `fastdp.wrap` for eager, traced, compiled or graph steps, a compiled graph, or a step graph."""
    modes = {"eager": None, "traced": "trace", "compiled": "inductor", "graph": "trace", "compiled graph": "inductor"}
    if how == "step graph":
        return {"compile": "trace", "graph": "step"}
    return {"compile": modes[how], "graph": "auto" if "graph" in how else None}


def facts_of(model: Any) -> dict[str, Any]:
    """Facts from a parallel model's report: how its steps run, and the seconds to capture them."""
    report = model.report().to_dict()
    seconds = [
        sum(value for key, value in entry.items() if key in ("trace_seconds", "record_seconds") and value)
        for entry in report["steps"]
    ]
    return {"report": report, "capture_seconds": round(max(seconds, default=0.0), 3)}


class EngineSteps:
    """Steps of a parallel model's engine, without Keras's loop, on batches made beforehand.

    Args:
        fitted: must have trained, so that its steps are captured.
    """

    def __init__(self, fitted: Fitted) -> None:
        flatten = importlib.import_module("fastdp.program.keras.batch").flatten_batch
        self.engine, self.fitted = fitted.model.engine, fitted
        x, y = fitted.data
        spans = [slice(start, start + fitted.rows) for start in (0, fitted.rows)]
        made = [flatten((x[span], y[span], None)) for span in spans]
        self.batches, self.structure = [arrays for arrays, _ in made], made[0][1]

    def train(self, batch: Sequence[Any], **more: Any) -> None:
        """One step, with the arguments that `fit` uses without metrics."""
        self.engine.train(batch, structure=self.structure, wants_outputs=False, **more)

    def fed(self, count: int) -> float:
        """Steps on batches in host memory; the next batch is prefetched as in `fit`, if the engine supports it."""
        stage = getattr(self.engine, "stage", None)
        began = time.perf_counter()
        for number in range(count):
            batch, coming = self.batches[number % 2], self.batches[(number + 1) % 2]
            self.train(batch, **({} if stage is None else {"while_running": lambda coming=coming: stage(coming)}))
        seconds = time.perf_counter() - began
        if stage is not None:
            self.engine.forget_staged()
        return seconds

    def on_the_card(self) -> Run:
        """Steps on a batch that is already on the first device."""
        device, there = self.engine.devices[0], []
        for array in self.batches[0]:
            there.append(device.empty(array.shape, array.dtype))
            device.copy(there[-1], array)

        def run(count: int) -> float:
            began = time.perf_counter()
            for _ in range(count):
                self.train(there)
            return time.perf_counter() - began

        return run

    def bare(self, how: str) -> Run:
        """The first replica's work in a loop on its worker, without the engine.

        If steps are graphs, the work is the replay of its graphs and the update; else its forward, backward and update.
        The host waits once, at the end.

        Raises:
            NotImplementedError: graphs were requested, and none was recorded.
        """
        replica = self.engine.replicas[0]
        kind, noted = type(replica), dict[str, Any]()
        train, update = kind.train, kind.update

        def note_train(one: Any, batch: Any, context: Any) -> Any:
            noted.update(batch=batch, context=context)
            return train(one, batch, context)

        def note_update(one: Any, totals: Any) -> None:
            noted.update(totals=totals)
            update(one, totals)

        kind.train, kind.update = note_train, note_update
        by_host, self.engine.host_launch.enabled = self.engine.host_launch.enabled, False
        try:
            self.train(self.batches[0])
        finally:
            kind.train, kind.update = train, update
            self.engine.host_launch.enabled = by_host
        batch, context = noted["batch"], noted["context"]
        step: Callable[[], object] = lambda: replica.train(batch, context)  # noqa: E731
        if "graph" in how:
            captured = self.engine.program.captures.find(context)
            recording = getattr(captured, "recordings", {}).get(0)
            if recording is None:
                raise NotImplementedError("no graph was recorded of these steps")
            tensors = importlib.import_module("fastdp.tensors.arrays")
            dtypes = [dtype for dtype in self.structure.dtypes if dtype is not None]
            rows = [tensors.as_tensor(array, dtype) for array, dtype in zip(batch, dtypes, strict=True)]
            step = lambda: recording.replay(rows, lambda bucket: None)  # noqa: E731

        def work(count: int) -> None:
            for _ in range(count):
                step()
                replica.update(noted["totals"])

        def run(count: int) -> float:
            compute = replica.device.compute
            began = time.perf_counter()
            compute.enqueue(lambda: work(count))
            compute.record().synchronize(COMPILE_SECONDS)
            return time.perf_counter() - began

        return run


def prepare(way: str, case: Case, steps: int, where: str) -> tuple[Run, dict[str, Any]]:
    """Build, capture or compile, and warm up; returns a function that trains a round, and facts.

    Args:
        way: `fit`, or `DEVICES:HOW:PART` for fastdp. The suffixes `:fed`, `:resident` and `:bare` skip Keras's loop:
            the engine's steps on a batch in host memory or on the card, and the replica's work alone.
    """
    if way == "fit":
        fitted = Fitted(case, steps, lambda model: model)
        for _ in range(2):
            fitted.train(WARM_UP)
        return (lambda: fitted.train(steps)), {"parameters": fitted.parameters}
    count, how, part, *rest = way.split(":")
    fastdp = importlib.import_module("fastdp")
    if int(count) > 1 or where == "cpu":
        fastdp.set_virtual_devices(int(count), kind="host" if where == "cpu" else "gpu")
    options = wrap_options(how)
    fitted = Fitted(case, steps, lambda model: fastdp.wrap(model, gpus=int(count), **options), int(part))
    fitted.train(WARM_UP)
    if how.startswith("compiled"):
        fitted.model.wait_compiled(COMPILE_SECONDS)
    fitted.train(WARM_UP)
    facts = {"parameters": fitted.parameters, **facts_of(fitted.model)}
    if not rest:
        return (lambda: fitted.train(steps)), facts
    steps_alone = EngineSteps(fitted)
    made = {"fed": lambda: steps_alone.fed, "resident": steps_alone.on_the_card, "bare": lambda: steps_alone.bare(how)}
    run = made[rest[0]]()
    run(WARM_UP)
    return (lambda: run(steps)), facts
