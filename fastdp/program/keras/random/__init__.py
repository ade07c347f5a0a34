"""Random draws of Keras models by the row of the global batch."""
