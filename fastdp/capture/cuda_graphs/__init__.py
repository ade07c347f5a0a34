"""Captured steps recorded as CUDA graphs."""
