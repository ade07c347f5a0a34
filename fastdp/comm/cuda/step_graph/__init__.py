"""A captured step and its all-reduces as one CUDA graph per GPU."""
