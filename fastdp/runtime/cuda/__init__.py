"""The device layer of NVIDIA GPUs. Its modules need CuPy, so only what uses GPUs imports them."""
