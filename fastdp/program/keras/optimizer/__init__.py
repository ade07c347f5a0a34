"""Keras optimizers on flat buffers, or variable by variable."""
