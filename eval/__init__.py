"""Honest evaluation: how far a model reads, measured at every position, with intervals and baselines."""
