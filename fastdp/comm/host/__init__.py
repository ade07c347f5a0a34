"""Collectives of virtual devices: sums in rank order, by whichever thread is free."""
