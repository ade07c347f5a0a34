"""The parts of `fastdp.callbacks`: what is watched, where it is written, and the callbacks."""
