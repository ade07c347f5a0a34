"""Traces of what devices and threads do: spans on lanes, written as a file for Perfetto, and NVTX ranges."""
