"""A replica's part of the loss of the global batch."""
