"""Collectives of virtual devices: sums in rank order, by threads that are free."""
