"""What captured steps do when the replicas are made anew: graphs are dropped, and what was captured of other rows."""

from __future__ import annotations

from typing import Any

from fastdp.shard import Deal


class Dealing:
    """Gives captured steps the way in which rows are dealt. The attributes are those of `Captures`."""

    _shapes: dict[Any, Any]
    _deal: Deal
    _decisions: Any
    generation: int

    def close(self, why: str = "compiling was ended") -> None:
        """Stop compiling."""
        raise NotImplementedError

    def forget_graphs(self) -> None:
        """Drop recorded graphs and free their memory. Called between steps."""
        for shape in self._shapes.values():
            if shape.captured is not None:
                shape.captured.recordings = {}

    def deal_by(self, deal: Deal) -> None:
        """Replicas were made anew, and rows are dealt in this way. What was captured of other rows is dropped."""
        self.forget_graphs()
        if deal == self._deal:
            return
        self._deal, self._decisions = deal, None  # which are kept for the number of replicas
        self.close("")  # what compiles is of other rows; those of now are compiled anew
        self._shapes.clear()
        self.generation += 1
