"""Devices, their streams, events and queues; which devices `gpus=` means; what the box has."""
