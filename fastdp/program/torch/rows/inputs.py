"""The inputs of a trial: some rows of a batch, as they are or with other values of the same kind."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from fastdp.comm.batch import Batch
from fastdp.program.torch.rows.declared import rows_back
from fastdp.shard import Rows
from fastdp.tensors.arrays import as_tensor
from fastdp.tensors.row_effects import ROWS_FIRST

# Makes other values of a tensor; None stands for what all rows share.
Change = Callable[[torch.Tensor, int | None], torch.Tensor]


class TrialInputs:
    """Some rows of a batch, for runs of a module on all of them and on parts.

    Args:
        batch: the global batch.
        chosen: the rows, by their numbers in it.
        change: makes other values of each array, given its place, and of each tensor that all rows share.

    Attributes:
        arrays: the rows of each array, rows first.
    """

    def __init__(self, batch: Batch, chosen: Sequence[int], change: Change | None = None) -> None:
        structure = batch.structure
        self._nest = structure.nest
        self._layouts = structure.layouts or [ROWS_FIRST] * len(batch)
        self.arrays = [as_tensor(array[chosen], name) for array, name in zip(batch, structure.nest.dtypes, strict=True)]
        self._shared = {
            place: leaf.detach().clone()
            for place, leaf in enumerate(structure.nest.leaves)
            if isinstance(leaf, torch.Tensor)
        }
        if change is not None:
            self.arrays = [change(array, place) for place, array in enumerate(self.arrays)]
            self._shared = {place: change(tensor, None) for place, tensor in self._shared.items()}

    def of(
        self, rows: Rows, where: str, wanted: Sequence[int] = ()
    ) -> tuple[tuple[object, ...], dict[str, object], tuple[object, ...]]:
        """The nest `(args, kwargs, targets)` for some of the rows, in memory of its own.

        Args:
            rows: which of the chosen rows.
            where: the device.
            wanted: the arrays that require gradients, by their places.
        """
        found = []
        for at, (array, layout) in enumerate(zip(self.arrays, self._layouts, strict=True)):
            tensor = rows_back(array[rows.start : rows.stop].clone(), layout).to(where)
            found.append(tensor.requires_grad_() if at in wanted else tensor)
        nest = self._nest.replaced({place: tensor.clone() for place, tensor in self._shared.items()})
        packed: tuple[tuple[object, ...], dict[str, object], tuple[object, ...]] = nest.on(where).pack(found)
        return packed


class OtherValues:
    """Makes other values in the range of a tensor's own, so that nothing agrees by accident.

    Args:
        flags: what becomes of equal numbers: some of them 0, or 1 if they are 0; else up to twice as much, or up to 1.
        exact: also change integers and booleans.
    """

    def __init__(self, *, flags: bool, exact: bool = True) -> None:
        self._flags, self._exact = flags, exact
        self._generator = torch.Generator().manual_seed(2)

    def __call__(self, tensor: torch.Tensor, place: int | None) -> torch.Tensor:
        """The tensor with other values."""
        if tensor.is_floating_point() or tensor.is_complex():
            return self._mixed(tensor) if tensor.dtype.itemsize > 1 else tensor
        return self._permuted(tensor) if self._exact else tensor

    def _mixed(self, tensor: torch.Tensor) -> torch.Tensor:
        """Each finite entry between itself and another one. Zeros and ones stay such numbers, unless all are equal."""
        found, fits = tensor.clone(), torch.isfinite(tensor)
        own = tensor[fits].to(torch.complex128 if tensor.is_complex() else torch.float64)
        if not own.numel():
            return found
        share = torch.rand(own.shape, generator=self._generator, dtype=torch.float64)
        if bool((own == own[0]).all()):
            others = (share < 0.5).to(own.dtype) if self._flags else share + (own[0] != 0)
            found[fits] = (others if own[0] == 0 else own * others).to(tensor.dtype)
            return found
        others = own[torch.randperm(len(own), generator=self._generator)]
        flags = bool(((own == 0) | (own == 1)).all())
        found[fits] = (others if flags else own + share * (others - own)).to(tensor.dtype)
        return found

    def _permuted(self, tensor: torch.Tensor) -> torch.Tensor:
        """The entries along the last axis in another order; booleans that are all equal by chance."""
        if not tensor.numel() or not tensor.ndim:
            return tensor
        if tensor.dtype == torch.bool and bool((tensor == tensor.flatten()[0]).all()):
            return torch.rand(tensor.shape, generator=self._generator) < 0.5
        if tensor.ndim == 1:  # lengths in descending order, positions, offsets
            return tensor
        keys = torch.rand(tensor.shape, generator=self._generator)
        return tensor.gather(-1, keys.argsort(-1))


class Injected:
    """Puts a number into some entries of one array, in some rows more often than in others.

    Args:
        place: of the array.
        number: the number; None for other booleans, or for integers between the smallest and the largest one, in
            descending order where each row has one.
        first: all entries of so many first rows get it.

    Attributes:
        number: as given.
        is_met: whether the module compares a tensor that has the number in it with a number. Set by trials.
    """

    def __init__(self, place: int, number: float | None, first: int = 0) -> None:
        self._place, self.number, self._first = place, number, first
        self.is_met = False

    def __call__(self, tensor: torch.Tensor, place: int | None) -> torch.Tensor:
        """The tensor, or that of the array with the number in it."""
        if place != self._place or not tensor.numel():
            return tensor
        generator = torch.Generator().manual_seed(3)
        rate = torch.linspace(0.9, 0.2, len(tensor), dtype=torch.float64)
        draws = torch.rand(tensor.shape, generator=generator, dtype=torch.float64)
        chosen = draws < rate.reshape(-1, *[1] * (tensor.ndim - 1))
        if tensor[0].numel() == 1:
            chosen[:] = (torch.arange(len(tensor)) % 2 == 1).reshape(-1, *[1] * (tensor.ndim - 1))
        else:
            chosen.view(len(tensor), -1)[:, -1] = False  # something counts in each row
        chosen[: self._first] = True
        found = tensor.clone()
        if self.number is not None or tensor.dtype == torch.bool:
            found[chosen] = ~tensor[chosen] if self.number is None else self.number
            return found
        low, high = int(tensor.min()), int(tensor.max())
        between = torch.randint(min(low, max(high, 1), 1), high + 1, tensor.shape, generator=generator).to(tensor.dtype)
        return between.sort(descending=True).values if tensor.ndim == 1 else between


def choices_of(rows: int, total: int) -> list[tuple[int, ...]]:
    """Rows of a batch for each trial: the first ones, some all over the batch, the last ones, and others."""
    last = rows - total
    spread = tuple(at * (rows - 1) // (total - 1) for at in range(total))
    starts = [tuple(range(start, start + total)) for start in (0, last, last // 2, last // 4)]
    return list(dict.fromkeys([starts[0], spread, tuple(reversed(spread)), *starts[1:]]))
