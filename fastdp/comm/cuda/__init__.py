"""Collectives of GPUs: NCCL, or our kernels over peer memory."""
