"""What fit, evaluate and predict read their batches from, and how."""
