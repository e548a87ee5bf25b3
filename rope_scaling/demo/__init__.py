"""The embedded model's files, its corpus, and its retrieval examples: plain data and text."""
