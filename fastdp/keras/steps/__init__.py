"""The train, test and predict steps that Keras's loops call for each batch."""
