"""Torch that Keras and torch programs share: arrays, gradient buckets, draws, threads, copies."""
