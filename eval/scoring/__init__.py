"""Scores of a model on a text: losses at every position, answers to questions, and what they were measured with."""
