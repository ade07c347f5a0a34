"""Measures a run while it goes on: throughput, waiting for input, memory and utilization of each device."""
