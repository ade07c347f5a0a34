"""torch.nn.Module as replicas."""
