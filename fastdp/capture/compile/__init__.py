"""Compiles captured steps with TorchInductor in a separate process."""
