"""Exact checkpoints: what a run needs to go on bit for bit, written in the background, whole or not there."""
