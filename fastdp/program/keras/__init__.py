"""keras.Model as replicas."""
