"""Keras 2's utilities, working with Keras 3."""
