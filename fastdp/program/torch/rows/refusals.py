"""Says why a module cannot be split by rows, and what to do about it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from fastdp.program.torch.rows.hints import of_values
from fastdp.tensors.row_effects import NotByRowsError

_REMEDIES = (
    'Say what it is, if you know: fastdp.wrap(module, rows={"output": ...}) with the number of the axis that has the '
    'rows, "same", "sum", "mean", or fastdp.mean_over(lambda mask: mask) for a mean over what counts; or combine the '
    "replicas' values in forward by fastdp.replica.all_reduce or fastdp.replica.all_gather; or use gpus=[0]."
)


def failed(
    error: BaseException, rows: tuple[int, int], total: int, values: Any, held: Sequence[str] = ()
) -> ValueError:
    """The error for a module that runs on a batch of `total` rows, but not on so few.

    Args:
        values: the batch's.
        held: tensors that the module holds, with an axis as long as the batch, by name.
    """
    first, last = rows
    state = (
        f" The module holds {', '.join(f'`{name}`' for name in held[:3])}, with an axis as long as the batch. If "
        "forward reads a state by rows there, such as a cache or hidden states, pass it as an argument and return the "
        "new one, since arguments are split by rows; or reset it before each call."
        if held
        else ""
    )
    return ValueError(
        f"The module does not run on {first}, {last} or {first + last} of the batch's {total} rows, as several devices "
        f"would run it: {type(error).__name__}: {error} If an argument has no rows, say so: "
        'fastdp.wrap(module, rows={"mask": "same"}), or the number of the axis that has the rows; or use gpus=[0].'
        + state
        + of_values(values)
    )


def refused_output(name: str, seen: str) -> NotByRowsError:
    """The error for an output that cannot be merged, by what trials have seen."""
    return NotByRowsError(
        f"The {name} of the module cannot be merged from several devices: fastdp ran the module on a few rows of the "
        f"batch, and saw {seen}. {_REMEDIES}"
    )


def refused_argument(name: str) -> NotByRowsError:
    """The error for an argument that forward changes in place, and that is not split along its first axis."""
    return NotByRowsError(
        f"forward changes its argument `{name}` in place, and on several devices each replica would change it, or a "
        f"copy. Let forward change a copy: {name} = {name}.clone(), or use gpus=[0]."
    )


def refused_reading(names: Iterable[str]) -> NotByRowsError:
    """The error for a state by rows, under these names, that the next forward reads."""
    return NotByRowsError(
        f"forward sets {', '.join(f'`{name}`' for name in names)} to values with the rows of the batch, and the next "
        "forward reads them, where each device would have its own rows. Pass the state as an argument and return the "
        "new one, since arguments are split by rows; keep those of all rows, fastdp.replica.all_gather(value); reset "
        "it before each call; or use gpus=[0]."
    )


def refused_in_place(name: str) -> NotByRowsError:
    """The error for a tensor of this name that one forward makes and the next one changes in place."""
    return NotByRowsError(
        f"forward makes the tensor `{name}`, and the next forward changes it in place by the rows of the batch, which "
        "the copies on other devices would miss. Put another one there (self.total = self.total + value in place of "
        "+=), begin with a tensor (torch.zeros(())) or a buffer, or use gpus=[0]."
    )


def refused_state(kind: str, name: str) -> NotByRowsError:
    """The error for what forward changes in a way that cannot be merged."""
    what = "no mean, sum or extreme over rows" if kind == "buffer" else "not the same on all devices"
    return NotByRowsError(
        f"forward changes the {kind} `{name}` of the module by the rows of the batch, and the change is {what}. "
        "Combine the replicas' values in forward by fastdp.replica.all_reduce or fastdp.replica.all_gather, or use "
        "gpus=[0]." + ("" if kind == "buffer" else " A sum or a mean over rows may be kept in a registered buffer.")
    )
