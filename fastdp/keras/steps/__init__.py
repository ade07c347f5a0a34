"""What Keras's loops call for each batch."""
