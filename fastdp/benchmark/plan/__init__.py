"""Models steps on 1 to 8 GPUs of a named box from what one device takes: the arithmetic of `fastdp plan`."""
