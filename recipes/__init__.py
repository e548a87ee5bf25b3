"""Training recipes: scripts built on the library, and the YAML files that drive them."""
