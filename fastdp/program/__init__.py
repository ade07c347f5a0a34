"""What a replica runs: NumPy functions, a torch.nn.Module or a Keras model, behind one protocol (`base`)."""
