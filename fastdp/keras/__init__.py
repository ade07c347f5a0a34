"""The Keras-compatible facade: parallel models and the utilities of `keras.utils`."""
