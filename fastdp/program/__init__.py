"""What a replica runs: a NumPy or CuPy function, a torch.nn.Module or a Keras model, as a `Program`."""
