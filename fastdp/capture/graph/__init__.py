"""Passes over the graph of a captured step."""
