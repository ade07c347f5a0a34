"""Collectives between the replicas of one process, and the rendezvous of their host threads."""
