"""Collaborations in which parameters cross: weights, deltas or adapters."""
