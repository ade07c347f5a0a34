"""Captured steps compiled by TorchInductor, in a process of its own."""
