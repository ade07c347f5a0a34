"""Roles that the user declares: `fastdp.wrap(module, rows={...})`, and marks on tensors."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from fastdp.program.torch.rows.readings import Given
from fastdp.shard import Rows
from fastdp.tensors import pytree
from fastdp.tensors.arrays import to_tensor
from fastdp.tensors.marks import MeanOver, mark_of
from fastdp.tensors.row_effects import Effect, Layout

_BUFFER = "buffer:"  # in front of the name of a buffer
_EXTREMES = {"max": Effect.LARGEST, "min": Effect.SMALLEST}
_OUTPUT_EFFECTS = {"same": Effect.SAME, "sum": Effect.SUM, "mean": Effect.MEAN}


class DeclaredRows:
    """How arrays of a batch and outputs depend on the rows, as far as the user has said it.

    Args:
        module: the user's module; the names of its `forward` name the arrays.
        rows: by name, an axis number, "same", and for outputs also "sum", "mean" and `fastdp.mean_over`. The names are
            those of forward's parameters, "target" and "output", with the path to a part of a nest: "mask",
            "batch['ids']", "output[1]". "buffer:" with the name of a buffer maps to "same", to "sum" or "mean" of what
            forward adds to it, or to "max" or "min" of the values that it gets.
            A name stands for all parts below it.

    Raises:
        ValueError: an unknown name or value; the message lists the known ones.
    """

    def __init__(self, module: nn.Module, rows: Mapping[str, Any] | None = None) -> None:
        self._signature = inspect.signature(module.forward)
        self._parameters = list(self._signature.parameters.values())
        rows = rows or {}
        self._roles = {name: self._role(name, value) for name, value in rows.items() if not name.startswith(_BUFFER)}
        self._met: set[str] = set()  # names of outputs that there were: a loss, say, is not in all calls
        given = {name.removeprefix(_BUFFER): value for name, value in rows.items() if name.startswith(_BUFFER)}
        self.buffers = {name: _buffer_effect(module, name, value) for name, value in given.items()}

    @property
    def weighed(self) -> list[MeanOver]:
        """What the user has said about means in which rows do not count alike."""
        return [one.weights for one in self._roles.values() if one.weights is not None]

    def weights(self, way: MeanOver, values: tuple[Any, dict[str, Any], Any], rows: int) -> torch.Tensor:
        """What each row counts in a mean.

        Args:
            way: one of `weighed`.
            values: `(args, kwargs, targets)`.
            rows: the number of rows.

        Raises:
            ValueError: the function's result has not as many rows, or its parameters are not among the arguments.
        """
        bound = self._signature.bind(*values[0], **values[1])
        bound.apply_defaults()
        given = dict(bound.arguments)
        for one in self._parameters:
            if one.kind is inspect.Parameter.VAR_KEYWORD:
                given.update(given.pop(one.name))
        missing = [name for name in way.names if name not in given]
        if missing:
            raise ValueError(f"The function of `fastdp.mean_over` wants {missing}. The arguments are {list(given)}.")
        with torch.no_grad():
            found = way.function(**{name: to_tensor(given[name]) for name in way.names})
        if not isinstance(found, torch.Tensor) or not found.ndim or len(found) != rows:
            shape = tuple(found.shape) if isinstance(found, torch.Tensor) else repr(found)
            raise ValueError(
                f"The function of `fastdp.mean_over` must return a tensor with the batch's {rows} rows first. "
                f"Received: {shape}"
            )
        return found.detach().reshape(rows, -1).double().sum(1)

    def _role(self, name: str, value: Any) -> Layout:
        """The layout that an entry declares."""
        root = _root_of(name)
        names = [one.name for one in self._parameters]
        open_ended = any(one.kind is inspect.Parameter.VAR_KEYWORD for one in self._parameters)
        if root not in (*names, "target", "output") and not open_ended:
            raise ValueError(
                f"`rows` names {name!r}, which is no argument of forward. Known names: {[*names, 'target', 'output']}, "
                'with paths such as "output[1]" or "batch[\'ids\']".'
            )
        if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
            return Layout(Effect.ROWS, value, 1, True)
        if isinstance(value, MeanOver) and root == "output":
            unknown = [one for one in value.names if one not in names]
            if unknown and not open_ended:
                raise ValueError(f"`rows` weighs {name!r} by {unknown}, which forward has not. It has: {names}")
            return Layout(Effect.MEAN, weights=value)
        known = _OUTPUT_EFFECTS if root == "output" else {"same": Effect.SAME}
        if not isinstance(value, str) or value not in known:
            raise ValueError(
                f"`rows` must map {name!r} to the number of an axis, from 0, or to one of {list(known)}; a name of an "
                f"output also to fastdp.mean_over(...). Received: {value!r}"
            )
        return Layout(known[str(value)])

    def names_of(self, values: tuple[Any, dict[str, Any], Any]) -> list[str]:
        """The names of the tensors with axes in `(args, kwargs, targets)`."""
        leaves = pytree.tree_flatten_with_path(values)[0]
        return [self._name(path, values) for path, leaf in leaves if getattr(leaf, "ndim", 0)]

    def of_arrays(self, values: tuple[Any, dict[str, Any], Any]) -> list[Layout | None]:
        """The layouts of the tensors with axes in `(args, kwargs, targets)`, as far as they are said.

        Raises:
            ValueError: an array lacks its axis.
        """
        arrays = [leaf for leaf in pytree.tree_leaves(values) if getattr(leaf, "ndim", 0)]
        marks = [mark_of(leaf) if isinstance(leaf, torch.Tensor) else None for leaf in arrays]
        if not self._roles:
            return marks
        names = self.names_of(values)
        layouts = [mark or self.declared(name) for mark, name in zip(marks, names, strict=True)]
        for name, layout, array in zip(names, layouts, arrays, strict=True):
            if layout is not None and layout.axis is not None and layout.axis >= array.ndim:
                raise ValueError(
                    f"`rows` says that {name!r} has its rows along axis {layout.axis}, but its shape is "
                    f"{tuple(array.shape)}."
                )
        return layouts

    def given(self, values: tuple[Any, dict[str, Any], Any], *, whole_targets: bool) -> list[Given]:
        """The arrays of `(args, kwargs, targets)`, for readings of them.

        Args:
            values: as above.
            whole_targets: whether the loss function gets all targets.

        Raises:
            ValueError: as in `of_arrays`.
        """
        found = []
        names, layouts = self.names_of(values), self.of_arrays(values)
        arrays = [leaf for leaf in pytree.tree_leaves(values) if getattr(leaf, "ndim", 0)]
        targets = sum(1 for leaf in pytree.tree_leaves(values[2]) if getattr(leaf, "ndim", 0))
        for place, (name, layout, array) in enumerate(zip(names, layouts, arrays, strict=True)):
            shape, is_target = tuple(array.shape), place >= len(arrays) - targets
            group = f"{_root_of(name)} {shape} {layout}"
            found.append(Given(group, shape, layout, is_target, whole_targets))
        return found

    def of_outputs(self, outputs: Any, others: Sequence[Layout]) -> list[Layout]:
        """The layouts of the tensors among a replica's outputs: as declared, or else those in `others`.

        Raises:
            ValueError: a name in `rows` stands for no output.
        """
        roles = output_roles(outputs, self)
        names = [name for name, _ in roles]
        found = [role or other for (_, role), other in zip(roles, others, strict=True)]
        for one in self._roles:
            if _root_of(one) == "output" and one not in self._met:
                if not any(_is_below(name, one) for name in (*names, *_without_tensors(outputs))):
                    raise ValueError(f"`rows` names {one!r}, which is no output of the module. Its outputs: {names}")
                self._met.add(one)
        return found

    def declared(self, name: str) -> Layout | None:
        """The layout of the longest declared name that stands for this one."""
        fits = [one for one in self._roles if _is_below(name, one)]
        return self._roles[max(fits, key=len)] if fits else None

    def name_of(self, place: int, values: tuple[Any, dict[str, Any], Any]) -> str:
        """The name of a leaf of `(args, kwargs, targets)`, by its place."""
        return self._name(pytree.tree_flatten_with_path(values)[0][place][0], values)

    def _name(self, path: Sequence[Any], values: tuple[Any, dict[str, Any], Any]) -> str:
        """The name of a leaf of `(args, kwargs, targets)`."""
        if path[0].idx == 2:
            rest = path[2:] if len(values[2]) == 1 else path[1:]
            return "target" + pytree.keystr(tuple(rest))
        if path[0].idx == 1:
            return f"{path[1].key}{pytree.keystr(tuple(path[2:]))}"
        place, given = path[1].idx, [one for one in self._parameters if one.kind is not inspect.Parameter.KEYWORD_ONLY]
        for number, one in enumerate(given):
            if one.kind is inspect.Parameter.VAR_POSITIONAL:
                return f"{one.name}[{place - number}]{pytree.keystr(tuple(path[2:]))}"
            if number == place:
                return f"{one.name}{pytree.keystr(tuple(path[2:]))}"
        return f"input[{place}]{pytree.keystr(tuple(path[2:]))}"


def _buffer_effect(module: nn.Module, name: str, value: Any) -> Effect:
    """The effect that an entry for a buffer declares."""
    buffers = dict(module.named_buffers())
    if name not in buffers:
        raise ValueError(f"`rows` names the buffer {name!r}, which the module has not. Its buffers: {list(buffers)}")
    dtype = buffers[name].dtype
    exact = not (dtype.is_floating_point or dtype.is_complex)
    known = {**_OUTPUT_EFFECTS, **({} if dtype.is_complex else _EXTREMES)}
    known = {key: one for key, one in known.items() if not (exact and key == "mean")}
    known = {key: one for key, one in known.items() if not (dtype == torch.bool and key == "sum")}
    if not isinstance(value, str) or value not in known:
        raise ValueError(f"`rows` must map 'buffer:{name}' ({dtype}) to one of {list(known)}. Received: {value!r}")
    return known[value]


def output_roles(outputs: Any, declared: DeclaredRows | None) -> list[tuple[str, Layout | None]]:
    """The names of the tensors among outputs, each with its mark or its declared layout; None without both."""
    found: list[tuple[str, Layout | None]] = []
    alone: list[tuple[pytree.KeyPath, Any]] = [((), outputs)]
    for path, leaf in alone if type(outputs) is torch.Tensor else pytree.tree_flatten_with_path(outputs)[0]:
        if isinstance(leaf, torch.Tensor):
            name = "output" + pytree.keystr(path)
            found.append((name, mark_of(leaf) or (declared.declared(name) if declared is not None else None)))
    return found


def _without_tensors(outputs: Any) -> list[str]:
    """The names of outputs that are None or another plain value, and of fields that are not there."""
    leaves = pytree.tree_leaves_with_path(outputs)
    names = ["output" + pytree.keystr(path) for path, leaf in leaves if not isinstance(leaf, torch.Tensor)]
    fields = dataclasses.fields(outputs) if dataclasses.is_dataclass(outputs) else ()
    return [*names, *(f"output.{field.name}" for field in fields)]


def _is_below(name: str, declared: str) -> bool:
    """Whether a declared name stands for a tensor of this name."""
    name, declared = _with_keys(name), _with_keys(declared)
    return name == declared or name.startswith(f"{declared}[") or (declared == "target[0]" and name == "target")


@lru_cache(1024)
def _with_keys(name: str) -> str:
    """A name in which fields are keys, since outputs such as those of transformers have both."""
    return re.sub(r"\.([^\W\d]\w*)", r"['\1']", re.sub(r'\["([^"\']*)"\]', r"['\1']", name))


def _root_of(name: str) -> str:
    """The argument, or `target` or `output`, in a name with a path."""
    return re.split(r"[.\[]", name)[0]


def rows_first(tensor: torch.Tensor, layout: Layout) -> torch.Tensor:
    """A view of an array with its rows along the first axis; several entries for a row lie along the second."""
    moved = tensor.movedim(layout.axis, 0) if layout.axis else tensor
    return moved.unflatten(0, (-1, layout.per_row)) if layout.per_row > 1 else moved


def rows_back(tensor: torch.Tensor, layout: Layout) -> torch.Tensor:
    """An array, given rows first, with its rows where the module expects them."""
    flat = tensor.flatten(0, 1) if layout.per_row > 1 else tensor
    return flat.movedim(0, layout.axis).contiguous() if layout.axis else flat


def parts_fit(layouts: Sequence[Layout], tensors: Sequence[torch.Tensor], rows: Rows) -> None:
    """Check that a replica's outputs have shapes for its rows.

    Raises:
        ValueError: one has not.
    """
    for i, (tensor, layout) in enumerate(zip(tensors, layouts, strict=True)):
        axis = layout.axis
        if layout.effect is not Effect.ROWS or axis is None:
            continue
        if tensor.ndim <= axis or tensor.shape[axis] < rows.count or tensor.shape[axis] % rows.count:
            which = "the first axis" if axis == 0 else f"axis {axis}"
            raise ValueError(
                f"Output {i} of the module must have its rows along {which} (a multiple of {rows.count} for "
                f"{rows.count} rows), so that the loss can be computed on all. Received: shape {tuple(tensor.shape)}. "
                'Say where they are: fastdp.wrap(module, rows={"output[1]": 1}), or "same", "sum" or "mean" for a '
                "value without rows."
            )
