"""Where `fit`, `evaluate` and `predict` get their batches from."""
