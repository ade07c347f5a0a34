"""Exact checkpoints of Keras's `fit`: the model's file from a snapshot, the place in the epoch, callbacks' states."""
