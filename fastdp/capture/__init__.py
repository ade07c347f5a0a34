"""Captured training steps: traced once per batch shape, replayed, compiled, recorded as CUDA graphs."""
