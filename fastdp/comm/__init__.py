"""Scatters batches, merges outputs and reduces gradients between the replicas of one process."""
