"""The Keras facade: `multi_gpu_model`, parallel models, `install`, and Keras 2's utilities."""
