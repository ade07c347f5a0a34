"""Keras models as replicas."""
