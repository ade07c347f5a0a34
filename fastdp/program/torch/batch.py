"""Flattens batches of torch tensors into arrays for the replicas, and packs their outputs again."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from fastdp.comm.batch import Batch
from fastdp.comm.context import Context
from fastdp.program.torch.following.merged import Roles
from fastdp.program.torch.nest import HOLE, PLAIN, Nest
from fastdp.program.torch.rows import hints
from fastdp.program.torch.rows.declared import DeclaredRows, rows_back, rows_first
from fastdp.program.torch.rows.forms import OutputForm
from fastdp.program.torch.rows.judged import Judged
from fastdp.program.torch.rows.merging import merge, plain_layouts
from fastdp.program.torch.rows.weights import RowWeights, agreed
from fastdp.program.torch.shared_draws import SharedDraws
from fastdp.tensors import pytree
from fastdp.tensors.arrays import as_array, as_tensor, dtype_name, output_array, to_tensor
from fastdp.tensors.autocast import Autocast
from fastdp.tensors.collectives import StepPeers
from fastdp.tensors.random import global_generator
from fastdp.tensors.row_effects import ROWS_FIRST, Effect, Layout


def _kind_of(leaf: Any) -> Any:
    """What a captured step depends on of a leaf. Tensors are given to it anew in each step."""
    if isinstance(leaf, torch.Tensor):
        return leaf.shape, leaf.stride(), leaf.dtype
    return (type(leaf), leaf) if isinstance(leaf, PLAIN) else type(leaf)


@dataclass(slots=True)
class Structure:
    """What replicas get besides the arrays of a batch: their nest, the autocast state and the seed.

    `layouts` are those of the arrays, by default rows first; `declared` is what the user has said about outputs, and
    `judged` what a trial has shown. `weights` are what rows count in means, if not alike. `values` are the user's own
    `(args, kwargs, targets)`. `misfit` says why they cannot be split by rows as they are, and `read` makes a batch of
    them whose arrays have other layouts. `inference`: the call is in torch's inference mode.
    `differentiated`: the numbers of the tensors, in the order of `tensors`, whose gradients are wanted.
    """

    nest: Nest
    autocast: Autocast = field(default_factory=Autocast.current)
    layouts: Sequence[Layout] = ()
    declared: DeclaredRows | None = None
    draws: SharedDraws = field(default_factory=SharedDraws)
    judged: Judged | None = None
    values: Any = None
    misfit: Exception | None = None
    read: Callable[[Sequence[Layout]], Batch] | None = None
    weights: dict[Any, RowWeights | None] = field(default_factory=dict)
    inference: bool = False
    differentiated: tuple[int, ...] = ()
    _forms: dict[str, OutputForm] = field(default_factory=dict)
    _seed: int | None = None
    _kind: tuple[Hashable, ...] | None = None

    def read_as(self, layouts: Sequence[Layout]) -> Batch:
        """The batch of the same values whose arrays have these layouts."""
        assert self.read is not None
        batch = self.read(layouts)
        batch.structure.inference = self.inference
        return batch

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Autocast and inference mode of the call, for forward. `inference_mode(False)` would enable gradients."""
        with self.autocast.enter(), torch.inference_mode() if self.inference else nullcontext():
            yield

    @property
    def kind(self) -> tuple[Hashable, ...]:
        """What a captured step depends on besides the arrays' shapes: the nest, its plain values, layouts."""
        if self._kind is None:
            nest = self.nest
            leaves = tuple(map(_kind_of, nest.leaves))
            self._kind = nest.spec, leaves, nest.dtypes, tuple(self.layouts), id(self.judged)
        return self._kind

    @property
    def has_objects(self) -> bool:
        """Whether there are leaves that are neither tensors nor plain values."""
        return any(one is not HOLE and not isinstance(one, (torch.Tensor, *PLAIN)) for one in self.nest.leaves)

    @property
    def count(self) -> int:
        """The number of `tensors`."""
        return len(self.nest.dtypes) + sum(isinstance(leaf, torch.Tensor) for leaf in self.nest.leaves)

    def tensors(self, arrays: Sequence[np.ndarray], where: str) -> list[torch.Tensor]:
        """A replica's arrays as the module gets them, then the tensors that all replicas share, on their device.

        Without arrays the others go to the device `where`.
        """
        tensors = [as_tensor(a, name) for a, name in zip(arrays, self.nest.dtypes, strict=True)]
        if self.layouts:
            tensors = [rows_back(tensor, one) for tensor, one in zip(tensors, self.layouts, strict=True)]
        shared = [leaf for leaf in self.nest.leaves if isinstance(leaf, torch.Tensor)]
        if not shared:
            return tensors
        device = tensors[0].device if tensors else where
        return [*tensors, *(leaf.to(device) for leaf in shared)]

    def nested(self, tensors: Sequence[torch.Tensor]) -> Any:
        """The nest `(args, kwargs, targets)` over tensors in the order of `tensors`."""
        count = len(self.nest.dtypes)
        shared = iter(tensors[count:])
        places = {i: next(shared) for i, leaf in enumerate(self.nest.leaves) if isinstance(leaf, torch.Tensor)}
        return self.nest.replaced(places).pack(tensors[:count])

    def weigh(self, arrays: Sequence[np.ndarray], rows: int) -> None:
        """Find out what the rows count in means. `arrays` are those of the batch."""
        judged, declared = self.judged, self.declared
        ways, said = judged.weighed if judged is not None else [], declared.weighed if declared is not None else []
        if not ways and not said:
            return
        tensors = [as_tensor(array, name) for array, name in zip(arrays, self.nest.dtypes, strict=True)]
        self.weights = {None: None, **{way: agreed(tensors, way) for way in ways}}
        if declared is not None:
            self.weights |= {way: RowWeights(declared.weights(way, self.values, rows)) for way in said}

    @property
    def inputs(self) -> int:
        """How many arrays are arguments of the module: the others are targets."""
        given = len(pytree.tree_leaves(self.values[:2]))
        return sum(1 for place in range(given) if self.nest.is_hole(place))

    def wanted(self) -> list[int]:
        """The arrays whose tensors require gradients, by their places."""
        leaves = pytree.tree_leaves(self.values)
        holes = [leaf for place, leaf in enumerate(leaves) if self.nest.is_hole(place)]
        return [at for at, leaf in enumerate(holes) if isinstance(leaf, torch.Tensor) and leaf.requires_grad]

    def target_of(self, batch: Batch) -> torch.Tensor | None:
        """The only target of a batch, if it has rows along its first axis; else None."""
        nest, first = self.nest, len(pytree.tree_leaves(self.values[:2]))
        if len(nest.leaves) != first + 1 or not nest.is_hole(first) or (self.layouts and self.layouts[-1].axis != 0):
            return None
        return as_tensor(batch[len(nest.dtypes) - 1], nest.dtypes[-1])

    def name_of(self, place: int) -> str:
        """The name of an argument or target, by its place among the leaves."""
        assert self.declared is not None
        return self.declared.name_of(place, self.values)

    @property
    def roles(self) -> Roles:
        """How what the module writes to attributes and containers depends on the rows, as far as a trial has shown."""
        return self.judged.roles if self.judged is not None else {}

    def layouts_of(self, outputs: Any, tensors: Sequence[torch.Tensor]) -> list[Layout]:
        """The layouts of a replica's outputs, a nest with these tensors."""
        found = self.judged.outputs if self.judged is not None else None
        if found is None or len(found) != len(tensors):
            found = plain_layouts(tensors)
        if self.declared is not None:
            found = self.declared.of_outputs(outputs, found)
        return [replace(one, weights=self.weights[one.weights]) for one in found] if self.weights else found

    def agree(self, form: OutputForm) -> None:
        """Check that a replica's outputs have the form of those of the replica that came first.

        Raises:
            ValueError: they have not.
        """
        self._forms.setdefault("outputs", form).check(form)

    def pack(self, arrays: Sequence[np.ndarray], where: str | None = None) -> Any:
        """The nest `(args, kwargs, targets)` over a replica's arrays. `where` names a device to copy them to."""
        tensors = [as_tensor(a, name) for a, name in zip(arrays, self.nest.dtypes, strict=True)]
        if self.layouts:
            tensors = [rows_back(tensor, one) for tensor, one in zip(tensors, self.layouts, strict=True)]
        nest = self.nest
        place = where or (str(tensors[0].device) if tensors else "cpu")
        if place != "cpu" and (self.layouts or not tensors):
            nest = nest.on(place)
        return nest.pack(tensors if where is None else [tensor.to(where) for tensor in tensors])

    def seed(self) -> int:
        """The seed of the step's random draws, drawn from torch's global generator at the first call."""
        with global_generator:
            if self._seed is None:
                self._seed = int(self.draws.alone(0, _seed, torch.default_generator))
            return self._seed


def _seed() -> torch.Tensor:
    return torch.randint(0, 2**62, (), dtype=torch.int64)


def flatten_batch(
    values: Any, layouts: Sequence[Layout] = (), *, no_graphs: bool = False
) -> tuple[list[np.ndarray], Nest]:
    """The arrays of a batch (tensors or NumPy arrays in any nest), and the nest.

    `layouts` are those of the tensors with axes, by default rows first; the arrays have their rows first. Zero-dim
    tensors, those that are the same for all rows, and plain values stay in the nest and go to every replica unchanged.
    Arrays are not copied, except
    read-only ones and those with negative strides, which torch cannot wrap.

    Raises:
        ValueError: a tensor is not on the CPU, or requires a gradient and `no_graphs` is set.
        TypeError: a leaf is neither a tensor, nor an array, nor a plain value.
    """
    given, spec = pytree.tree_flatten(values)
    nest, tensors = Nest.of([to_tensor(leaf) for leaf in given], spec, "A batch")
    for tensor in tensors:
        if tensor.device.type != "cpu":
            raise ValueError(
                f"A batch must be in host memory, from where each device gets its rows. Received: a tensor on "
                f"{tensor.device}. Pass it as it comes from the DataLoader, without .to(device)."
            )
    if no_graphs and any(tensor.requires_grad for tensor in tensors):
        raise ValueError(_HAS_GRAPH)
    roles = iter(layouts or [ROWS_FIRST] * sum(1 for tensor in tensors if tensor.ndim))
    leaves, dtypes, rows = [], [], []
    left = iter(tensors)
    for leaf in nest.leaves:
        tensor = next(left) if leaf is HOLE else None
        layout = next(roles) if tensor is not None and tensor.ndim else None
        if tensor is not None and layout is not None and layout.effect is Effect.ROWS:
            leaves.append(HOLE)
            dtypes.append(dtype_name(tensor))
            rows.append(as_array(rows_first(tensor, layout)))
        else:
            leaves.append(leaf if tensor is None else tensor)
    return rows, Nest(nest.spec, tuple(leaves), tuple(dtypes))


_HAS_GRAPH = (
    "On several devices the inputs and targets of a train step must not require gradients: it trains the module's own "
    "parameters, and would leave other gradients out. Received: a tensor with requires_grad=True. If its gradient is "
    "wanted, write the loop: loss = loss_fn(model(x), y); loss.backward(). If not, pass x.detach(), or compute it "
    "under torch.no_grad()."
)


def make_batch(
    values: tuple[Any, dict[str, Any], Any], declared: DeclaredRows | None = None, *, no_graphs: bool = False
) -> Batch:
    """Make the engine's batch, with its `Structure`, of `(args, kwargs, targets)`.

    A batch that cannot be split by rows as it is has no rows, and `Structure.misfit` has the ValueError or TypeError
    that says why.
    """
    read = partial(split_batch, values, declared, no_graphs=no_graphs)
    try:
        batch = read()
    except (ValueError, TypeError) as error:
        batch = Batch([], Structure(Nest(None, (), ()), declared=declared, values=values, misfit=error), 0)
    batch.structure.read = read
    return batch


def split_batch(
    values: tuple[Any, dict[str, Any], Any],
    declared: DeclaredRows | None = None,
    reading: Sequence[Layout] | None = None,
    *,
    no_graphs: bool = False,
) -> Batch:
    """As `make_batch`, of values that can be split by rows.

    Args:
        values, declared, no_graphs: as there.
        reading: the layouts of all tensors with axes; by default as declared, or else rows first.

    Raises:
        ValueError: no arrays, no rows, or unequal numbers of rows; also as in `flatten_batch`.
        TypeError: as in `flatten_batch`.
    """
    if declared is None:
        arrays, nest = flatten_batch(values, no_graphs=no_graphs)
        return _batch_of(arrays, Structure(nest, values=values), partial(_names, values))
    layouts = reading or [one or ROWS_FIRST for one in declared.of_arrays(values)]
    arrays, nest = flatten_batch(values, layouts, no_graphs=no_graphs)
    of_rows = [one for one in layouts if one.effect is Effect.ROWS]
    structure = Structure(nest, layouts=of_rows, declared=declared, values=values)

    def names() -> list[str]:
        pairs = zip(declared.names_of(values), layouts, strict=True)
        return [name for name, one in pairs if one.effect is Effect.ROWS]

    return _batch_of(arrays, structure, names)


def _batch_of(arrays: list[np.ndarray], structure: Structure, names: Callable[[], list[str]]) -> Batch:
    """`Batch.of`, with remedies for what is in the batch."""
    try:
        return Batch.of(arrays, structure, names)
    except ValueError as error:
        hints.refuse_packed(structure.values)
        if not arrays:
            raise ValueError(
                "On several devices a batch needs a tensor with rows, which are split. Received: none. Pass one, run "
                "the module itself (model.module), or use gpus=[0]."
            ) from None
        rows = [len(array) for array in arrays]
        if len(set(rows)) == 1:
            raise
        raise ValueError(f"{error}.{hints.unequal(names(), rows, structure.values)}") from None


def undivided_batch(values: tuple[Any, dict[str, Any], Any]) -> Batch:
    """A batch for one device, which gets all values as they are: one row, for want of a number of rows."""
    leaves, spec = pytree.tree_flatten(pytree.tree_map(to_tensor, values))
    return Batch([], Structure(Nest(spec, tuple(leaves), ()), values=values), 1)


def _names(values: Any) -> list[str]:
    """A readable name for each array of `(args, kwargs, targets)`, for messages."""
    names = []
    for path, leaf in pytree.tree_flatten_with_path(values)[0]:
        if getattr(leaf, "ndim", 0):
            names.append(("input", "input", "target")[path[0].idx] + pytree.keystr(path[1:]))
    return names


def with_extremes(outputs: Any, context: Context) -> Any:
    """A replica's outputs, in which those that are extremes over rows are extremes over all rows of the batch."""
    structure: Structure = context.structure
    if context.size == 1 or structure.judged is None or not structure.judged.extremes:
        return outputs
    nest, tensors = Nest.flatten(outputs, "The module's outputs")
    ops = {Effect.LARGEST: "max", Effect.SMALLEST: "min"}
    peers, layouts = StepPeers(context), structure.layouts_of(outputs, tensors)
    return nest.pack(
        [
            peers.all_reduce(tensor, ops[layout.effect]) if layout.effect in ops else tensor
            for tensor, layout in zip(tensors, layouts, strict=True)
        ]
    )


def outputs_to_arrays(
    outputs: Any, context: Context, layouts: Sequence[Layout] | None = None
) -> tuple[list[np.ndarray], Nest]:
    """A replica's outputs as arrays with their rows first, and their nest. `layouts` are theirs, if they are known.

    Values without rows are merged here, by all replicas, and stay in the nest. So does every output of a replica that
    is alone in its step, with the dtype that the module gave it.
    """
    nest, tensors = Nest.flatten(outputs, "The module's outputs", dense=context.size > 1)
    structure: Structure = context.structure
    layouts = structure.layouts_of(outputs, tensors) if layouts is None else layouts
    alone = context.size == 1
    shards = context.shards
    arrays, dtypes, leaves = [], [], list(nest.leaves)
    places = [place for place, leaf in enumerate(leaves) if leaf is HOLE]
    axes: list[int] = []
    for place, tensor, layout in zip(places, tensors, layouts, strict=True):
        if alone or layout.effect is not Effect.ROWS:
            found = tensor.detach() if alone else merge(context.exchange(tensor.detach(), "an output"), layout, shards)
            leaves[place] = found.cpu().clone()
            continue
        dtypes.append(dtype_name(tensor))
        axes.append(layout.axis or 0)
        arrays.append(output_array(tensor.detach().movedim(layout.axis or 0, 0), context.device))
    return arrays, Nest(nest.spec, tuple(leaves), tuple(dtypes), tuple(axes))


def outputs_from_arrays(arrays: Sequence[np.ndarray], nest: Nest) -> Any:
    """The merged outputs, in the module's own structure and dtypes."""
    tensors = [as_tensor(array, name) for array, name in zip(arrays, nest.dtypes, strict=True)]
    return nest.pack([tensor.movedim(0, axis) for tensor, axis in zip(tensors, nest.axes, strict=True)])
