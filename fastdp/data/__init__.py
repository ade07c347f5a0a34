"""Data that does not fit in memory, or should not be copied there."""
