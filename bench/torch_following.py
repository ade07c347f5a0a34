"""What does it cost to see, before each step, that a torch module is still what its copies were made of?

The guard of an unchanged module of 101 parts (linear, normalization, activation and dropout layers), also with
attributes, hooks and containers of the user's own; and the time to make one copy anew after a change. The best of many
rounds, in microseconds.
"""

from __future__ import annotations

import timeit
from collections.abc import Callable

import torch
from report import finish, options, print_table
from torch import nn

from fastdp.program.torch.following.contents import Contents
from fastdp.program.torch.following.copies import replicate
from fastdp.program.torch.following.guard import Guard
from fastdp.program.torch.module import slots_of


def parts(blocks: int = 20) -> nn.Sequential:
    """Five parts a block, and one around them."""
    return nn.Sequential(
        *(nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.ReLU(), nn.Dropout(0.1)) for _ in range(blocks))
    )


def held() -> nn.Sequential:
    """The same, with things that users add: a table, tensors, a teacher in a list, hooks that keep something."""
    module = parts()
    vars(module).update(table={"alpha": 1.0}, scales=[torch.ones(8)], teacher=[nn.Linear(8, 8)])
    features: dict[str, torch.Tensor] = {}
    for i, block in enumerate(module):
        block.register_forward_hook(lambda part, arguments, output, i=i: features.update({str(i): output}))
    return module


def best(run: Callable[[], object], number: int) -> float:
    """The best time of a call, in microseconds."""
    return min(timeit.repeat(run, number=number, repeat=20)) / number * 1e6


def main() -> None:
    arguments = options(__doc__)
    rows = {}
    for name, module in (("parts alone", parts()), ("with more in it", held())):
        slots = slots_of(module)
        contents = Contents(module, [slot.tensor for slot in slots])
        guard = Guard(contents)
        assert not guard.changed()
        variables = [slot.tensor.detach().clone() for slot in slots]
        rows[name] = {
            "parts": len(contents.parts),
            "guard": best(guard.changed, 1000),
            "copy": best(lambda m=module, s=slots, v=variables, c=contents: replicate(m, s, v, c), 1),
        }
    table = [[name, *(round(value, 1) for value in row.values())] for name, row in rows.items()]
    print_table("A module that is followed", ["module", "parts", "guard, us", "copy made anew, us"], table)
    finish("torch_following", rows, libraries=("torch",), save=arguments.save)


if __name__ == "__main__":
    main()
