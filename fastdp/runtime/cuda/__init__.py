"""The runtime for GPUs, through CuPy. These modules are imported only when GPUs are used."""
