"""Outputs of a module that share memory with others, with its arguments or with what it holds: merged ones do too."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch.autograd.function import BackwardCFunction

from fastdp.program.torch.following.merged import equal

# Operations that give a view, and whose gradient is that of its elements.
_NAMES = (
    "Alias AsStrided Diagonal Expand Movedim Narrow Permute ReshapeAlias Select Slice Split SplitWithSizes Squeeze T "
    "Transpose Unbind Unfold UnsafeSplit UnsafeView Unsqueeze View"
)
_VIEWS = frozenset(_NAMES.split())


_Step = tuple[int, ...] | None  # in indices


@dataclass(frozen=True, slots=True)
class Region:
    """Where the elements of a view lie in a tensor, its base.

    Attributes:
        base: the strides of the base.
        offset, strides: of the view in memory, from the first element of the base on.
        starts, steps: the same in indices of the base: of the first element, and for each axis of the view; None for an
            axis of one element, whose step does not show. Without `steps` an axis of the view runs over several.
    """

    base: tuple[int, ...]
    offset: int
    strides: tuple[int, ...]
    starts: tuple[int, ...]
    steps: tuple[_Step, ...] | None

    @classmethod
    def of(cls, view: torch.Tensor, base: torch.Tensor) -> Region | None:
        """Where a view lies in a base in the same memory; None if it does not, as far as this can tell."""
        if view.dtype != base.dtype or not view.numel() or not base.numel():
            return None
        offset = view.storage_offset() - base.storage_offset()
        last = offset + sum((size - 1) * stride for size, stride in zip(view.shape, view.stride(), strict=True))
        starts, ends = _index(offset, base), _index(last, base)
        if starts is None or ends is None or not (_is_in(starts, base) and _is_in(ends, base)):
            return None
        steps = _steps(view, base, starts)
        if steps is None and not _is_dense(base):
            return None
        return cls(base.stride(), offset, view.stride(), starts, steps)

    def among(self, base: torch.Tensor, shape: Sequence[int], rows: _Step) -> tuple[int, tuple[int, ...]] | None:
        """The offset and strides of the view of another base, which may have more rows; None if there is none.

        Args:
            base: the other base.
            shape: of the view.
            rows: the step along its rows.
        """
        own, start = base.stride(), base.storage_offset()
        if own == self.base:
            return start + self.offset, self.strides
        if self.steps is None:
            return None
        strides = []
        for size, step in zip(shape, self.steps, strict=True):
            step = rows if step is None and size > 1 else step
            if step is None and size > 1:
                return None
            strides.append(0 if step is None else _inner(step, own))
        return start + _inner(self.starts, own), tuple(strides)

    def is_like(self, other: Region) -> bool:
        """Whether a view of a base with another number of rows is the same view."""
        if (self.base, self.offset, self.strides) == (other.base, other.offset, other.strides):
            return True
        if self.steps is None or other.steps is None or self.starts != other.starts:
            return False
        pairs = zip(self.steps, other.steps, strict=True)
        return all(one is None or step is None or one == step for one, step in pairs)


@dataclass(frozen=True, slots=True)
class Alias:
    """That a tensor shares memory with another one, its base.

    Attributes:
        base: the key of the base.
        region: where it lies in the base; None if it is the base itself.
        has_graph: gradients by it are gradients by the base.
        in_part: it shares some elements alone, or with other gradients, so that there is no view of merged ones.
    """

    base: Hashable
    region: Region | None
    has_graph: bool
    in_part: bool = False

    def made(self, base: torch.Tensor, merged: torch.Tensor, axis: int | None) -> torch.Tensor | None:
        """The view of another base that a merged tensor is on one device; None if there is none.

        `axis`: that of the rows of the base.
        """
        if self.in_part or merged.device != base.device or merged.dtype != base.dtype:
            return None
        if merged.requires_grad > base.requires_grad:
            return None
        if self.region is None:
            return base if base.shape == merged.shape else None
        rows = None if axis is None else tuple([int(at == axis) for at in range(base.ndim)])
        found = self.region.among(base, merged.shape, rows)
        if found is None:
            return None
        offset, strides = found
        whole = base if self.has_graph else base.detach()
        if (merged.shape, strides, offset) == (base.shape, base.stride(), base.storage_offset()):
            return whole.view_as(whole) if self.has_graph else whole
        try:
            view = whole.as_strided(merged.shape, strides, offset)
        except RuntimeError:  # beyond its memory
            return None
        return view if equal(view, merged) else None

    def is_like(self, other: Alias | None) -> bool:
        """Whether a replica with another number of rows shares memory in the same way."""
        if other is None or (self.base, self.has_graph, self.in_part) != (other.base, other.has_graph, other.in_part):
            return False
        if self.region is None or other.region is None:
            return self.region is other.region
        return self.region.is_like(other.region)


Aliases = Mapping[Hashable, Alias]
_Keyed = tuple[Hashable, torch.Tensor]
_Span = tuple[int, tuple[int, ...], tuple[int, ...]]  # offset, shape and strides


def aliases_of(given: Iterable[_Keyed], made: Iterable[_Keyed]) -> Aliases:
    """Which of the tensors that a module has made are views of others, or of what was there before.

    Args:
        given: arguments and tensors of the module, with a key for each.
        made: its outputs, and what it has put into attributes.
    """
    groups: dict[int, list[_Keyed]] = {}
    for key, tensor in made:
        if tensor.layout is torch.strided and tensor.numel():
            groups.setdefault(_memory(tensor), []).append((key, tensor))
    known: dict[int, list[_Keyed]] = {}
    for key, tensor in given if groups else ():
        if tensor.layout is torch.strided and _memory(tensor) in groups:
            known.setdefault(_memory(tensor), []).append((key, tensor))
    found: dict[Hashable, Alias] = {}
    for memory, tensors in groups.items():
        before = known.get(memory, [])
        if before or len(tensors) > 1:
            found.update(_in_memory(before, tensors))
    return found


def _in_memory(given: Sequence[_Keyed], made: Sequence[_Keyed]) -> Iterator[tuple[Hashable, Alias]]:
    """The views among tensors in one memory."""
    first: dict[int, Hashable] = {}
    edges: dict[Any, _Keyed] = {}
    for key, tensor in (*given, *made):
        first.setdefault(id(tensor), key)
        edge = id(tensor) if tensor.grad_fn is None else (tensor.grad_fn, tensor.output_nr)
        edges.setdefault(edge, (key, tensor))
    left, roots = [], list(given)
    for key, tensor in made:
        if first[id(tensor)] != key:
            yield key, Alias(first[id(tensor)], None, True)
        elif not tensor.requires_grad:
            left.append((key, tensor))
        else:
            base = _below(tensor, edges)
            region = None if base is None else Region.of(tensor, base[1])
            if base is None or region is None:
                yield from _in_part(key, tensor, roots)
                roots.append((key, tensor))
            else:
                yield key, Alias(base[0], region, True)
    for key, tensor in sorted(left, key=lambda one: -one[1].numel()):  # a base has all elements of its views
        regions = ((base, Region.of(tensor, other)) for base, other in roots)
        alias = next((Alias(base, region, False) for base, region in regions if region is not None), None)
        if alias is None:
            yield from _in_part(key, tensor, roots)
            roots.append((key, tensor))
        else:
            yield key, alias


def _in_part(key: Hashable, tensor: torch.Tensor, roots: Sequence[_Keyed]) -> Iterator[tuple[Hashable, Alias]]:
    """That a tensor shares elements with one of others in the same memory, though it is no view of it."""
    for base, other in roots:
        start = min(tensor.storage_offset(), other.storage_offset())
        spans = [(one.storage_offset() - start, tuple(one.shape), one.stride()) for one in (tensor, other)]
        if tensor.dtype == other.dtype and _overlap(*spans):
            yield key, Alias(base, None, False, in_part=True)
            return


@lru_cache(256)
def _overlap(one: _Span, other: _Span) -> bool:
    """Whether two tensors have an element in common."""
    ends = [
        at + sum((size - 1) * step for size, step in zip(shape, steps, strict=True))
        for at, shape, steps in (one, other)
    ]
    if ends[0] < other[0] or ends[1] < one[0]:
        return False
    marks = torch.zeros(max(ends) + 1, dtype=torch.bool)
    marks.as_strided(one[1], one[2], one[0]).fill_(True)
    return bool(marks.as_strided(other[1], other[2], other[0]).any())


def in_common(every: Sequence[Aliases]) -> Aliases:
    """The aliases that all replicas have, which may have other numbers of rows."""
    return {key: one for key, one in every[0].items() if all(one.is_like(other.get(key)) for other in every[1:])}


def shared(
    aliases: Aliases,
    merged: Mapping[Hashable, torch.Tensor],
    given: Mapping[Hashable, torch.Tensor],
    axes: Mapping[Hashable, int | None],
) -> tuple[dict[Hashable, torch.Tensor], list[tuple[Hashable, Hashable]]]:
    """The merged tensors, with views in the place of those that are views on one device, and pairs that should share.

    Args:
        aliases: what the replicas have in common.
        merged: by key.
        given: arguments and tensors of the user's module, by key.
        axes: where the rows are, by key; None for tensors without.
    """
    found: dict[Hashable, torch.Tensor] = {}
    apart: list[tuple[Hashable, Hashable]] = []

    def of(key: Hashable) -> torch.Tensor | None:
        if key in given:
            return given[key]
        if key not in found and key in merged:
            own, alias = merged[key], aliases.get(key)
            base = of(alias.base) if alias is not None else None
            view = alias.made(base, own, axes.get(alias.base)) if alias is not None and base is not None else None
            if alias is not None and view is None:
                apart.append((key, alias.base))
            found[key] = own if view is None else view
        return found.get(key)

    for key in merged:
        of(key)
    return found, apart


def _memory(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _below(tensor: torch.Tensor, edges: Mapping[Any, _Keyed]) -> _Keyed | None:
    """The first of some tensors, by their edges in the graph, of which another one is a view and nothing else."""
    node: Any = tensor.grad_fn
    while node is not None and _gives_views(node):
        node, output = node.next_functions[0]
        variable = getattr(node, "variable", None)  # a leaf
        found = edges.get((node, output) if variable is None else id(variable))
        if found is not None:
            return found
    return None


def _gives_views(node: Any) -> bool:
    """Whether a node of autograd's graph is an operation that gives a view, and no function of the user's."""
    if isinstance(node, BackwardCFunction) or len(node.next_functions) != 1:
        return False
    return node.name().rstrip("0123456789").removesuffix("Backward") in _VIEWS


def _steps(view: torch.Tensor, base: torch.Tensor, starts: Sequence[int]) -> tuple[_Step, ...] | None:
    """The steps of a region that begins at this index; None if they do not go along axes of the base."""
    found: list[_Step] = []
    reached = list(starts)
    for size, stride in zip(view.shape, view.stride(), strict=True):
        if size == 1:
            found.append(None)
            continue
        step = _index(stride, base)
        if step is None:
            return None
        found.append(step)
        reached = [at + (size - 1) * one for at, one in zip(reached, step, strict=True)]
    return tuple(found) if _is_in(reached, base) else None


def _index(offset: int, base: torch.Tensor) -> tuple[int, ...] | None:
    """The index of the element that lies so far from the first one of a tensor, or would; None if none does."""
    found = [0] * base.ndim
    for axis in sorted(range(base.ndim), key=lambda axis: -base.stride(axis)):
        if base.stride(axis) and offset >= 0:
            found[axis], offset = divmod(offset, base.stride(axis))
    return None if offset else tuple(found)


def _is_in(index: Sequence[int], base: torch.Tensor) -> bool:
    return all(at < size for at, size in zip(index, base.shape, strict=True))


def _is_dense(tensor: torch.Tensor) -> bool:
    """Whether a tensor fills its part of the memory."""
    count = 1
    for axis in sorted(range(tensor.ndim), key=tensor.stride):
        if tensor.shape[axis] > 1 and tensor.stride(axis) != count:
            return False
        count *= tensor.shape[axis]
    return True


def _inner(one: Sequence[int], other: Sequence[int]) -> int:
    return sum(a * b for a, b in zip(one, other, strict=True))
