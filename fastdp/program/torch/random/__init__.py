"""Random draws of torch modules on replicas."""
