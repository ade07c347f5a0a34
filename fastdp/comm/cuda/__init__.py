"""Collectives of GPUs: NCCL, or kernels over peer memory."""
