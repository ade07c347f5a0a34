"""HDF5 files of Keras 2 and of old parallel models."""
