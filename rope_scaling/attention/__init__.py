"""Attention from spans: the dense law, and the fast paths that agree with it."""
