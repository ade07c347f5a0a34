"""Buckets so small that a model of a few weights has several."""

from __future__ import annotations

import fastdp.buffers


def make_buckets_small(monkeypatch):
    """The first of 64 bytes, the others of 256 at most, for the time of a test."""
    plan = fastdp.buffers.plan_buckets
    monkeypatch.setattr(fastdp.buffers, "plan_buckets", lambda sizes, first, cap: plan(sizes, 64, 256))
