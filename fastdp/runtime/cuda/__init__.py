"""GPUs, through CuPy: only what uses GPUs imports these modules."""
