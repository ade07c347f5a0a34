"""How a torch module's inputs, outputs and buffers depend on the rows of a batch."""
