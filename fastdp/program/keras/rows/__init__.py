"""How losses, variables and outputs of a Keras model depend on the rows of a batch."""
