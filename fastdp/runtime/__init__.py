"""Devices: streams, events and queues, which devices `gpus=` means, and what the box has."""
