"""Torch modules as replicas."""
