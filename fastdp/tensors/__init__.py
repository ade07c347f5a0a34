"""Torch code that Keras and torch programs share: storage, gradient buckets, random draws, threads."""
