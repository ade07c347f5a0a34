"""What one device's step takes by its rows: measured, or fitted as a fixed part and a part per row."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np


class Compute:
    """Seconds of a step of one device by its rows.

    Between two measured numbers of rows the time is interpolated. Beyond them it follows a line that is fitted by
    least squares: a fixed part, which each step has, and a part per row. From one measurement alone the time is taken
    to be proportional to the rows, which is too good for few rows: launches and small matrices do not shrink.

    Args:
        points: measured seconds of a step by rows; one or more.

    Attributes:
        fixed: seconds of the part that does not depend on the rows.
        per_row: seconds for each row.
        basis: a sentence about where the figures come from.

    Raises:
        ValueError: no measurement, or one that is not above zero.

    Example:
        >>> compute = Compute({64: 0.050, 32: 0.028})
        >>> round(compute.fixed, 4), round(compute.seconds(16), 4)
        (0.006, 0.017)
    """

    def __init__(self, points: Mapping[int, float]) -> None:
        if not points or min(points) < 1 or not min(points.values()) > 0:
            raise ValueError(f"`points` must be seconds above 0 by rows of 1 or more. Received: {dict(points)}")
        self.points = dict(sorted(points.items()))
        rows, seconds = np.array(list(self.points)), np.array(list(self.points.values()))
        self.fixed, self.per_row = 0.0, float(rows @ seconds / (rows @ rows))
        if len(rows) > 1:
            slope, start = np.polyfit(rows, seconds, 1)
            if start >= 0 and slope >= 0:
                self.fixed, self.per_row = float(start), float(slope)
            elif slope < 0:  # more rows took no longer: all of it is fixed
                self.fixed, self.per_row = float(seconds.mean()), 0.0
        known = " and ".join(str(one) for one in self.points)
        self.basis = (
            f"steps on {known} rows of one device: {1e3 * self.fixed:.3g} ms and {1e6 * self.per_row:.3g} us per row"
            if len(rows) > 1
            else f"one measured step, on {known} rows: fewer rows are assumed to take proportionally less"
        )

    def seconds(self, rows: int) -> float:
        """Seconds of a step on `rows` rows."""
        known = list(self.points)
        if rows < known[0]:
            return min(self.fixed + self.per_row * rows, self.points[known[0]])
        if rows > known[-1]:
            return self.points[known[-1]] + self.per_row * (rows - known[-1])
        return float(np.interp(rows, known, list(self.points.values())))
