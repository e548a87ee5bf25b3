"""Attention from spans: the dense reference implementation, and the fast engines tested against it."""
