"""The colors of parts of a whole: readable on white and on black, and told apart without red and green."""

COLORS = ("#5b8dd9", "#3fae7a", "#2fb3c4", "#9a9a9a", "#e08a2e", "#b070c8", "#d9647a", "#a08a4a")


def color(index: int) -> str:
    """The color of a part, as `#rrggbb`. After the last one they repeat."""
    return COLORS[index % len(COLORS)]
