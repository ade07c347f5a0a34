"""How losses, variables and outputs of a model depend on the rows of a batch."""
