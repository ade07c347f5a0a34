"""Compiles captured steps by TorchInductor, in a process of its own."""
