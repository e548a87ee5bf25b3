"""The `rope-scaling` command."""
